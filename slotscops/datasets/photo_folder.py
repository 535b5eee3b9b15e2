"""A folder of photos, with or without label maps of their parts, as a source of objects: one object a photo.

Without label maps the whole photo is the object, padded to a square as `segment` pads it, so that nothing is cut off.
With them the object is what has a label, cropped as PASCAL-Part's objects are. H x W are a photo's pixels as it is
shown, turned by its Exif entry: label maps have that size.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from slotscops.core.errors import UserError, first_line
from slotscops.core.photos import read_photo
from slotscops.core.pixels import Box, box_of, crop_labels, crop_photo, square_crop, whole_square
from slotscops.core.records import Record
from slotscops.datasets.pascal_part.annotation import Candidate, ImageScan, LeftOut
from slotscops.datasets.pascal_part.tree import SPLITS

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
_NAMES = "parts.txt"  # one part name a line, in the order of the labels


@dataclass(frozen=True)
class _ByHash:
    """Splits by the names alone, so that adding photos moves none."""

    val_share: float
    class_name: str
    has_folders: bool

    def of_image(self, image: str) -> dict[str, str]:
        if self.has_folders:
            return {self.class_name: image.split("/")[0]}
        number = int.from_bytes(hashlib.sha256(_key_of(image).encode()).digest()[:8], "big")
        return {self.class_name: "val" if number < self.val_share * 2**64 else "train"}


@dataclass(frozen=True)
class PhotoFolder:
    """All photos below `root`; where it holds both `train/` and `val/`, only these, and they are the splits."""

    root: Path
    parts: Path | None  # folder of label PNGs of the photos' names, 0 = none
    val_share: float
    class_name: str

    @property
    def _has_split_folders(self) -> bool:
        return all((self.root / split).is_dir() for split in SPLITS)

    def list_images(self) -> list[str]:
        """Paths below `root`. Raises UserError for no folder, no photo, or two photos of one name."""
        for folder in (self.root, self.parts):
            if folder is not None and not folder.is_dir():
                raise UserError(f"{folder}: no such folder")
        photos = _find_photos(self.root, self._has_split_folders)
        if not photos:
            raise UserError(f"{self.root}: holds no photo ({', '.join(sorted(_SUFFIXES))})")
        return photos

    def splits(self, class_names: list[str]) -> _ByHash:
        return _ByHash(self.val_share, self.class_name, self._has_split_folders)

    def scan(
        self, image: str, split_of_class: dict[str, str], class_names: list[str], min_box_share: Mapping[str, float]
    ) -> ImageScan:
        split = split_of_class[self.class_name]
        try:
            photo, labels = self._read(image)
        except UserError as error:
            return ImageScan([], [self._left_out(image, split, "damaged file", str(error), damaged=True)])
        if labels is None and self.parts is not None:
            return ImageScan(
                [], [self._left_out(image, split, "no label map", f"no {Path(image).stem}.png in {self.parts}")]
            )
        width, height = photo.size
        box: Box = (0, 0, width, height)
        if labels is not None:
            if not labels.any():
                return ImageScan([], [self._left_out(image, split, "no parts annotated", "its label map is empty")])
            box = box_of(labels > 0)
        share = (box[2] - box[0]) * (box[3] - box[1]) / (width * height)
        if share <= min_box_share[split]:
            reason = f"its box covers {100 * share:.3g} % of the image"
            return ImageScan([], [self._left_out(image, split, "box too small", reason)])
        highest = 0 if labels is None else int(labels.max())
        return ImageScan([Candidate(image, 0, self.class_name, split, box, highest)], [])

    def read(self, image: str, candidates: list[Candidate], size: int) -> tuple[list[Record], list[LeftOut]]:
        try:
            photo, labels = self._read(image)
            return [self._record(candidate, photo, labels, size) for candidate in candidates], []
        except UserError as error:
            return [], [self._left_out(image, item.split, "damaged file", str(error), True) for item in candidates]

    def part_names(self, class_name: str, candidates: list[Candidate]) -> list[str]:
        """From `parts.txt` where there is one, else `part_1` and so on up to the highest label."""
        named = self._listed_names
        return named or self._names_up_to(max((item.highest_label for item in candidates), default=0))

    @cached_property
    def _listed_names(self) -> list[str]:
        path = self.parts / _NAMES if self.parts is not None else None
        if path is None or not path.is_file():
            return []
        try:
            names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read ({type(error).__name__})") from None
        if len(set(names)) != len(names) or len(names) > 255:
            raise UserError(f"{path}: needs at most 255 names, each once, one a line")
        return names

    def _names_up_to(self, highest: int) -> list[str]:
        return [f"part_{label}" for label in range(1, highest + 1)]

    def _left_out(self, image: str, split: str, kind: str, reason: str, damaged: bool = False) -> LeftOut:
        return LeftOut(image, 0, self.class_name, split, kind, reason, damaged)

    def _read(self, image: str) -> tuple[Image.Image, NDArray[np.uint8] | None]:
        """The photo in RGB and its (H, W) labels, None without a label map. Raises UserError."""
        photo = read_photo(self.root / image)
        path = self._label_path(image)
        if path is None:
            return photo, None
        labels = _read_labels(path)
        if labels.shape[::-1] != photo.size:
            came = f"labels of {labels.shape[1]} x {labels.shape[0]}, photo of {photo.width} x {photo.height} as shown"
            raise UserError(f"{path}: {came}, needed one size")
        if self._listed_names and labels.max() > len(self._listed_names):
            raise UserError(f"{path}: holds label {labels.max()}, but {_NAMES} names {len(self._listed_names)} parts")
        return photo, labels

    def _label_path(self, image: str) -> Path | None:
        """The label map in the photo's own sub-folder of `parts`, or in `parts` itself."""
        if self.parts is None:
            return None
        below = self.parts / image
        places = (below.with_name(f"{below.stem}.png"), self.parts / f"{below.stem}.png")
        return next((path for path in places if path.is_file()), None)

    def _record(self, candidate: Candidate, photo: Image.Image, labels: NDArray[np.uint8] | None, size: int) -> Record:
        if labels is None:
            crop = whole_square(photo.size)
            labels, mask = np.zeros(photo.size[::-1], np.uint8), np.ones(photo.size[::-1], np.uint8)
        else:
            crop, mask = square_crop(candidate.box), (labels > 0).astype(np.uint8)
        names = self._listed_names or self._names_up_to(int(labels.max()))
        parts = crop_labels(Image.fromarray(labels), crop, size)
        return Record(
            key=f"{_key_of(candidate.image)}_0",
            image=crop_photo(photo, crop, size),
            parts=parts,
            parts_small=parts,  # nothing overlaps in a label map
            object_mask=crop_labels(Image.fromarray(mask), crop, size) > 0,
            description={
                "image": candidate.image,
                "object": 0,
                "class": self.class_name,
                "box": list(candidate.box),
                "crop": list(crop),
                "source_size": list(photo.size),
                "part_names": [names[label - 1] for label in np.unique(labels).tolist() if label],
            },
        )


def _find_photos(root: Path, only_splits: bool) -> list[str]:
    found: dict[str, str] = {}
    for folder in [root / split for split in SPLITS] if only_splits else [root]:
        for path in sorted(folder.rglob("*")):
            image = path.relative_to(root).as_posix()
            hidden = any(part.startswith(".") for part in image.split("/"))
            if hidden or path.suffix.lower() not in _SUFFIXES or not path.is_file():
                continue
            if not image.isprintable():
                raise UserError(f"{str(path)!r}: its name cannot be a key; rename it")
            if found.setdefault(_key_of(image), image) != image:
                raise UserError(f"{root / found[_key_of(image)]} and {path}: two photos of one name; rename one")
    return sorted(found.values())


def _key_of(image: str) -> str:
    """The photo's name without dots, which would end a WebDataset key."""
    return Path(image).stem.replace(".", "_")


# ---- pixels ------------------------------------------------------------------------------------------------------


def _read_labels(path: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            if image.mode not in ("L", "P"):
                raise UserError(f"{path}: labels of mode {image.mode}, needed a grey or palette PNG of 8 bits")
            return np.array(image)
    except UserError:
        raise
    except Exception as error:  # as above
        raise UserError(f"{path}: label map is damaged ({first_line(error)[:120]})") from None
