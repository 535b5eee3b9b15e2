"""Slot Attention against its pseudocode, positions by hand, the head against the sum of its convolutions."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from slotscops.model.decoder import DilatedHead, SlotDecoder
from slotscops.model.slots import SlotAttention, SoftPositionEncoding

Array = NDArray[np.float64]

# ---- slots -------------------------------------------------------------------------------------------------------


def layer_norm(x: Array, norm: nn.LayerNorm) -> Array:
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    normalised: Array = (x - mean) / np.sqrt(variance + 1e-5) * array(norm.weight) + array(norm.bias)
    return normalised


def array(tensor: Tensor) -> Array:
    return np.asarray(tensor.detach().double())


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def gru(inputs: Array, state: Array, cell: nn.GRUCell) -> Array:
    """Cho et al. (arXiv:1406.1078) with the gates in PyTorch's order: reset, update, new."""
    i_r, i_z, i_n = np.split(array(cell.weight_ih) @ inputs + array(cell.bias_ih), 3)
    h_r, h_z, h_n = np.split(array(cell.weight_hh) @ state + array(cell.bias_hh), 3)
    reset, update = sigmoid(i_r + h_r), sigmoid(i_z + h_z)
    new = np.tanh(i_n + reset * h_n)
    return (1 - update) * new + update * state


def algorithm_1(module: SlotAttention, inputs: Array, slots: Array) -> tuple[Array, Array]:
    """Slot Attention of one image line by line as in the paper's pseudocode, with loops over slots and positions."""
    inputs = layer_norm(inputs, module.norm_inputs)
    k, v = inputs @ array(module.key.weight).T, inputs @ array(module.value.weight).T  # (N, D)
    num_positions, num_slots = len(inputs), len(slots)
    attn = np.zeros((num_positions, num_slots))
    for _ in range(module.num_iterations):
        slots_prev = slots
        q = layer_norm(slots, module.norm_slots) @ array(module.query.weight).T  # (S, D)
        for n in range(num_positions):
            scores = np.exp([k[n] @ q[s] / math.sqrt(module.dim) for s in range(num_slots)])
            attn[n] = scores / scores.sum()
        new_slots = []
        for s in range(num_slots):
            weights = attn[:, s] + module.epsilon
            update = sum(weights[n] / weights.sum() * v[n] for n in range(num_positions))
            slot = gru(np.asarray(update), slots_prev[s], module.gru)
            first, second = module.mlp[0], module.mlp[2]
            assert isinstance(first, nn.Linear)
            assert isinstance(second, nn.Linear)
            hidden = np.maximum(array(first.weight) @ layer_norm(slot, module.norm_mlp) + array(first.bias), 0)
            new_slots.append(slot + array(second.weight) @ hidden + array(second.bias))
        slots = np.stack(new_slots)
    return slots, attn.T


@pytest.mark.parametrize(("init", "epsilon"), [("learned", 1e-8), ("shared_gaussian", 1e-8), ("learned", 0.1)])
def test_slot_attention_is_algorithm_1(init: str, epsilon: float) -> None:
    module = SlotAttention(4, dim=12, num_iterations=3, hidden_dim=20, init=init, epsilon=epsilon)  # type: ignore[arg-type]
    for parameter in module.parameters():  # so that no scale of 1 or bias of 0 hides a mistake
        nn.init.normal_(parameter, std=0.5)
    inputs, noise = torch.randn(2, 9, 12), torch.randn(2, 4, 12)
    if init == "learned":
        slots, attention = module(inputs)
        start = array(module.starts.start)[None].repeat(2, axis=0)
    else:
        slots, attention = module(inputs, noise)
        start = array(module.starts.mean) + np.exp(array(module.starts.log_sigma)) * array(noise)
    for image in range(2):
        expected_slots, expected_attention = algorithm_1(module, array(inputs[image]), start[image])
        np.testing.assert_allclose(array(slots[image]), expected_slots, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(array(attention[image]), expected_attention, rtol=1e-4, atol=1e-6)


def test_permuting_shared_gaussian_slots_permutes_the_result() -> None:
    module = SlotAttention(5, dim=16, init="shared_gaussian")
    inputs, noise, order = torch.randn(2, 30, 16), torch.randn(2, 5, 16), torch.tensor([3, 0, 4, 1, 2])
    slots, attention = module(inputs, noise)
    permuted_slots, permuted_attention = module(inputs, noise[:, order])
    torch.testing.assert_close(permuted_slots, slots[:, order])
    torch.testing.assert_close(permuted_attention, attention[:, order])


def test_permuting_positions_leaves_the_slots_as_they_are() -> None:
    module, inputs, order = SlotAttention(5, dim=16), torch.randn(2, 30, 16), torch.randperm(30)
    slots, attention = module(inputs)
    permuted_slots, permuted_attention = module(inputs[:, order])
    torch.testing.assert_close(permuted_slots, slots, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(permuted_attention, attention[:, :, order], rtol=1e-4, atol=1e-5)


def test_shared_gaussian_slots_are_drawn_from_the_global_generator() -> None:
    module, inputs = SlotAttention(5, dim=16, init="shared_gaussian"), torch.randn(2, 30, 16)
    torch.manual_seed(3)
    first, second = module(inputs)[0], module(inputs)[0]
    torch.manual_seed(3)
    assert torch.equal(module(inputs)[0], first)
    assert not torch.equal(first, second)


def test_learned_slots_start_apart_and_stay_apart() -> None:
    slots, attention = SlotAttention(6)(torch.randn(4, 289, 64))
    spread = (slots - slots.mean(dim=1, keepdim=True)).norm(dim=-1).mean() / slots.norm(dim=-1).mean()
    assert spread > 0.5  # measured: 0.7, and 0.4 for starts a tenth as large
    assert attention.std(dim=1).mean() > 0.02


def test_positions_run_from_zero_to_one_down_and_to_the_right() -> None:
    encoding = SoftPositionEncoding(4)
    with torch.no_grad():
        encoding.project.weight.copy_(torch.eye(4))
        encoding.project.bias.zero_()
    added = encoding(torch.full((1, 4, 3, 5), 2.0))[0] - 2
    torch.testing.assert_close(added[:, 0, 0], torch.tensor([0.0, 0, 1, 1]))
    torch.testing.assert_close(added[:, 2, 0], torch.tensor([1.0, 0, 0, 1]))
    torch.testing.assert_close(added[:, 1, 1], torch.tensor([0.5, 0.25, 0.5, 0.75]))


# ---- decoder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [8, 30])
def test_the_head_is_the_sum_of_four_dilated_convolutions(grid: int) -> None:
    head, maps = DilatedHead(16, 2), torch.randn(3, 16, grid, grid)
    expected = torch.zeros(3, 2, grid, grid)
    for branch, dilation in zip(head.branches, (6, 12, 18, 24), strict=True):
        assert isinstance(branch, nn.Conv2d)
        expected += functional.conv2d(maps, branch.weight, branch.bias, padding=dilation, dilation=dilation)
    torch.testing.assert_close(head(maps), expected)


def test_the_broadcast_is_the_slot_everywhere_plus_the_positions() -> None:
    decoder, slots = SlotDecoder(16, grid=8), torch.randn(2, 3, 16)
    broadcast, slot_logits = decoder(slots)
    positions = decoder.positions(torch.zeros(1, 16, 8, 8))
    torch.testing.assert_close(broadcast[4], slots[1, 1][:, None, None] + positions[0])
    torch.testing.assert_close(slot_logits, decoder.head(broadcast))
