"""The toy's horses and cows in numbers: their proportions, the names of their parts, and outlines to build them of.

Animals are built facing left in a frame whose unit is the body's length: x to the right, y down, the torso's middle at
the origin. Facing left, an animal shows its left side; mirrored, its right. So parts are named by `+` for the near side
and `-` for the far side until the facing is known. N is the number of corners of an outline.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Points = NDArray[np.float64]  # (N, 2) x, y
Colour = NDArray[np.float64]  # (3,) RGB, 0..255
Corners = tuple[tuple[float, float], ...]

FAR, TAIL, BODY, NEAR, HEAD = range(5)  # groups that catch the light as one rounded body each

# PASCAL-Part's own names, in the order of its files.
_HEAD_PARTS = ("head", "lear", "rear", "leye", "reye", "muzzle")
_HORSE_LEGS = tuple(f"{side}{end}{piece}" for end in "fb" for side in "lr" for piece in ("lleg", "uleg", "ho"))
_COW_LEGS = tuple(name for name in _HORSE_LEGS if not name.endswith("ho"))
PART_NAMES = {
    "horse": (*_HEAD_PARTS, "torso", "neck", *_HORSE_LEGS, "tail"),
    "cow": (*_HEAD_PARTS, "lhorn", "rhorn", "torso", "neck", *_COW_LEGS, "tail"),
    "table": (),
}


@dataclass(frozen=True)
class Shape:
    """A piece of one part in one colour. Pieces are painted in list order, the later over the earlier."""

    part: str  # PASCAL-Part name with + or - for the side; "" belongs to the object and to no part
    outlines: tuple[Points, ...]  # filled together
    tone: str  # key of the figure's palette
    group: int


@dataclass(frozen=True)
class Figure:
    """One object, not yet placed in a photo."""

    class_name: str
    shapes: tuple[Shape, ...]
    palette: dict[str, Colour]  # the coat first
    patch_colour: Colour  # of the spots on the coat
    patch_share: float  # share of the coat that is spotted, 0..1
    faces_left: bool


@dataclass(frozen=True)
class Anatomy:
    """Proportions of a class, in body lengths. Head outlines are (along the face, towards the forehead)."""

    torso: Corners
    neck_root: tuple[float, float]
    neck_length: float
    neck_radii: tuple[float, float, float]
    neck_degrees: tuple[float, float]  # lowest and highest, above the horizontal
    face: Corners
    face_from_front: Corners
    muzzle_starts: float
    hips: tuple[tuple[float, float], tuple[float, float]]  # front, hind
    leg_length: float  # relative to a horse
    leg_width: float  # relative to a horse


# Corner by corner after side views of standing animals; the looks are checked by eye, not by a number.
ANATOMY = {
    "horse": Anatomy(
        torso=(
            *((-0.50, 0.02), (-0.46, -0.11), (-0.30, -0.21), (-0.10, -0.175), (0.10, -0.175), (0.30, -0.21)),
            *((0.44, -0.16), (0.50, -0.03), (0.46, 0.09), (0.30, 0.125), (0.12, 0.17), (-0.10, 0.205)),
            *((-0.30, 0.20), (-0.44, 0.14)),
        ),
        neck_root=(-0.36, -0.07),
        neck_length=0.50,
        neck_radii=(0.165, 0.115, 0.085),
        neck_degrees=(-52, 62),
        face=(
            *((-0.05, 0.02), (0.0, 0.085), (0.12, 0.085), (0.25, 0.05), (0.36, 0.05), (0.415, 0.03), (0.435, -0.02)),
            *((0.41, -0.065), (0.36, -0.075), (0.27, -0.06), (0.16, -0.105), (0.05, -0.12), (-0.03, -0.07)),
        ),
        face_from_front=((-0.04, 0.0), (-0.01, 0.075), (0.11, 0.088), (0.24, 0.06), (0.37, 0.062), (0.42, 0.0)),
        muzzle_starts=0.27,
        hips=((-0.36, 0.04), (0.35, 0.0)),
        leg_length=1.0,
        leg_width=1.0,
    ),
    "cow": Anatomy(
        torso=(
            *((-0.50, 0.06), (-0.48, -0.12), (-0.38, -0.20), (-0.20, -0.205), (0.10, -0.19), (0.34, -0.22)),
            *((0.47, -0.19), (0.50, -0.04), (0.47, 0.13), (0.36, 0.19), (0.20, 0.26), (-0.05, 0.28)),
            *((-0.28, 0.25), (-0.44, 0.20)),
        ),
        neck_root=(-0.38, -0.04),
        neck_length=0.31,
        neck_radii=(0.18, 0.15, 0.105),
        neck_degrees=(-58, 42),
        face=(
            *((-0.03, 0.04), (0.02, 0.10), (0.12, 0.09), (0.22, 0.06), (0.31, 0.06), (0.35, 0.02), (0.345, -0.05)),
            *((0.29, -0.085), (0.18, -0.095), (0.06, -0.115), (-0.02, -0.08)),
        ),
        face_from_front=((-0.05, 0.0), (-0.02, 0.085), (0.10, 0.105), (0.21, 0.075), (0.30, 0.085), (0.35, 0.0)),
        muzzle_starts=0.225,
        hips=((-0.36, 0.08), (0.37, 0.03)),
        leg_length=0.76,
        leg_width=1.02,
    ),
}


# Outlines ------------------------------------------------------------------------------------------------------------


def smooth(corners: ArrayLike) -> Points:
    """(5 N, 2) closed Catmull-Rom curve through N corners."""
    p1 = np.asarray(corners, dtype=np.float64)
    p0, p2, p3 = np.roll(p1, 1, 0), np.roll(p1, -1, 0), np.roll(p1, -2, 0)
    t = np.linspace(0, 1, 5, endpoint=False)[None, :, None]
    a, b, c = (p2 - p0)[:, None], (2 * p0 - 5 * p1 + 4 * p2 - p3)[:, None], (3 * p1 - p0 - 3 * p2 + p3)[:, None]
    return (p1[:, None] + 0.5 * (a * t + b * t**2 + c * t**3)).reshape(-1, 2)


def disc(centre: ArrayLike, radius: float) -> Points:
    angle = np.linspace(0, 2 * np.pi, 14, endpoint=False)
    return np.asarray(centre) + radius * np.stack([np.cos(angle), np.sin(angle)], 1)


def limb(spine: ArrayLike, radii: ArrayLike) -> tuple[Points, ...]:
    """A tube along the spine (J, 2) with the given radii (J,), and a disc at each joint to round its bends and ends."""
    joints, widths = np.asarray(spine, dtype=np.float64), np.asarray(radii, dtype=np.float64)
    normals = turn(np.gradient(joints, axis=0), 90)
    normals *= (widths / np.maximum(np.linalg.norm(normals, axis=1), 1e-9))[:, None]
    tube = np.concatenate([joints + normals, (joints - normals)[::-1]])
    return (tube, *(disc(joint, width) for joint, width in zip(joints, widths, strict=True)))


def turn(points: Points, degrees: float) -> Points:
    """Rotates about the origin, from x towards y: clockwise as seen, because y points down."""
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turned: Points = points @ np.array([[cos, sin], [-sin, cos]])
    return turned


def leaf(base: tuple[float, float], degrees: float, length: float, width: float) -> Points:
    """An ear: pointed at its tip, `degrees` from the first axis towards the second."""
    along = np.array([(0, -0.35), (0.35, -0.6), (0.7, -0.4), (1, 0), (0.7, 0.4), (0.35, 0.6), (0, 0.35)])
    return turn(along * (length, width), degrees) + base
