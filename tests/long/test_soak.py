from pathlib import Path

from soak import soak


def test_a_run_that_is_killed_again_and_again_ends_with_the_parameters_of_one_that_was_not(
    toy_shards: Path, tmp_path: Path
) -> None:
    amid, starts = soak(toy_shards, tmp_path, kills=4, steps=60, seed=1, num_processes=1)
    assert starts >= 4
    assert amid >= 1
