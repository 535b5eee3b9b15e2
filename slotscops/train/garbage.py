"""Collects Python's garbage at the same steps on every process."""

import gc
from types import TracebackType
from typing import Self

_EVERY_STEPS = 100


class SynchronisedGarbage:
    """While it is open, Python collects garbage only when told to.

    By itself, each process collects at moments of its own, and in every step all processes wait for the one that
    collects. What exists at the beginning, such as modules and the network, is left out of all collections.
    """

    def __enter__(self) -> Self:
        self._was_enabled = gc.isenabled()
        gc.collect()
        gc.freeze()
        gc.disable()
        return self

    def collect_if_due(self, step: int) -> None:
        """Collects at every hundredth step. All processes must call it with the same steps."""
        if step % _EVERY_STEPS == 0:
            gc.collect()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        gc.unfreeze()
        if self._was_enabled:
            gc.enable()
