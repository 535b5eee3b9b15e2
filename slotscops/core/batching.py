"""Cuts photos of any sizes into batches that fit into memory."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
MAX_PIXELS = 50_000_000  # of a batch of several photos: 150 MB of pixels, and 24 frames of 1920 x 1080


def batches_by_pixels(
    items: Iterable[Item],
    pixels: Callable[[Item], int],
    size: int,
    kind: Callable[[Item], Hashable] = lambda item: None,
) -> Iterator[list[Item]]:
    """Yields the items in their order, at most `size` at a time and of one kind.

    Several items together have at most 50 million pixels. An item that has more comes alone.

    Args:
        pixels: number of pixels of an item.
        kind: only items for which it is the same come together.
    """
    batch: list[Item] = []
    num_pixels = 0
    for item in items:
        more = pixels(item)
        if batch and (len(batch) == size or num_pixels + more > MAX_PIXELS or kind(batch[-1]) != kind(item)):
            yield batch
            batch, num_pixels = [], 0
        batch.append(item)
        num_pixels += more
        del item  # the caller frees a batch as it goes through it
    if batch:
        yield batch
