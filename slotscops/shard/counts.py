"""Counts what the shards of a split hold, for the table at the end of `shard` and for the data set card."""

from collections import Counter

from slotscops.shard.index import ShardDataset
from slotscops.shard.reader import ShardReader

Counts = Counter[tuple[str, str]]  # by (what, class)


def count_split(dataset: ShardDataset, split: str) -> Counts:
    """Images, objects, visible parts and bytes by ("images", "objects", "parts" or "bytes", class)."""
    counts: Counts = Counter()
    images: set[tuple[str, str]] = set()
    for entry in dataset.splits[split]:
        reader = ShardReader(dataset, entry)
        for row in range(len(reader.index)):
            description = reader.read_description(row)
            name = description["class"]
            images.add((name, description["image"]))
            counts["objects", name] += 1
            counts["parts", name] += len(description["part_names"])
            counts["bytes", name] += int(reader.index.sizes[row].sum())
    for name, _ in images:
        counts["images", name] += 1
    return counts
