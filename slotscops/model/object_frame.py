"""Where each part lies relative to the object: places in a frame that moves with the object and turns with its facing.

Two legs look alike, but one is in front. Seen from the side, an animal faces left or right, so the front is a side of
the animal and not of the photo. The frame of a photo has its origin in the middle of the object, the object's own
extent as its unit, and an x axis that points to the object's right or, where it faces the other way, to its left. Which
way an object faces is nowhere annotated: of both, the one is taken under which the part maps are likelier.

Shapes: B images, S slots (slot 0 the background), K = S - 1 parts, h x w grid. Places are (y, x).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from slotscops.core.constants import made_once

_SIDES_PER_DEVIATION = 3**0.5  # half the side of a square, over the standard deviation of its points along an axis
_LEAST_EXTENT = 0.1  # of an object, as a share of half the crop, so that an empty background cannot blow places up
_LOG_AREA = math.log(4)  # of the crop, whose sides run from -1 to 1


class ObjectFrame(NamedTuple):
    """The frame of the object in each photo."""

    centre: Tensor  # (B, 2) y and x, from -1 to 1 across the crop
    extent: Tensor  # (B, 2) half the height and the width of the object, in half sides of the crop
    facing: Tensor  # (B,) 1, or -1 where the frame's x axis points to the left

    def first(self, num_images: int) -> "ObjectFrame":
        """The frames of the first images only."""
        return ObjectFrame(*(tensor[:num_images] for tensor in self))


class Densities(NamedTuple):
    """How likely each slot is at each place, before anything is seen: the logarithm of a density over the crop.

    A slot's log density at (y, x) is rows[y] + columns[x].
    """

    rows: Tensor  # (B, S, h)
    columns: Tensor  # (B, S, w)

    def over_grid(self) -> Tensor:
        """(B, S, h, w) log densities."""
        return self.rows[:, :, :, None] + self.columns[:, :, None, :]


def find_frame(object_share: Tensor) -> ObjectFrame:
    """The frame of an object that faces right, from the share of each cell that belongs to it.

        c = sum_u m(u) u / sum_u m(u),   e = sqrt(3 sum_u m(u) (u - c)^2 / sum_u m(u))

    e is half the height and the width if the object fills a box evenly. Outliers move it less than they move a box.

    Args:
        object_share: (B, h, w) in [0, 1]. It receives no gradient.
    """
    share = object_share.detach().float()
    y, x = (_axis(side, share.device) for side in share.shape[1:])
    mass = share.sum((1, 2)).clamp_min(1e-6)  # (B,)
    along_y, along_x = share.sum(2), share.sum(1)  # (B, h), (B, w)
    # No matrix product, which autocast would compute in bfloat16.
    centre = torch.stack([(along_y * y).sum(1), (along_x * x).sum(1)], dim=1) / mass[:, None]  # (B, 2)
    spread_y = (along_y * (y - centre[:, :1]).square()).sum(1)
    spread_x = (along_x * (x - centre[:, 1:]).square()).sum(1)
    deviation = (torch.stack([spread_y, spread_x], dim=1) / mass[:, None]).sqrt()
    extent = (_SIDES_PER_DEVIATION * deviation).clamp_min(_LEAST_EXTENT)
    return ObjectFrame(centre, extent, torch.ones_like(mass))


def in_frame(frame: ObjectFrame, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The rows (B, h) and columns (B, w) of a grid over the crop, as y and x in the frame of each photo's object."""
    (centre, extent, facing), device = frame, frame.centre.device
    rows = (_axis(grid[0], device) - centre[:, :1]) / extent[:, :1]
    columns = (_axis(grid[1], device) - centre[:, 1:]) / extent[:, 1:] * facing[:, None]
    return rows, columns


def place_densities(places: Tensor, frame: ObjectFrame, spread: float, grid: tuple[int, int]) -> Densities:
    """How likely each slot is at each point of a grid over the crop.

        log N(p; q_k, spread^2) - log e_y e_x  for part k,   -log 4  for the background, which is anywhere alike

    p is the point in the object's frame, and e the object's extent.

    Args:
        places: (K, 2) or (B, K, 2) places q of the parts in the object's frame.
        spread: standard deviation of a part around its place, in halves of the object's extent.
        grid: h, w. The outer points lie on the crop's border.
    """
    sides = []
    for number, points in enumerate(in_frame(frame, grid)):
        distance = (points[:, None, :] - places[..., number, None]) / spread  # (B, K, h or w)
        scale = (frame.extent[:, number] * spread).log() + math.log(2 * math.pi) / 2  # (B,)
        of_parts = -distance.square() / 2 - scale[:, None, None]
        background = torch.full_like(of_parts[:, :1], -_LOG_AREA / 2)
        sides.append(torch.cat([background, of_parts], dim=1))
    return Densities(*sides)


@torch.no_grad()
def find_facing(shares: Tensor, places: Tensor, frame: ObjectFrame, spread: float) -> Tensor:
    """Which way each object faces: the way under which the shares of the slots and their places agree better.

        argmax over both ways of  sum_u log sum_s exp(shares_s(u)) N_s(u)

    Args:
        shares: (B, S, h, w) logarithms of the slots' shares in each cell, or of shares times any other likelihood.
        places, spread: see `place_densities`.
        frame: its facing is not read.

    Returns:
        (B,) 1 or -1.
    """
    grid = (shares.shape[2], shares.shape[3])
    scores = []
    for sign in (1.0, -1.0):
        turned = frame._replace(facing=torch.full_like(frame.facing, sign))
        densities = place_densities(places, turned, spread, grid).over_grid()
        scores.append((shares + densities).logsumexp(1).sum((1, 2)))  # (B,)
    return torch.where(scores[1] > scores[0], -1.0, 1.0).to(frame.facing)


@made_once
def _axis(side: int, device: torch.device) -> Tensor:
    """(side,) evenly spaced from -1 to 1."""
    return torch.linspace(-1, 1, side, device=device)
