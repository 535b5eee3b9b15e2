"""Where photos, annotations and split lists lie in the folders that people have."""

from dataclasses import dataclass
from pathlib import Path

from slotscops.errors import UserError

SPLITS = ("train", "val")


@dataclass(frozen=True)
class PascalPartTree:
    """The three folders of a PASCAL-Part tree."""

    root: Path
    photos: Path  # JPEGImages
    lists: Path  # ImageSets/Main
    annotations: Path  # Annotations_Part

    def annotation_path(self, image: str) -> Path:
        return self.annotations / f"{image}.mat"

    def photo_path(self, image: str) -> Path:
        return self.photos / f"{image}.jpg"


@dataclass(frozen=True)
class Splits:
    """Which split an object belongs to: by its class and its image."""

    lists: dict[str, dict[str, str]]  # class -> image -> split

    def of_image(self, image: str) -> dict[str, str]:
        """class -> split, for the classes whose lists name the image."""
        return {name: splits[image] for name, splits in self.lists.items() if image in splits}


def find_tree(root: Path) -> PascalPartTree:
    """Finds the folders below `root`.

    Known are the official layout, `VOCdevkit/VOC2010/` with `Annotations_Part/` in `root`, in `VOCdevkit` or beside
    it, and that of Choudhury et al., `VOCdevkit_2010/{VOC2010,Annotations_Part}`; `root` may be any folder of these.

    Raises:
        UserError: no such folder, or one of the three is missing.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give --root the folder that holds VOCdevkit and Annotations_Part")
    layouts = ("VOCdevkit/VOC2010", "VOCdevkit_2010/VOC2010", "VOC2010", ".")
    voc = next(root / layout for layout in layouts if (root / layout).is_dir())
    devkit = voc.parent if voc != root else voc.resolve().parent
    places = [root, devkit, devkit.resolve().parent]
    annotations = [place / "Annotations_Part" for place in places if (place / "Annotations_Part").is_dir()]
    if not annotations:
        looked = ", ".join(str(place) for place in dict.fromkeys(places))
        raise UserError(
            f"{root}: no folder Annotations_Part in {looked}; unpack PASCAL-Part's trainval.tar.gz into {root}"
        )
    tree = PascalPartTree(root, voc / "JPEGImages", voc / "ImageSets" / "Main", annotations[0])
    for folder in (tree.photos, tree.lists):
        if not folder.is_dir():
            raise UserError(f"{root}: no folder {folder}; unpack VOCtrainval_03-May-2010.tar into {root}")
    if not any(tree.annotations.glob("*.mat")):
        raise UserError(f"{tree.annotations}: holds no .mat file; unpack PASCAL-Part's trainval.tar.gz into {root}")
    return tree


def list_images(tree: PascalPartTree) -> list[str]:
    """Names of all annotated images, sorted."""
    return sorted(path.stem for path in tree.annotations.glob("*.mat"))


def find_splits(tree: PascalPartTree, class_names: list[str]) -> Splits:
    """Reads `ImageSets/Main/{class}_{train,val}.txt`; a class without lists of its own follows `{train,val}.txt`.

    A list names all images of the split; its second column says whether the class is in the image. The annotation
    knows that better, so that column is not looked at (nor do Choudhury et al.).

    Raises:
        UserError: no list at all for a class, a line that is none of a list, an image in both splits.
    """
    return Splits({name: _splits_of_class(tree, name) for name in class_names})


def _splits_of_class(tree: PascalPartTree, class_name: str) -> dict[str, str]:
    splits: dict[str, str] = {}
    found = False
    for split in SPLITS:
        own, general = tree.lists / f"{class_name}_{split}.txt", tree.lists / f"{split}.txt"
        path = own if own.is_file() else general
        if not path.is_file():
            continue
        found = True
        for image in _read_list(path):
            if splits.setdefault(image, split) != split:
                raise UserError(f"{path}: {image} is in the lists of both splits; take it out of one")
    if not found:
        raise UserError(f"{tree.lists}: no {class_name}_train.txt, {class_name}_val.txt, train.txt or val.txt")
    return splits


def _read_list(path: Path) -> list[str]:
    images = []
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}); it must be a VOC image list") from None
    for number, line in enumerate(lines, start=1):
        columns = line.split()
        if not columns:
            continue
        if len(columns) > 2 or (len(columns) == 2 and columns[1] not in ("-1", "0", "1")):
            raise UserError(f"{path}, line {number}: '{line[:40]}' came, needed an image name and -1, 0 or 1")
        images.append(columns[0])
    return images
