"""Speed and memory on this machine, by `python -m slotscops.benchmark WHAT`."""

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from slotscops.benchmark import loader, loss, scale, scaling, sharding, step, table
from slotscops.config import load_config
from slotscops.core import console
from slotscops.core.command_line import command_parser
from slotscops.core.errors import UserError
from slotscops.core.files import write_json
from slotscops.core.machine import machine
from slotscops.core.pool import usable_cores
from slotscops.features.cache import open_cache
from slotscops.shard import __main__ as shard
from slotscops.shard.index import open_dataset
from slotscops.train.processes import start_accelerator

_MORE = """\
loss                    the exact loss, compared with the same loss with all tensors materialised
loader [--shards S]     our loader, compared with other loaders and with JPEG decoding alone
step [--shards S]       a training step, compared with the encoder alone and the baseline with VGG in the loop
scaling [--shards S]    images per second with 1, 2, ... processes
scale                   what grows with processes, shards and samples, on a simulated cluster
sharding --root DIR     from photos and annotations to shards, as many objects as PASCAL-Part has
report FILE...          writes figures kept with --json into the table of the file --readme

All figures are medians of contestants that take turns in one process. --json FILE keeps them."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.what == "report":
        table.write_section([Path(name) for name in options.overrides], options.readme)
        return 0
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        figures = _measure(options, scratch)
    figures["machine"] = machine(_device())
    for name, value in figures.items():
        console.say(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    if options.json:
        write_json(options.json, figures)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmark", "Measure speed and memory on this machine.", "loss --quick", _MORE)
    parser.add_argument("what", choices=("loss", "loader", "step", "scaling", "scale", "sharding", "report"))
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--rounds", type=int, default=7, help="measured turns of each contestant (default: 7)")
    parser.add_argument("--processes", default="1,2", help="scaling: how many processes (default: 1,2)")
    parser.add_argument("--ranks", type=int, default=512, help="scale: processes (default: %(default)s)")
    parser.add_argument("--num-shards", type=int, default=100_000, help="scale: shards (default: %(default)s)")
    parser.add_argument(
        "--samples-per-shard", type=int, default=1_000, help="scale: samples of each shard (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=65_536, help="scale: global batch (default: %(default)s)")
    parser.add_argument("--root", type=Path, help="sharding: a PASCAL-Part tree, repeated to reach --images")
    parser.add_argument(
        "--images", type=int, default=sharding.PASCAL_PART, help="sharding: number of photos (default: %(default)s)"
    )
    parser.add_argument(
        "--readme",
        type=Path,
        default=Path("launch/README.md"),
        help="report: the file with the table (default: %(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="loss: measure only batch 8 at 128 px")
    parser.add_argument(
        "--shards", type=Path, help="shards with relu5_4 features (default: toy shards made for this measurement)"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="NAME=VALUE", help="step: settings, such as train.batch_size=16"
    )
    return parser.parse_intermixed_args(arguments)


def _measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    if options.what == "loss":
        return loss.compare(options.rounds, _device(), options.quick)
    if options.what == "sharding":
        if options.root is None:
            raise UserError("sharding needs --root, a folder of VOCdevkit and Annotations_Part")
        return sharding.compare(options.root, options.images, usable_cores(), scratch)
    if options.what == "scale":
        return scale.compare(options.num_shards, options.samples_per_shard, options.ranks, options.batch, scratch)
    shards = options.shards or _make_toy_shards(scratch / "shards")
    if options.what == "loader":
        dataset = open_dataset(shards)
        return loader.compare(dataset, open_cache(dataset, "relu5_4", dataset.size), options.rounds, scratch)
    if options.what == "scaling":
        settings = [*_step_settings(shards), *options.overrides]
        batch_size = load_config(None, settings).train.batch_size
        counts = [int(count) for count in options.processes.split(",")]
        return scaling.compare(settings, batch_size, counts, scratch) | {"setting": f"batch {batch_size}"}
    config = load_config(None, [*_step_settings(shards), f"run_dir={scratch / 'run'}", *options.overrides])
    accelerator = start_accelerator(config)
    return step.compare(config, accelerator, options.rounds)


def _make_toy_shards(out: Path) -> Path:
    arguments = ["--toy", "--toy-train", "150", "--toy-val", "1", "--out", str(out), "--teacher-weights", "random:0"]
    shard.main(arguments)
    return out


def _step_settings(shards: Path) -> list[str]:
    """A ResNet-50 with random weights; its speed does not depend on them."""
    size = open_dataset(shards).size
    return [f"data.shards={shards}", f"data.size={size}", "encoder.weights=random:0", "train.batch_size=8"]


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    console.run_command(main)
