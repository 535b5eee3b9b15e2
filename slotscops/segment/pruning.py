"""Leaves dead parts out of a model that is published or exported.

A part is dead if it won less than 0.1 % of the pixels of every class in the last evaluation of the training, whose
counts every checkpoint keeps. The other parts keep their numbers, names and colours: without part 3, part 4 stays part
4, and the model says which row of its maps is which part.

Only the output changes; see `SlotScops.keep_slots` for the reason. The background is never left out.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from slotscops.core import console
from slotscops.train.build import Trained
from slotscops.train.monitors import dead_parts


def without_dead(trained: Trained) -> Trained:
    """The model without its dead parts; the same object if there is none, or if all are dead.

    Tensors are shared with the given model.
    """
    network, dead = trained.network, find_dead(trained)
    kept = [number for number in network.slot_numbers if number not in dead]
    if not dead or len(kept) == 1:
        return trained
    pruned = copy.copy(network)  # its modules and tensors are the given network's
    pruned.keep_slots(kept)
    return trained._replace(network=pruned, state=replace(trained.state, slot_numbers=kept))


def tell_left_out(trained: Trained, how_to_keep: str) -> None:
    """Prints one line if `without_dead` leaves parts out of the model, or does not because all are dead.

    Args:
        how_to_keep: what the user does to keep them.
    """
    dead = find_dead(trained)
    if not dead:
        return
    if len(dead) == trained.network.num_slots - 1:
        console.warn(f"{trained.path}: every part is dead in its last evaluation, so none is left out")
        return
    console.say(
        f"{trained.path}: {left_out_in_words(dead)}; the others keep their numbers ({how_to_keep} keeps all parts)"
    )


def find_dead(trained: Trained) -> list[int]:
    """Numbers of the dead parts that the model still has. Empty if no evaluation counted pixels."""
    counts = np.array(list(trained.state.slot_pixels.values()), np.int64)
    network = trained.network
    if counts.ndim != 2 or counts.shape[1] != network.basis.num_parts + 1:
        return []
    if network.num_classes is None:
        counts = counts.sum(axis=0, keepdims=True)
    return [number for number in dead_parts(counts) if number in network.slot_numbers]


def left_out_in_words(numbers: Sequence[int]) -> str:
    """Says which parts are left out, and why."""
    which, verb = ("part", "is") if len(numbers) == 1 else ("parts", "are")
    listed = ", ".join(map(str, numbers))
    return f"{which} {listed} won less than 0.1 % of the pixels of the last evaluation and {verb} left out"
