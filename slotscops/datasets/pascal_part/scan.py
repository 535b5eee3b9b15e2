"""Which objects of an image are kept, and why the others are left out. No photo is decoded.

Shapes: H x W pixels of a photo.
"""

from slotscops.core.errors import UserError
from slotscops.core.pixels import box_of
from slotscops.datasets.pascal_part.annotation import read_annotation
from slotscops.datasets.pascal_part.classes import PART_NAMES, AnnotatedObject, part_label
from slotscops.datasets.pascal_part.photos import find_photo_fault
from slotscops.datasets.pascal_part.tree import PascalPartTree
from slotscops.datasets.sources import Candidate, ImageScan, LeftOut

# An object is kept if its box covers more of the image than this; Choudhury et al. (NeurIPS 2021) do the same.
BOX_SHARE = {"train": 0.10, "val": 0.20}


def scan_image(
    tree: PascalPartTree,
    image: str,
    split_of_class: dict[str, str],
    class_names: list[str],
    min_box_share: dict[str, float],
) -> ImageScan:
    """Sorts one image's objects of the wanted classes into kept and left out. Each object is in exactly one list.

    Args:
        split_of_class: which split's list of each class names the image.
        min_box_share: by split, the share of the image that an object's box must exceed.
    """
    scan = ImageScan([], [])
    try:
        with tree.open_annotation(image) as stream:
            objects = read_annotation(stream)
    except UserError as error:
        # The split is unknown only where the lists disagree on it.
        splits = set(split_of_class.values())
        split = splits.pop() if len(splits) == 1 else None
        scan.left_out.append(LeftOut(image, None, None, split, "damaged file", str(error), damaged=True))
        return scan
    # Objects of a class that the table lacks are looked at for every choice of classes: nobody can ask for that class,
    # so the fault of the file would otherwise go unnoticed.
    unasked = set(PART_NAMES) - set(class_names)
    wanted = [(number, item) for number, item in enumerate(objects) if item.class_name not in unasked]
    photo_fault = find_photo_fault(tree, image, objects[0].mask) if wanted and split_of_class else None
    for number, item in wanted:
        split = split_of_class.get(item.class_name)
        fault = _fault(item, split, photo_fault, min_box_share)
        if fault is not None:
            scan.left_out.append(LeftOut(image, number, item.class_name, split, *fault))
        elif split is not None:
            scan.candidates.append(Candidate(image, number, item.class_name, split, box_of(item.mask)))
    return scan


def _fault(
    item: AnnotatedObject, split: str | None, photo_fault: str | None, min_box_share: dict[str, float]
) -> tuple[str, str, bool] | None:
    """Why an object is left out: kind, reason, and whether a file is at fault."""
    if item.class_name not in PART_NAMES:
        return "unknown class", f"PASCAL-Part knows no class '{item.class_name}'", True
    if split is None:
        return "in no split list", "its image is in no split list of its class", False
    if photo_fault is not None:
        return "damaged file", photo_fault, True
    if not item.mask.any():
        return "empty mask", "its mask is empty", False
    if not item.parts:
        return "no parts annotated", "no parts annotated", False
    for name, _ in item.parts:
        if part_label(item.class_name, name) is None:
            return "unknown part", f"PASCAL-Part knows no part '{name}' of {item.class_name}", True
    left, top, right, bottom = box_of(item.mask)
    share = (right - left) * (bottom - top) / item.mask.size
    if share <= min_box_share[split]:
        wanted = f"{100 * min_box_share[split]:g} %"
        reason = f"its box covers {100 * share:.3g} % of the image, needed more than {wanted} for {split}"
        return f"box covers no more than {wanted} of the image", reason, False
    return None
