"""Scores of whole photos: the protocol `photo` of `metrics.protocols`.

Which photos: those of the split that show at least one object which became a sample of the shards, so the filters of
the shards decide. In such a photo every annotated object of the class counts, also one that was too small to become a
sample: it is in the photo, and a method should find it. Left out of the scores are the pixels of objects whose parts
are not annotated, of objects of the shards' other classes, which a method may rightly find, and of ignored rims.
Everything else is background. A photo that shows kept objects of several classes is scored once for each.

Shapes: H x W pixels of a photo.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from slotscops.core.batching import batches_by_pixels
from slotscops.core.errors import DamageError, UserError
from slotscops.core.photos import shown_name
from slotscops.core.records import IGNORED
from slotscops.datasets.sources import WHOLE_FOLDER, Source, WholePhoto
from slotscops.loader.split import Split
from slotscops.metrics.protocols import ProtocolScores

_BATCH_SIZE = 8

# The parts of several photos of one class: (photos, class) -> (H, W) uint8 labels of each, 0 = background.
PhotoLabeller = Callable[[Sequence[Image.Image], str], Sequence[NDArray[np.uint8]]]


@dataclass(frozen=True)
class _Listed:
    """A photo to score for one class."""

    image: str
    class_name: str
    size: tuple[int, int]  # width, height


def _class_of(photo: _Listed) -> str:
    return photo.class_name


class PhotoSet:
    """The photos of a split, to be read whole from the source that the shards were made of."""

    def __init__(self, split: Split, source: Source) -> None:
        """
        Raises:
            UserError: the source lacks a photo of the split.
        """
        self._split, self._source = split, source
        self._photos = _list_photos(split)
        present = set(source.list_images()) - {WHOLE_FOLDER}
        missing = [photo.image for photo in self._photos if photo.image not in present]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(
                f"{source.root}: lacks {shown_name(missing[0])}{more}, needed all photos of '{split.name}' of "
                f"{split.dataset.location}; give --photos what these shards were made of"
            )

    def __len__(self) -> int:
        """Number of photos. One that is scored for several classes counts once."""
        return len({photo.image for photo in self._photos})

    def batches(self) -> list[list[_Listed]]:
        """Batches of photos of one class. They are the same for any number of processes."""
        names = self._split.dataset.class_names
        by_class = sorted(self._photos, key=lambda photo: names.index(photo.class_name))
        return list(batches_by_pixels(by_class, lambda photo: math.prod(photo.size), _BATCH_SIZE, _class_of))

    def score(self, label: PhotoLabeller, batches: Iterable[list[_Listed]], scores: ProtocolScores) -> None:
        """Finds the parts in the photos of some `batches`, and adds them to the protocol `photo` of `scores`.

        Raises:
            UserError: a photo cannot be read, or is not the one that the shards were made of.
        """
        for batch in batches:
            photos = [self._read(photo) for photo in batch]
            found = label([photo.photo for photo in photos], batch[0].class_name)
            for listed, photo, labels in zip(batch, photos, found, strict=True):
                scores.update_photo(listed.class_name, labels, dict(self._true_labels(listed, photo)))

    def _read(self, listed: _Listed) -> WholePhoto:
        others = [name for name in self._split.dataset.class_names if name != listed.class_name]
        photo = self._source.read_whole(listed.image, listed.class_name, others)
        if photo.photo.size != listed.size:
            came, needed = (f"{width} x {height} pixels" for width, height in (photo.photo.size, listed.size))
            raise UserError(
                f"{self._source.root}: {shown_name(listed.image)} has {came}, the shards were made of one of {needed}; "
                "give --photos what they were made of"
            )
        return photo

    def _true_labels(self, listed: _Listed, photo: WholePhoto) -> Iterator[tuple[str, NDArray[np.uint8]]]:
        """By paint order, the labels as the split numbers them."""
        num_parts = len(self._split.dataset.part_names[listed.class_name])
        for order, labels in (("first", photo.part_labels), ("small", photo.part_labels_small)):
            highest = int(labels.max(initial=0, where=labels != IGNORED))
            if highest > num_parts:
                raise UserError(
                    f"{self._source.root}: {shown_name(listed.image)} has part label {highest}, but the shards know "
                    f"{num_parts} parts of {listed.class_name}; give --photos and --parts what they were made of"
                )
            yield order, labels if self._split.merge is None else self._split.merge.apply(labels, listed.class_name)


def _list_photos(split: Split) -> list[_Listed]:
    """The photos of the split, once for each class of which they show a kept object."""
    found: dict[_Listed, None] = {}
    for sample in range(len(split)):
        try:
            described = json.loads(split.read_member(sample, "json"))
            width, height = (int(side) for side in described["source_size"])
            photo = _Listed(str(described["image"]), str(described["class"]), (width, height))
            split.dataset.class_names.index(photo.class_name)
        except (ValueError, TypeError, KeyError):
            raise DamageError(f"{split.dataset.location}: the description of {split.key(sample)} is damaged") from None
        found[photo] = None
    return list(found)
