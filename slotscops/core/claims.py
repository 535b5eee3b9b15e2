"""Work that several processes share without any of them waiting for another.

Each unit of work produces one file. The file appears whole or not at all, and its content does not depend on which
process writes it. A process does its own units first and then all that are still missing, so if one process dies, the
others finish its units.

A claim in the folder says what the work is. Of several starts with different settings, one makes the claim and the
others are refused; starts with the same settings share the work.
"""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slotscops.core import console
from slotscops.core.errors import ClaimError
from slotscops.core.files import write_once

_SHORT = 100  # characters; longer pairs of values are not printed in the message
_WRITING_S = 1.0  # an empty claim may be one that is just being written, where the file system has no hard links


def units_in_turn(num_units: int) -> Iterator[int]:
    """All unit numbers, starting with this process's own share, so that processes begin at different places."""
    first = console.rank() * num_units // console.world_size()
    for step in range(num_units):
        yield (first + step) % num_units


def claim(path: Path, content: dict[str, Any], remedy: str) -> None:
    """Records in `path` what its folder will hold. Of several processes, the first one decides.

    Args:
        remedy: what the user can do about the error; it ends the message.

    Raises:
        ClaimError: the folder was made with other settings, or the claim is damaged.
    """
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    if not path.exists() and write_once(path, text.encode()):
        return
    try:
        present = dict(json.loads(_read_claim(path)))
    except (ValueError, TypeError, RecursionError):
        raise ClaimError(f"{path}: is damaged; {remedy}") from None
    for name in differences(present, content):
        before, now = present, content
        for step in name.split("."):
            before, now = before.get(step, {}), now.get(step, {})
        values = f"({before}, now {now})" if len(f"{before}{now}") < _SHORT else "(too long to print)"
        raise ClaimError(f"{path.parent}: was made with another {name.removeprefix('settings.')} {values}; {remedy}")


def _read_claim(path: Path) -> str:
    ends = time.monotonic() + _WRITING_S
    while not (text := path.read_text()) and time.monotonic() < ends:
        time.sleep(0.05)
    return text


def differences(first: Any, second: Any, prefix: str = "") -> list[str]:
    """Dotted names of the settings in which two nested mappings differ."""
    names: list[str] = []
    for name in sorted(set(first) | set(second)):
        mine, other = first.get(name), second.get(name)
        if isinstance(mine, Mapping) and isinstance(other, Mapping):
            names += differences(mine, other, f"{prefix}{name}.")
        elif mine != other:
            names.append(f"{prefix}{name}")
    return names
