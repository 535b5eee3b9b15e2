"""Compact forms of a cache: features projected to fewer dimensions, and numbers of 8 bits.

A projection keeps the D directions that hold most of the teacher's feature vectors f (C channels):

    y = Q^T f,    Q (C, D) with orthonormal columns that minimise the mean of |f - Q Q^T f|^2

These are the leading eigenvectors of the mean of f f^T. No mean is subtracted. The mixture loss, its k-means and the l2
transforms use angles between vectors as seen from zero, and a shift of zero would change every angle. Without one,
inner products, lengths, angles and distances of the projected vectors are those of the vectors themselves, up to the
part that Q cuts off; every consumer therefore uses the projected vectors as if they were the features of a teacher with
D channels. What treats channels one by one (`sqrt`, `channel_standardised`) then acts on the new axes, and gives other
results than on the teacher's own channels.

Shapes: B images or N samples, C teacher channels on an h x w grid, D components, V vectors.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from slotscops.core.errors import UserError

if TYPE_CHECKING:  # loader workers read no settings
    from slotscops.config import FeatureStore, TeacherSettings

PROJECTION = "projection.safetensors"  # the file of the matrix in the cache's folder
PROJECTION_SHA256 = "projection_sha256"  # the manifest's field for the hash of that file


@dataclass(frozen=True)
class Compact:
    """How a cache takes less room than its features. The defaults are the features themselves as float16."""

    components: int | None = None  # D
    store: "FeatureStore" = "float16"

    @classmethod
    def of(cls, known: "Mapping[str, Any] | TeacherSettings") -> Self:
        """The form that a manifest or the settings name."""
        values = known if isinstance(known, Mapping) else dataclasses.asdict(known)
        return cls(values.get("components"), values.get("store", "float16"))

    def fields(self) -> dict[str, Any]:
        """The fields of a manifest. None for the defaults, so that a plain cache is what it always was."""
        default = Compact()
        return {name: value for name, value in dataclasses.asdict(self).items() if value != getattr(default, name)}

    def name_suffix(self) -> str:
        """What the name of the cache's folder says of it."""
        components = "" if self.components is None else f"-pca{self.components}"
        return components + ("" if self.store == "float16" else f"-{self.store}")

    def options(self) -> str:
        """The options of `slotscops features` that make it, each after a blank."""
        components = "" if self.components is None else f" --components {self.components}"
        return components + ("" if self.store == "float16" else f" --store {self.store}")

    def settings(self) -> list[str]:
        """The settings with which a training reads this cache."""
        return [f"teacher.{name}={value}" for name, value in self.fields().items()]

    def check(self, num_channels: int, layer: str) -> None:
        """Raises UserError if the teacher's layer has no more channels than components are wanted."""
        if self.components is not None and not 0 < self.components < num_channels:
            raise UserError(
                f"--components {self.components}: {layer} has {num_channels} "
                f"channels; give 1 to {num_channels - 1}, or leave --components out"
            )

    def shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(D, h, w), or (C, h, w) without a projection, of teacher features (C, h, w)."""
        return shape if self.components is None else (self.components, *shape[1:])

    def row_bytes(self, shape: tuple[int, int, int]) -> int:
        """Bytes of one stored row of teacher features (C, h, w), unless a sparse row is smaller."""
        channels, height, width = self.shape(shape)
        if self.store == "int8":
            return channels * (height * width + 6)  # a lowest value and a step for each channel
        return 2 * channels * height * width


@dataclass(frozen=True)
class Projection:
    """The matrix of a cache, and the share of the variance about the mean that it keeps, in 0..1."""

    matrix: Tensor  # (C, D) float32, orthonormal columns
    explained_variance: float

    def to_bytes(self) -> bytes:
        """The content of `projection.safetensors`."""
        share = torch.tensor([self.explained_variance], dtype=torch.float64)
        return save({"matrix": self.matrix.contiguous(), "explained_variance": share})

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Raises ValueError if the content is no projection."""
        try:
            tensors = load(content)
            matrix, share = tensors["matrix"], tensors["explained_variance"]
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"holds no projection ({error})") from None
        if matrix.ndim != 2 or matrix.dtype != torch.float32 or not matrix.isfinite().all() or share.numel() != 1:
            raise ValueError("its matrix is damaged")
        return cls(matrix, float(share))


def check_fields(manifest: Mapping[str, Any]) -> bool:
    """Whether the fields of a manifest that describe its form are valid. They are missing in a plain cache."""
    from slotscops.config import FeatureStore  # imported here, because loader workers need no settings

    components, sha256 = manifest.get("components"), manifest.get(PROJECTION_SHA256)
    if manifest.get("store", "float16") not in get_args(FeatureStore):
        return False
    if components is None:
        return sha256 is None
    return type(components) is int and components > 0 and isinstance(sha256, str)


def project(features: Tensor, matrix: Tensor | None) -> Tensor:
    """(B, C, h, w) features -> (B, D, h, w) components; the features themselves without a (C, D) matrix."""
    return features if matrix is None else torch.einsum("bchw,cd->bdhw", features, matrix)
