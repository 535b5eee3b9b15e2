"""Finds the files of PASCAL-Part in the folder layouts that people have, and reads the split lists."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

from slotscops.core import console
from slotscops.core.errors import UserError
from slotscops.core.files import decode_text
from slotscops.core.photos import is_litter, real_path
from slotscops.datasets.pascal_part.archives import (
    ArchivePlace,
    FolderPlace,
    Place,
    find_archives,
    is_compressed,
    unpacked,
)
from slotscops.datasets.sources import SPLITS

_GET_PHOTOS = "unpack VOCtrainval_03-May-2010.tar"
_GET_PARTS = "unpack PASCAL-Part's trainval.tar.gz"
_SHARD_LABEL_MAPS = "python -m slotscops.shard --images PHOTOS --parts LABELS --out SHARDS"
_FOR_LABEL_MAPS = f"; for label maps in PNG files: {_SHARD_LABEL_MAPS}"
_PHOTO_ENDING = re.compile(r"\.jpe?g$", re.IGNORECASE)  # some lists name files
_ANY_YEAR = "VOC20[0-9][0-9]"
_FOLDERS = ("JPEGImages", "ImageSets/Main", "Annotations_Part")


@dataclass(frozen=True)
class PascalPartTree:
    """The three folders of a PASCAL-Part tree. Its files are opened by the name of their image."""

    root: Path
    photos: Place  # JPEGImages
    lists: Place  # ImageSets/Main
    annotations: Place  # Annotations_Part

    def annotation_path(self, image: str) -> Path:
        return self.annotations.path(f"{image}.mat")

    def photo_path(self, image: str) -> Path:
        return self.photos.path(f"{image}.jpg")

    def open_annotation(self, image: str) -> BinaryIO:
        """Raises UserError if there is none or it may not be read."""
        return self.annotations.open(f"{image}.mat")

    def open_photo(self, image: str) -> BinaryIO:
        """Raises UserError if there is none or it may not be read."""
        return self.photos.open(f"{image}.jpg")


# ---- finding the folders -----------------------------------------------------------------------------------------


@contextmanager
def open_tree(root: Path, scratch: Path) -> Iterator[PascalPartTree]:
    """As `find_tree`. If `root` holds the official archives instead of the folders, they are read without unpacking.

    Args:
        scratch: folder for what must be unpacked, removed at the end.

    Raises:
        UserError: as `find_tree`, or an archive is damaged.
    """
    with ExitStack() as stack:
        places: dict[str, Place] = {}
        for archive in find_archives(root) if _is_folder(root) or root.is_file() else []:
            plain = stack.enter_context(unpacked(archive, scratch)) if is_compressed(archive) else archive
            for folder in _FOLDERS:
                place = ArchivePlace(archive, plain, folder)
                if place.names():
                    places.setdefault(folder, place)
        yield find_tree(root, places)


def find_tree(root: Path, places: Mapping[str, Place] | None = None) -> PascalPartTree:
    """Finds the folders below `root`; those that are not there are taken from `places`.

    Two layouts are known: the official one, `VOCdevkit/VOC2010/` with `Annotations_Part/` in `root`, in `VOCdevkit` or
    beside it, and that of Choudhury et al., `VOCdevkit_2010/{VOC2010,Annotations_Part}`. `root` may be any of these
    folders or the folder above them. If there is no VOC2010, another year is used and named in a printed line.

    Raises:
        UserError: no such folder, or one of the three is missing. The message says where it was looked for.
    """
    if not _is_folder(root) and not places:
        raise UserError(f"{root}: no such folder; give --root the folder that holds VOCdevkit and Annotations_Part")
    archived = dict(places or {})
    base = root.parent if root.is_file() else root
    vocs = [base / "VOCdevkit" / "VOC2010", base / "VOCdevkit_2010" / "VOC2010", base / "VOC2010", base]
    patterns = (f"VOCdevkit/{_ANY_YEAR}", _ANY_YEAR, f"*/VOCdevkit/{_ANY_YEAR}", f"*/{_ANY_YEAR}")
    others = [folder for pattern in patterns for folder in sorted(base.glob(pattern), reverse=True)]
    voc = next((folder for folder in (*vocs, *others) if _is_folder(folder / "JPEGImages")), None)
    if voc is not None and fnmatch(real_path(voc).name, _ANY_YEAR) and real_path(voc).name != "VOC2010":
        console.say(f"{voc}: using the photos of {real_path(voc).name}; PASCAL-Part was annotated on VOC2010")
    if voc is not None:
        photos, lists = voc / "JPEGImages", voc / "ImageSets" / "Main"
        archived["JPEGImages"] = FolderPlace(photos)
        if _is_folder(lists):
            archived["ImageSets/Main"] = FolderPlace(lists)
    if "JPEGImages" not in archived:
        raise UserError(f"{root}: no folder JPEGImages in {_listed(vocs)}; {_GET_PHOTOS} into {root}{_FOR_LABEL_MAPS}")
    if "ImageSets/Main" not in archived:
        where = voc / "ImageSets" / "Main" if voc else "ImageSets/Main"
        raise UserError(f"{root}: no folder {where}; {_GET_PHOTOS} into {root}")
    around = [base, *_parents(voc or base)]
    annotations = next(filter(_is_folder, (place / "Annotations_Part" for place in around)), None)
    if annotations is not None:
        archived["Annotations_Part"] = FolderPlace(annotations)
    if "Annotations_Part" not in archived:
        raise UserError(
            f"{root}: no folder Annotations_Part in {_listed(around)}; {_GET_PARTS} into {root}{_FOR_LABEL_MAPS}"
        )
    tree = PascalPartTree(root, *(archived[folder] for folder in _FOLDERS))
    if not list_images(tree):
        if any(name.lower().endswith(".png") for name in tree.annotations.names()):
            raise UserError(
                f"{tree.annotations.path('')}: holds PNG label maps, as Pascal-Part-116 has, needed PASCAL-Part's .mat "
                f"files; shard the maps with: {_SHARD_LABEL_MAPS}"
            )
        raise UserError(f"{tree.annotations.path('')}: holds no .mat file; {_GET_PARTS} into {root}{_FOR_LABEL_MAPS}")
    return tree


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112, Path.is_dir raises where the folder above may not be entered


def _parents(voc: Path) -> list[Path]:
    """The folder above VOC2010 and the one above that, also where `voc` is `.` or a link."""
    named, real = Path(os.path.abspath(voc)), voc.resolve()  # noqa: PTH100, resolve would follow links
    return [voc.parent] * fnmatch(voc.name, _ANY_YEAR) + [*named.parents[:2], *real.parents[:2]]


def _listed(folders: list[Path]) -> str:
    return ", ".join(dict.fromkeys(str(folder) for folder in folders))


def list_images(tree: PascalPartTree) -> list[str]:
    """Names of all annotated images, sorted."""
    return sorted(_annotations_of_images(tree))


def list_passed_over(tree: PascalPartTree) -> list[tuple[str, str]]:
    """Other files among the annotations, except litter: (name, why it is not read), sorted by name."""
    taken = set(_annotations_of_images(tree).values())
    others = [name for name in tree.annotations.names() if name not in taken and not _is_hidden(name)]
    same = "another file has this name with another ending"
    return [(name, same if name.lower().endswith(".mat") else "is no annotation by its ending") for name in others]


def _annotations_of_images(tree: PascalPartTree) -> dict[str, str]:
    """Image -> its annotation file. Of files such as `a.mat` and `a.MAT`, it is the one that is opened."""
    found: dict[str, str] = {}
    for name in tree.annotations.names():
        if name.lower().endswith(".mat") and not _is_hidden(name):
            found[name[:-4]] = max(name, found.get(name[:-4], name))  # .mat is above .MAT
    return found


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or is_litter(name)  # a Mac's tar leaves ._NAME beside each file


# ---- split lists -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SplitLists:
    """Which split an object belongs to: by its class and its image."""

    lists: dict[str, dict[str, str]]  # class -> image -> split

    def of_image(self, image: str) -> dict[str, str]:
        """class -> split, for the classes whose lists name the image."""
        return {name: splits[image] for name, splits in self.lists.items() if image in splits}


def find_splits(tree: PascalPartTree, class_names: list[str]) -> SplitLists:
    """Reads `ImageSets/Main/{class}_{train,val}.txt`; a class without a list of its own follows `{train,val}.txt`.

    A list names all images of the split. Its second column says whether the class is in the image; we ignore it, as
    Choudhury et al. do, because the annotation is more reliable.

    Raises:
        UserError: a class has no list at all, a line does not have a list's form, or an image is in both splits.
    """
    return SplitLists({name: _splits_of_class(tree, name) for name in class_names})


def _splits_of_class(tree: PascalPartTree, class_name: str) -> dict[str, str]:
    present = set(tree.lists.names())
    own, general = ([f"{prefix}{split}.txt" for split in SPLITS] for prefix in (f"{class_name}_", ""))
    names = own if present.intersection(own) else general
    if not present.intersection(names):
        raise UserError(f"{tree.lists.path('')}: holds none of {', '.join((*own, *general))}; {_GET_PHOTOS}")
    splits: dict[str, str] = {}
    for split, name in zip(SPLITS, names, strict=True):
        path = tree.lists.path(name)
        for number, image in _read_list(tree.lists, name) if name in present else ():
            if splits.setdefault(image, split) != split:
                raise UserError(f"{path}, line {number}: {image} is in the lists of both splits; take it out of one")
    return splits


def _read_list(lists: Place, name: str) -> Iterator[tuple[int, str]]:
    """Line numbers and image names."""
    path = lists.path(name)
    try:
        with lists.open(name) as file:
            lines = decode_text(file.read()).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}); it must be a VOC image list") from None
    for number, line in enumerate(lines, start=1):
        columns = line.split()
        if not columns:
            continue
        if len(columns) > 2 or (len(columns) == 2 and columns[1] not in ("-1", "0", "1")):
            came = " ".join(columns)[:40]
            raise UserError(f"{path}, line {number}: '{came}' came, needed an image name and -1, 0 or 1; mend the line")
        yield number, _PHOTO_ENDING.sub("", columns[0])
