"""A folder of photos, with or without label maps of their parts, as a source of objects: one object a photo.

Without label maps the whole photo is the object, padded to a square as `segment` pads it, so that nothing is cut off.
With them the object is what has a label, cropped as PASCAL-Part's objects are. The accepted label maps are described in
shards/README.md, "What is accepted". H x W are a photo's pixels as it is shown, turned by its Exif entry.
"""

import functools
import hashlib
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image

from slotscops.core.errors import UserError
from slotscops.core.photos import NO_PHOTO, PHOTO_SUFFIXES, read_image, real_path, shown_name, to_rgb, walk_folder
from slotscops.core.pixels import Box, Context, box_of, crop_labels, crop_photo, square_crop, whole_square
from slotscops.core.records import Record
from slotscops.datasets.label_maps import NAMES_FILE, LabelMap, LabelMapError, read_label_map, read_part_names
from slotscops.datasets.sources import SPLITS, WHOLE_FOLDER, Candidate, ImageScan, LeftOut, WholePhoto, count_kinds

_SPLIT_OF_FOLDER = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
_TEST_FOLDERS = {"test", "testing"}  # they are the val split if there is a train folder and no val folder


@dataclass(frozen=True)
class _PhotoFolderSplits:
    """Splits by folder if there are split folders, otherwise by a hash of each photo's name.

    The hash depends on no other photo, so photos that are added later change no other photo's split.
    """

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
    """All photos below `root`, or those in its split folders if it holds both, such as `train/` and `val/`."""

    root: Path
    label_folder: Path | None  # folder of label PNGs of the photos' names, 0 = none
    val_share: float
    class_name: str

    def list_images(self) -> list[str]:
        """Paths of photos below `root`, then `WHOLE_FOLDER`, which stands for all that was passed over.

        Raises:
            UserError: there is no such folder, no photo, or a `parts.txt` that cannot be used.
        """
        _keys_of_twins.cache_clear()
        for folder in (self.root, self.label_folder):
            if folder is not None and not folder.is_dir():
                raise UserError(f"{folder}: no such folder")
        if self.label_folder is not None and self.label_folder.samefile(self.root):
            raise UserError(f"{self.label_folder}: holds the photos; put the label maps into a folder of their own")
        _ = self._part_names_of_file  # a fault in it is found before any photo is read
        images, passed_over = self.walk()
        if not images:
            why = ""
            if passed_over:
                why = (
                    f"; passed over {count_kinds(passed_over)}, such as {passed_over[0].image}: {passed_over[0].reason}"
                )
            raise UserError(f"{self.root}: holds no photo ({', '.join(sorted(PHOTO_SUFFIXES))}){why}")
        return [*images, WHOLE_FOLDER]

    def splits(self, class_names: list[str]) -> _PhotoFolderSplits:
        return _PhotoFolderSplits(self.val_share, self.class_name, self._split_folders())

    def _split_folders(self) -> dict[str, str]:
        """Folder name -> split, such as Train -> train; empty unless there are folders of both splits."""
        folders = sorted(path.name for path in self.root.iterdir() if os.path.isdir(path))  # noqa: PTH112, never raises
        found = {name: _SPLIT_OF_FOLDER[name.lower()] for name in folders if name.lower() in _SPLIT_OF_FOLDER}
        if "val" not in found.values():
            found |= {name: "val" for name in folders if name.lower() in _TEST_FOLDERS}
        return found if set(found.values()) == set(SPLITS) else {}

    def walk(self) -> tuple[list[str], list[LeftOut]]:
        """Paths of photos below `root`, and what was passed over."""
        labels = self.label_folder and real_path(self.label_folder)
        photos, passed_over = walk_folder(self.root, lambda path: labels is not None and real_path(path) == labels)
        split_folders = self._split_folders()
        images: list[str] = []
        taken = set()
        left_out = []
        for path in photos:
            image = path.relative_to(self.root).as_posix()
            if split_folders and image.split("/")[0] not in split_folders:
                folders = ", ".join(split_folders)
                left_out.append(_passed_over(image, "in no split folder", f"lies in none of {folders}", damaged=False))
            elif image.encode(errors="replace") != os.fsencode(image):
                reason = "its name is not UTF-8; rename it"
                left_out.append(_passed_over(image, "name that is not UTF-8", reason, damaged=True))
            elif (composed := unicodedata.normalize("NFC", image)) in taken:
                reason = "its name and another photo's differ only in how accents are composed; rename one"
                left_out.append(_passed_over(image, "name of another photo", reason, damaged=True))
            else:
                taken.add(composed)
                images.append(image)
        for item in passed_over:
            name = item.path.relative_to(self.root).as_posix()
            is_outside = bool(split_folders) and name.split("/")[0] not in split_folders
            left_out.append(_passed_over(name, item.kind, item.reason, item.is_fault and not is_outside))
        return images, left_out

    def _key(self, image: str) -> str:
        return _keys_of_twins(self).get(image) or _key_of(image)

    def _unused_label_maps(self) -> list[LeftOut]:
        """What lies in the folder of label maps and belongs to no photo."""
        if self.label_folder is None:
            return []
        used = {self._label_path(image) for image in self.walk()[0]}
        root = real_path(self.root)
        maps, passed_over = walk_folder(self.label_folder, lambda path: real_path(path) == root)
        found = [(path, "label map without a photo", "belongs to no photo") for path in maps]
        found += [
            (item.path, item.kind, item.reason) for item in passed_over if item.is_fault and item.kind != NO_PHOTO
        ]
        return [_passed_over(str(path), kind, reason, damaged=True) for path, kind, reason in found if path not in used]

    def scan(
        self, image: str, split_of_class: dict[str, str], class_names: list[str], min_box_share: Mapping[str, float]
    ) -> ImageScan:
        if image == WHOLE_FOLDER:
            return ImageScan([], [*self.walk()[1], *self._unused_label_maps()])
        split = split_of_class[self.class_name]
        try:
            photo, labels = self._read(image)
        except UserError as error:
            return ImageScan([], [self._fault(image, split, error)])
        if labels is None and self.label_folder is not None:
            reason = self._why_no_label_map(image)
            return ImageScan([], [self._left_out(image, split, "no label map", reason, damaged=True)])
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

    def read(
        self, image: str, candidates: list[Candidate], size: int, context: Context
    ) -> tuple[list[Record], list[LeftOut]]:
        try:
            photo, labels = self._read(image)
            return [self._record(candidate, photo, labels, size, context) for candidate in candidates], []
        except UserError as error:
            return [], [self._fault(image, item.split, error) for item in candidates]

    def read_whole(self, image: str, class_name: str, ignored: Sequence[str]) -> WholePhoto:
        photo, labels = self._read(image)
        if labels is None:
            raise UserError(f"{shown_name(image)}: {self._why_no_label_map(image)}")
        return WholePhoto(photo, labels.part_labels, labels.part_labels)

    def part_names(self, class_name: str, candidates: list[Candidate]) -> list[str]:
        """From `parts.txt` where there is one, else `part_1` and so on up to the highest label."""
        named = self._part_names_of_file
        return named or self._names_up_to(max((item.highest_label for item in candidates), default=0))

    @cached_property
    def _part_names_of_file(self) -> list[str]:
        path = self.label_folder / NAMES_FILE if self.label_folder is not None else None
        if path is None or not path.is_file():
            return []
        return read_part_names(path)

    def _names_up_to(self, highest: int) -> list[str]:
        return [f"part_{label}" for label in range(1, highest + 1)]

    def _fault(self, image: str, split: str, error: UserError) -> LeftOut:
        kind = "label map that cannot be used" if isinstance(error, LabelMapError) else "damaged file"
        return self._left_out(image, split, kind, str(error), damaged=True)

    def _left_out(self, image: str, split: str, kind: str, reason: str, damaged: bool = False) -> LeftOut:
        return LeftOut(shown_name(image), 0, self.class_name, split, kind, reason, damaged)

    def _read(self, image: str) -> tuple[Image.Image, LabelMap | None]:
        """The photo in RGB, and its labels or None if there is no label map. Raises UserError."""
        upright, orientation = read_image(self.root / image)
        photo = to_rgb(upright)
        path = self._label_path(image)
        if path is None:
            return photo, None
        return photo, read_label_map(path, photo.size, orientation, self._part_names_of_file)

    def _label_path(self, image: str) -> Path | None:
        return next((path for path in self._files_of_labels(image) if path.suffix.lower() == ".png"), None)

    def _files_of_labels(self, image: str) -> list[Path]:
        """Files of the photo's name in its own sub-folder of `label_folder`, then those in `label_folder` itself.

        If several photos have that name, only the sub-folder tells which of them a label map belongs to.
        """
        if self.label_folder is None:
            return []
        own = self.label_folder / Path(image).parent
        folders = [own] if image in _keys_of_twins(self) else [own, self.label_folder]
        return [path for folder in dict.fromkeys(folders) for path in _files_named(folder, Path(image).stem)]

    def _why_no_label_map(self, image: str) -> str:
        name = f"{shown_name(Path(image).stem)}.png"
        others = self._files_of_labels(image)
        if others:
            return f"no {name} in {self.label_folder}, only {shown_name(others[0].name)}"
        if image in _keys_of_twins(self):
            folder = f"the sub-folder {shown_name(Path(image).parent)} of {self.label_folder}"
            return f"no {name} in {folder}; it must lie there because other photos have the same name"
        return f"no {name} in {self.label_folder}"

    def _record(
        self, candidate: Candidate, photo: Image.Image, labels: LabelMap | None, size: int, context: Context
    ) -> Record:
        key = f"{self._key(candidate.image)}_0"
        if labels is None:
            crop = whole_square(photo.size)
            labels = LabelMap(np.zeros(photo.size[::-1], np.uint8), np.ones(photo.size[::-1], np.bool_))
        else:
            crop = square_crop(candidate.box, key, context)
        seen = labels.of_parts()
        names = self._part_names_of_file or self._names_up_to(max(seen, default=0))
        part_labels = crop_labels(Image.fromarray(labels.part_labels), crop, size)
        mask = Image.fromarray(labels.object_mask.astype(np.uint8))
        return Record(
            key=key,
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

    Accents are composed (Unicode's NFC), dots are replaced because a WebDataset key ends at the first one, and
    unprintable characters become %NN of their UTF-8 bytes. The description of each sample holds the original name.
    """
    return _printable(Path(image).stem.replace(".", "_"))


@functools.lru_cache(maxsize=4)  # found once a process: too many to send with every photo
def _keys_of_twins(folder: PhotoFolder) -> dict[str, str]:
    """Keys for photos of the same name, such as `a/1.jpg` and `b/1.jpg`: their whole paths, with %, / and . as %NN.

    All of them get such a key, so that none depends on the order of the photos.
    """
    by_key: dict[str, list[str]] = {}
    for image in folder.walk()[0]:
        by_key.setdefault(_key_of(image), []).append(image)
    twins = [image for same in by_key.values() if len(same) > 1 for image in same]
    return {image: _printable(image.replace("%", "%25").replace("/", "%2F").replace(".", "%2E")) for image in twins}


def _printable(name: str) -> str:
    composed = unicodedata.normalize("NFC", name)
    return "".join(c if c.isprintable() else quote(c, safe="", errors="surrogateescape") for c in composed)


def _files_named(folder: Path, stem: str) -> list[Path]:
    """The files of that name and any ending, however its accents are composed."""
    try:
        return _files_by_stem(folder, folder.stat().st_mtime_ns).get(unicodedata.normalize("NFC", stem), [])
    except OSError:  # no such folder
        return []


@functools.lru_cache(maxsize=64)
def _files_by_stem(folder: Path, changed_ns: int) -> dict[str, list[Path]]:
    """File name without ending -> files. `changed_ns`, the folder's time of change, is part of the cache's key."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file():
            found.setdefault(unicodedata.normalize("NFC", path.stem), []).append(path)
    return found
