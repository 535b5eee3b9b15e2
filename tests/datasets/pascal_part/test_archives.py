import io
import shutil
import sys
import tarfile
import time
from pathlib import Path

import pytest
from commands import TWO_PROCESSES, started

from slotscops.core.errors import UserError
from slotscops.datasets.pascal_part.archives import ArchivePlace
from slotscops.datasets.toy import tree as toy
from slotscops.shard import __main__ as shard

COMMON = ["--no-features", "--size", "48", "--samples-per-shard", "4"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    toy.write_tree(root, num_train=10, num_val=4, seed=1)
    return root


@pytest.fixture(scope="module")
def archives(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tree as the two official archives. Not to be changed."""
    folder = tmp_path_factory.mktemp("archives")
    with tarfile.open(folder / "VOCtrainval_03-May-2010.tar", "w") as tar:
        tar.add(tree / "VOCdevkit", "VOCdevkit")
    with tarfile.open(folder / "trainval.tar.gz", "w:gz") as tar:
        tar.add(tree / "Annotations_Part", "./Annotations_Part")
    return folder


@pytest.fixture(scope="module")
def shards(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "out"
    assert write(tree, out) == 0
    return out


def write(root: Path, out: Path, workers: int = 1) -> int:
    return shard.main(["--root", str(root), "--out", str(out), *COMMON, "--workers", str(workers)])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("workers", [1, 2])
def test_unopened_archives_give_the_bytes_of_the_tree(
    archives: Path, shards: Path, tmp_path: Path, workers: int
) -> None:
    assert write(archives, tmp_path / "out", workers) == 0
    assert contents(tmp_path / "out") == contents(shards)


@pytest.mark.parametrize("unpacked", ["VOCdevkit", "Annotations_Part"])
def test_one_archive_beside_one_folder_gives_the_bytes_of_the_tree(
    tree: Path, archives: Path, shards: Path, tmp_path: Path, unpacked: str
) -> None:
    root = Path(shutil.copytree(archives, tmp_path / "root"))
    shutil.copytree(tree / unpacked, root / unpacked)
    (root / ("trainval.tar.gz" if unpacked == "Annotations_Part" else "VOCtrainval_03-May-2010.tar")).unlink()
    assert write(root, tmp_path / "out") == 0
    assert contents(tmp_path / "out") == contents(shards)


def test_processes_killed_at_any_moment_and_started_again_give_the_bytes_of_the_tree(
    archives: Path, shards: Path, tmp_path: Path
) -> None:
    command = [
        sys.executable, "-m", "slotscops.shard", "--root", str(archives), "--out", str(tmp_path / "out"), *COMMON,
        "--workers", "1",
    ]  # fmt: skip
    for wait_s in (0.2, 0.5, 0.9):
        with started(command), started(command):
            time.sleep(wait_s)
        # Leaving that block kills both with SIGKILL.
    assert write(archives, tmp_path / "out") == 0
    left = {name: content for name, content in contents(tmp_path / "out").items() if not name.endswith(".partial")}
    assert left == contents(shards)


def test_a_launcher_killed_with_all_its_processes_leaves_what_one_process_finishes(
    archives: Path, shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    work = ["-m", "slotscops.shard", "--root", str(archives), "--out", str(out), *COMMON, "--workers", "1"]
    for wanted in ("index/scan/*", "*.tar"):
        with started([*TWO_PROCESSES, *work]) as running:
            while not list(out.glob(wanted)):
                assert running.process.poll() is None, running.said(running.err)
                time.sleep(0.005)
        # Leaving that block kills all of them with SIGKILL.
    assert not (out / "index" / "dataset.json").exists(), "everything was written before the kill"
    assert write(archives, out) == 0
    left = {name: content for name, content in contents(out).items() if not name.endswith(".partial")}
    assert left == contents(shards)


@pytest.mark.parametrize("name", ["VOCtrainval_03-May-2010.tar", "trainval.tar.gz"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.99])
def test_a_truncated_archive_is_a_one_line_error_that_names_it(
    archives: Path, tmp_path: Path, name: str, share: float
) -> None:
    root = Path(shutil.copytree(archives, tmp_path / "root"))
    content = (root / name).read_bytes()
    whole = len(content.rstrip(b"\0"))
    (root / name).write_bytes(content[: int(share * whole)])
    with pytest.raises(UserError) as caught:
        write(root, tmp_path / "out")
    assert str(root / name) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_flipped_bit_in_a_header_loses_nothing_in_silence(archives: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(archives, tmp_path / "root"))
    path = root / "VOCtrainval_03-May-2010.tar"
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[8].offset
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="is no readable tar"):
        write(root, tmp_path / "out")


def test_hostile_members_reach_nothing(tmp_path: Path) -> None:
    path = tmp_path / "hostile.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("/Annotations_Part/a.mat", "../Annotations_Part/b.mat", "x/../Annotations_Part/c.mat"):
            entry = tarfile.TarInfo(name)
            entry.size = 1
            tar.addfile(entry, io.BytesIO(b"x"))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            entry = tarfile.TarInfo(f"Annotations_Part/{kind!r}.mat")
            entry.type, entry.linkname = kind, "/etc/passwd"
            tar.addfile(entry)
    assert ArchivePlace(path, path, "Annotations_Part").names() == []
    with tarfile.open(path, "a") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("y/Annotations_Part/twice.mat"))
    twice = path.rename(tmp_path / "twice.tar")
    with pytest.raises(UserError, match=r"two files Annotations_Part/twice\.mat"):
        ArchivePlace(twice, twice, "Annotations_Part").names()


def _header(kind: bytes, size: int, content: bytes = b"") -> bytes:
    entry = tarfile.TarInfo("x")
    entry.type, entry.size = kind, size
    return entry.tobuf(tarfile.GNU_FORMAT) + content


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (_header(tarfile.XHDTYPE, 6 << 30), "a header of 6,442,450,944 bytes, needed at most"),
        (_header(tarfile.GNUTYPE_LONGNAME, 6 << 30), "a header of 6,442,450,944 bytes, needed at most"),
        (
            b"".join(
                _header(tarfile.XGLTYPE, 14, f"14 key{number}=abc\n".encode().ljust(512, b"\0"))
                for number in range(100, 220)
            )
            + tarfile.TarInfo("y").tobuf(),
            "global header fields",
        ),
        (_header(tarfile.GNUTYPE_SPARSE, 512, bytes(512)), "a sparse file; pack the archive without"),
    ],
    ids=["attributes", "long name", "global fields", "sparse"],
)
def test_headers_that_expand_without_bound_are_refused(content: bytes, what: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb.tar"
    path.write_bytes(content + bytes(1024))
    with pytest.raises(UserError, match=rf"bomb\.tar: is no readable tar \(.*{what}"):
        ArchivePlace(path, path, "Annotations_Part").names()


def test_a_member_of_negative_size_does_not_lead_back_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "back.tar"
    entry = tarfile.TarInfo("Annotations_Part/a.mat")
    entry.size = -1024
    header = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    path.write_bytes(bytes(header) + bytes(1024))
    with pytest.raises(UserError, match=r"back\.tar: is no readable tar \(a member of -1,024 bytes\); fetch"):
        ArchivePlace(path, path, "Annotations_Part").names()
