"""File systems without locks, or on which a folder cannot be made durable, as on some clusters."""

import errno
import fcntl
import gzip
import os
import stat
from pathlib import Path

import pytest
from servers import web_server

from slotscops.core import files, transfer
from slotscops.core.errors import UserError
from slotscops.datasets.pascal_part.archives import _share
from slotscops.shard.index import open_dataset


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    transfer.check_locks.cache_clear()


def test_a_file_is_written_where_folders_cannot_be_made_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    files.write_bytes(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "failing")))
    with pytest.raises(OSError, match=r"failing: '.*/other'"):  # the file is named, which the system did not do
        files.write_bytes(tmp_path / "other", b"content")
    assert not (tmp_path / "other").exists()


def test_a_cache_of_remote_shards_without_locks_is_refused_and_not_waited_for(
    no_locks: None, toy_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLOTSCOPS_CACHE", str(tmp_path / "cache"))
    with web_server(toy_shards) as server:
        dataset = open_dataset(server.url)
        with pytest.raises(UserError, match=r"needs a file system with locks \(No locks.*; set SLOTSCOPS_CACHE"):
            dataset.read_index(dataset.splits["train"][0])


def test_an_archive_is_not_unpacked_where_there_are_no_locks(no_locks: None, tmp_path: Path) -> None:
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(gzip.compress(b"x"))
    with pytest.raises(UserError, match=r"needs a file system with locks .*; choose an --out on another one"):
        _share(tmp_path / "scratch", archive, tmp_path / "scratch" / "a.tar")
