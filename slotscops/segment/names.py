"""Names of the parts of a trained model, kept in `part_names.json` beside its `model.safetensors`.

The slots of a model have numbers but no names. `segment --name-from` gives them names from a few labelled photos.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from slotscops.core.errors import UserError, first_line
from slotscops.core.files import write_json

FILE = "part_names.json"
SHARED = ""  # key of the names where all classes share their parts
_MAX_BYTES = 1 << 20  # of the file, which may come from elsewhere
Name = Annotated[str, Field(min_length=1, max_length=200)]


@dataclass(frozen=True)
class PartNames:
    """A name, or None, for each part, and how well the labelled photos support them."""

    by_class: dict[str, list[Name | None]]  # by class, or under `SHARED`; in the order of the model's parts
    agreement: Annotated[float, Field(ge=0, le=1)]  # share of the labelled pixels whose slot has the name of their part
    num_photos: Annotated[int, Field(ge=1, le=2**53)]

    def check_fit(self, class_names: Sequence[str], num_parts: int) -> None:
        """Checks that the names are those of a model.

        Args:
            class_names: of the model, empty if its classes share their parts.
            num_parts: K of the model.

        Raises:
            ValueError: if they name other classes or another number of parts, or a name cannot be printed.
        """
        if set(self.by_class) != (set(class_names) or {SHARED}):
            raise ValueError("it names the parts of other classes than the model has")
        for names in self.by_class.values():
            if len(names) != num_parts:
                raise ValueError(f"it has names for {len(names)} parts, the model has {num_parts}")
            if not all(name is None or name.isprintable() for name in names):
                raise ValueError("a name cannot be printed")


def write_names(folder: Path, names: PartNames | None) -> None:
    """Writes the names into the folder of a model, or removes those of an earlier model if there are none."""
    if names is None:
        (folder / FILE).unlink(missing_ok=True)
    else:
        write_json(folder / FILE, asdict(names))


def read_names(folder: Path, class_names: Sequence[str], num_parts: int) -> PartNames | None:
    """The names in the folder of a model, or None if there are none.

    Args:
        class_names, num_parts: see `PartNames.check_fit`.

    Raises:
        UserError: if the file is damaged, or its names do not fit the model.
    """
    path = folder / FILE
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES:,} bytes")
        TypeAdapter(PartNames).validate_json(content, strict=True)
        names = PartNames(**json.loads(content))
        names.check_fit(class_names, num_parts)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: does not hold names of this model's parts ({first_line(error)}); remove it, or name the parts "
            "again with segment --name-from"
        ) from None
    return names


def shown_names(
    names: PartNames | None, class_names: Sequence[str], part_numbers: Sequence[int]
) -> dict[str, list[str]]:
    """A name for each part by class, or under `SHARED`: the given name, or `part k` for slot k without a name.

    Args:
        part_numbers: of the model's parts, such as 1 to K.
    """
    given: dict[str, list[Any]] = names.by_class if names else {}
    numbered = [f"part {slot}" for slot in part_numbers]
    return {
        key: [name or number for name, number in zip(given.get(key, numbered), numbered, strict=True)]
        for key in class_names or [SHARED]
    }


def joined_names(names: dict[str, list[str]]) -> list[str]:
    """One name for each slot: the different names that the classes have for it, joined by ` / `."""
    return [" / ".join(dict.fromkeys(of_slot)) for of_slot in zip(*names.values(), strict=True)]
