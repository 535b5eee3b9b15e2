"""Features, boxes and centres of the parts of all photos in one safetensors file.

Shapes: N photos in their order, S slots (slot 0 the background), C channels.

| tensor | shape | content |
|---|---|---|
| `features` | (N, S, C) float32 | see `FoundParts.features` |
| `boxes` | (N, S, 4) float32 | left, top, right, bottom in pixels of the photo, the last two exclusive |
| `centres` | (N, S, 2) float32 | x and y in pixels of the photo |
| `present` | (N, S) bool | False where a slot has no pixel in the photo; its other rows are NaN |
| `facing` | (N,) int8 | which of two ways the object faces, 1 or -1; only of models with `decoder.places=facing` |

The metadata of the file holds JSON texts: `photos`, the N names of photos; `part_names`, S names with "background"
first, or such a list by class where classes have parts of their own; `classes`, then the N classes of the photos; and
`model` and `command`.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from slotscops.core.files import write_bytes
from slotscops.segment.formats import About
from slotscops.segment.names import SHARED
from slotscops.segment.segmenter import FoundParts

Row = tuple[str, str | None, dict[str, NDArray[np.generic]]]


@contextmanager
def open_part_features(path: Path, about: About) -> Iterator["PartFeatures"]:
    """Collects the parts of all photos and writes the file when the body ends without an error.

    Args:
        path: of the file. One that is there already is removed at once, because it is of an earlier run.
        about: model, command, names of the parts and of the photos.
    """
    path.unlink(missing_ok=True)
    features = PartFeatures(about)
    yield features
    write_bytes(path, features.to_bytes())


@dataclass
class PartFeatures:
    """The parts of the photos that were added. They stay in memory, with 4 S C bytes a photo."""

    about: About
    _rows: list[Row] = field(default_factory=list)

    def describe(self, photo: Path, name: str, parts: FoundParts) -> Row:
        """What is kept of one photo."""
        arrays: dict[str, NDArray[np.generic]] = {
            "features": parts.features,
            "boxes": parts.boxes,
            "centres": parts.centres,
            "present": parts.present,
        }
        if parts.facing is not None:
            arrays["facing"] = np.array(parts.facing, np.int8)
        return self.about.file_name(photo), parts.class_name, arrays

    def add(self, described: Row) -> None:
        """Adds the parts of one photo."""
        self._rows.append(described)

    def to_bytes(self) -> bytes:
        """The file's content."""
        named = {key: ["background", *names] for key, names in self.about.part_names.items()}
        metadata: dict[str, Any] = {
            "photos": [photo for photo, _, _ in self._rows],
            "part_names": named.get(SHARED, named),
            "model": self.about.model,
            "command": self.about.made_by,
        }
        if SHARED not in named:
            metadata["classes"] = [class_name for _, class_name, _ in self._rows]
        tensors = {name: np.stack([arrays[name] for _, _, arrays in self._rows]) for name in self._rows[0][2]}
        return save(tensors, {key: json.dumps(value) for key, value in metadata.items()})
