"""Scores a network without any label, to choose between trainings of the same settings.

Shapes: B images, S slots, C teacher channels on an h x w grid, H x W pixels.
"""

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from slotscops.config import Config, LossWeights
from slotscops.core.errors import UserError
from slotscops.core.records import Batch
from slotscops.core.seeding import seeded
from slotscops.loader.split import Split
from slotscops.losses.objective import compute_terms
from slotscops.metrics.scores import PartScores, normalized_mutual_information
from slotscops.metrics.scoring import BATCH_SIZE, sum_over_processes
from slotscops.model.network import ModelOutput, SlotScops

DATA_TERMS = ("semantic", "mixture")  # how well the teacher's features are explained
_SHIFT = 8  # two crops are shifted against each other by an eighth of the grid


def score_without_labels(
    network: SlotScops,
    split: Split,
    config: Config,
    samples: NDArray[np.int64] | None = None,
    accelerator: Accelerator | None = None,
) -> dict[str, float]:
    """Scores of a network that need no part label. They are the same for any number of processes.

    If the network reads photos, or the cache holds features of mirrored crops, the parts of a photo are compared with
    those of its mirror image. Otherwise they are compared between two crops of its feature grid that are shifted
    against each other.

    Args:
        split: its features are the target. Object masks are read if `losses.target_mask` is `object`.
        config: the settings that the network was trained with.
        samples: (n,) numbers of the photos to score; all of the split if not given.
        accelerator: None for a single process.

    Returns:
        agreement: mean over slots of the intersection over union of the slot's pixels in both views, in [0, 1]. A slot
            without pixels counts 0, so a collapsed network scores low.
        agreement_nmi: normalised mutual information of the labels in both views, in [0, 1]; 0 if there is one label.
        likelihood: minus the weighted sum of the losses that explain the teacher's features, semantic and mixture.
            Only comparable between networks of the same settings. NaN if neither is on.
        loss_semantic, loss_mixture: these losses, not weighted, as far as they are on.
        Every score is NaN if the network's output is not finite.

    Raises:
        UserError: if there is neither a mirror image nor a grid that is large enough for shifted crops.
    """
    split = replace(split, with_object_masks=config.losses.target_mask == "object", sparse_features=False)
    samples = np.arange(len(split)) if samples is None else samples
    batches = [samples[start : start + BATCH_SIZE] for start in range(0, len(samples), BATCH_SIZE)]
    rank, num_ranks = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    device = next(network.parameters()).device
    names = [name for name in DATA_TERMS if getattr(config.losses, name)]
    table = torch.zeros(network.num_slots, network.num_slots, dtype=torch.int64)
    # Each batch has a row of its own: the sum over processes is then exact and does not depend on their number.
    losses = torch.zeros(len(batches), len(names) + 1, dtype=torch.float64)
    was_training = network.training
    network.eval()
    for number in range(rank, len(batches), num_ranks):
        counts, sums = _score_batch(network, split, config, batches[number], device)
        table += counts
        losses[number] = sums
    network.train(was_training)
    table = sum_over_processes(table, accelerator)
    if num_ranks > 1:  # not every device of a single process knows float64
        losses = sum_over_processes(losses, accelerator)
    totals = losses.sum(0)  # (terms + 1,)
    means = dict(zip(names, (totals[:-1] / max(1, len(samples))).tolist(), strict=True))
    if not totals.isfinite().all():
        return dict.fromkeys(["agreement", "agreement_nmi", "likelihood", *(f"loss_{name}" for name in names)], np.nan)
    weighted = [getattr(config.losses, name) * value for name, value in means.items()]
    return {
        **agreement_of(table.numpy()),
        "likelihood": -sum(weighted) if weighted else np.nan,
        **{f"loss_{name}": value for name, value in means.items()},
    }


def agreement_of(table: NDArray[np.int64]) -> dict[str, float]:
    """`agreement` and `agreement_nmi` of `score_without_labels`, from (S, S) counts of pixels by both labels."""
    common = np.diag(table)
    union = table.sum(0) + table.sum(1) - common
    several = np.count_nonzero(table.sum(0)) > 1 or np.count_nonzero(table.sum(1)) > 1
    return {
        "agreement": float(np.mean(common / np.maximum(union, 1))),
        "agreement_nmi": normalized_mutual_information(table) if several else 0.0,
    }


@torch.no_grad()
def _score_batch(
    network: SlotScops, split: Split, config: Config, samples: NDArray[np.int64], device: torch.device
) -> tuple[Tensor, Tensor]:
    """(S, S) pixel counts of the labels in both views, and the sums over images of each loss and of all logits."""
    batch = split.read(samples).to(device)
    only_data: dict[str, Any] = dict.fromkeys(asdict(LossWeights()), 0.0)
    only_data |= {name: getattr(config.losses, name) for name in DATA_TERMS}
    config = replace(config, losses=replace(config.losses, **only_data))
    outputs: list[ModelOutput] = []

    def forward(*inputs: Tensor, **given: Any) -> ModelOutput:
        outputs.append(network(*inputs, **given))
        return outputs[0]

    # Shared-Gaussian slots draw numbers. They are the same for every network, and training draws on as if none were.
    with seeded(config.seed, device):
        _, terms = compute_terms(forward, network.target, batch, config, 0, network.object_guess)
        # As the network gave it, as for the other view: the losses also ask the teacher which way an object faces.
        (output,) = outputs
        views = _label_views(network, split, batch, samples, output)
    scores = PartScores(network.num_slots, network.num_slots)
    scores.update(*views)
    values = [terms[name] for name in DATA_TERMS if name in terms]
    sums = [value.cpu().double() * len(batch) for value in values]
    return scores.table, torch.stack([*sums, output.logits.sum().cpu().double()])


def _label_views(
    network: SlotScops, split: Split, batch: Batch, samples: NDArray[np.int64], output: ModelOutput
) -> tuple[Tensor, Tensor]:
    """Two label maps of the same shape, of the same pixels (or cells) seen in two views of each photo."""
    size = batch.images.shape[-2:]
    class_ids = batch.class_ids if network.num_classes is not None else None
    if not network.takes_features:
        mirrored = network(batch.images.flip(3), class_ids=class_ids)
        return output.maps(size).argmax(1), mirrored.maps(size).argmax(1).flip(2)
    if split.cache is not None and split.cache.mirrored is not None:
        other = split.read(samples % len(split) + len(split)).to(batch.images.device)
        mirrored = network(other.features, class_ids=class_ids)
        return output.maps(size).argmax(1), mirrored.maps(size).argmax(1).flip(2)
    assert batch.features is not None
    height, width = batch.features.shape[-2:]
    down, across = max(1, height // _SHIFT), max(1, width // _SHIFT)
    grid = (height - down, width - across)
    if min(grid[0] - down, grid[1] - across) < 1:
        raise UserError(
            f"features on a grid of {height} x {width} cells leave nothing to compare after a shift; cache those of "
            "mirrored crops (python -m slotscops.features --mirrored) and set data.mirror=true"
        )
    first = network(batch.features[:, :, :-down, :-across], class_ids=class_ids).maps(grid).argmax(1)  # (B, h', w')
    second = network(batch.features[:, :, down:, across:], class_ids=class_ids).maps(grid).argmax(1)
    return first[:, down:, across:], second[:, :-down, :-across]
