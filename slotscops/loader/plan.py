"""The order of training, as a pure function: which sample stands at which place of the endless stream.

The stream is one permutation of all samples after the other, a fresh one each epoch, drawn from (seed, epoch). Step s
of global batch G takes places [s G, (s + 1) G); each process takes its equal share of them, in order. So the order
does not depend on the number of processes or workers, the tail of an epoch that fills no batch opens the next one,
and `samples_seen` is all the state there is. Which samples are mirrored is drawn from (seed, epoch, sample) alike.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from slotscops.core.errors import UserError

NUM_SUBSTITUTES = 64  # drawn for a damaged sample; where all are damaged too, hardly anything is whole


@lru_cache(maxsize=2)  # a batch touches at most two epochs unless it is larger than the data set
def permutation(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """(N,) order of all samples in one epoch. Philox is counter-based and the same on every machine."""
    key = np.random.SeedSequence([seed, epoch])
    order = np.random.Generator(np.random.Philox(key)).permutation(num_samples)
    order.setflags(write=False)
    return order


def samples_at(places: NDArray[np.int64], num_samples: int, seed: int) -> NDArray[np.int64]:
    """The samples standing at the given places of the stream. Same shape as `places`."""
    epochs, within = np.divmod(places, num_samples)
    samples = np.empty_like(places)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        samples[here] = permutation(num_samples, seed, int(epoch))[within[here]]
    return samples


@lru_cache(maxsize=2)
def mirrored_in(num_samples: int, seed: int, epoch: int) -> NDArray[np.bool_]:
    """(N,) whether each sample is mirrored in one epoch: one bit a sample, half of them set."""
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch, 1])).random_raw(-(-num_samples // 64))
    mirrored = np.unpackbits(bits.astype("<u8").view(np.uint8))[:num_samples].astype(np.bool_)
    mirrored.setflags(write=False)
    return mirrored


def mirrored_at(places: NDArray[np.int64], num_samples: int, seed: int) -> NDArray[np.bool_]:
    """Whether the samples standing at the given places of the stream are mirrored there. Same shape as `places`."""
    epochs, samples = places // num_samples, samples_at(places, num_samples, seed)
    mirrored = np.empty(places.shape, np.bool_)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        mirrored[here] = mirrored_in(num_samples, seed, int(epoch))[samples[here]]
    return mirrored


def share_of_rank(samples_seen: int, batch_size: int, rank: int, num_ranks: int) -> NDArray[np.int64]:
    """(G / ranks,) places of the stream that one process takes of the next global batch.

    Raises:
        UserError: the batch cannot be divided evenly.
    """
    check_divisible(batch_size, num_ranks, 1)
    share = batch_size // num_ranks
    start = samples_seen + rank * share
    return np.arange(start, start + share, dtype=np.int64)


def check_divisible(batch_size: int, num_ranks: int, accumulation_steps: int) -> None:
    if batch_size % (num_ranks * accumulation_steps):
        raise UserError(
            f"train.batch_size is {batch_size}, which {num_ranks} processes x {accumulation_steps} accumulation steps "
            f"do not divide; use a multiple of {num_ranks * accumulation_steps}"
        )


def microbatches(
    first: int, last: int, batch_size: int, rank: int, num_ranks: int, accumulation_steps: int
) -> Iterator[NDArray[np.int64]]:
    """Places of one process's microbatches, from `first` to `last` samples seen, in the order they are trained on."""
    check_divisible(batch_size, num_ranks, accumulation_steps)
    for samples_seen in range(first, last, batch_size):
        share = share_of_rank(samples_seen, batch_size, rank, num_ranks)
        yield from np.split(share, accumulation_steps)


def substitutes(sample: int, num_samples: int) -> list[int]:
    """Samples to take, the first whole one, in the place of a damaged one; the same on every process and worker."""
    key = np.random.SeedSequence([sample, NUM_SUBSTITUTES])
    drawn: list[int] = np.random.Generator(np.random.Philox(key)).integers(num_samples, size=NUM_SUBSTITUTES).tolist()
    return [other for other in drawn if other != sample]


@dataclass(frozen=True)
class TrainingPlan:
    """Which samples this process trains on, from `samples_seen` on.

    Iterates over microbatches; number N + i among N samples is sample i mirrored.
    """

    num_samples: int
    seed: int
    batch_size: int  # global
    rank: int
    num_ranks: int
    accumulation_steps: int
    samples_seen: int
    last: int  # samples seen at the end of training
    mirror: bool = False  # each sample with probability 1/2

    def __iter__(self) -> Iterator[list[int]]:
        for places in microbatches(
            self.samples_seen, self.last, self.batch_size, self.rank, self.num_ranks, self.accumulation_steps
        ):
            samples = samples_at(places, self.num_samples, self.seed)
            if self.mirror:
                samples += self.num_samples * mirrored_at(places, self.num_samples, self.seed)
            yield samples.tolist()

    def global_batch(self, samples_seen: int) -> list[int]:
        """The samples of all processes at a step, in order, mirrored or not."""
        places = share_of_rank(samples_seen, self.batch_size, 0, 1)
        samples: list[int] = samples_at(places, self.num_samples, self.seed).tolist()
        return samples


def batch_digest(keys: Iterable[str]) -> str:
    """Hash of a global batch's record keys in order, 16 hex digits."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16]
