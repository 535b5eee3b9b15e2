"""Parts as COCO instances: one JSON file for all photos, at the photos' own sizes.

Every part of a photo is one annotation, however many pieces it has. Its mask is that of the label map, either as run
lengths of pycocotools, which are exact, or as outlines. `area` and `bbox` are those of the mask, and `score` is the
mean share of the part in its pixels. Parts that have no pixel are left out. There is one category for each part or,
where classes have parts of their own, for each class and part. A photo that Exif turns has the size at which it is
shown.

Source: https://cocodataset.org/#format-data
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from slotscops import __version__
from slotscops.core.files import replace_when_complete
from slotscops.core.pixels import Box
from slotscops.segment.formats import About
from slotscops.segment.names import SHARED
from slotscops.segment.outlines import outline_part
from slotscops.segment.segmenter import FoundParts


@contextmanager
def open_coco(path: Path, about: About, polygons: bool = False) -> Iterator["CocoFile"]:
    """Writes the file photo by photo and gives it its name when the body ends without an error.

    Args:
        path: of the file. One that is there already is removed at once, because its masks are of an earlier run.
        about: model, command, names of the parts and of the photos.
        polygons: write outlines instead of run lengths; see `outlines.outline_part`.
    """
    path.unlink(missing_ok=True)
    with replace_when_complete(path) as file:
        coco = CocoFile(file, about, polygons)
        coco.begin()
        yield coco
        coco.finish()


@dataclass
class CocoFile:
    """A COCO file to which photos are added. Only the list of photos stays in memory."""

    file: BinaryIO
    about: About
    polygons: bool
    _images: list[dict[str, Any]] = field(default_factory=list)
    _num_annotations: int = 0

    def begin(self) -> None:
        """Writes what is known before the first photo."""
        info = {
            "description": f"Parts found by {self.about.model}",
            "version": __version__,
            "contributor": "slotscops",
            "model": self.about.model,
            "command": self.about.made_by,
        }
        self._write('{"info": ', info)
        self._write(',\n"licenses": ', [])
        self._write(',\n"categories": ', categories(self.about))
        self.file.write(b',\n"annotations": [')

    def describe(self, photo: Path, name: str, parts: FoundParts) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The photo's entry and those of its parts, without their ids."""
        height, width = parts.labels.shape
        image = {"file_name": self.about.file_name(photo), "width": width, "height": height}
        return image, [self._annotation(parts, int(row)) for row in np.flatnonzero(parts.present) if row]

    def add(self, described: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
        """Numbers the entries of a photo and writes those of its parts."""
        image, annotations = described
        image_id = len(self._images) + 1
        self._images.append({"id": image_id} | image)
        for annotation in annotations:
            self._num_annotations += 1
            separator = ",\n" if self._num_annotations > 1 else "\n"
            self._write(separator, {"id": self._num_annotations, "image_id": image_id} | annotation)

    def finish(self) -> None:
        """Writes the list of photos and ends the file."""
        self._write('\n],\n"images": ', self._images)
        self.file.write(b"}\n")

    def _annotation(self, parts: FoundParts, row: int) -> dict[str, Any]:
        left, top, right, bottom = (int(edge) for edge in parts.boxes[row])
        number = int(parts.numbers[row])
        class_number = list(self.about.part_names).index(parts.class_name or SHARED)
        return {
            "category_id": class_number * int(parts.numbers[-1]) + number,
            "segmentation": self._segmentation(parts.labels, number, (left, top, right, bottom)),
            "area": int(parts.areas[row]),
            "bbox": [left, top, right - left, bottom - top],
            "iscrowd": 0,
            "score": round(float(parts.scores[row]), 6),
        }

    def _segmentation(self, labels: NDArray[np.uint8], slot: int, box: Box) -> Any:
        if self.polygons:
            return [corners.round(2).flatten().tolist() for corners in outline_part(labels, slot, box)]
        from pycocotools import mask  # optional, see `formats.read_formats`

        runs = mask.encode(np.asfortranarray(labels == slot, dtype=np.uint8))
        return {"size": [int(side) for side in runs["size"]], "counts": runs["counts"].decode("ascii")}

    def _write(self, before: str, content: Any) -> None:
        # ASCII only: a file name that is not UTF-8 has no other place in JSON.
        self.file.write(f"{before}{json.dumps(content)}".encode())


def categories(about: About) -> list[dict[str, Any]]:
    """COCO's categories. Ids are the numbers of the parts, and count on from class to class.

    The supercategory of a part is its class, if it has one.

    If the user gave two parts the same name, the second gets a number behind it, because readers tell categories by
    their names.
    """
    found: list[dict[str, Any]] = []
    taken: set[str] = set()
    for class_number, class_name in enumerate(about.part_names):
        for part_number, wanted in zip(about.numbers, about.labels_of(class_name), strict=True):
            name, number = wanted, 1
            while name in taken:
                number += 1
                name = f"{wanted} {number}"
            taken.add(name)
            category_id = class_number * about.numbers[-1] + part_number
            found.append({"id": category_id, "name": name, "supercategory": class_name or "part"})
    return found
