"""Kept objects become records: the crop of the photo and of its masks.

Shapes: H x W pixels of a photo.
"""

import numpy as np
from PIL import Image

from slotscops.core.errors import UserError
from slotscops.core.pixels import DEFAULT_CONTEXT, Context, box_of, crop_labels, crop_photo, square_crop
from slotscops.core.records import Record
from slotscops.datasets.pascal_part.annotation import read_annotation
from slotscops.datasets.pascal_part.classes import PART_NAMES, AnnotatedObject, paint_parts, part_label
from slotscops.datasets.pascal_part.photos import read_photo
from slotscops.datasets.pascal_part.tree import PascalPartTree
from slotscops.datasets.sources import Candidate, LeftOut


def read_records(
    tree: PascalPartTree, image: str, candidates: list[Candidate], size: int, context: Context = DEFAULT_CONTEXT
) -> tuple[list[Record], list[LeftOut]]:
    """Crops the candidates of one image to `size` x `size`. Damage that shows only now leaves objects out."""
    if not candidates:
        return [], []
    try:
        with tree.open_annotation(image) as stream:
            objects = read_annotation(stream)
        numbered = dict(enumerate(objects))
        if not all(c.object_number in numbered and _is_unchanged(c, numbered[c.object_number]) for c in candidates):
            raise UserError(f"{tree.annotation_path(image)}: has changed since it was scanned; start anew")
        photo = read_photo(tree, image, objects[0].mask)
    except UserError as error:
        return [], [
            LeftOut(image, item.object_number, item.class_name, item.split, "damaged file", str(error), damaged=True)
            for item in candidates
        ]
    return [_make_record(item, objects[item.object_number], photo, size, context) for item in candidates], []


def _is_unchanged(candidate: Candidate, item: AnnotatedObject) -> bool:
    """Whether the object is still the one that was scanned: hours may lie between the phases."""
    box = box_of(item.mask) if item.mask.any() else None
    known = all(part_label(item.class_name, name) for name, _ in item.parts)
    return known and (item.class_name, box) == (candidate.class_name, candidate.box)


def _make_record(
    candidate: Candidate, item: AnnotatedObject, photo: Image.Image, size: int, context: Context
) -> Record:
    key = f"{candidate.image}_{candidate.object_number}"
    labels, small = (Image.fromarray(paint_parts(item, smallest_on_top)) for smallest_on_top in (False, True))
    crop = square_crop(candidate.box, key, context)
    names = zip(PART_NAMES[item.class_name], labels.histogram()[1:], strict=False)
    return Record(
        key=key,
        image=crop_photo(photo, crop, size),
        part_labels=crop_labels(labels, crop, size),
        part_labels_small=crop_labels(small, crop, size),
        object_mask=crop_labels(Image.fromarray(item.mask.astype(np.uint8)), crop, size) > 0,
        description={
            "image": candidate.image,
            "object": candidate.object_number,
            "class": item.class_name,
            "box": list(candidate.box),
            "crop": list(crop),
            "source_size": list(photo.size),
            "part_names": [name for name, num_pixels in names if num_pixels],
        },
    )
