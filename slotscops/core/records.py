"""One object of one photo as a square crop with masks, and its conversion to members of a WebDataset tar and back.

Shapes: S the crop's side in pixels.
"""

import io
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

# Members of one sample, in the order they stand in the tar.
MEMBERS = ("jpg", "parts.png", "parts_small.png", "object.png", "json")
JPEG_QUALITY = 95
# The label of pixels that are left out of every score, because nobody knows what they show. PASCAL VOC uses 255 too.
IGNORED = 255


@dataclass(frozen=True)
class Record:
    """One object: its crop, its parts and where it came from."""

    key: str  # "{image}_{object}", unique within a dataset
    image: NDArray[np.uint8]  # (S, S, 3) RGB, 0..255
    part_labels: NDArray[
        np.uint8
    ]  # (S, S) part label of the object's class, 0 = no part, or IGNORED; first listed on top
    part_labels_small: NDArray[np.uint8]  # (S, S) the same with the smallest part on top
    object_mask: NDArray[np.bool_]  # (S, S) True on the object
    description: dict[str, Any]  # image, object, class, box, crop, source_size, part_names


def to_members(record: Record) -> dict[str, bytes]:
    """The record's tar members by extension, in the order of `MEMBERS`. Same record, same bytes."""
    jpeg = io.BytesIO()
    Image.fromarray(record.image).save(jpeg, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return {
        "jpg": jpeg.getvalue(),
        "parts.png": _encode_png(record.part_labels),
        "parts_small.png": _encode_png(record.part_labels_small),
        "object.png": _encode_png(record.object_mask.astype(np.uint8) * 255),
        "json": json.dumps(record.description, sort_keys=True).encode(),
    }


def from_members(key: str, members: dict[str, bytes]) -> Record:
    """The inverse of `to_members`, up to JPEG's loss in the image."""
    return Record(
        key=key,
        image=decode_image(members["jpg"]),
        part_labels=decode_image(members["parts.png"]),
        part_labels_small=decode_image(members["parts_small.png"]),
        object_mask=decode_image(members["object.png"]) > 0,
        description=json.loads(members["json"]),
    )


def _encode_png(label_map: NDArray[np.uint8]) -> bytes:
    png = io.BytesIO()
    Image.fromarray(label_map).save(png, "PNG")
    return png.getvalue()


def decode_image(
    content: bytes | memoryview, size: tuple[int, int] | None = None, mode: str | None = None
) -> NDArray[np.uint8]:
    """(H, W, 3) RGB or (H, W) grey pixels of a JPEG or PNG.

    Args:
        size: width and height in pixels. An image of another size is refused before it is decoded.
        mode: Pillow's name for the kind of pixels, likewise.

    Raises:
        ValueError: the size or mode is another one.
        Exception: Pillow raises many kinds on a damaged image.
    """
    with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content), formats=["JPEG", "PNG"]) as image:
        if (size or image.size, mode or image.mode) != (image.size, image.mode):
            raise ValueError(f"{image.width} x {image.height} pixels of mode {image.mode}")
        return np.asarray(image)


@dataclass(frozen=True)
class Batch:
    """What one training or evaluation step takes. B images of S x S pixels, features of C channels on an h x w grid."""

    images: Tensor  # (B, 3, S, S) uint8 RGB, not yet normalised: a quarter of float32 to carry to the device
    features: Tensor | None  # (B, C, h, w) float16 teacher features of the same crops; None where no cache is read
    part_labels: Tensor | None  # (B, S, S) uint8 part labels, 0 = none, or IGNORED; None where not read
    object_masks: Tensor | None  # (B, S, S) bool; None where the split does not read them
    class_ids: Tensor  # (B,) int64 row of the index's class table
    keys: list[str]  # B record keys
    part_labels_small: Tensor | None = None  # (B, S, S) as part_labels, with the smallest part on top
    # On the way to a GPU, sparse features are Z values that are not 0 and their places; `features` is then None.
    feature_values: Tensor | None = None  # (Z,) float16
    feature_places: Tensor | None = None  # (Z,) int32 places in the flattened (B, C, h, w) features
    feature_shape: tuple[int, int, int] | None = None  # C, h, w
    damaged: dict[str, str] = field(default_factory=dict)  # Damaged samples replaced in this batch: key -> reason.

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device) -> Self:
        """The same batch on another device, copied without waiting where the memory is pinned.

        Sparse features become dense there.
        """
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=True))
        values, places = moved.feature_values, moved.feature_places
        if values is None or places is None or self.feature_shape is None:
            return moved
        features = values.new_zeros(len(self) * math.prod(self.feature_shape)).scatter_(0, places.long(), values)
        dense = features.view(len(self), *self.feature_shape)
        return replace(moved, features=dense, feature_values=None, feature_places=None, feature_shape=None)

    def pin_memory(self) -> Self:
        """Called by the DataLoader, so that the copy to a GPU need not wait."""
        return self._map(lambda tensor: tensor.pin_memory())

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keeps the memory of its tensors until the work queued on `stream` is done."""
        for tensor in self._tensors().values():
            tensor.record_stream(stream)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        changed: dict[str, Any] = {name: function(tensor) for name, tensor in self._tensors().items()}
        return replace(self, **changed)

    def _tensors(self) -> dict[str, Tensor]:
        """The fields that hold a tensor, by name, so that a field that is added later is moved like the others."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}
