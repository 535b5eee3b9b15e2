from slotscops.core.batching import MAX_PIXELS, batches_by_pixels


def test_a_batch_has_few_items_of_one_kind_and_few_pixels_and_a_huge_item_comes_alone() -> None:
    half = MAX_PIXELS // 2
    cut = lambda sizes: list(batches_by_pixels(sizes, int, 3))  # noqa: E731
    assert cut([]) == []
    assert cut([1, 2, 3, 4, 5]) == [[1, 2, 3], [4, 5]]
    assert cut([half, half, 1, half]) == [[half, half], [1, half]]
    assert cut([1, 3 * MAX_PIXELS, 2, 3]) == [[1], [3 * MAX_PIXELS], [2, 3]]
    assert list(batches_by_pixels("aabbba", lambda _: 1, 2, str)) == [["a", "a"], ["b", "b"], ["b"], ["a"]]


def test_items_are_read_one_at_a_time_and_freed_with_their_batch() -> None:
    class Photo:
        alive = 0

        def __init__(self) -> None:
            Photo.alive += 1

        def __del__(self) -> None:
            Photo.alive -= 1

    most = 0
    for batch in batches_by_pixels((Photo() for _ in range(9)), lambda _: 1, 2):
        most = max(most, Photo.alive)
        batch.clear()
    assert most == 3  # a batch, and the one item that did not fit any more
    assert Photo.alive == 0
