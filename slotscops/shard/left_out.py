"""What became no sample of the shards, and why: the lists that the writer keeps, read back with checks."""

from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter

from slotscops.core.errors import UserError
from slotscops.core.files import read_bytes
from slotscops.datasets.sources import Candidate, LeftOut

Content = TypeVar("Content")
Scanned = list[list[Candidate | LeftOut]]  # by image


def left_out_path(out: Path) -> Path:
    """The list of finished shards."""
    return out / "index" / "left_out.json"


def read_left_out(path: Path, remedy: str) -> list[LeftOut]:
    """The items of a list that the writer has written.

    Args:
        remedy: what the user can do if the list is damaged; it ends the message.

    Raises:
        UserError: the list is damaged.
    """
    return _read(path, TypeAdapter(list[LeftOut]), remedy)


def read_scanned(path: Path) -> Scanned:
    """The objects and files of one chunk of images. Raises UserError if the chunk is damaged."""
    return _read(path, TypeAdapter(Scanned), "remove it and start again")


def _read(path: Path, kind: TypeAdapter[Content], remedy: str) -> Content:
    try:
        return kind.validate_json(read_bytes(path), strict=True)
    except ValueError:
        raise UserError(f"{path}: is damaged; {remedy}") from None
