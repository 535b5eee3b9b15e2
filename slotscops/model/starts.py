"""The initial slots, before they compete for the input.

Shapes: B images, S slots, N positions, D slot dimension, G classes of objects.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from slotscops.config import SlotInit


def rows_of_classes(rows: Tensor, class_ids: Tensor) -> Tensor:
    """Selects for each image the row of its class: rows (G, ...) and class_ids (B,) -> (B, ...).

    We use a matrix product, because its gradient is the same in every run. On a GPU the gradient of indexing is not.
    Autocast is off: it would round the rows, and their gradients, to bfloat16.
    """
    with torch.autocast(rows.device.type, enabled=False):
        choice = functional.one_hot(class_ids, len(rows)).to(rows.dtype)  # (B, G)
        chosen: Tensor = choice @ rows.flatten(1)  # (B, the others flattened)
    return chosen.view(-1, *rows.shape[1:])


class LearnedStarts(nn.Module):
    """One learned start for each slot, so that slot s means the same in every image."""

    def __init__(self, num_slots: int, dim: int, num_classes: int | None = None) -> None:
        """
        Args:
            num_classes: G, if each class of objects has starts of its own. None if all classes share them.
        """
        super().__init__()
        # The starts are as large as the GRU's state. The first update is nearly the same for all slots, and with starts
        # a tenth as large it hides the differences between them.
        shape = (num_slots, dim) if num_classes is None else (num_classes, num_slots, dim)
        self.start = nn.Parameter(torch.randn(shape))

    def forward(self, inputs: Tensor, noise: Tensor | None = None, class_ids: Tensor | None = None) -> Tensor:
        """(B, S, D) for normalised inputs (B, N, D). class_ids (B,) are needed if classes have their own starts."""
        assert noise is None, "learned slots start without noise"
        batch = inputs.shape[0]  # len() would fix the batch size of an exported model
        return self.of_classes(class_ids).expand(batch, *self.start.shape[-2:])

    def of_classes(self, class_ids: Tensor | None) -> Tensor:
        """The starts: (S, D), or (B, S, D) if each class has starts of its own, which needs class_ids (B,)."""
        if self.start.ndim == 2:
            return self.start
        assert class_ids is not None, "each class has starts of its own; give class_ids"
        return rows_of_classes(self.start, class_ids)


class ConditionedStarts(LearnedStarts):
    """Learned starts plus a linear map of the mean input. The map is initialised to zero."""

    def __init__(self, num_slots: int, dim: int, num_classes: int | None = None) -> None:
        super().__init__(num_slots, dim, num_classes)
        self.condition = nn.Linear(dim, num_slots * dim)
        nn.init.zeros_(self.condition.weight)
        nn.init.zeros_(self.condition.bias)

    def forward(self, inputs: Tensor, noise: Tensor | None = None, class_ids: Tensor | None = None) -> Tensor:
        """(B, S, D) for normalised inputs (B, N, D). class_ids (B,) are needed if classes have their own starts."""
        assert noise is None, "image-conditioned slots start without noise"
        predicted: Tensor = self.condition(inputs.mean(dim=1))  # (B, S * D)
        return self.of_classes(class_ids) + predicted.view(inputs.shape[0], *self.start.shape[-2:])


class GaussianStarts(nn.Module):
    """Draws all slots from one learned Gaussian, as in Locatello et al. (arXiv:2006.15055)."""

    def __init__(self, num_slots: int, dim: int) -> None:
        super().__init__()
        self.num_slots = num_slots
        self.mean = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, dim)))
        self.log_sigma = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, dim)))

    def forward(self, inputs: Tensor, noise: Tensor | None = None, class_ids: Tensor | None = None) -> Tensor:
        """(B, S, D) for inputs (B, N, D). noise (B, S, D) is standard normal; it is drawn here if not given."""
        if noise is None:
            noise = torch.randn((inputs.shape[0], self.num_slots, self.mean.shape[1]), device=inputs.device)
        return self.mean + self.log_sigma.exp() * noise


def build_starts(init: SlotInit, num_slots: int, dim: int, num_classes: int | None = None) -> nn.Module:
    """Builds the starts for the setting `slots.init`: a module that maps (inputs, noise, class_ids) to (B, S, D)."""
    if init == "shared_gaussian":
        assert num_classes is None, "one Gaussian for all slots has no starts to own"
        return GaussianStarts(num_slots, dim)
    kinds = {"learned": LearnedStarts, "image_conditioned": ConditionedStarts}
    return kinds[init](num_slots, dim, num_classes)
