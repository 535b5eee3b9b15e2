"""A disk that a test can fill: a small tmpfs or, if none can be mounted, system calls that raise ENOSPC."""

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import skips
from tensorboard.summary.writer.record_writer import RecordWriter

from slotscops.core import files


class Disk:
    def __init__(self, path: Path, patches: pytest.MonkeyPatch | None) -> None:
        """
        Args:
            patches: None for a real file system.
        """
        self.path = path
        self._patches = patches

    def fill(self) -> None:
        if self._patches is None:
            with suppress_full(), (self.path / "filler").open("wb", buffering=0) as file:
                while True:
                    file.write(b"x" * 1024)
            return
        plain = Path.open

        def open_unless_log(self: Path, *arguments: Any, **named: Any) -> Any:
            return refuse() if self.name == "metrics.jsonl" and "ab" in arguments else plain(self, *arguments, **named)

        self._patches.setattr(Path, "open", open_unless_log)
        self._patches.setattr(files.tempfile, "mkstemp", refuse)
        self._patches.setattr(RecordWriter, "write", refuse)

    def make_room(self) -> None:
        if self._patches is None:
            (self.path / "filler").unlink()
        else:
            self._patches.undo()


def refuse(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def suppress_full() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


@contextmanager
def small_disk(path: Path, megabytes: int, is_real: bool = False) -> Iterator[Disk]:
    """A folder on a disk that can be filled.

    Args:
        is_real: for other processes, which no patch reaches; the test is skipped where no disk can be mounted.
    """
    path.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        if is_real:
            pytest.skip(skips.NO_MOUNT)
        with pytest.MonkeyPatch.context() as patches:
            yield Disk(path, patches)
        return
    try:
        yield Disk(path, None)
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)
