"""Random warps of photos, and losses for part maps that do not follow them. In float32, even under autocast.

Points are (x, y) in [-1, 1] across the image, as `torch.nn.functional.grid_sample` takes them with align_corners=True.
A warp maps each point of the warped photo to its place in the original: warped(u) = original(g(u)).

Shapes: B images, S slots, K parts, P = points^2 control points, N points, H x W pixels.
"""

import math
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

_EPSILON = 1e-8
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


class Warp(NamedTuple):
    """One random warp for each photo: an affine map plus a thin-plate spline, and a change of colours.

    g(u) = A [u, 1] + sum_i w_i r_i^2 log r_i^2 + the spline's affine part,   r_i = |u - c_i|
    """

    affine: Tensor  # (B, 2, 3)
    bend: Tensor  # (B, P + 3, 2) weights w_i of the spline, then those of its affine part: 1, x, y
    centres: Tensor  # (P, 2) control points
    jitter: Tensor  # (B, 3) factors of brightness, contrast, saturation

    def move(self, points: Tensor) -> Tensor:
        """(B, N, 2) points of the warped photo -> (B, N, 2) the same points in the original photo."""
        with torch.autocast(points.device.type, enabled=False):
            straight = points @ self.affine[:, :, :2].mT + self.affine[:, None, :, 2]
            return straight + _spline_terms(points, self.centres) @ self.bend

    def to(self, device: torch.device) -> "Warp":
        """The same warp on another device. The copy to a GPU starts from pinned memory, so that the host goes on."""
        if device.type == "cpu":
            return Warp(*(tensor.to(device) for tensor in self))
        return Warp(*(tensor.pin_memory().to(device, non_blocking=True) for tensor in self))


def draw_warps(
    keys: Sequence[str],
    seed: int,
    step: int,
    points: int = 5,
    bend: float = 0.01,
    rotation: float = 60.0,
    translation: float = 0.1,
    min_scale: float = 0.7,
    max_scale: float = 2.0,
    jitter: float = 0.3,
) -> Warp:
    """Draws one warp for each sample.

    A warp depends on (seed, step, key) only, so it is the same for any number of processes and workers.

    Args:
        keys: B record keys.
        points: number of control points along each axis, P = points^2.
        bend: standard deviation of the shifts of the control points, in half-image units.
        rotation: the angle is uniform in [-rotation, rotation], in degrees.
        translation: both offsets are uniform in [-translation, translation], in half-image units.
        min_scale, max_scale: the scale is uniform between them. 2 shows the object twice as large.
        jitter: the factors of the colours are uniform in [1 - jitter, 1 + jitter].

    Returns:
        A warp of B photos, on the CPU.

    Source: SCOPS (arXiv:1905.01298) for the ranges; Bookstein (1989) for the spline.
    """
    axis = np.linspace(-1, 1, points)
    centres = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)  # (P, 2)
    affines, shifts, factors = [], [], []
    for key in keys:
        generator = np.random.default_rng([seed, step, zlib.crc32(key.encode())])
        angle = math.radians(generator.uniform(-rotation, rotation))
        scale = generator.uniform(min_scale, max_scale)
        cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
        offset = generator.uniform(-translation, translation, 2)
        affines.append([[cos, -sin, offset[0]], [sin, cos, offset[1]]])
        shifts.append(generator.normal(0, bend, centres.shape))
        factors.append(generator.uniform(1 - jitter, 1 + jitter, 3))
    nodes = torch.from_numpy(centres)
    return Warp(
        affine=torch.tensor(np.array(affines), dtype=torch.float32),
        bend=_solve_spline(nodes, torch.from_numpy(np.stack(shifts))).float(),
        centres=nodes.float(),
        jitter=torch.tensor(np.array(factors), dtype=torch.float32),
    )


def warp_maps(maps: Tensor, warp: Warp) -> tuple[Tensor, Tensor]:
    """Applies the warp to maps.

    Args:
        maps: (B, C, H, W) floating point.

    Returns:
        warped: (B, C, H, W), sampled bilinearly. Points from outside the original photo are zero.
        inside: (B, H, W) bool, true where a pixel comes from inside the original photo.
    """
    height, width = maps.shape[-2:]
    y = torch.linspace(-1, 1, height, device=maps.device)[:, None].expand(height, width)
    x = torch.linspace(-1, 1, width, device=maps.device)[None].expand(height, width)
    pixels = torch.stack([x, y], dim=-1).reshape(1, -1, 2).expand(len(maps), -1, -1)  # (B, H*W, 2)
    grid = warp.move(pixels).view(len(maps), height, width, 2).to(maps.dtype)
    # On a GPU, the gradient of grid_sample differs from run to run. PyTorch refuses it where that is not wanted.
    is_fixed = torch.are_deterministic_algorithms_enabled() and maps.requires_grad
    warped = _sample_in_fixed_order(maps, grid) if is_fixed else functional.grid_sample(maps, grid, align_corners=True)
    return warped, (grid.abs() <= 1).all(dim=3)


def _sample_in_fixed_order(maps: Tensor, grid: Tensor) -> Tensor:
    """What `grid_sample` gives with align_corners=True, by `gather`, whose gradient can be the same in every run.

    Args:
        maps: (B, C, H, W).
        grid: (B, H', W', 2) points (x, y) in [-1, 1] across the image.

    Returns:
        (B, C, H', W'), sampled bilinearly. What lies outside the maps counts as zero.
    """
    height, width = maps.shape[2:]
    x, y = (grid[..., 0] + 1) / 2 * (width - 1), (grid[..., 1] + 1) / 2 * (height - 1)  # (B, H', W') in pixels
    cells = maps.flatten(2)  # (B, C, H * W)
    sampled = maps.new_zeros(1)
    for row in (y.floor(), y.floor() + 1):
        for column in (x.floor(), x.floor() + 1):
            share = (1 - (x - column).abs()) * (1 - (y - row).abs())
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            place = row.clamp(0, height - 1).long() * width + column.clamp(0, width - 1).long()  # (B, H', W')
            values = cells.gather(2, place.flatten(1)[:, None].expand(-1, cells.shape[1], -1))
            sampled = sampled + values.unflatten(2, place.shape[1:]) * (share * inside)[:, None]
    return sampled


@torch.no_grad()
def warp_images(images: Tensor, warp: Warp) -> Tensor:
    """(B, 3, H, W) uint8 RGB -> the same shape and type, warped and with changed colours. Outside is black."""
    with torch.autocast(images.device.type, enabled=False):
        warped, _ = warp_maps(images.float() / 255, warp)
        brightness, contrast, saturation = (factor[:, None, None, None] for factor in warp.jitter.unbind(1))
        # Filled on the device: a tensor of these numbers would have to be copied there, which waits for the device.
        luma = torch.cat([warped.new_full((1, 1, 1), share) for share in _LUMA])  # (3, 1, 1)
        warped = warped * brightness
        mean = (warped * luma).sum(1, keepdim=True).mean((2, 3), keepdim=True)
        warped = mean + (warped - mean) * contrast
        grey = (warped * luma).sum(1, keepdim=True)
        warped = grey + (warped - grey) * saturation
        return (warped.clamp(0, 1) * 255).round().to(torch.uint8)


def equivariance(plain: Tensor, of_warped: Tensor, warp: Warp) -> Tensor:
    """Divergence between the maps of the warped photo and the warped maps of the plain photo.

        L = 1/B sum_b  mean over pixels u inside of  sum_s q_bs(u) log( q_bs(u) / p_bs(u) )

    q are the maps of the plain photo after warping, p the maps of the warped photo. Both receive gradients. The mean
    over pixels is taken for each image first, so every image has the same weight.

    Args:
        plain: (B, S, H, W) soft maps of the plain photos, which sum to 1 over slots.
        of_warped: (B, S, H, W) soft maps of the warped photos, likewise.

    Returns:
        Scalar in nats. It is 0 if the maps follow the warp exactly.

    Source: SCOPS (arXiv:1905.01298), equivariance loss.
    """
    with torch.autocast(plain.device.type, enabled=False):
        dtype = torch.promote_types(plain.dtype, torch.float32)
        expected, inside = warp_maps(plain.to(dtype), warp)
        ratio = (expected.clamp_min(_EPSILON) / of_warped.to(dtype).clamp_min(_EPSILON)).log()
        divergence = (expected * ratio).sum(1) * inside  # (B, H, W)
        mean: Tensor = (divergence.sum((1, 2)) / inside.sum((1, 2)).clamp_min(1)).mean()
    return mean


def landmark_equivariance(centres: Tensor, centres_of_warped: Tensor, warp: Warp) -> Tensor:
    """Squared distance between the centres of the parts and where the warp puts them, over parts and images.

        L = 1/(B K) sum_bk |g(c'_bk) - c_bk|^2

    Args:
        centres: (B, K, 2) centres c of the parts in the plain photo.
        centres_of_warped: (B, K, 2) centres c' of the parts in the warped photo.

    Returns:
        Scalar, in squared half-image units of the plain photo.

    Source: SCOPS (arXiv:1905.01298), equivariance of the parts' centres.
    """
    mean: Tensor = (warp.move(centres_of_warped) - centres).square().sum(2).mean()
    return mean


def _spline_terms(points: Tensor, centres: Tensor) -> Tensor:
    """(..., N, 2) points and (P, 2) centres -> (..., N, P + 3): r^2 log r^2 for each centre, then 1, x, y."""
    square = (points[..., :, None, :] - centres).square().sum(-1)  # (..., N, P)
    # At r = 0 the gradient of r^2 log r^2 is 0, but that of the log alone is not finite.
    radial = square * square.clamp_min(1e-12).log()
    return torch.cat([radial, torch.ones_like(points[..., :1]), points], dim=-1)


def _solve_spline(centres: Tensor, shifts: Tensor) -> Tensor:
    """(B, P + 3, 2) weights of the spline that moves control point i by shifts[b, i], in float64."""
    num_points = len(centres)
    system = torch.zeros(num_points + 3, num_points + 3, dtype=torch.float64)
    terms = _spline_terms(centres, centres)  # (P, P + 3)
    system[:num_points] = terms
    system[num_points:, :num_points] = terms[:, num_points:].T
    solution: Tensor = torch.linalg.solve(system, functional.pad(shifts, (0, 0, 0, 3)))
    return solution
