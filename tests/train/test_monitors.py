"""Monitors compared with values by hand, and warnings that name a cause and existing settings."""

import re

import pytest
import torch

from slotscops.config import Config, load_config, setting_names
from slotscops.train.monitors import likely_causes, watch


def logits_of(winners: list[list[int]], num_slots: int, strength: float = 20.0) -> torch.Tensor:
    """(1, S, h, w) logits by which each cell belongs to its winner."""
    return strength * torch.nn.functional.one_hot(torch.tensor([winners]), num_slots).permute(0, 3, 1, 2).float()


def row_of(logits: torch.Tensor, basis: torch.Tensor) -> dict[str, float]:
    return {name: float(value) for name, value in watch(logits, basis).items()}


def settings_of(*overrides: str) -> Config:
    return load_config(None, ["train.total_steps=2000", *overrides])


HEALTHY = row_of(logits_of([[0, 0], [1, 2]], 3), torch.eye(2, 4))


def test_monitors_of_a_small_grid_by_hand() -> None:
    row = row_of(logits_of([[0, 0], [1, 3]], 4), torch.tensor([[3.0, 0, 0], [4, 3, 0], [0, 0, 0]]))
    assert [row[f"slot_share_{slot}"] for slot in range(4)] == [0.5, 0.25, 0, 0.25]
    assert row["background_share"] == 0.5
    assert row["dead_slots"] == 1
    assert row["map_entropy"] == pytest.approx(0, abs=1e-6)
    assert row["basis_cosine"] == pytest.approx(0.8)
    assert row["zero_basis_rows"] == 1


def test_equal_maps_have_the_largest_entropy_and_a_single_basis_row_no_cosine() -> None:
    row = row_of(torch.zeros(2, 2, 3, 3), torch.ones(1, 5))
    assert row["map_entropy"] == pytest.approx(1)
    assert row["basis_cosine"] == 0


@pytest.mark.parametrize(
    ("logits", "basis", "cause"),
    [
        (torch.zeros(1, 3, 4, 4), torch.eye(2, 4), "undecided"),
        (logits_of([[0, 0], [0, 0]], 3), torch.eye(2, 4), "one slot takes all"),
        (logits_of([[2, 2], [2, 2]], 3), torch.eye(2, 4), "one slot takes all"),
        (logits_of([[1, 1], [2, 2]], 3), torch.eye(2, 4), "no background"),
        (logits_of([[0, 0], [2, 2]], 3), torch.eye(2, 4), "dead slots"),
        (logits_of([[0, 0], [1, 2]], 3), torch.tensor([[0.0, 0], [1, 2]]), "zero basis rows"),
        (logits_of([[0, 0], [1, 2]], 3), torch.tensor([[1.0, 2], [1, 2]]), "rows alike"),
    ],
)
def test_each_collapse_is_named_with_settings_that_exist(logits: torch.Tensor, basis: torch.Tensor, cause: str) -> None:
    causes = likely_causes(row_of(logits, basis), 1000, settings_of())
    assert list(causes) == [cause]
    settings = re.findall(r"\b[a-z_]+\.[a-z_]+\b", causes[cause])
    assert settings
    assert set(settings) <= set(setting_names())
    # What has been done already is not advised.
    changed = settings_of("basis.init=kmeans", "slots.init=learned", "train.optimizer=adamw", "slots.num_parts=1")
    advised = likely_causes(row_of(logits, basis), 1000, changed)[cause].rsplit(": ", 1)[1]
    assert not re.search("basis.init|slots.init|optimizer|entropy|num_parts", advised)
    assert re.fullmatch("(lower|raise) train.[a-z_]+", advised)
    entropy = likely_causes(row_of(logits, basis), 1000, settings_of("losses.entropy=0.1"))[cause].rsplit(": ", 1)[1]
    assert ("losses.entropy" in entropy) == (cause in ("one slot takes all", "dead slots"))


def test_parts_that_look_alike_but_have_places_are_no_collapse() -> None:
    row = row_of(logits_of([[0, 0], [1, 2]], 3), torch.tensor([[1.0, 2], [1, 2]]))
    assert likely_causes(row, 1000, settings_of())
    assert likely_causes(row, 1000, settings_of("decoder.places=facing", "losses.mixture=1")) == {}


def test_a_healthy_run_is_not_warned_of_nor_is_a_young_one() -> None:
    assert likely_causes(HEALTHY, 1000, settings_of()) == {}
    collapsed = row_of(torch.zeros(1, 3, 4, 4), torch.eye(2, 4))
    assert likely_causes(collapsed, 99, settings_of("train.total_steps=500")) == {}
    assert likely_causes(collapsed, 199, settings_of()) == {}
    assert likely_causes(collapsed, 200, settings_of()) != {}
