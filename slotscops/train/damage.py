"""Counts damaged samples over all processes, reports each once, and ends the run if there are too many."""

import json
from collections.abc import Mapping

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import tensor

from slotscops.core import console
from slotscops.core.errors import RunError
from slotscops.core.files import write_json
from slotscops.shard.index import ShardDataset
from slotscops.train.run.folder import RunFolder
from slotscops.train.run.side_files import SideFiles

_NAMED = 3  # samples named in the error that ends the run; each was reported before, and the run folder lists all


class DamageLedger:
    """The damaged samples found so far: key -> reason. It is the same on every process after `agree`."""

    def __init__(
        self, dataset: ShardDataset, split: str, max_share: float, folder: RunFolder, files: SideFiles
    ) -> None:
        """
        Args:
            max_share: share of the split's samples that may be damaged; `agree` raises RunError if more are.
        """
        self._dataset = dataset
        self._split = split
        self._max_share = max_share
        self._folder = folder
        self._files = files
        self._known: dict[str, str] = {}
        self._found_at: dict[str, int] = {}  # step, by key
        self._new: dict[str, str] = {}  # found by this process since the last `agree`

    def note(self, damaged: Mapping[str, str]) -> None:
        """Records the damaged samples of a batch of this process."""
        for key in damaged.keys() - self._known.keys():
            self._new[key] = damaged[key]

    def reload(self, step: int) -> None:
        """Reads the damage found up to `step`. One process calls it; `agree` tells the others."""
        try:
            rows = json.loads(self._folder.damaged.read_text())
            self._new = {key: str(row["what"]) for key, row in rows.items() if row["step"] <= step}
            self._found_at = {key: int(rows[key]["step"]) for key in self._new}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):  # file missing or damaged
            self._new = {}

    def agree(self, accelerator: Accelerator, step: int, write: bool = True) -> int:
        """Shares what each process found, and returns the number of distinct damaged samples over all processes.

        All processes must call it at the same step.

        Raises:
            RunError: on every process, if more samples are damaged than allowed.
        """
        num_new = tensor([len(self._new)], device=accelerator.device)
        if int(accelerator.gather(num_new).sum()):
            found: dict[str, str] = {}
            for of_process in gather_object([self._new]):
                found |= of_process
            self._new = {}
            self._take_up({key: found[key] for key in sorted(found.keys() - self._known.keys())}, step, write)
        allowed = self._max_share * self._dataset.num_samples(self._split)
        if len(self._known) > allowed:
            raise RunError(self._too_many())
        return len(self._known)

    def _take_up(self, found: dict[str, str], step: int, write: bool) -> None:
        self._known |= found
        if not console.is_main():
            return
        for key, what in found.items():
            self._found_at.setdefault(key, step)
            console.warn(f"sample {key} is damaged, another takes its place: {what}")
        if write:
            rows = {key: {"step": self._found_at[key], "what": what} for key, what in self._known.items()}
            self._files.write("damaged.json", lambda: write_json(self._folder.damaged, rows), keep=1)

    def _too_many(self) -> str:
        named = "; ".join(list(self._known.values())[:_NAMED])
        more = f"; {len(self._known) - _NAMED} more in {self._folder.damaged}" if len(self._known) > _NAMED else ""
        return (
            f"{self._dataset.location}: {len(self._known)} of {self._dataset.num_samples(self._split)} samples of "
            f"{self._split} are damaged, more than data.max_damaged_share={self._max_share:g} allows: {named}{more}"
        )
