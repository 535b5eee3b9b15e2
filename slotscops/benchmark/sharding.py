"""How fast photos and annotations become shards: from a tree, and from the two official archives unopened.

The measured tree has the requested number of annotations. They are links to those of the given tree.
"""

import gzip
import itertools
import os
import shutil
import tarfile
import time
from pathlib import Path
from typing import Any

from slotscops.core import console
from slotscops.datasets.pascal_part.classes import PART_NAMES
from slotscops.datasets.pascal_part.scan import BOX_SHARE
from slotscops.datasets.pascal_part.source import open_pascal_part
from slotscops.datasets.pascal_part.tree import PascalPartTree, find_tree, list_images
from slotscops.shard.writer import ShardSettings, write_shards

PASCAL_PART = 10_103  # annotations of the whole data set


def compare(root: Path, num_images: int, workers: int, folder: Path) -> dict[str, Any]:
    """Seconds, and images and objects per second and core, without features."""
    copies = folder / "copies"
    _multiply(find_tree(root), num_images, copies)
    _archive(copies, folder / "archives")
    rows: list[tuple[object, ...]] = []
    figures: dict[str, float] = {}
    for kind, source in (("tree", copies), ("archives", folder / "archives")):
        seconds, num_objects = _shard(source, workers, folder / f"shards-{kind}")
        figures |= {
            f"shard_{kind}_s": seconds,
            f"shard_{kind}_images_per_core_second": num_images / (seconds * workers),
            f"shard_{kind}_objects_per_core_second": num_objects / (seconds * workers),
        }
        rows.append(
            (kind, f"{seconds:.1f}", f"{num_images / seconds:.1f}", num_objects, f"{num_objects / seconds:.1f}")
        )
    title = f"{num_images:,} annotations, {workers} processes, 128 px"
    console.show_table(title, ("from", "s", "images/s", "objects", "objects/s"), rows)
    return {"setting": title, **figures}


def _shard(root: Path, workers: int, out: Path) -> tuple[float, int]:
    settings = ShardSettings(list(PART_NAMES), 128, dict(BOX_SHARE), samples_per_shard=1000)
    start = time.perf_counter()
    with open_pascal_part(root, out / ".unpacked") as source:
        outcome = write_shards(source, out, settings, workers)
    seconds = time.perf_counter() - start
    return seconds, sum(outcome.dataset.num_samples(split) for split in outcome.dataset.splits)


def _multiply(tree: PascalPartTree, num_images: int, out: Path) -> None:
    """A tree of `num_images` annotations; each photo and annotation is copied once and linked from then on."""
    voc = out / "VOCdevkit" / "VOC2010"
    folders = {"jpg": voc / "JPEGImages", "mat": out / "Annotations_Part"}
    for folder in (*folders.values(), voc / "ImageSets" / "Main"):
        folder.mkdir(parents=True)
    names = [f"copy_{number:06d}" for number in range(num_images)]
    first: dict[str, str] = {}
    for name, image in zip(names, itertools.cycle(list_images(tree)), strict=False):
        for ending, read in (("jpg", tree.open_photo), ("mat", tree.open_annotation)):
            path = folders[ending] / f"{name}.{ending}"
            if image in first:
                os.link(folders[ending] / f"{first[image]}.{ending}", path)
            else:
                with read(image) as file, path.open("wb") as copy:
                    shutil.copyfileobj(file, copy)
        first.setdefault(image, name)
    middle = num_images // 2
    for split, listed in (("train", names[:middle]), ("val", names[middle:])):
        (voc / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(listed) + "\n")


def _archive(tree: Path, out: Path) -> None:
    """The same as VOCtrainval_03-May-2010.tar and trainval.tar.gz."""
    out.mkdir()
    for name, compressed, content in (
        ("VOCtrainval_03-May-2010.tar", False, "VOCdevkit"),
        ("trainval.tar.gz", True, "Annotations_Part"),
    ):
        plain = out / Path(name).with_suffix("" if compressed else ".tar").name
        with tarfile.open(plain, "w") as archive:
            for path in sorted((tree / content).rglob("*")):
                if path.is_file():
                    member = tarfile.TarInfo(str(path.relative_to(tree)))  # a file, where gettarinfo finds a link
                    member.size = path.stat().st_size
                    with path.open("rb") as file:
                        archive.addfile(member, file)
        if compressed:
            with plain.open("rb") as file, gzip.open(out / name, "wb", compresslevel=1) as packed:
                shutil.copyfileobj(file, packed)
            plain.unlink()
