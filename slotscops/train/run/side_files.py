"""Files that a run writes besides its checkpoints. If the disk is full, the writes wait and the run goes on."""

from collections import deque
from collections.abc import Callable

from slotscops.core import console
from slotscops.core.errors import first_line


class SideFiles:
    """Writes of several kinds, such as metrics or pictures. A write that fails waits and is done later, in order."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Callable[[], object]]] = {}
        self._reasons: dict[str, str] = {}
        self._told: set[str] = set()

    @property
    def missing(self) -> dict[str, str]:
        """Kind -> why it could not be written, for each kind with waiting writes."""
        return dict(self._reasons)

    def write(self, kind: str, write: Callable[[], object], keep: int | None = None) -> None:
        """Calls `write` after the waiting writes of its kind. If one raises OSError, it and the later ones wait.

        The first failure of each kind prints a warning.

        Args:
            write: is called again later if it raises OSError.
            keep: at most so many writes of the kind wait, the newest ones. 1 for a file that is always written whole.
        """
        waiting = self._waiting.setdefault(kind, deque())
        waiting.append(write)
        while keep is not None and len(waiting) > keep:
            waiting.popleft()
        self._catch_up(kind)

    def catch_up(self) -> None:
        """Tries all waiting writes once more."""
        for kind in list(self._waiting):
            self._catch_up(kind)

    def _catch_up(self, kind: str) -> None:
        waiting = self._waiting[kind]
        while waiting:
            try:
                waiting[0]()
            except OSError as error:
                self._reasons[kind] = error.strerror or first_line(error)
                if kind not in self._told:
                    console.warn(
                        f"WARNING: {kind} could not be written ({self._reasons[kind]}); training goes on and writes "
                        "it later: make room there"
                    )
                self._told.add(kind)
                return
            waiting.popleft()
        if self._reasons.pop(kind, None):
            console.warn(f"{kind}: can be written again")
