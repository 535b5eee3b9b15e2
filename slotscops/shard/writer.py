"""Writes the objects of a source as shards with an index. It can be restarted at any time and gives the same bytes.

There are two phases. Scanning decides from the annotations which objects are kept, so that the content of every shard
is known before the first is written. Then each shard is cropped and written. Both phases consist of units whose files
appear whole or not at all, and any number of processes may work on the same folder (see `slotscops.core.claims`).
"""

import io
import shutil
import tarfile
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from slotscops.core.claims import claim, leased_units, remove_leases
from slotscops.core.errors import ClaimError, UserError
from slotscops.core.files import (
    read_json_or_none,
    remove_abandoned,
    sha256_of_file,
    sha256_of_json,
    write_bytes,
    write_json,
)
from slotscops.core.pixels import DEFAULT_CONTEXT, Context
from slotscops.core.pool import WorkerPool
from slotscops.core.records import MEMBERS, to_members
from slotscops.datasets.sources import SPLITS, WHOLE_FOLDER, Candidate, LeftOut, Source, count_kinds
from slotscops.shard.index import (
    ShardDataset,
    ShardEntry,
    ShardIndex,
    dataset_path,
    index_path,
    open_dataset,
    write_dataset,
)
from slotscops.shard.left_out import left_out_path, read_left_out, read_scanned

_ANOTHER = "choose another --out or remove the folder"
_WITHDRAWING_S = 1.0
_IMAGES_PER_SCAN = 256  # a unit of the first phase: a second or two of work
Sample = tuple[str, str, dict[str, bytes]]  # key, class, members


@dataclass(frozen=True)
class ShardSettings:
    """The settings that, with the photos and annotations, determine the bytes of the shards."""

    classes: list[str]  # in the class table's order
    size: int  # side of the crops, pixels
    min_box_share: dict[str, float]  # by split: an object's box must cover more of its image than this
    samples_per_shard: int
    context: Context = DEFAULT_CONTEXT

    def to_json(self) -> dict[str, Any]:
        """As plain values. The default context is left out, so that shards keep the bytes of earlier versions."""
        settings = asdict(self)
        if self.context == DEFAULT_CONTEXT:
            del settings["context"]
        return settings


@dataclass(frozen=True)
class Outcome:
    """The finished data set, and all objects and files that were left out of it."""

    dataset: ShardDataset
    left_out: list[LeftOut]

    @property
    def num_damaged(self) -> int:
        return sum(item.damaged for item in self.left_out)


def write_shards(
    source: Source, out: Path, settings: ShardSettings, num_workers: int, description: str = "files"
) -> Outcome:
    """Writes all shards that are missing in `out`, and returns the finished data set.

    Finished shards are not written again. If photos or annotations have changed, choose another folder.

    Args:
        description: what the photos are; it distinguishes sources whose images have the same names.

    Any number of processes may call this at once with the same settings; they share the work.

    Raises:
        UserError: no object is left to write (then the folder is cleaned up).
        ClaimError: the folder holds something else, or another process writes other shards there.
        RunError: a worker process died.
    """
    images = source.list_images()
    plan = {"source": description, "settings": settings.to_json(), **_fields_of(images)}
    # Earlier versions had no entry for what the search for images passed over.
    older = plan | _fields_of([image for image in images if image != WHOLE_FOLDER])
    if read_json_or_none(plan_path(out)) == older:
        plan = older
    if _claim_folder(out, plan):
        try:
            _write_all(source, out, settings, images, num_workers)
        except FileNotFoundError:
            if not _is_withdrawn(out):
                raise
            raise ClaimError(f"{out}: another process found no object to write there and says why") from None
    return Outcome(open_dataset(out), read_left_out(left_out_path(out), f"remove {out} and make the shards again"))


def _fields_of(images: list[str]) -> dict[str, Any]:
    """What the plan says of the images."""
    return {"images": len(images), "images_sha256": sha256_of_json(images)}


def _write_all(source: Source, out: Path, settings: ShardSettings, images: list[str], num_workers: int) -> None:
    with WorkerPool(num_workers, __name__) as pool:
        candidates, left_out = _scan(source, out, settings, images, pool)
        if not candidates:
            _withdraw(out)
            raise UserError(_nothing_left(source, left_out))
        _write_missing(source, out, settings, candidates, pool)
    for _ in leased_units(["dataset.json"], _scan_folder(out), lambda _: dataset_path(out).is_file()):
        _finish(source, out, settings, candidates, left_out)
        remove_leases(_scan_folder(out))


# ---- the folder --------------------------------------------------------------------------------------------------


def _claim_folder(out: Path, plan: dict[str, Any]) -> bool:
    """Records the plan in the folder. Returns False if the shards are finished; raises ClaimError for another plan."""
    _make_folder(out)
    remove_abandoned(out, plan_path(out).parent, _scan_folder(out))
    claim(plan_path(out), plan, _ANOTHER)
    _drawing_path(out).unlink(missing_ok=True)  # the plan records it from now on
    return not dataset_path(out).is_file()


def _make_folder(out: Path) -> None:
    """Makes the folder and its index. Raises ClaimError if it holds shards without a plan."""
    # We look for shards first and for the plan second, because a process of the same work writes its plan first.
    if _holds_other_things(out) and not plan_path(out).is_file():
        raise ClaimError(f"{out}: holds other shards or is no folder; choose another --out or remove it")
    try:
        plan_path(out).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made ({error.strerror}); choose another --out") from None


def _holds_other_things(out: Path) -> bool:
    """Whether the folder holds more than a process leaves if it is killed before it has written its plan."""
    if out.exists() and not out.is_dir():
        return True
    in_index = (path for path in (out / "index").glob("*") if path != _drawing_path(out))
    return any(out.glob("*.tar")) or any(not path.name.endswith(".partial") for path in in_index)


@contextmanager
def claimed_drawing(out: Path, numbers: dict[str, int]) -> Iterator[bool]:
    """While it is open, only processes with the same numbers may draw photos in the folder.

    Args:
        numbers: what the photos depend on.

    Returns:
        True if the photos must be drawn, False if the shards' plan says that they have been.

    Raises:
        ClaimError: another process draws other photos there, or was killed while it did.
    """
    if not plan_path(out).is_file():
        _make_folder(out)
        claim(_drawing_path(out), numbers, _ANOTHER)
    try:
        # Another process may have replaced its claim by the plan since the first look.
        yield not plan_path(out).is_file()
    except BaseException:
        _drawing_path(out).unlink(missing_ok=True)  # so that other numbers can be tried at once
        raise


def _drawing_path(out: Path) -> Path:
    return out / "index" / "drawing.json"


def plan_path(out: Path) -> Path:
    return out / "index" / "plan.json"


def _withdraw(out: Path) -> None:
    """Removes the index folder, and `out` if it is then empty. Another process of the same work may do it too."""
    index = plan_path(out).parent
    for path in (*set(index.glob("*")) - {plan_path(out)}, plan_path(out)):  # the plan last
        with suppress(FileNotFoundError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for folder in (index, out):
        with suppress(OSError):  # not empty, or gone
            folder.rmdir()


def _is_withdrawn(out: Path) -> bool:
    """Whether another process is removing the index folder, the plan last, as `_withdraw` does."""
    ends = time.monotonic() + _WITHDRAWING_S
    while plan_path(out).exists() and time.monotonic() < ends:
        time.sleep(0.02)
    return not plan_path(out).exists()


def _scan_folder(out: Path) -> Path:
    return out / "index" / "scan"


def _nothing_left(source: Source, left_out: list[LeftOut]) -> str:
    """Says how many files and objects were left out for which reason, the most frequent first, and names one."""
    if not left_out:
        return f"{source.root}: no object is left to write: no object of these classes in any split"
    first = next((item for item in left_out if item.damaged), left_out[0])
    return f"{source.root}: no object is left to write: {count_kinds(left_out)}; such as {first.image}: {first.reason}"


# ---- first phase: which objects ----------------------------------------------------------------------------------


def _scan(
    source: Source, out: Path, settings: ShardSettings, images: list[str], pool: WorkerPool
) -> tuple[list[Candidate], list[LeftOut]]:
    """All kept objects, ordered by image and object number, and all objects and files that were left out."""
    splits = source.splits(settings.classes)
    chunks = [images[start : start + _IMAGES_PER_SCAN] for start in range(0, len(images), _IMAGES_PER_SCAN)]
    folder = _scan_folder(out)
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number:06d}.json" for number in range(len(chunks))]
    task = partial(source.scan, class_names=settings.classes, min_box_share=settings.min_box_share)
    names = [path.name for path in paths]
    for number in leased_units(names, folder, lambda unit: paths[unit].is_file(), "scanning annotations, chunks"):
        found = pool.map(task, chunks[number], [splits.of_image(image) for image in chunks[number]])
        write_json(paths[number], [[asdict(item) for kind in pair for item in kind] for pair in found])
    found = [item for path in paths for row in read_scanned(path) for item in row]
    candidates = [item for item in found if isinstance(item, Candidate)]
    return candidates, [item for item in found if isinstance(item, LeftOut)]


# ---- second phase: the shards ------------------------------------------------------------------------------------


def _shards(candidates: list[Candidate], settings: ShardSettings) -> list[tuple[str, list[Candidate]]]:
    """Each shard's name and its objects."""
    shards = []
    for split in SPLITS:
        mine = [candidate for candidate in candidates if candidate.split == split]
        for number, start in enumerate(range(0, len(mine), settings.samples_per_shard)):
            shards.append((f"{split}-{number:06d}", mine[start : start + settings.samples_per_shard]))
    return shards


def _write_missing(
    source: Source, out: Path, settings: ShardSettings, candidates: list[Candidate], pool: WorkerPool
) -> None:
    shards = _shards(candidates, settings)
    names = [name for name, _ in shards]
    for number in leased_units(
        names, _scan_folder(out), lambda unit: index_path(out, names[unit]).is_file(), "writing shards"
    ):
        name, objects = shards[number]
        by_image = [list(group) for _, group in groupby(objects, key=lambda candidate: candidate.image)]
        made = pool.map(partial(_make_samples, source, settings.size, settings.context), by_image)
        samples = [sample for found, _ in made for sample in found]
        write_bytes(out / f"{name}.tar", _tar_bytes(samples))
        write_json(_shard_left_out_path(out, name), [asdict(item) for _, missing in made for item in missing])
        _index_tar(out / f"{name}.tar", samples, settings.classes).write(index_path(out, name))


def _shard_left_out_path(out: Path, shard: str) -> Path:
    return _scan_folder(out) / f"{shard}.json"


def _make_samples(
    source: Source, size: int, context: Context, candidates: list[Candidate]
) -> tuple[list[Sample], list[LeftOut]]:
    """Crops and encodes the objects of one image."""
    records, left_out = source.read(candidates[0].image, candidates, size, context)
    return [(record.key, record.description["class"], to_members(record)) for record in records], left_out


def _tar_bytes(samples: Iterable[Sample]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for key, _, members in samples:
            for extension, content in members.items():
                entry = tarfile.TarInfo(f"{key}.{extension}")  # owner 0, time 0, mode 644: independent of this machine
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def _index_tar(path: Path, samples: Sequence[Sample], class_names: list[str]) -> ShardIndex:
    with tarfile.open(path) as tar:
        offsets = [entry.offset_data for entry in tar]
    contents = [content for _, _, members in samples for content in members.values()]
    shape = (len(samples), len(MEMBERS))
    return ShardIndex.from_keys(
        [key for key, _, _ in samples],
        offsets=np.array(offsets, np.int64).reshape(shape),
        sizes=np.array([len(content) for content in contents], np.int64).reshape(shape),
        crc32=np.array([zlib.crc32(content) for content in contents], np.uint32).reshape(shape),
        class_ids=np.array([class_names.index(name) for _, name, _ in samples], np.int64),
    )


def _finish(
    source: Source, out: Path, settings: ShardSettings, candidates: list[Candidate], left_out: list[LeftOut]
) -> None:
    """Writes `dataset.json`, for which one process reads and hashes all shards."""
    splits: dict[str, list[ShardEntry]] = {split: [] for split in SPLITS}
    for name, objects in _shards(candidates, settings):
        path = out / f"{name}.tar"
        splits[objects[0].split].append(
            ShardEntry(
                name=name,
                num_samples=len(ShardIndex.read(index_path(out, name))),
                num_bytes=path.stat().st_size,
                sha256=sha256_of_file(path),
                index_sha256=sha256_of_file(index_path(out, name)),
            )
        )
        left_out += read_left_out(_shard_left_out_path(out, name), f"remove {out} and make the shards again")
    if not any(entry.num_samples for entries in splits.values() for entry in entries):
        for name, _ in _shards(candidates, settings):
            (out / f"{name}.tar").unlink(missing_ok=True)
        _withdraw(out)
        raise UserError(_nothing_left(source, left_out))
    write_json(left_out_path(out), [asdict(item) for item in left_out])
    write_dataset(
        ShardDataset(
            folder=out,
            settings=settings.to_json(),
            class_names=settings.classes,
            part_names={name: source.part_names(name, candidates) for name in settings.classes},
            splits=splits,
        )
    )
