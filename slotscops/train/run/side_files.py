"""What a run writes besides its checkpoints: a full disk costs what cannot be written, not the run."""

from collections import deque
from collections.abc import Callable

from slotscops.core import console
from slotscops.core.errors import first_line


class SideFiles:
    """Writes by kind, such as metrics or pictures. What cannot be written waits and is written in order later."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Callable[[], object]]] = {}
        self._reasons: dict[str, str] = {}
        self._told: set[str] = set()

    @property
    def missing(self) -> dict[str, str]:
        """Why each kind that is not complete could not be written."""
        return dict(self._reasons)

    def write(self, kind: str, write: Callable[[], object], keep: int | None = None) -> None:
        """Calls `write` after all that waits of its kind. If the system refuses, it waits, with a warning once a kind.

        Args:
            write: may be called again after it raised OSError.
            keep: how many writes of the kind wait at most, the newest; 1 where a file is always written whole.
        """
        waiting = self._waiting.setdefault(kind, deque())
        waiting.append(write)
        while keep is not None and len(waiting) > keep:
            waiting.popleft()
        self._catch_up(kind)

    def catch_up(self) -> None:
        """Tries once more to write all that waits."""
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
