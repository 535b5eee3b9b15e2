"""Where the files of PASCAL-Part lie in the folders that people have, and what their split lists say."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from slotscops.errors import UserError

SPLITS = ("train", "val")
_GET_PHOTOS = "unpack VOCtrainval_03-May-2010.tar"
_GET_PARTS = "unpack PASCAL-Part's trainval.tar.gz"


@dataclass(frozen=True)
class PascalPartTree:
    """The three folders of a PASCAL-Part tree. Whoever reads its files asks for them by the image's name."""

    root: Path
    photos: Path  # JPEGImages
    lists: Path  # ImageSets/Main
    annotations: Path  # Annotations_Part

    def annotation_path(self, image: str) -> Path:
        return self.annotations / f"{image}.mat"

    def photo_path(self, image: str) -> Path:
        return self.photos / f"{image}.jpg"

    def open_annotation(self, image: str) -> BinaryIO:
        """Raises UserError where there is none or it may not be read."""
        return _open(self.annotation_path(image))

    def open_photo(self, image: str) -> BinaryIO:
        """Raises UserError where there is none or it may not be read."""
        return _open(self.photo_path(image))


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; fetch it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


# ---- finding the folders -----------------------------------------------------------------------------------------


def find_tree(root: Path) -> PascalPartTree:
    """Finds the folders below `root`.

    Known are the official layout, `VOCdevkit/VOC2010/` with `Annotations_Part/` in `root`, in `VOCdevkit` or beside
    it, and that of Choudhury et al., `VOCdevkit_2010/{VOC2010,Annotations_Part}`; `root` may be any folder of these.

    Raises:
        UserError: no such folder, or one of the three is missing; says where it was looked for.
    """
    if not _is_folder(root):
        raise UserError(f"{root}: no such folder; give --root the folder that holds VOCdevkit and Annotations_Part")
    vocs = [root / "VOCdevkit" / "VOC2010", root / "VOCdevkit_2010" / "VOC2010", root / "VOC2010", root]
    voc = next((folder for folder in vocs if _is_folder(folder / "JPEGImages")), None)
    if voc is None:
        raise UserError(f"{root}: no folder JPEGImages in {_listed(vocs)}; {_GET_PHOTOS} into {root}")
    lists = voc / "ImageSets" / "Main"
    if not _is_folder(lists):
        raise UserError(f"{root}: no folder {lists}; {_GET_PHOTOS} into {root}")
    places = [root, *_parents(voc)]
    annotations = next(filter(_is_folder, (place / "Annotations_Part" for place in places)), None)
    if annotations is None:
        raise UserError(f"{root}: no folder Annotations_Part in {_listed(places)}; {_GET_PARTS} into {root}")
    tree = PascalPartTree(root, voc / "JPEGImages", lists, annotations)
    if not list_images(tree):
        raise UserError(f"{annotations}: holds no .mat file; {_GET_PARTS} into {root}")
    return tree


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112, Path.is_dir raises where the folder above may not be entered


def _parents(voc: Path) -> list[Path]:
    """The folder above VOC2010 and the one above that, also where `voc` is `.` or a link."""
    named, real = Path(os.path.abspath(voc)), voc.resolve()  # noqa: PTH100, resolve would follow links
    return [voc.parent] * (voc.name == "VOC2010") + [*named.parents[:2], *real.parents[:2]]


def _listed(folders: list[Path]) -> str:
    return ", ".join(dict.fromkeys(str(folder) for folder in folders))


def list_images(tree: PascalPartTree) -> list[str]:
    """Names of all annotated images, sorted."""
    # A name with a dot in front is what a Mac's tar leaves beside each file.
    return sorted(path.stem for path in tree.annotations.glob("*.mat") if not path.name.startswith("."))


# ---- split lists -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Splits:
    """Which split an object belongs to: by its class and its image."""

    lists: dict[str, dict[str, str]]  # class -> image -> split

    def of_image(self, image: str) -> dict[str, str]:
        """class -> split, for the classes whose lists name the image."""
        return {name: splits[image] for name, splits in self.lists.items() if image in splits}


def find_splits(tree: PascalPartTree, class_names: list[str]) -> Splits:
    """Reads `ImageSets/Main/{class}_{train,val}.txt`; a class without a list of its own follows `{train,val}.txt`.

    A list names all images of the split; its second column says whether the class is in the image. The annotation
    knows that better, so that column is not looked at (nor do Choudhury et al.).

    Raises:
        UserError: no list at all for a class, a line that is none of a list, an image in both splits.
    """
    return Splits({name: _splits_of_class(tree, name) for name in class_names})


def _splits_of_class(tree: PascalPartTree, class_name: str) -> dict[str, str]:
    own, general = ([tree.lists / f"{prefix}{split}.txt" for split in SPLITS] for prefix in (f"{class_name}_", ""))
    paths = own if any(path.is_file() for path in own) else general
    if not any(path.is_file() for path in paths):
        names = ", ".join(path.name for path in (*own, *general))
        raise UserError(f"{tree.lists}: holds none of {names}; {_GET_PHOTOS}")
    splits: dict[str, str] = {}
    for split, path in zip(SPLITS, paths, strict=True):
        for number, image in _read_list(path) if path.is_file() else ():
            if splits.setdefault(image, split) != split:
                raise UserError(f"{path}, line {number}: {image} is in the lists of both splits; take it out of one")
    return splits


def _read_list(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers and image names."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}); it must be a VOC image list") from None
    for number, line in enumerate(lines, start=1):
        columns = line.split()
        if not columns:
            continue
        if len(columns) > 2 or (len(columns) == 2 and columns[1] not in ("-1", "0", "1")):
            came = " ".join(columns)[:40]
            raise UserError(f"{path}, line {number}: '{came}' came, needed an image name and -1, 0 or 1; mend the line")
        yield number, columns[0]
