import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import run
from forks import ranks

from slotscops.core.errors import UserError
from slotscops.loader.split import Split
from slotscops.metrics.stability import stability_of
from slotscops.shard.reader import ShardReader
from slotscops.train.choose_k import search
from slotscops.train.choose_k.__main__ import main, read_range
from slotscops.train.choose_k.rule import Measured, recommend
from slotscops.train.monitors import dead_parts

SETTINGS = ["data.size=64", "data.num_workers=0", "encoder.name=features", "teacher.transform=l2"]
SETTINGS += ["decoder.maps=attention", "basis.init=single_kmeans", "train.batch_size=4", "train.total_steps=9"]
SETTINGS += ["train.reduction=deterministic", "train.microbatches=2"]


def arguments(shards: Path, out: Path, numbers: str = "2-3", *more: str) -> list[str]:
    amount = ["--steps", "1", "--repeats", "2"]
    return ["--shards", str(shards), "--range", numbers, "--out", str(out), *amount, *SETTINGS, *more]


def result(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "choose_k.json").read_text())
    return content


@pytest.fixture(scope="module")
def measured(toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str], list[set[int]]]:
    """A finished result, the members that it read, and the photos that each training and each scoring read in turn."""
    members: set[str] = set()
    photos: list[set[int]] = []
    kinds = [False]
    plain_member, plain_read = ShardReader.read_member, Split._read

    def note_member(self: ShardReader, row: int, member: str) -> bytes:
        members.add(member)
        return plain_member(self, row, member)

    def note_photos(self: Split, samples: Any) -> Any:
        scores = not torch.is_grad_enabled() or torch.is_inference_mode_enabled()
        if scores != kinds[-1] or not photos:
            kinds.append(scores)
            photos.append(set())
        assert self.only is not None
        photos[-1].update(self.only[samples % len(self)].tolist())
        return plain_read(self, samples)

    out = tmp_path_factory.mktemp("chosen") / "out"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ShardReader, "read_member", note_member)
        patched.setattr(Split, "_read", note_photos)
        assert main(arguments(toy_shards, out)) == 0
    return out, members, photos


def test_trainings_of_a_pair_share_no_photo_and_are_compared_on_others_without_part_labels(
    measured: tuple[Path, set[str], list[set[int]]],
) -> None:
    out, members, photos = measured
    assert members == {"jpg"}
    trained, scored = photos[::2], photos[1::2]
    assert len(trained) == len(scored) == 2 * 2 * 2  # numbers, repeats, halves
    assert all(len(one) == 17 // 4 and one == scored[0] for one in scored)
    assert all(0 < len(one) <= 6 and not one & scored[0] for one in trained)
    assert not any(first & second for first, second in zip(trained[::2], trained[1::2], strict=True))
    assert trained[:4] == trained[4:]  # every number of parts has the same halves
    assert trained[0] != trained[2]
    for row in result(out)["measured"]:
        assert len(row["stabilities"]) == 2
        assert len({*row["likelihoods"]}) == len(row["dead_parts"]) == 4
        assert row["stability"] == pytest.approx(np.mean(row["stabilities"]))


def test_page_and_command_tell_what_the_file_holds(measured: tuple[Path, set[str], list[set[int]]]) -> None:
    out = measured[0]
    content, page = result(out), (out / "choose_k.html").read_text()
    for row in content["measured"]:
        assert f"<td>{row['num_parts']}</td><td>{row['stability']:.3f}</td>" in page
    assert page.count("<svg") == 3
    assert content["note"] in page
    if content["recommended"] is not None:
        assert content["next_command"].endswith(f" slots.num_parts={content['recommended']}")


def test_a_second_start_trains_only_what_is_missing_and_other_settings_are_refused(
    measured: tuple[Path, set[str], list[set[int]]], toy_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, before = measured[0], result(measured[0])
    asked = []

    def measure(_config: Any, number: int, *_: Any) -> Measured:
        asked.append(number)
        return Measured(number, [0.5, float("nan")], [-1.0], [0], 1.0)

    with monkeypatch.context() as patched:
        patched.setattr(search, "_measure", measure)
        assert main(arguments(toy_shards, out)) == 0
        assert not asked
        assert result(out) == before
        for other in ("train.learning_rate=0.5", "seed=1"):
            with pytest.raises(UserError, match=f"another {other.partition('=')[0]}; restore it, or choose another"):
                main(arguments(toy_shards, out, "2-3", other))
        with pytest.raises(UserError, match=r"another choose_k\.steps; restore it"):
            main(arguments(toy_shards, out, "2-3", "--steps", "3"))
        assert main(arguments(toy_shards, out, "3-4")) == 0
        assert asked == [4]
        assert result(out)["measured"][:2] == before["measured"]
        assert result(out)["measured"][2]["stabilities"] == [0.5, None]
        assert main(arguments(toy_shards, out, "3-4")) == 0  # None is read back
        (out / "choose_k.json").write_text("{")
        with pytest.raises(UserError, match=r"cannot be read .* remove it, or choose another folder with --out DIR"):
            main(arguments(toy_shards, out))
    (out / "choose_k.json").write_text(json.dumps(before))


def test_two_processes_measure_what_one_measures(
    measured: tuple[Path, set[str], list[set[int]]], toy_shards: Path, tmp_path: Path
) -> None:
    done = run([*ranks(2), "-m", "slotscops.train.choose_k", *arguments(toy_shards, tmp_path / "out")])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("parts: stability") == 2
    one, two = (result(out)["measured"] for out in (measured[0], tmp_path / "out"))
    assert [row | {"seconds": 0} for row in one] == [row | {"seconds": 0} for row in two]


def rows(*stabilities: Sequence[float], dead: dict[int, list[int]] | None = None) -> list[Measured]:
    """Results of 2, 3, ... parts."""
    return [
        Measured(number, list(values), [0.0], (dead or {}).get(number, [0]), 0.0)
        for number, values in enumerate(stabilities, start=2)
    ]


def test_the_largest_number_within_one_standard_error_of_the_best_is_recommended() -> None:
    spread = [(0.8, 0.9), (0.7, 0.9), (0.5, 0.6)]  # variances 0.005, 0.02, 0.005, so the error is 0.0707
    found = recommend(rows(*spread))
    assert found.standard_error == pytest.approx((0.03 / 3 / 2) ** 0.5)
    assert (found.num_parts, found.best) == (3, 2)
    assert found.least == pytest.approx(0.85 - found.standard_error)
    assert recommend(rows((0.8, 0.9), (0.7, 0.85), (0.5, 0.6))).num_parts == 2
    assert recommend(rows(*spread, (0.99, 0.99))).num_parts == 5
    assert recommend(rows(*spread, (0.99, 0.99), dead={5: [1, 0]})).num_parts == 3
    assert recommend(rows(*spread, (0.99, 0.99), dead={5: [1, 0, 0]})).num_parts == 5
    assert recommend(rows(*spread, (float("nan"), 0.99))).num_parts == 3
    assert recommend(rows((float("nan"), 0.9), (0.8, 0.8), dead={3: [1]})).num_parts is None


def test_stability_is_that_of_pixels_which_a_network_gives_to_a_part() -> None:
    same = np.diag([900, 40, 60])
    assert stability_of(same[None]) == 1
    renamed = same[:, [0, 2, 1]]
    assert stability_of(renamed[None]) == 1
    by_chance = np.array([[900, 0, 0], [0, 25, 25], [0, 25, 25]])
    assert abs(stability_of(by_chance[None])) < 0.02  # with the background's pairs it would be 0.9
    assert stability_of(np.stack([same, by_chance])) == pytest.approx((1 + stability_of(by_chance[None])) / 2)
    assert np.isnan(stability_of(np.diag([9, 0])[None]))


def test_a_part_is_dead_if_it_wins_next_to_nothing_in_every_class() -> None:
    counts = np.array([[5000, 4996, 4, 0], [5000, 0, 5000, 0], [0, 0, 0, 0]])
    assert dead_parts(counts) == [3]
    assert dead_parts(counts[:1]) == [2, 3]
    assert dead_parts(counts[2:]) == []


@pytest.mark.parametrize("text", ["3", "3-3", "5-4", "1-4", "3-255", "a-b", "3-4-5"])
def test_a_range_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=f"--range {re.escape(text)}: give two rising numbers"):
        read_range(text)


def test_a_number_of_parts_beside_the_range_is_refused() -> None:
    with pytest.raises(UserError, match="is what --range tries"):
        main(["--shards", "s", "--range", "2-3", "slots.num_parts=4"])
