from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from slotscops.config import load_config
from slotscops.core.records import Batch
from slotscops.loader.batches import move_ahead
from slotscops.shard.reader import ShardReader
from slotscops.train.loop import Trainer
from slotscops.train.processes import start_accelerator


class Readings(TorchDispatchMode):
    """Counts how often Python reads a number from a tensor: on a GPU, each time waits for all queued work."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*arguments, **(named or {}))


def test_a_step_reads_nothing_back_from_the_device_until_it_is_logged(toy_shards: Path, tmp_path: Path) -> None:
    settings = [
        f"data.shards={toy_shards}", f"run_dir={tmp_path}", "data.size=64", "data.num_workers=0", "train.batch_size=4",
        "encoder.name=resnet18", "encoder.weights=random:0",
    ]  # fmt: skip
    config = load_config(None, settings)
    trainer = Trainer(config, start_accelerator(config))
    trainer.open_run()
    batches = trainer.open_batches(2)
    trainer.take_step(batches)  # whatever is done once
    batch = next(batches)  # reading files is the host's own work
    with Readings() as readings:
        loss, grad_norm = trainer.take_step(iter([batch]))
        assert readings.count == 0
        trainer.log(loss, grad_norm)
        assert readings.count > 0


@pytest.mark.parametrize("target_mask", ["none", "object", "guessed"])
def test_training_never_reads_a_part_label(
    toy_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target_mask: str
) -> None:
    read = Counter[str]()
    plain = ShardReader.read_member

    def count(self: ShardReader, row: int, member: str) -> bytes:
        read[member] += 1
        return plain(self, row, member)

    monkeypatch.setattr(ShardReader, "read_member", count)
    settings = [
        f"data.shards={toy_shards}", f"run_dir={tmp_path}", "data.size=64", "data.num_workers=0", "train.batch_size=4",
        "encoder.name=features", "train.total_steps=3", "train.eval_every_steps=0", f"losses.target_mask={target_mask}",
    ]  # fmt: skip
    config = load_config(None, settings)
    assert Trainer(config, start_accelerator(config)).train() == 0
    assert read["jpg"] >= 12
    assert set(read) == {"jpg"} | ({"object.png"} if target_mask == "object" else set())


def test_batches_moved_ahead_are_all_there_and_in_order() -> None:
    made = [
        Batch(torch.full((2, 3, 4, 4), number), None, None, None, torch.tensor([0, 0]), [str(number)] * 2)
        for number in range(5)
    ]
    moved = list(move_ahead(iter(made), torch.device("cpu")))
    assert [batch.keys for batch in moved] == [batch.keys for batch in made]
    assert all(torch.equal(one.images, other.images) for one, other in zip(moved, made, strict=True))
