"""Whole photos with the parts of all objects of a class, for scores of uncropped photos.

Shapes: H x W pixels of a photo.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from slotscops.core.records import IGNORED
from slotscops.datasets.pascal_part.annotation import read_annotation
from slotscops.datasets.pascal_part.classes import AnnotatedObject, paint_parts, part_label
from slotscops.datasets.pascal_part.photos import read_photo
from slotscops.datasets.pascal_part.tree import PascalPartTree
from slotscops.datasets.sources import WholePhoto


def read_whole_photo(tree: PascalPartTree, image: str, class_name: str, ignored: Sequence[str]) -> WholePhoto:
    """Reads a photo and paints the parts of all objects of a class, those that are too small for shards included.

    Ignored are the objects of the class whose parts are not annotated or have unknown names, because nobody knows
    which part their pixels show, and the objects of the classes in `ignored`. Everything else is "no part".

    Raises:
        UserError: the annotation or the photo cannot be read.
    """
    with tree.open_annotation(image) as stream:
        objects = read_annotation(stream)
    photo = read_photo(tree, image, objects[0].mask)
    first, small = (_paint(objects, class_name, ignored, smallest_on_top) for smallest_on_top in (False, True))
    return WholePhoto(photo, first, small)


def _paint(
    objects: list[AnnotatedObject], class_name: str, ignored: Sequence[str], smallest_on_top: bool
) -> NDArray[np.uint8]:
    """(H, W) labels. Where objects overlap, the one listed first stays on top."""
    labels = np.zeros_like(objects[0].mask, np.uint8)
    for item in reversed(objects):
        if item.class_name == class_name and _has_known_parts(item):
            parts = paint_parts(item, smallest_on_top)
            np.copyto(labels, parts, where=item.mask | (parts > 0))
        elif item.class_name == class_name or item.class_name in ignored:
            labels[item.mask] = IGNORED
    return labels


def _has_known_parts(item: AnnotatedObject) -> bool:
    return bool(item.parts) and all(part_label(item.class_name, name) for name, _ in item.parts)
