"""A folder of photos, with or without label maps of their parts, as a source of objects: one object a photo.

Without label maps the whole photo is the object, padded to a square as `segment` pads it, so that nothing is cut off.
With them the object is what has a label, cropped as PASCAL-Part's objects are. The accepted label maps are described in
shards/README.md, "What is accepted". H x W are a photo's pixels as it is shown, turned by its Exif entry.
"""

import functools
import hashlib
import os
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from slotscops.core.errors import UserError, first_line
from slotscops.core.photos import PHOTO_SUFFIXES, orientation_of, read_image, shown_name, to_rgb, walk_folder
from slotscops.core.pixels import Box, box_of, crop_labels, crop_photo, square_crop, whole_square
from slotscops.core.records import IGNORED, Record
from slotscops.datasets.sources import SPLITS, Candidate, ImageScan, LeftOut

_NAMES = "parts.txt"  # one part name a line, in the order of the labels
# First lines of parts.txt that name label 0, as labelme and others write them.
_NAMES_OF_ZERO = {"background", "_background_", "__background__", "__ignore__", "bg", "none", "void", "unlabeled"}
_MOST_LABELS = 48  # in one map; an antialiased mask or a photo has more
_WHOLE_FOLDER = "."  # stands in the list of images for all that the search for photos passed over
_SPLIT_OF_FOLDER = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
_BIT_DEPTH, _COLOUR_TYPE = 24, 25  # bytes of a PNG's header
_GREY, _PALETTE = 0, 3
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by Exif's orientation, as Pillow's exif_transpose


class _Labels(NamedTuple):
    part_labels: NDArray[np.uint8]  # (H, W) part label, 0 = no part, or IGNORED
    object_mask: NDArray[np.bool_]  # (H, W) without what is to be ignored

    def of_parts(self) -> list[int]:
        """The labels of parts that occur, sorted."""
        return [label for label in np.unique(self.part_labels).tolist() if label not in (0, IGNORED)]


@dataclass(frozen=True)
class _PhotoFolderSplits:
    """Splits by folder if there are split folders, else by names alone, so that added photos move no others."""

    val_share: float
    class_name: str
    split_of_folder: Mapping[str, str]

    def of_image(self, image: str) -> dict[str, str]:
        if self.split_of_folder:
            return {self.class_name: self.split_of_folder.get(image.split("/")[0], "train")}
        number = int.from_bytes(hashlib.sha256(_key_of(image).encode()).digest()[:8], "big")
        return {self.class_name: "val" if number < self.val_share * 2**64 else "train"}


@dataclass(frozen=True)
class PhotoFolder:
    """All photos below `root`. Where it holds folders of both splits, such as `train/` and `val/`, only theirs."""

    root: Path
    label_folder: Path | None  # folder of label PNGs of the photos' names, 0 = none
    val_share: float
    class_name: str

    def list_images(self) -> list[str]:
        """Paths of photos below `root`, then the folder itself, for all that was passed over.

        Raises:
            UserError: no folder, no photo, or two photos of one name.
        """
        for folder in (self.root, self.label_folder):
            if folder is not None and not folder.is_dir():
                raise UserError(f"{folder}: no such folder")
        images, passed_over = self._walk()
        if not images:
            why = f"; passed over {len(passed_over)}, such as {passed_over[0].reason}" if passed_over else ""
            raise UserError(f"{self.root}: holds no photo ({', '.join(sorted(PHOTO_SUFFIXES))}){why}")
        by_key: dict[str, str] = {}
        for image in images:
            other = by_key.setdefault(_key_of(image), image)
            if other != image:
                came = f"{self.root / other} and {self.root / image}"
                raise UserError(f"{shown_name(came)}: two photos of one name; rename one")
        return [*images, _WHOLE_FOLDER]

    def splits(self, class_names: list[str]) -> _PhotoFolderSplits:
        return _PhotoFolderSplits(self.val_share, self.class_name, self._split_folders())

    def _split_folders(self) -> dict[str, str]:
        """Folder name -> split, such as Train -> train; empty unless there are folders of both splits."""
        names = [path.name for path in self.root.iterdir() if path.name.lower() in _SPLIT_OF_FOLDER and path.is_dir()]
        found = {name: _SPLIT_OF_FOLDER[name.lower()] for name in sorted(names)}
        return found if set(found.values()) == set(SPLITS) else {}

    def _walk(self) -> tuple[list[str], list[LeftOut]]:
        """Paths of photos below `root`, and what was passed over."""
        folder = self.label_folder
        labels = folder.resolve() if folder is not None and not folder.samefile(self.root) else None
        photos, passed_over = walk_folder(self.root, lambda path: labels is not None and path.resolve() == labels)
        split_folders = self._split_folders()
        images, left_out = [], []
        for path in photos:
            image = path.relative_to(self.root).as_posix()
            if split_folders and image.split("/")[0] not in split_folders:
                folders = ", ".join(split_folders)
                left_out.append(_passed_over(image, "in no split folder", f"lies in none of {folders}", damaged=False))
            elif image.encode(errors="replace") != os.fsencode(image):
                reason = "its name is not UTF-8; rename it"
                left_out.append(_passed_over(image, "name that is not UTF-8", reason, damaged=True))
            else:
                images.append(image)
        for item in passed_over:
            name = item.path.relative_to(self.root).as_posix()
            is_outside = bool(split_folders) and name.split("/")[0] not in split_folders
            left_out.append(_passed_over(name, item.kind, item.reason, item.is_fault and not is_outside))
        return images, left_out

    def scan(
        self, image: str, split_of_class: dict[str, str], class_names: list[str], min_box_share: Mapping[str, float]
    ) -> ImageScan:
        if image == _WHOLE_FOLDER:
            return ImageScan([], self._walk()[1])
        split = split_of_class[self.class_name]
        try:
            photo, labels = self._read(image)
        except UserError as error:
            return ImageScan([], [self._left_out(image, split, "damaged file", str(error), damaged=True)])
        if labels is None and self.label_folder is not None:
            return ImageScan(
                [],
                [
                    self._left_out(
                        image, split, "no label map", f"no {shown_name(Path(image).stem)}.png in {self.label_folder}"
                    )
                ],
            )
        width, height = photo.size
        box: Box = (0, 0, width, height)
        if labels is not None:
            if not labels.object_mask.any():
                return ImageScan([], [self._left_out(image, split, "no parts annotated", "its label map is empty")])
            box = box_of(labels.object_mask)
        share = (box[2] - box[0]) * (box[3] - box[1]) / (width * height)
        if share <= min_box_share[split]:
            reason = f"its box covers {100 * share:.3g} % of the image"
            return ImageScan([], [self._left_out(image, split, "box too small", reason)])
        highest = 0 if labels is None else max(labels.of_parts(), default=0)
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
        path = self.label_folder / _NAMES if self.label_folder is not None else None
        if path is None or not path.is_file():
            return []
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read ({type(error).__name__})") from None
        names = [" ".join(line.split()) for line in lines if line.strip()]  # no-break spaces become plain ones
        if names and names[0].lower() in _NAMES_OF_ZERO:
            names = names[1:]
        unprintable = [name for name in names if not name.isprintable()]
        if unprintable:
            raise UserError(f"{path}: {unprintable[0]!r} cannot be shown; write names in printable characters")
        if len(set(names)) != len(names) or len(names) >= IGNORED:
            raise UserError(f"{path}: needs fewer than {IGNORED} names, each once, one a line")
        return names

    def _names_up_to(self, highest: int) -> list[str]:
        return [f"part_{label}" for label in range(1, highest + 1)]

    def _left_out(self, image: str, split: str, kind: str, reason: str, damaged: bool = False) -> LeftOut:
        return LeftOut(shown_name(image), 0, self.class_name, split, kind, reason, damaged)

    def _read(self, image: str) -> tuple[Image.Image, _Labels | None]:
        """The photo in RGB and its labels, None without a label map. Raises UserError."""
        upright, orientation = read_image(self.root / image)
        photo = to_rgb(upright)
        path = self._label_path(image)
        if path is None:
            return photo, None
        labels = _read_labels(path, photo.size, orientation)
        if labels.shape[::-1] != photo.size:
            came = f"labels of {labels.shape[1]} x {labels.shape[0]}, photo of {photo.width} x {photo.height} as shown"
            raise UserError(f"{path}: {came}, needed one size")
        return photo, _check_labels(path, labels, self._listed_names)

    def _label_path(self, image: str) -> Path | None:
        """The label map in the photo's own sub-folder of `label_folder`, or in `label_folder` itself."""
        if self.label_folder is None:
            return None
        name = f"{Path(image).stem}.png"
        folders = (self.label_folder / Path(image).parent, self.label_folder)
        return next((found for folder in folders if (found := _find_file(folder, name))), None)

    def _record(self, candidate: Candidate, photo: Image.Image, labels: _Labels | None, size: int) -> Record:
        if labels is None:
            crop = whole_square(photo.size)
            labels = _Labels(np.zeros(photo.size[::-1], np.uint8), np.ones(photo.size[::-1], np.bool_))
        else:
            crop = square_crop(candidate.box)
        seen = labels.of_parts()
        names = self._listed_names or self._names_up_to(max(seen, default=0))
        part_labels = crop_labels(Image.fromarray(labels.part_labels), crop, size)
        mask = Image.fromarray(labels.object_mask.astype(np.uint8))
        return Record(
            key=f"{_key_of(candidate.image)}_0",
            image=crop_photo(photo, crop, size),
            part_labels=part_labels,
            part_labels_small=part_labels,  # nothing overlaps in a label map
            object_mask=crop_labels(mask, crop, size) > 0,
            description={
                "image": candidate.image,
                "object": 0,
                "class": self.class_name,
                "box": list(candidate.box),
                "crop": list(crop),
                "source_size": list(photo.size),
                "part_names": [names[label - 1] for label in seen],
            },
        )


def _passed_over(name: str, kind: str, reason: str, damaged: bool) -> LeftOut:
    return LeftOut(shown_name(name), None, None, None, kind, reason, damaged)


def _key_of(image: str) -> str:
    """The photo's name as a key of the shards, the same on every file system.

    Composed (Unicode's NFC), without dots, which would end a WebDataset key, and with unprintable characters as
    %NN of their UTF-8 bytes. The description of each sample holds the name itself.
    """
    name = unicodedata.normalize("NFC", Path(image).stem).replace(".", "_")
    return "".join(c if c.isprintable() else quote(c, safe="", errors="surrogateescape") for c in name)


def _find_file(folder: Path, name: str) -> Path | None:
    """The file of that name, however its ending is written and its accents are composed."""
    path = folder / name
    try:
        if path.is_file():
            return path
        return _files_by_name(folder, folder.stat().st_mtime_ns).get(_comparable(name))
    except OSError:  # no such folder, or a name too long for the file system
        return None


@functools.lru_cache(maxsize=64)
def _files_by_name(folder: Path, changed_ns: int) -> dict[str, Path]:
    """Each file by its comparable name; read anew when the folder has changed."""
    return {_comparable(path.name): path for path in sorted(folder.iterdir()) if path.is_file()}


def _comparable(name: str) -> str:
    stem, dot, suffix = unicodedata.normalize("NFC", name).rpartition(".")
    return f"{stem}{dot}{suffix.lower()}"


# ---- label maps --------------------------------------------------------------------------------------------------


def _read_labels(path: Path, shown_size: tuple[int, int], orientation: int) -> NDArray[np.uint8]:
    """(H, W) of the values in the file at their own bit depth, turned as the photo is shown.

    Args:
        shown_size: width and height of the photo as it is shown.
        orientation: Exif's, by which the photo was turned.

    Raises:
        UserError: it is damaged, no PNG, or has colours or 16 bits.
    """
    try:
        with path.open("rb") as file:
            header = file.read(33)
        with Image.open(path) as image:
            if image.format != "PNG":
                raise UserError(f"{path}: is a {image.format} by its content, needed a PNG, which keeps labels exactly")
            depth, colour_type = header[_BIT_DEPTH], header[_COLOUR_TYPE]
            if colour_type not in (_GREY, _PALETTE) or depth > 8:
                came = f"a PNG of mode {image.mode}"
                raise UserError(f"{path}: {came}, needed a grey or palette PNG of at most 8 bits")
            own_orientation = orientation_of(image)
            labels = np.array(image).astype(np.uint8)
        if colour_type == _GREY and depth in (2, 4):
            labels //= 255 // (2**depth - 1)  # Pillow spreads greys of few bits over 0 to 255
    except UserError:
        raise
    except Exception as error:  # Pillow raises anything on damaged files
        raise UserError(f"{path}: label map is damaged ({first_line(error)[:120]})") from None
    return _turn(labels, shown_size, orientation, own_orientation)


def _turn(
    labels: NDArray[np.uint8], shown_size: tuple[int, int], orientation: int, own_orientation: int | None
) -> NDArray[np.uint8]:
    """Turns labels by their own Exif entry, or else by the photo's unless only the unturned map has the shown size."""
    turn = _TURNS.get(own_orientation or orientation)
    if turn is None:
        return labels
    turned = np.asarray(Image.fromarray(labels).transpose(turn))
    is_upright_already = labels.shape[::-1] == shown_size != turned.shape[::-1]
    return labels if own_orientation is None and is_upright_already else turned


def _check_labels(path: Path, labels: NDArray[np.uint8], names: list[str]) -> _Labels:
    """Sorts out 255, and refuses values that are no part labels.

    255 beside other labels is a rim to be ignored: it stays in the part labels, and it is not on the object. Alone it
    is the object's mask.

    Raises:
        UserError: more labels than one photo has parts, a label without a name, or, where parts have no names, gaps.
    """
    values = [value for value in np.unique(labels).tolist() if value]
    small = [value for value in values if value != IGNORED]
    if values == [IGNORED]:
        return _Labels(np.zeros_like(labels), labels == IGNORED)
    seen = ", ".join(map(str, values[:8])) + (f" and {len(values) - 8} more" if len(values) > 8 else "")
    if len(small) > _MOST_LABELS:
        need = f"at most {_MOST_LABELS} can be parts; is it an antialiased mask or a photo?"
        raise UserError(f"{path}: holds {len(values)} labels ({seen}), {need}")
    if small and names and small[-1] > len(names):
        raise UserError(f"{path}: holds label {small[-1]} (seen: {seen}), but {_NAMES} names {len(names)} parts")
    if not names and small != list(range(1, len(small) + 1)):
        need = f"needed 1, 2, 3 and so on without gaps; where a part may be hidden, name all parts in {_NAMES}"
        raise UserError(f"{path}: holds labels {seen}, {need}")
    return _Labels(labels, (labels > 0) & (labels != IGNORED))
