"""Shows what shards contain before training: tables of numbers and a sheet of crops with their parts coloured."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from slotscops.core import console
from slotscops.core.address import Address
from slotscops.core.errors import UserError
from slotscops.core.files import write_bytes
from slotscops.core.pictures import overlay, picture_bytes, sheet, voc_palette
from slotscops.core.records import IGNORED
from slotscops.shard.index import ShardDataset, open_dataset
from slotscops.shard.reader import ShardReader
from slotscops.shard.remote import is_remote

_PICTURED = 24  # crops on the sheet, spread evenly over the data set
_COLUMNS = 6
_TILE = 192  # pixels
_LINE = 11  # pixels of a line of Pillow's own font
_NAMES_SHOWN = 8  # lines of names below a crop


@dataclass
class _ClassCounts:
    """Counts of one class in one split."""

    objects: int = 0
    with_part: Counter[str] = field(default_factory=Counter)
    part_pixels: Counter[str] = field(default_factory=Counter)
    object_pixels: int = 0
    box_sides: list[int] = field(default_factory=list)  # longer side, source pixels


def inspect_shards(shards: str | Path | Address, picture: Path | None = None) -> None:
    """Prints the tables and writes the sheet, by default to `SHARDS/contact_sheet.png`.

    Raises:
        UserError: no shards there, or the sheet cannot be written.
        RunError: a member is damaged.
    """
    if is_remote(shards) and picture is None:
        raise UserError(f"{shards}: the sheet of crops cannot be written there; say where with --out FILE.png")
    dataset = open_dataset(shards)
    if not console.is_main():
        return
    counts, tiles = _read(dataset)
    rows = []
    for (split, name), count in sorted(counts.items()):
        sides = np.percentile(count.box_sides, [0, 50, 100]).round().astype(int)
        rows.append((name, split, f"{count.objects:,}", *(f"{side}" for side in sides)))
    header = ("class", "split", "objects", "smallest box", "median", "largest, px")
    console.show_table(f"{shards}, crops of {dataset.size} px", header, rows, 2)
    parts = [row for (split, name), count in sorted(counts.items()) for row in _part_rows(dataset, split, name, count)]
    if parts:
        console.show_table("parts", ("class", "split", "part", "objects with it", "share of object pixels"), parts, 3)
    if dataset.remote is None:  # a web server cannot list its files
        caches = sorted(path.parent.name for path in dataset.folder.glob("features/*/manifest.json"))
        console.say(f"features: {', '.join(caches) or 'none'}")
    picture = picture or dataset.folder / "contact_sheet.png"
    try:
        write_bytes(picture, picture_bytes(sheet([tiles[i : i + _COLUMNS] for i in range(0, len(tiles), _COLUMNS)])))
    except OSError as error:
        raise UserError(f"{picture}: cannot be written ({error.strerror}); choose another --out") from None
    console.say(f"crops with their parts: {picture}")


def _read(dataset: ShardDataset) -> tuple[dict[tuple[str, str], _ClassCounts], list[Image.Image]]:
    counts: dict[tuple[str, str], _ClassCounts] = defaultdict(_ClassCounts)
    tiles = []
    total = sum(dataset.num_samples(split) for split in dataset.splits)
    shown = set(np.linspace(0, total - 1, min(_PICTURED, total)).round().astype(int).tolist())
    number = 0
    entries = [(split, entry) for split, entries in dataset.splits.items() for entry in entries if entry.num_samples]
    for split, entry in console.track(entries, len(entries), "reading shards"):
        reader = ShardReader(dataset, entry)
        for row in range(len(reader.index)):
            description, labels = reader.read_description(row), reader.read_part_labels(row)
            count, names = counts[split, description["class"]], dataset.part_names[description["class"]]
            count.objects += 1
            count.object_pixels += int(reader.read_object_mask(row).sum())
            left, top, right, bottom = description["box"]
            count.box_sides.append(max(right - left, bottom - top))
            for label in _labels_of_parts(labels):
                count.with_part[names[label - 1]] += 1
                count.part_pixels[names[label - 1]] += int((labels == label).sum())
            if number in shown:
                photo = reader.read_images([row])[0].permute(1, 2, 0).numpy()
                tiles.append(_tile(photo, labels, names, f"{split} {description['class']}"))
            number += 1
    return counts, tiles


def _labels_of_parts(labels: NDArray[np.uint8]) -> list[int]:
    return [label for label in np.unique(labels).tolist() if label not in (0, IGNORED)]


def _part_rows(dataset: ShardDataset, split: str, name: str, count: _ClassCounts) -> list[tuple[str, ...]]:
    return [
        (
            name, split, part, f"{count.with_part[part]:,} ({100 * count.with_part[part] / count.objects:.0f} %)",
            f"{100 * count.part_pixels[part] / max(1, count.object_pixels):.1f} %",
        )
        for part in dataset.part_names[name]
    ]  # fmt: skip


def _tile(photo: Any, labels: Any, names: list[str], title: str) -> Image.Image:
    """One crop with its parts coloured and, below it, their names in two columns."""
    tile = Image.new("RGB", (_TILE, _TILE + _LINE * (1 + _NAMES_SHOWN) + 4), (255, 255, 255))
    tile.paste(overlay(photo, labels).resize((_TILE, _TILE), Image.Resampling.BICUBIC), (0, 0))
    draw, colours = ImageDraw.Draw(tile), voc_palette()
    draw.text((1, _TILE), title, fill=(0, 0, 0))
    for place, label in enumerate(_labels_of_parts(labels)[: 2 * _NAMES_SHOWN]):
        x, y = place // _NAMES_SHOWN * (_TILE // 2), _TILE + _LINE * (1 + place % _NAMES_SHOWN)
        draw.rectangle((x + 1, y + 2, x + 8, y + 9), fill=tuple(colours[label].tolist()))
        draw.text((x + 12, y), names[label - 1], fill=(0, 0, 0))
    return tile
