"""Before the first step: joins the processes, opens data and features, and checks them against the settings."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar, get_args

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from slotscops.config import Config, MixedPrecision, to_mapping
from slotscops.core import console
from slotscops.core.errors import RunError, UserError
from slotscops.core.files import sha256_of_json
from slotscops.core.machine import keep_freed_memory
from slotscops.features.cache import FeatureCache, check_feature_files, open_cache, warn_if_random
from slotscops.features.compact import Compact
from slotscops.features.teacher import Teacher, channels_of_layers
from slotscops.loader import plan
from slotscops.loader.split import Split
from slotscops.model.target import TargetTransform
from slotscops.shard.index import ShardDataset, check_tars, open_dataset
from slotscops.train.reduction import choose_kernels
from slotscops.train.run.checkpoint import Checkpoint
from slotscops.train.trackers import choose_trackers

CPU_LAUNCH = (
    "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
    "--dynamo_backend no --num_cpu_threads_per_process 1 --main_process_port 0"
)
Result = TypeVar("Result")
_MASKS_LOOKED_AT = 64
_ENOUGH_IMAGES = 64  # for each GPU at a time; not measured on a GPU


def start_accelerator(config: Config, trackers: Sequence[str] = ()) -> Accelerator:
    """Joins the other processes.

    Args:
        trackers: trackers to log to besides TensorBoard.

    Raises:
        UserError: the launcher started another number of processes than it was asked for, or than the settings want,
            the global batch cannot be divided among them, the precision is not supported, or a tracker is missing.
    """
    # This is checked before the processes connect and before a GPU is used.
    if config.train.num_processes not in (None, console.world_size()):
        raise UserError(
            f"train.num_processes is {config.train.num_processes}, but {console.world_size()} were started; "
            "give the launcher that number or drop the setting"
        )
    _check_precision(config)
    microbatches_of_process(config, console.world_size())
    if torch.cuda.is_available():
        choose_kernels(config.train.reduction)
    accelerator = join_processes(
        mixed_precision=config.train.mixed_precision,
        log_with=choose_trackers(trackers, config),
        project_dir=config.run_dir,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timeout_of(config)),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
        ],
    )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    warn_of_small_share(config, accelerator.device, accelerator.num_processes)
    return accelerator


def timeout_of(config: Config) -> timedelta:
    """How long a process waits for the others, in whichever group."""
    return timedelta(minutes=config.train.timeout_minutes)


def warn_of_small_share(config: Config, device: torch.device, num_processes: int) -> None:
    """Warns if a GPU gets so few images at a time that it waits for the host, which launches about 700 kernels a step.

    Eight GPUs with 8 images each would then be no faster than one with 64.
    """
    share = config.train.batch_size // (num_processes * microbatches_of_process(config, num_processes))
    is_small = device.type == "cuda" and share < _ENOUGH_IMAGES and config.encoder.name != "features"
    if not is_small or config.train.compile or not console.is_main():
        return
    console.warn(
        f"each GPU takes {share} images at a time, fewer than {_ENOUGH_IMAGES}, and will wait for its host; faster are "
        f"train.compile=true, train.batch_size={_ENOUGH_IMAGES * config.train.batch_size // share}, or fewer processes"
    )


def _check_precision(config: Config) -> None:
    """Refuses a precision that only the launcher knows, such as fp16: the loop would clip gradients still scaled."""
    asked = config.train.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in get_args(MixedPrecision):
        raise UserError(
            f"the launcher asks for {asked}, needed one of {', '.join(get_args(MixedPrecision))}; launch with "
            "--mixed_precision bf16, or set train.mixed_precision=bf16"
        )


def join_processes(**arguments: Any) -> Accelerator:
    """Joins the other processes; `arguments` are Accelerate's own.

    Raises:
        UserError: the launcher started another number of processes than it was asked for.
    """
    _check_environment()
    # Between hosts, each process connects to those that it sends to, about log2 of their number, and not to all: at 512
    # processes the sockets of one group would be more than a process may have open.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    accelerator = Accelerator(**arguments)
    if accelerator.num_processes != console.world_size():
        raise UserError(
            f"the launcher promised {console.world_size()} processes, but each runs alone (--multi_gpu without a GPU "
            f"for each); on CPUs launch with: {CPU_LAUNCH}"
        )
    return accelerator


def microbatches_of_process(config: Config, num_processes: int) -> int:
    """Number of microbatches into which each process divides its share of the global batch.

    Raises:
        UserError: the batch cannot be divided equally.
    """
    train = config.train
    if train.reduction == "ddp":
        plan.check_divisible(train.batch_size, num_processes, train.accumulation_steps)
        return train.accumulation_steps
    if train.accumulation_steps != 1:
        raise UserError(
            f"train.accumulation_steps is {train.accumulation_steps}, but train.reduction=deterministic splits the "
            "batch into train.microbatches; set train.accumulation_steps=1"
        )
    if train.microbatches % num_processes or train.batch_size % train.microbatches:
        raise UserError(
            f"train.microbatches is {train.microbatches}, needed a multiple of the {num_processes} processes that "
            f"divides train.batch_size, {train.batch_size}"
        )
    return train.microbatches // num_processes


def check_same_on_all_ranks(config: Config, dataset: ShardDataset, cache: FeatureCache) -> None:
    """Refuses to train if settings or data differ between processes, such as an old copy on one node.

    One process of each node looks whether all files of the shards and features are there.

    Raises:
        UserError: on every process. Something differs, and the message names it and the ranks; or a file is missing.
    """
    missing = _find_missing_file(dataset, cache) if console.is_first_on_node() else ""
    if missing and console.world_size() == 1:
        raise UserError(missing)
    if console.world_size() == 1:
        return
    mine = {
        "settings": sha256_of_json(to_mapping(config) | {"data": config.data.size, "run_dir": ""}),
        "shards": dataset.digest,
        "features": cache.digest,
    }
    everyone: list[Any] = [None] * console.world_size()
    with _between_hosts(timeout_of(config)) as group:
        dist.all_gather_object(everyone, (missing, mine), group=group)
    for missing, _ in everyone:
        if missing:
            raise UserError(missing)
    for what, first in everyone[0][1].items():
        others = [str(rank) for rank, (_, theirs) in enumerate(everyone) if theirs[what] != first]
        if others:
            raise UserError(
                f"rank {', '.join(others)} came with {what} other than rank 0's ({first[:12]}); give every process "
                "the same command, shards and run folder"
            )


def _find_missing_file(dataset: ShardDataset, cache: FeatureCache) -> str:
    """What is wrong with the first file that is missing or has another size; empty if all are there."""
    try:
        check_tars(dataset)
        check_feature_files(cache)
    except UserError as error:
        return str(error)
    return ""


def on_first_process(work: Callable[[], Result], timeout: timedelta) -> Result:
    """Runs `work` on rank 0 and gives its result to all processes; all must call it.

    Args:
        timeout: how long the other processes wait for the result; see `timeout_of`.

    Raises:
        UserError, RunError: on every process, if `work` raises it.
    """
    if console.world_size() == 1:
        return work()
    outcome: list[Any] = [None, None]  # result, error
    if console.is_main():
        try:
            outcome[0] = work()
        except (UserError, RunError) as error:
            outcome[1] = error
    with _between_hosts(timeout) as group:
        dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    result: Result = outcome[0]
    return result


def read_on_first_process(find: Callable[[], Checkpoint | None], timeout: timedelta) -> Checkpoint | None:
    """The checkpoint that `find` finds on rank 0, sent to all processes; all must call it.

    Each file is thus opened once, however many processes resume, and only rank 0 has to see the run's folder.

    Args:
        timeout: how long the other processes wait for each message; see `timeout_of`.

    Raises:
        UserError: on every process, if `find` raises it.
    """
    if console.world_size() == 1:
        return find()
    own: list[Checkpoint] = []

    def describe() -> Checkpoint | None:
        found = find()
        if found is None:
            return None
        own.append(found)
        return found.with_tensors(lambda tensor: tensor.to("meta"))  # shapes and types without values

    described = on_first_process(describe, timeout)
    if described is None:
        return None
    checkpoint = own[0] if own else described.with_tensors(lambda tensor: torch.empty_like(tensor, device="cpu"))
    with _between_hosts(timeout) as group:
        for tensor in checkpoint.tensors():
            dist.broadcast(tensor.view(-1).view(torch.uint8), src=0, group=group)
    return checkpoint


@contextmanager
def _between_hosts(timeout: timedelta) -> Iterator[Any]:
    """A group of all processes for messages before the training, which takes no GPU memory. Its sockets are closed."""
    # A new group does not inherit the default group's timeout.
    group: Any = dist.new_group(backend="gloo", timeout=timeout)
    try:
        yield group
    finally:
        dist.destroy_process_group(group)


def _check_environment() -> None:
    # accelerate launch --cpu --num_processes N sets the address of a process group and then starts one process.
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        raise UserError(
            f"the launcher was asked for several processes but started one; on CPUs launch with: {CPU_LAUNCH}"
        )


def open_training_data(config: Config) -> tuple[ShardDataset, FeatureCache]:
    """Opens the shards and their feature cache, and checks them against the settings.

    Whether each of their files is there, `check_same_on_all_ranks` finds out.

    Raises:
        UserError: no or unfinished shards, another crop size, a cache that does not fit.
    """
    dataset = open_dataset_of_size(config)
    _check_layer_weights(config)
    network, layer, weights = config.teacher.network, config.teacher.layer, config.teacher.weights
    sha256 = None if weights is None else Teacher(layer, weights, network).fingerprint
    # If the cache cannot follow an augmentation, this raises an error that names it.
    size, compact = config.teacher_size, Compact.of(config.teacher)
    cache = open_cache(dataset, layer, size, sha256, network, config.data.mirror, check_files=False, compact=compact)
    warn_if_random(cache)
    if cache.has_negative and config.basis.kind == "relu" and config.losses.semantic and console.is_main():
        console.warn(
            f"{cache.folder}: holds negative numbers, which no basis of basis.kind=relu rebuilds; set basis.kind=free"
        )
    _warn_if_fetched_again_and_again(dataset, cache)
    return dataset, cache


def _check_layer_weights(config: Config) -> None:
    weights, layers = config.teacher.layer_weights, config.teacher.layer.split("+")
    if weights is not None and len(weights) != len(layers):
        raise UserError(
            f"teacher.layer_weights has {len(weights)} number(s), but teacher.layer joins {len(layers)}, "
            f"{config.teacher.layer}; give one number for each layer"
        )
    if weights is not None and config.teacher.components is not None:
        raise UserError(
            f"teacher.layer_weights weighs the channels of each layer, but each of the {config.teacher.components} "
            "teacher.components mixes those of all layers; set one of the two to null"
        )


def check_object_masks(split: Split) -> None:
    """Refuses masks that show no objects: photos without label maps count as objects as a whole.

    Such a mask is all of the photo, which spans the crop from side to side or from top to bottom. The first photos of
    the split are looked at.

    Raises:
        UserError: the mask of each of them is the whole photo.
    """
    masks = replace(split, cache=None).read(np.arange(min(_MASKS_LOOKED_AT, len(split)))).object_masks
    assert masks is not None
    rows, columns = masks.any(2), masks.any(1)  # (B, S) each
    fills_its_box = (masks == rows[:, :, None] & columns[:, None, :]).all((1, 2))
    spans_the_crop = rows.all(1) | columns.all(1)
    if len(masks) and (fills_its_box & spans_the_crop).all():
        raise UserError(
            f"{split.dataset.location}: losses.target_mask is object, but the photos have no masks: each counts as an "
            "object as a whole; set losses.target_mask=guessed, or give label maps to shard with --parts"
        )


def weigh_layers(target: TargetTransform, config: Config) -> None:
    """Tells the target which channels belong to which layer, if `teacher.layer_weights` is set."""
    if config.teacher.layer_weights is not None:
        target.weigh_layers(channels_of_layers(config.teacher.network, config.teacher.layer))


def _warn_if_fetched_again_and_again(dataset: ShardDataset, cache: FeatureCache) -> None:
    """Warns if the cache is smaller than the data. Training reads in random order and would fetch again and again."""
    if dataset.remote is None or not console.is_main():
        return
    entries = dataset.split("train")
    needed = sum(entry.num_bytes for entry in entries)
    for features in [cache] if cache.mirrored is None else [cache, cache.mirrored]:
        needed += sum(features.manifest["files"][entry.name]["bytes"] for entry in entries)
    if needed > dataset.remote.max_bytes:
        console.warn(
            f"{dataset.location}: has {needed / 1e9:.3g} GB to train on, but the cache holds "
            f"{dataset.remote.max_bytes / 1e9:.3g}; shards will be fetched again and again: set SLOTSCOPS_CACHE_GB to "
            f"more than {needed / 1e9:.3g}"
        )


def open_dataset_of_size(config: Config) -> ShardDataset:
    """Opens the shards. Raises UserError if they hold crops of another size than `data.size`."""
    dataset = open_dataset(config.data.shards, check_files=False)
    if dataset.size != config.data.size:
        raise UserError(
            f"{config.data.shards}: holds crops of {dataset.size} px, but data.size is {config.data.size}; set "
            f"data.size={dataset.size} or make shards with python -m slotscops.shard --size {config.data.size}"
        )
    return dataset
