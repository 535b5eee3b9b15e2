"""Slot Attention, and the soft positional encoding of its input.

Shapes: B images, S slots, N = h * w positions, C channels, D slot dimension, G classes of objects.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from slotscops.config import SlotGradient, SlotInit
from slotscops.core.constants import made_once
from slotscops.model.saved_names import save_as_own
from slotscops.model.starts import build_starts


class SoftPositionEncoding(nn.Module):
    """Adds a linear map of [y, x, 1 - y, 1 - x] to every position. y and x run from 0 to 1 over the grid.

    Source: Locatello et al. (arXiv:2006.15055), appendix E.2.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.project = nn.Linear(4, channels)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        batch, _, height, width = maps.shape  # len() would fix the batch size of an exported model
        grid = _position_grid(height, width, maps.device)  # (N, 5)
        rows = torch.cat([self.project.weight.T, self.project.bias[None]])  # (5, C)
        # This is a matrix product, because the gradient of a broadcast sum is a sum over the batch. That sum took a
        # third of the time of everything between a ResNet-50 and its slots (CPU, batch 16).
        tokens = maps.flatten(2).transpose(1, 2)  # (B, N, C)
        placed = torch.baddbmm(tokens, grid.expand(batch, -1, -1), rows.expand(batch, -1, -1))  # (B, N, C)
        return placed.transpose(1, 2).reshape(maps.shape)


@made_once
def _position_grid(height: int, width: int, device: torch.device) -> Tensor:
    """(N, 5): y, x, 1 - y, 1 - x and 1 at every position."""
    y = torch.linspace(0, 1, height, device=device)[:, None].expand(height, width)  # (h, w)
    x = torch.linspace(0, 1, width, device=device)[None].expand(height, width)  # (h, w)
    return torch.stack([y, x, 1 - y, 1 - x, torch.ones_like(y)], dim=-1).flatten(0, 1)


class SlotAttention(nn.Module):
    """Slots compete for the input positions, and each slot is updated from the positions that it wins.

        attn = softmax_over_slots(k(x) q(slots)^T / sqrt(D))
        updates = weighted mean over positions of v(x), weights attn + epsilon
        slots = GRU(state=slots, input=updates);  slots += MLP(LayerNorm(slots))

    Source: Locatello et al. (arXiv:2006.15055), Algorithm 1. Difference: with `learned`, each slot has a learned start
    of its own instead of a draw from one shared Gaussian, so that slot s means the same in every image.
    """

    def __init__(
        self,
        num_slots: int,
        dim: int = 64,
        num_iterations: int = 3,
        hidden_dim: int = 128,
        init: SlotInit = "learned",
        epsilon: float = 1e-8,
        gradient: SlotGradient = "full",
        attached_iterations: int = 1,
        num_classes: int | None = None,
    ) -> None:
        """
        Args:
            num_slots: S.
            dim: D, the dimension of inputs and slots.
            num_iterations: how often the slots are updated.
            hidden_dim: width of the residual MLP.
            init: `learned`: one start for each slot. `shared_gaussian`: as in the paper. `image_conditioned`: as
                `learned`, plus a linear map of the mean of the normalised inputs, which is zero at first.
            epsilon: added to every attention weight, so that the mean of a slot that wins nothing is defined.
            gradient: the iterations through which the gradient flows. `full`: all. `last_iteration`: only the last,
                as if the earlier ones had found a fixed point (Chang et al., arXiv:2207.00787); the starts are then
                not trained. `bilevel`: the last, and straight through to the starts (Jia et al., arXiv:2210.08990).
            attached_iterations: how many iterations at the end count as the last one. Use 2 if the attention is the
                output, because it depends on the update of the iteration before.
            num_classes: G, if each class of objects has starts of its own. None if all classes share them.
        """
        super().__init__()
        self.num_slots, self.dim, self.num_iterations, self.epsilon = num_slots, dim, num_iterations, epsilon
        self.gradient, self.attached_iterations = gradient, attached_iterations
        self.starts = build_starts(init, num_slots, dim, num_classes)
        save_as_own(self, "starts")
        if gradient == "last_iteration":  # DDP would wait for a gradient that the starts never receive.
            self.starts.requires_grad_(False)
        self.norm_inputs = nn.LayerNorm(dim)
        self.norm_slots = nn.LayerNorm(dim)
        self.norm_mlp = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.gru = nn.GRUCell(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, dim))

    def forward(
        self, inputs: Tensor, noise: Tensor | None = None, class_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            inputs: (B, N, D).
            noise: (B, S, D) standard normal numbers for `shared_gaussian`. They are drawn here if not given.
            class_ids: (B,) int64 class of each image, needed if classes have starts of their own.

        Returns:
            slots: (B, S, D) float32.
            attention: (B, S, N) float32 of the last iteration; sums to 1 over slots.
        """
        # We compute in float32 even under autocast. bfloat16 is too coarse for the softmax and the recurrent state,
        # and the cost is negligible beside the encoder's.
        with torch.autocast(inputs.device.type, enabled=False):
            inputs = self.norm_inputs(inputs.float())
            keys, values = self._read(inputs)
            slots = self.starts(inputs, noise, class_ids)  # (B, S, D)
            start = slots
            for iteration in range(self.num_iterations):
                if self.gradient != "full" and iteration == max(0, self.num_iterations - self.attached_iterations):
                    slots = slots.detach()
                    if self.gradient == "bilevel":
                        slots = slots + start - start.detach()
                attention = self._attend(slots, keys)  # (B, S, N)
                slots = self._update(slots, attention, values)
        return slots, attention

    def _read(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, D) keys and values of the normalised inputs. The keys include the query's projection and 1 / sqrt(D).

        Since q(s) . k(x) = s . (Wq^T Wk x), the slots themselves are the queries, and no iteration projects them. Keys
        and values are one matrix product. On a GPU this saves 15 kernel launches, forward and backward.
        """
        key = self.query.weight.T @ self.key.weight * self.dim**-0.5  # (D, D)
        both = functional.linear(inputs, torch.cat([key, self.value.weight]))  # (B, N, 2 D)
        keys, values = both.split(self.dim, dim=2)
        return keys, values

    def _attend(self, slots: Tensor, keys: Tensor) -> Tensor:
        """(B, S, N) share of each slot in each position, summing to 1 over slots."""
        return torch.softmax(self.norm_slots(slots) @ keys.transpose(1, 2), dim=1)

    def _update(self, slots: Tensor, attention: Tensor, values: Tensor) -> Tensor:
        """(B, S, D) slots after one update from the positions that they won."""
        weights = attention + self.epsilon
        updates = weights / weights.sum(dim=2, keepdim=True) @ values  # (B, S, D)
        inputs, state = updates.flatten(0, 1), slots.flatten(0, 1)  # (B * S, D)
        state = _plain_gru(self.gru, inputs, state) if torch.compiler.is_compiling() else self.gru(inputs, state)
        slots = state.view_as(updates)
        refined: Tensor = slots + self.mlp(self.norm_mlp(slots))
        return refined


def _plain_gru(cell: nn.GRUCell, inputs: Tensor, state: Tensor) -> Tensor:
    """What the cell computes, (B, D) and (B, D) -> (B, D), from operators that the compiler can fuse.

    On a GPU the cell itself is an operator that the compiler does not know: it can only run it to see what it gives.
    """
    of_inputs = functional.linear(inputs, cell.weight_ih, cell.bias_ih).chunk(3, dim=1)  # reset, update, new
    of_state = functional.linear(state, cell.weight_hh, cell.bias_hh).chunk(3, dim=1)
    reset, update = ((own + other).sigmoid() for own, other in zip(of_inputs[:2], of_state[:2], strict=True))
    new = (of_inputs[2] + reset * of_state[2]).tanh()
    return (state - new) * update + new
