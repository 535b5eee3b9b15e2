"""The order of training as a pure function: which sample is at which place of an endless stream.

The stream concatenates one permutation of all samples for each epoch, drawn from (seed, epoch). With a global batch of
G samples, step s takes places [s G, (s + 1) G), and each process takes an equal share of them, in order. The order
therefore does not depend on the number of processes or workers. If an epoch does not end with a full batch, the batch
is filled from the next epoch. The only state is `samples_seen`. Which samples are mirrored depends on (seed, epoch,
sample).
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from slotscops.core.errors import UserError

NUM_SUBSTITUTES = 64  # tried for a damaged sample; if all of them are damaged too, nearly the whole split is


@lru_cache(maxsize=2)  # a batch touches at most two epochs unless it is larger than the data set
def permutation(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """(N,) int64 order of all samples in one epoch. Philox gives the same numbers on every machine."""
    key = np.random.SeedSequence([seed, epoch])
    order = np.random.Generator(np.random.Philox(key)).permutation(num_samples)
    order.setflags(write=False)
    return order


def samples_at(places: NDArray[np.int64], num_samples: int, seed: int) -> NDArray[np.int64]:
    """The samples at the given places of the stream, in the shape of `places`."""
    epochs, within = np.divmod(places, num_samples)
    samples = np.empty_like(places)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        samples[here] = permutation(num_samples, seed, int(epoch))[within[here]]
    return samples


@lru_cache(maxsize=2)
def mirrored_in(num_samples: int, seed: int, epoch: int) -> NDArray[np.bool_]:
    """(N,) bool, whether each sample is mirrored in one epoch. Each is mirrored with probability 1/2."""
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch, 1])).random_raw(-(-num_samples // 64))
    mirrored = np.unpackbits(bits.astype("<u8").view(np.uint8))[:num_samples].astype(np.bool_)
    mirrored.setflags(write=False)
    return mirrored


def mirrored_at(places: NDArray[np.int64], num_samples: int, seed: int) -> NDArray[np.bool_]:
    """Whether the sample at each of the given places of the stream is mirrored: bool, in the shape of `places`."""
    epochs, samples = places // num_samples, samples_at(places, num_samples, seed)
    mirrored = np.empty(places.shape, np.bool_)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        mirrored[here] = mirrored_in(num_samples, seed, int(epoch))[samples[here]]
    return mirrored


def share_of_rank(samples_seen: int, batch_size: int, rank: int, num_ranks: int) -> NDArray[np.int64]:
    """(G / num_ranks,) int64 places of the stream that one process takes from the next global batch.

    Raises:
        UserError: if the batch cannot be divided evenly among the processes.
    """
    check_divisible(batch_size, num_ranks, 1)
    share = batch_size // num_ranks
    start = samples_seen + rank * share
    return np.arange(start, start + share, dtype=np.int64)


def check_divisible(batch_size: int, num_ranks: int, accumulation_steps: int) -> None:
    """Raises a UserError if the global batch cannot be divided into equal microbatches."""
    if batch_size % (num_ranks * accumulation_steps):
        raise UserError(
            f"train.batch_size is {batch_size}, which {num_ranks} processes x {accumulation_steps} accumulation steps "
            f"do not divide; use a multiple of {num_ranks * accumulation_steps}"
        )


def microbatches(
    first: int, last: int, batch_size: int, rank: int, num_ranks: int, accumulation_steps: int
) -> Iterator[NDArray[np.int64]]:
    """Yields the places (n,) of each microbatch of one process, in the order of training.

    Args:
        first, last: samples seen before the first microbatch and at the end.
        batch_size: G, over all processes.

    Raises:
        UserError: if the batch cannot be divided into equal microbatches.
    """
    check_divisible(batch_size, num_ranks, accumulation_steps)
    for samples_seen in range(first, last, batch_size):
        share = share_of_rank(samples_seen, batch_size, rank, num_ranks)
        yield from np.split(share, accumulation_steps)


def substitutes(sample: int, num_samples: int) -> list[int]:
    """Samples to try, in order, in place of a damaged one. They are the same on every process and worker."""
    key = np.random.SeedSequence([sample, NUM_SUBSTITUTES])
    drawn: list[int] = np.random.Generator(np.random.Philox(key)).integers(num_samples, size=NUM_SUBSTITUTES).tolist()
    return [other for other in drawn if other != sample]


@dataclass(frozen=True)
class TrainingPlan:
    """The samples that this process trains on, starting at `samples_seen`.

    Iterating yields one list of sample numbers for each microbatch. Of N samples, number N + i is sample i mirrored.
    """

    num_samples: int
    seed: int
    batch_size: int  # over all processes
    rank: int
    num_ranks: int
    accumulation_steps: int
    samples_seen: int
    last: int  # samples seen at the end of training
    mirror: bool = False  # mirror each sample with probability 1/2

    def __iter__(self) -> Iterator[list[int]]:
        for places in microbatches(
            self.samples_seen, self.last, self.batch_size, self.rank, self.num_ranks, self.accumulation_steps
        ):
            samples = samples_at(places, self.num_samples, self.seed)
            if self.mirror:
                samples += self.num_samples * mirrored_at(places, self.num_samples, self.seed)
            yield samples.tolist()

    def global_batch(self, samples_seen: int) -> list[int]:
        """The samples of all processes in the step after `samples_seen` samples, in order, without mirroring."""
        places = share_of_rank(samples_seen, self.batch_size, 0, 1)
        samples: list[int] = samples_at(places, self.num_samples, self.seed).tolist()
        return samples


def batch_digest(keys: Iterable[str]) -> str:
    """Hash of a global batch's record keys in order, 16 hex digits."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16]
