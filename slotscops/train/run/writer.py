"""Writes checkpoints beside the training: the loop waits only until the tensors are copied to host memory."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from safetensors import SafetensorError
from torch import Tensor

from slotscops.core import console
from slotscops.core.errors import RunError, first_line
from slotscops.train.run.checkpoint import State, save_checkpoint


class CheckpointWriter:
    """Writes one checkpoint at a time. The next one waits until the one before it is written.

    If a checkpoint cannot be written (full disk, read-only folder), a warning is printed, training goes on, and the
    next one is tried. Leaving the writer raises RunError only if the last checkpoint of the run failed.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None
        self._failure: str | None = None  # of the newest checkpoint

    def save(
        self,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: State,
        best_step: int | None = None,
    ) -> None:
        """Copies the tensors and returns; the writing goes on in a thread of its own.

        Args:
            tensors: file name without ending (model, optimizer, rng, and ema if there is one) -> its tensors.
            best_step: step of a checkpoint that is kept, however old it is.
        """
        copies = {
            name: {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in group.items()}
            for name, group in tensors.items()
        }
        self.wait()
        self._writing = self._thread.submit(save_checkpoint, self._folder, copies, state, self._keep, best_step)

    @property
    def is_writing(self) -> bool:
        return self._writing is not None and not self._writing.done()

    def wait(self) -> None:
        """Waits until nothing is being written."""
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        try:
            writing.result()
            self._failure = None
        except (OSError, SafetensorError) as error:  # safetensors raises its own error on a full disk
            self._failure = f"{self._folder}: the checkpoint could not be written ({first_line(error)})"
            console.warn(f"{self._failure}; training goes on, earlier checkpoints are whole: make room there")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wait()
        self._thread.shutdown()
        if self._failure and error is None:
            raise RunError(f"{self._failure}; the run ended without its last checkpoint: make room, start again")
