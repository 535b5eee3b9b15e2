"""Parts as files of LabelMe, one for each photo: https://github.com/wkentaro/labelme

Each connected piece of a part is one polygon, and the pieces of a part have its number as their `group_id`. LabelMe has
no holes, so a polygon runs along its holes too; see `outlines.outline_part`. The files name the photos and do not hold
them.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slotscops.core.files import write_bytes
from slotscops.segment.formats import About
from slotscops.segment.names import SHARED
from slotscops.segment.outlines import outline_part
from slotscops.segment.segmenter import FoundParts

_VERSION = "5.5.0"  # of LabelMe, whose format this is


@contextmanager
def open_labelme(folder: Path, about: About) -> Iterator["LabelMeFolder"]:
    """Makes the folder, into which each photo's file is written as `NAME.json`."""
    folder.mkdir(exist_ok=True)
    yield LabelMeFolder(folder, about)


@dataclass(frozen=True)
class LabelMeFolder:
    """A folder of LabelMe's files to which photos are added."""

    folder: Path
    about: About

    def describe(self, photo: Path, name: str, parts: FoundParts) -> None:
        """Writes the file of one photo."""
        height, width = parts.labels.shape
        content = {
            "version": _VERSION,
            "flags": {},
            "shapes": [shape for row in np.flatnonzero(parts.present) if row for shape in self._shapes(parts, row)],
            "imagePath": Path(os.path.relpath(photo, self.folder)).as_posix(),
            "imageData": None,
            "imageHeight": height,
            "imageWidth": width,
        }
        write_bytes(self.folder / f"{name}.json", f"{json.dumps(content, indent=1)}\n".encode())

    def add(self, described: None) -> None:
        """Does nothing: the file is there already."""

    def _shapes(self, parts: FoundParts, row: np.intp) -> list[dict[str, Any]]:
        left, top, right, bottom = (int(edge) for edge in parts.boxes[row])
        number = int(parts.numbers[row])
        labels = self.about.labels_of(parts.class_name or SHARED)
        return [
            {
                "label": labels[row - 1],
                "points": corners.round(2).tolist(),
                "group_id": number,
                "description": "",
                "shape_type": "polygon",
                "flags": {},
                "mask": None,
            }
            for corners in outline_part(parts.labels, number, (left, top, right, bottom))
        ]
