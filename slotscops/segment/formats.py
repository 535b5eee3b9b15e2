"""The files in which results go to other programs, beside the label maps, the pictures and the page.

| `--format` | file in DIR | content |
|---|---|---|
| `coco` | `coco.json` | COCO instances with masks as run lengths |
| `coco-polygons` | `coco_polygons.json` | the same with outlines, for programs that take no run lengths |
| `labelme` | `labelme/NAME.json` | one file a photo with outlines |

`--features` writes `part_features.safetensors`; see `part_features`.
"""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from slotscops.core.errors import UserError, suggest
from slotscops.segment.names import SHARED
from slotscops.segment.segmenter import FoundParts

_PACKAGES = {  # by format
    "coco": ("pycocotools",),
    "coco-polygons": ("contourpy", "shapely"),
    "labelme": ("contourpy", "shapely"),
}
FORMATS = tuple(_PACKAGES)


@dataclass(frozen=True)
class About:
    """What the files say about the whole run of the command."""

    model: str  # name of the model
    made_by: str  # the command
    part_names: dict[str, list[str]]  # names of the parts by class, or under `SHARED`
    folder: Path  # names of photos in the files are relative to this folder
    part_numbers: Sequence[int] | None = None  # of these parts; None: 1 to K

    @property
    def numbers(self) -> Sequence[int]:
        """Number of each part, which is its label."""
        if self.part_numbers is not None:
            return self.part_numbers
        return range(1, 1 + len(next(iter(self.part_names.values()))))

    def file_name(self, photo: Path) -> str:
        """The photo's path inside `folder`, with slashes."""
        return Path(os.path.relpath(photo, self.folder)).as_posix()

    def labels_of(self, class_name: str) -> list[str]:
        """Names of the parts for a class or `SHARED`. A part of a class is called `CLASS PART`."""
        names = self.part_names[class_name]
        return names if class_name == SHARED else [f"{class_name} {part}" for part in names]


class ResultFile(Protocol):
    """Something that takes the parts of one photo after the other."""

    def describe(self, photo: Path, name: str, parts: FoundParts) -> Any:
        """Prepares what is kept of one photo. Called in a thread, for several photos at once.

        Args:
            photo: file of the photo.
            name: name of the photo among the results, without an ending.
        """

    def add(self, described: Any) -> None:
        """Adds what `describe` returned. Called for one photo after the other, in their order."""


def read_formats(options: Sequence[str]) -> list[str]:
    """The formats of all `--format` options, in each of which names are separated by commas. Each is given once.

    Raises:
        UserError: if one is unknown, or a package that it needs is not installed.
    """
    formats = list(dict.fromkeys(name.strip() for text in options for name in text.split(",")))
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"--format: '{name}' is none of {', '.join(FORMATS)}{suggest(name, FORMATS)}")
        for package in _PACKAGES[name]:
            if importlib.util.find_spec(package) is None:
                raise UserError(f"--format {name} needs {package}; install it with pip install 'slotscops[coco]'")
    return formats


def common_folder(photos: Sequence[Path]) -> Path:
    """The deepest folder that holds all the photos."""
    return Path(os.path.commonpath([os.path.dirname(os.path.abspath(photo)) for photo in photos]))  # noqa: PTH100, PTH120


@contextmanager
def open_formats(formats: Sequence[str], features: bool, out: Path, about: About) -> Iterator[list[ResultFile]]:
    """Opens the files of the formats. They get their names when the body ends without an error.

    Args:
        formats: of `FORMATS`, each once.
        features: also write the features, boxes and centres of all parts.
        out: folder of the results, which exists.
    """
    from slotscops.segment.coco import open_coco
    from slotscops.segment.labelme import open_labelme
    from slotscops.segment.part_features import open_part_features

    with ExitStack() as stack:
        files: list[ResultFile] = []
        if "coco" in formats:
            files.append(stack.enter_context(open_coco(out / "coco.json", about)))
        if "coco-polygons" in formats:
            files.append(stack.enter_context(open_coco(out / "coco_polygons.json", about, polygons=True)))
        if "labelme" in formats:
            files.append(stack.enter_context(open_labelme(out / "labelme", about)))
        if features:
            files.append(stack.enter_context(open_part_features(out / "part_features.safetensors", about)))
        yield files
