"""Outlines of a part as polygons, for programs that take no masks.

Shapes: H x W pixels of the photo, n corners of a polygon.
"""

import math
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from slotscops.core.pixels import Box

# A corner is left out where the outline moves by less than this, in pixels: a staircase of pixels becomes a line.
_TOLERANCE = 0.4
_MOST_PIXELS = 4_000_000  # of a part's box; of a larger one every second or third pixel is looked at
Polygon = NDArray[np.float64]  # (n, 2) x and y in pixels; (0, 0) is the photo's top left corner


def outline_part(labels: NDArray[np.uint8], part: int, box: Box) -> list[Polygon]:
    """The outlines of one part: one polygon for each connected piece of it.

    A polygon has no holes. A hole is therefore joined to the outline by a cut without width, which the polygon follows
    in both directions. Whoever fills the polygon leaves the hole free.

    Args:
        labels: (H, W) uint8 label map.
        part: a label that occurs in it.
        box: the box of that part.

    Returns:
        (n, 2) corners of each polygon, n at least 3, the first not repeated at the end.
    """
    from contourpy import FillType, contour_generator  # optional, see `formats.read_formats`
    from shapely import Polygon as ShapelyPolygon

    left, top, right, bottom = box
    step = max(1, math.ceil(math.sqrt((right - left) * (bottom - top) / _MOST_PIXELS)))
    mask = np.pad(labels[top:bottom:step, left:right:step] == part, 1).astype(np.float64)
    if not mask.any():  # all its pixels lie between those that were looked at
        return [np.array([(left, top), (right, top), (right, bottom), (left, bottom)], np.float64)]
    contours = contour_generator(z=mask, fill_type=FillType.OuterOffset)
    polygons = []
    for corners, offsets in zip(*contours.filled(0.5, 2.0), strict=True):
        # The mask has a rim of one pixel, and the value of a pixel stands at its centre.
        places = (corners - 0.5) * step + (left, top)
        rings = [places[start:stop] for start, stop in pairwise(offsets)]
        whole = ShapelyPolygon(rings[0], rings[1:]).simplify(_TOLERANCE * step)
        holes = [np.asarray(hole.coords)[:-1] for hole in whole.interiors]
        polygons.append(_join_holes(np.asarray(whole.exterior.coords)[:-1], holes))
    return polygons


def _join_holes(outline: Polygon, holes: list[Polygon]) -> Polygon:
    """One polygon that runs along the outline and all holes. The hole nearest to what is joined comes first."""
    holes = list(holes)
    while holes:
        nearest = [_nearest_corners(outline, hole) for hole in holes]
        number = min(range(len(holes)), key=lambda place: nearest[place][0])
        _, of_outline, of_hole = nearest[number]
        hole = np.roll(holes.pop(number), -of_hole, axis=0)
        outline = np.concatenate([outline[: of_outline + 1], hole, hole[:1], outline[of_outline:]])
    return outline


def _nearest_corners(first: Polygon, second: Polygon) -> tuple[float, int, int]:
    """Squared distance of the two nearest corners of two polygons, and their numbers."""
    distances = np.square(first[:, None] - second[None]).sum(axis=2)
    place = int(distances.argmin())
    return float(distances.flat[place]), place // len(second), place % len(second)
