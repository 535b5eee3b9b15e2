"""The order of training as a pure function: which sample is at which place of an endless stream.

The stream concatenates one permutation of all samples for each epoch, keyed by (seed, epoch). With a global batch of
G samples, step s takes places [s G, (s + 1) G), and each process takes an equal share of them, in order. The order
therefore does not depend on the number of processes or workers. If an epoch does not end with a full batch, the batch
is filled from the next epoch. The only state is `samples_seen`. Which samples are mirrored depends on (seed, epoch,
sample).

Nothing here grows with the number of samples: the sample at any place is computed when it is needed.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from slotscops.core.errors import UserError

ORDER = 2  # number of the rule for the order; a run goes on only by the rule that it began with
NUM_SUBSTITUTES = 64  # tried for a damaged sample; if all of them are damaged too, nearly the whole split is
_HELD_OUT = 2**32 - 1  # the epoch whose order says which samples are held out; no training gets that far
_ROUNDS = 12  # with 8, the orders of 5 and 6 samples were not equally likely
_AT_ONCE = 8192  # numbers that are computed at once: the intermediate arrays then stay in the processor's cache
_HALF = np.uint64(32)  # bits


def permute(places: NDArray[np.int64], num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The samples at the given places of one epoch's order, in the shape of `places`.

    It maps [0, N) to itself one to one, without an array of N numbers. A place is written as (row, column) of a table
    of about sqrt(N) rows and as many columns. Each round of a Feistel network shifts the row by a hash of the column or
    the column by a hash of the row, which can be undone, so that the network permutes the cells of the table. The table
    has up to sqrt(N) cells more than there are samples. A place that leads to such a cell goes on from there until it
    reaches a sample, which keeps the map one to one (cycle walking).

    Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains (CT-RSA 2002), methods 2 and 3.

    Args:
        places: int64 in [0, N).
        num_samples: N, at most 2^62.
    """
    num_rows = math.isqrt(num_samples - 1) + 1
    num_columns = -(-num_samples // num_rows)
    keys = _keys(seed, epoch)
    samples = places.astype(np.uint64).reshape(-1)
    for start in range(0, len(samples), _AT_ONCE):
        part = samples[start : start + _AT_ONCE]
        part[:] = _shuffle_cells(part, num_rows, num_columns, keys)
    while (beyond := np.flatnonzero(samples >= num_samples)).size:
        samples[beyond] = _shuffle_cells(samples[beyond], num_rows, num_columns, keys)
    return samples.astype(np.int64).reshape(places.shape)


def _shuffle_cells(
    cells: NDArray[np.uint64], num_rows: int, num_columns: int, keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """The numbers of the cells to which the network takes the given ones. Cell = row * num_columns + column."""
    rows, columns = np.divmod(cells, np.uint64(num_columns))
    for number in range(_ROUNDS):
        if number % 2 == 0:
            rows = _shift(rows, columns, keys[number], num_rows)
        else:
            columns = _shift(columns, rows, keys[number], num_columns)
    return rows * np.uint64(num_columns) + columns


def _shift(numbers: NDArray[np.uint64], others: NDArray[np.uint64], key: np.uint64, bound: int) -> NDArray[np.uint64]:
    """(number + hash of the other) modulo `bound`, which is less than 2^32."""
    drawn = ((_hash(others, key) >> _HALF) * np.uint64(bound)) >> _HALF  # in [0, bound), without a slow division
    shifted: NDArray[np.uint64] = numbers + drawn
    shifted[shifted >= bound] -= np.uint64(bound)
    return shifted


def _hash(numbers: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """64 well mixed bits of each number and a key, by the mixer of splitmix64 (modulo 2^64)."""
    mixed = numbers ^ key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


@lru_cache(maxsize=8)
def _keys(*numbers: int) -> NDArray[np.uint64]:
    """(_ROUNDS,) keys, the same on every machine."""
    keys: NDArray[np.uint64] = np.random.SeedSequence(numbers).generate_state(_ROUNDS, np.uint64).astype(np.uint64)
    return keys


def permutation(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """(N,) int64 order of all samples in one epoch."""
    return permute(np.arange(num_samples), num_samples, seed, epoch)


def samples_at(places: NDArray[np.int64], num_samples: int, seed: int) -> NDArray[np.int64]:
    """The samples at the given places of the stream, in the shape of `places`."""
    epochs, within = np.divmod(places, num_samples)
    samples = np.empty_like(places)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        samples[here] = permute(within[here], num_samples, seed, int(epoch))
    return samples


def mirrored_in(samples: NDArray[np.int64], seed: int, epoch: int) -> NDArray[np.bool_]:
    """Whether each sample is mirrored in one epoch: bool, each with probability 1/2."""
    mirrored: NDArray[np.bool_] = _hash(samples.astype(np.uint64), _keys(seed, epoch, 1)[0]) >= np.uint64(1 << 63)
    return mirrored


def mirrored_at(places: NDArray[np.int64], num_samples: int, seed: int) -> NDArray[np.bool_]:
    """Whether the sample at each of the given places of the stream is mirrored: bool, in the shape of `places`."""
    epochs, samples = places // num_samples, samples_at(places, num_samples, seed)
    mirrored = np.empty(places.shape, np.bool_)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        mirrored[here] = mirrored_in(samples[here], seed, int(epoch))
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


def held_out_samples(num_samples: int, num_held_out: int, seed: int) -> NDArray[np.int64]:
    """(n,) the samples that a plan with `num_held_out` n leaves out: n of all N at random, the same in every epoch."""
    return permute(np.arange(num_samples - num_held_out, num_samples), num_samples, seed, _HELD_OUT)


def disjoint_halves(
    num_samples: int, num_held_out: int, seed: int, repeat: int, most: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Two sets of samples of equal size, without a common one and without those of `held_out_samples`, in order.

    Args:
        repeat: each number divides the samples in another way.
        most: the largest size of a set. Otherwise it is half of the samples that are not held out.

    Returns:
        (n,) and (n,) sample numbers.
    """
    num_used = num_samples - num_held_out
    size = min(num_used // 2, most)
    places = permute(np.arange(2 * size), num_used, seed, repeat)
    samples = permute(places, num_samples, seed, _HELD_OUT)
    return np.sort(samples[:size]), np.sort(samples[size:])


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
    num_held_out: int = 0  # so many samples are left out, those of `held_out_samples`

    def __iter__(self) -> Iterator[list[int]]:
        for places in microbatches(
            self.samples_seen, self.last, self.batch_size, self.rank, self.num_ranks, self.accumulation_steps
        ):
            num_used = self.num_samples - self.num_held_out
            samples = samples_at(places, num_used, self.seed)
            if self.num_held_out:
                samples = permute(samples, self.num_samples, self.seed, _HELD_OUT)
            if self.mirror:
                samples += self.num_samples * mirrored_at(places, num_used, self.seed)
            yield samples.tolist()

    def global_batch(self, samples_seen: int) -> NDArray[np.int64]:
        """(G,) samples of all processes in the step after `samples_seen` samples, in order, without mirroring."""
        return samples_at(share_of_rank(samples_seen, self.batch_size, 0, 1), self.num_samples, self.seed)


def batch_digest(samples: NDArray[np.int64]) -> str:
    """Hash of a global batch's sample numbers in order, 16 hex digits."""
    return hashlib.sha256(samples.astype("<i8").tobytes()).hexdigest()[:16]
