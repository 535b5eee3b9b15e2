"""Malicious files: names that lead out of the folder, and images that expand to gigabytes."""

import io
import shutil
import struct
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from audit import audited
from commands import python
from damages import ROW, SHARD, index_of
from PIL import Image

from slotscops.core.errors import DamageError, UserError
from slotscops.core.files import sha256_of_file
from slotscops.core.records import MEMBERS
from slotscops.features.verify import find_damage
from slotscops.loader.split import Split
from slotscops.segment.__main__ import read_photo
from slotscops.shard.index import ShardIndex, index_path, open_dataset, write_dataset
from slotscops.shard.reader import ShardReader

SIDE = 30_000  # pixels
LIMIT_BYTES = 300_000_000  # beyond what Python and its libraries take; the bombs hold 900 MB of pixels


def png_bomb() -> bytes:
    """An undamaged black PNG of 30,000 x 30,000 pixels: half a megabyte that Pillow expands to one byte a pixel."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes((SIDE // 8 + 1) * 100)) for _ in range(SIDE // 100)) + packer.flush()
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def jpeg_bomb() -> bytes:
    """A JPEG whose header says 30,000 x 30,000 pixels."""
    jpeg = io.BytesIO()
    Image.new("RGB", (64, 64), "grey").save(jpeg, "JPEG")
    content = bytearray(jpeg.getvalue())
    at = content.index(b"\xff\xc0") + 5
    content[at : at + 4] = struct.pack(">HH", SIDE, SIDE)
    return bytes(content)


@pytest.fixture(scope="module")
def bombs() -> dict[str, bytes]:
    return {"png": png_bomb(), "jpg": jpeg_bomb()}


@pytest.fixture
def own_shards(toy_shards: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(toy_shards, tmp_path / "shards"))


def rewrite(shards: Path, changed: dict[str, bytes], names: dict[str, tarfile.TarInfo]) -> None:
    """Replaces members of the sample ROW and entries in the tar, and makes all hashes fit."""
    dataset = open_dataset(shards)
    entry = next(entry for entry in dataset.splits["train"] if entry.name == SHARD)
    reader = ShardReader(dataset, entry)
    contents = {(row, m): reader.read_member(row, m) for row in range(len(reader.index)) for m in MEMBERS}
    contents |= {(ROW, member): content for member, content in changed.items()}
    offsets = []
    with tarfile.open(dataset.tar_path(entry), "w", format=tarfile.GNU_FORMAT) as tar:
        for (row, member), content in contents.items():
            info = tarfile.TarInfo(f"{reader.index.key(row)}.{member}")
            info = names.get(member, info) if row == ROW else info
            info.size = len(content)
            tar.addfile(info)
            offsets.append(tar.offset)
            tar.fileobj.write(content.ljust(-(-len(content) // 512) * 512, b"\0"))
            tar.offset += -(-len(content) // 512) * 512
    shape = (len(reader.index), len(MEMBERS))
    index = replace(
        reader.index,
        offsets=np.array(offsets, np.int64).reshape(shape),
        sizes=np.array([len(content) for content in contents.values()], np.int64).reshape(shape),
        crc32=np.array([zlib.crc32(content) for content in contents.values()], np.uint32).reshape(shape),
    )
    index.write(index_path(shards, SHARD))
    path = dataset.tar_path(entry)
    sums = {"sha256": sha256_of_file(path), "index_sha256": sha256_of_file(index_path(shards, SHARD))}
    new = replace(entry, num_bytes=path.stat().st_size, **sums)
    splits = {split: [new if e == entry else e for e in entries] for split, entries in dataset.splits.items()}
    write_dataset(replace(dataset, splits=splits))


def number_of_row(split: Split) -> int:
    return next(sample for sample in range(len(split)) if split.key(sample) == index_of(split.dataset.folder).key(ROW))


@pytest.mark.parametrize("member", ["jpg", "parts.png", "parts_small.png", "object.png"])
@pytest.mark.parametrize("bomb", ["png", "jpg"])
def test_a_bomb_among_the_crops_is_damage_like_any_other(
    own_shards: Path, bombs: dict[str, bytes], member: str, bomb: str
) -> None:
    rewrite(own_shards, {member: bombs[bomb]}, {})
    split = Split(open_dataset(own_shards), "train", None, with_labels=True)
    sample = number_of_row(split)
    with pytest.raises(DamageError) as refused:
        split.read(np.array([sample]))
    assert str(refused.value).isprintable()
    assert f"{split.key(sample)}.{member}" in str(refused.value)
    batch = replace(split, replace_damaged=True).read(np.array([sample]))
    assert list(batch.damaged) == [split.key(sample)]


@pytest.mark.parametrize("content", [b"[]", b"{", b"[" * 100_000, b"\xff\xfe", b"\0" * 1000])
def test_a_description_that_is_none_is_damage(own_shards: Path, content: bytes) -> None:
    rewrite(own_shards, {"json": content}, {})
    dataset = open_dataset(own_shards)
    entry = next(entry for entry in dataset.splits["train"] if entry.name == SHARD)
    with pytest.raises(DamageError, match="is no JSON object"):
        ShardReader(dataset, entry).read_description(ROW)


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Names of the files that are opened or made from now on."""
    events = ("open", "os.link", "os.symlink", "os.mkdir", "os.rename")
    with audited(*events, describe=lambda _, arguments: str(arguments[0])) as opened:
        yield opened


@pytest.mark.parametrize("name", ["../../evil.jpg", "/tmp/evil.jpg", "../../evil"])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_hostile_entries_of_a_tar_lead_nowhere(
    own_shards: Path, tmp_path: Path, opened: list[str], name: str, kind: bytes
) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    rewrite(own_shards, {}, {"jpg": info})
    opened.clear()
    split = Split(open_dataset(own_shards), "train", None, with_labels=True)
    batch = split.read(np.arange(len(split)))
    assert len(batch) == len(split)
    list(find_damage(own_shards, num_workers=1))
    assert any(path.endswith(f"{SHARD}.tar") for path in opened)
    assert all(Path(path).is_relative_to(own_shards) for path in opened if path.startswith(str(tmp_path)))
    assert not any("evil" in path or "passwd" in path for path in opened)
    assert not list(tmp_path.parent.rglob("evil*"))


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil", "..", "", "a\nb", "a\0b"])
def test_shards_with_hostile_names_in_dataset_json_are_refused(own_shards: Path, name: str) -> None:
    dataset = open_dataset(own_shards)
    splits = {"train": [replace(entry, name=name) for entry in dataset.splits["train"]], "val": []}
    write_dataset(replace(dataset, splits=splits))
    with pytest.raises(UserError, match="no row of the table of shards") as refused:
        open_dataset(own_shards)
    assert str(refused.value).isprintable()


def test_keys_that_do_not_fit_in_a_line_are_refused(tmp_path: Path) -> None:
    shape = (1, len(MEMBERS))
    arrays = {
        "offsets": np.zeros(shape, np.int64),
        "sizes": np.ones(shape, np.int64),
        "crc32": np.zeros(shape, np.uint32),
    }
    for key, is_good in (("horse_0", True), ("pferd_ä_0", True), ("a\nb", False), ("\x1b[2J", False)):
        ShardIndex.from_keys([key], **arrays, class_ids=np.zeros(1, np.int64)).write(tmp_path / "index")
        if is_good:
            assert ShardIndex.read(tmp_path / "index").key(0) == key
        else:
            with pytest.raises(UserError, match="do not fit"):
                ShardIndex.read(tmp_path / "index")


# ---- photos ------------------------------------------------------------------------------------------------------

# After the imports, more memory is refused, so a file that expands would end in a MemoryError.
LIMITED = f"""
import resource, sys
from pathlib import Path
from slotscops.core import console
from slotscops.shard import __main__ as shard
in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + {LIMIT_BYTES}, resource.RLIM_INFINITY))
console.run_command(lambda: shard.main(sys.argv[1:]))
"""


def test_sharding_leaves_out_bombs_in_one_line_each_and_in_little_memory(
    toy_shards: Path, tmp_path: Path, bombs: dict[str, bytes]
) -> None:
    tree = Path(shutil.copytree(toy_shards / "photos", tmp_path / "tree"))
    photos = sorted(tree.rglob("JPEGImages/*.jpg"))
    for photo, bomb in zip(photos, ("png", "jpg"), strict=False):
        photo.write_bytes(bombs[bomb])
    arguments = ["--root", str(tree), "--out", str(tmp_path / "out"), "--size", "64", "--workers", "1", "--no-features"]
    (tmp_path / "limited.py").write_text(LIMITED)
    done = python(tmp_path / "limited.py", *arguments)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "left out" in line]
    left_out = {line.split()[3].removesuffix(":") for line in lines}
    assert left_out == {photo.stem for photo in photos[:2]}
    assert any("more than 10000 pixels a side" in line for line in lines)
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == len(lines)


@pytest.mark.parametrize("bomb", ["png", "jpg"])
def test_segmenting_refuses_a_bomb_in_one_line_before_decoding_it(
    tmp_path: Path, bombs: dict[str, bytes], bomb: str
) -> None:
    path = tmp_path / f"photo.{bomb}"
    path.write_bytes(bombs[bomb])
    with pytest.raises(UserError) as refused:
        read_photo(path)
    assert str(refused.value).isprintable()
    assert str(path) in str(refused.value)
