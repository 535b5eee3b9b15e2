"""Horses, cows and tables, each with its own pose and coat: the figures of the toy's photos."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

from slotscops.datasets.toy.anatomy import (
    ANATOMY,
    BODY,
    FAR,
    HEAD,
    NEAR,
    TAIL,
    Anatomy,
    Colour,
    Figure,
    Points,
    Shape,
    disc,
    leaf,
    limb,
    smooth,
    turn,
)


def draw_animal(rng: np.random.Generator, class_name: str) -> Figure:
    """One horse or cow with its own coat, proportions and pose."""
    anatomy = ANATOMY[class_name]
    far_legs, near_legs = _draw_legs(rng, class_name, anatomy)
    neck, poll, neck_degrees = _draw_neck(rng, class_name, anatomy)
    torso = smooth(np.array(anatomy.torso) + rng.normal(0, 0.008, (len(anatomy.torso), 2)))
    belly = np.array([(-0.30, 0.15), (-0.1, 0.15), (0.12, 0.12), (0.22, 0.2), (-0.1, 0.32), (-0.3, 0.28)])
    shapes = [
        *far_legs,
        *_draw_tail(rng, class_name),
        Shape("torso", (torso,), "coat", BODY),
        Shape("torso", (_keep_in_box_of(smooth(belly), torso),), "belly", BODY),
        *neck,
        *_draw_udder(rng, class_name),
        *near_legs,
        *_draw_head(rng, class_name, anatomy, poll, neck_degrees),
    ]
    slim = np.array([rng.uniform(0.82, 1.05), rng.uniform(0.94, 1.06)])  # seen a little from the front or behind
    faces_left = bool(rng.random() < 0.5)
    palette, patch_colour, patch_share = _dye(rng, class_name)
    named = tuple(_name_sides(_scale(shape, slim), faces_left) for shape in shapes)
    return Figure(class_name, named, palette, patch_colour, patch_share, faces_left)


def _draw_legs(rng: np.random.Generator, class_name: str, anatomy: Anatomy) -> tuple[list[Shape], list[Shape]]:
    """Far legs and near legs in one of three gaits. Degrees of swing: positive moves the foot backwards."""
    swing, bend = {0: (6, 6), 1: (20, 30), 2: (38, 65)}[int(rng.choice(3, p=[0.45, 0.4, 0.15]))]
    phase = rng.choice([-1.0, 1.0])
    far: list[Shape] = []
    near: list[Shape] = []
    for side, legs, sign in (("-", far, phase), ("+", near, -phase)):
        for end, hip in zip("bf", anatomy.hips[::-1], strict=True):
            direction = sign if end == "f" else -sign
            angle = swing * direction * rng.uniform(0.5, 1.0) + rng.normal(0, 3)
            flex = bend * rng.uniform(0, 1) * (direction > 0) * (1 if end == "f" else 0.5)
            shift = 0.0 if side == "+" else rng.uniform(-0.06, 0.06)
            legs += _draw_leg(class_name, side + end, (hip[0] + shift, hip[1]), angle, flex, anatomy)
    return far, near


def _draw_leg(
    class_name: str, prefix: str, hip: tuple[float, float], swing: float, flex: float, anatomy: Anatomy
) -> list[Shape]:
    long, wide = anatomy.leg_length, anatomy.leg_width
    upper = np.array([(0, 0), (0.0, 0.17), (0, 0.40)] if prefix[1] == "f" else [(0, 0.03), (-0.02, 0.19), (0.06, 0.40)])
    widths = np.array([0.095, 0.075, 0.046] if prefix[1] == "f" else [0.14, 0.095, 0.046]) * wide
    upper = turn(upper * (1, long), swing)
    knee = upper[-1]
    lower = turn(np.array([(0, 0), (0, 0.11), (0.005, 0.225)]) * (1, long), swing + flex) + knee
    hoof = turn(np.array([(-0.034, -0.03), (0.032, -0.03), (0.04, 0.075), (-0.062, 0.075)]), swing + 0.7 * flex)
    hoof = hoof * (wide, min(1.0, long + 0.1)) + lower[-1]
    far, hoof_part = prefix[0] == "-", "ho" if class_name == "horse" else "lleg"
    shade, group = ("far_", FAR) if far else ("", NEAR)
    return [
        Shape(f"{prefix}uleg", limb(upper + hip, widths), f"{shade}upper_leg", FAR if far else BODY),
        Shape(f"{prefix}lleg", limb(lower + hip, np.array([0.045, 0.033, 0.038]) * wide), f"{shade}leg", group),
        Shape(f"{prefix}{hoof_part}", (hoof + hip,), f"{shade}hoof", group),
    ]


def _draw_tail(rng: np.random.Generator, class_name: str) -> list[Shape]:
    t = np.linspace(0, 1, 6)[:, None]
    lift, swing, length = rng.uniform(0.04, 0.22), rng.uniform(-0.06, 0.14), rng.uniform(0.42, 0.6)
    spine = np.array([0.475, -0.15]) + np.hstack([lift * np.sin(np.pi * 0.8 * t) + swing * t**2, length * t**1.3])
    if class_name == "horse":
        return [Shape("tail", limb(spine, [0.03, 0.045, 0.055, 0.055, 0.045, 0.015]), "mane", TAIL)]
    tuft = limb(spine[-2:] + np.array([[0, 0], [0, 0.04]]), [0.034, 0.022])
    return [Shape("tail", limb(spine, np.full(6, 0.02)), "coat", TAIL), Shape("tail", tuft, "mane", TAIL)]


def _draw_udder(rng: np.random.Generator, class_name: str) -> list[Shape]:
    """The udder belongs to the cow and to none of its parts: real objects, too, have pixels outside all parts."""
    if class_name != "cow" or rng.random() < 0.5:
        return []
    bag = smooth([(0.14, 0.20), (0.22, 0.17), (0.31, 0.17), (0.32, 0.27), (0.24, 0.31), (0.16, 0.28)])
    return [Shape("", (bag,), "udder", BODY)]


def _draw_neck(rng: np.random.Generator, class_name: str, anatomy: Anatomy) -> tuple[list[Shape], Points, float]:
    """The neck, the place of the poll where the head hangs, and the neck's angle in degrees above the horizontal."""
    low, high = anatomy.neck_degrees
    raised = rng.random() < 0.75
    degrees = float(rng.uniform(0.35 * high, high) if raised else rng.uniform(low, 0.2 * high))
    along = np.array([-np.cos(np.radians(degrees)), -np.sin(np.radians(degrees))])
    crest = np.array([-along[1], along[0]])  # towards the mane
    steps = np.array([0.0, 0.5, 1.0])[:, None] * anatomy.neck_length
    spine = np.array(anatomy.neck_root) + steps * along + np.array([0, 0.03, 0])[:, None] * crest
    shapes = [Shape("neck", limb(spine, anatomy.neck_radii), "neck", BODY)]
    if class_name == "horse":
        t = np.linspace(0.1, 1.1, 9)
        ridge = spine[0] + t[:, None] * (spine[2] - spine[0]) + 0.03 * np.sin(np.pi * t)[:, None] * crest
        width = np.interp(t, [0, 0.5, 1], anatomy.neck_radii)
        outer = ridge + crest * (width + 0.02 + rng.uniform(0, 0.03, 9))[:, None]
        inner = ridge + crest * (width - rng.uniform(0.04, 0.10, 9))[:, None]
        shapes.append(Shape("neck", (np.concatenate([outer, inner[::-1]]),), "mane", BODY))
    return shapes, spine[-1], degrees


def _draw_head(
    rng: np.random.Generator, class_name: str, anatomy: Anatomy, poll: Points, neck_degrees: float
) -> list[Shape]:
    """The head in profile, or in a quarter of the animals turned to the viewer, who then sees both eyes."""
    turned = rng.random() < 0.25
    hang = float(rng.uniform(25, 62) if neck_degrees > 0 else rng.uniform(50, 85))  # of the face, below the horizontal
    shapes = (_front_of_head if turned else _side_of_head)(class_name, anatomy, rng)
    if turned:
        hang = float(rng.uniform(70, 95))
    along = np.array([-np.cos(np.radians(hang)), np.sin(np.radians(hang))])
    forehead = np.array([-along[1], along[0]])
    frame = np.stack([along, forehead]) * rng.uniform(0.92, 1.08)
    return [
        Shape(shape.part, tuple(outline @ frame + poll for outline in shape.outlines), shape.tone, HEAD)
        for shape in shapes
    ]


def _side_of_head(class_name: str, anatomy: Anatomy, rng: np.random.Generator) -> list[Shape]:
    head = smooth(anatomy.face)
    muzzle, tip = _cut_below(head, anatomy.muzzle_starts), max(corner[0] for corner in anatomy.face)
    tilt = rng.uniform(-20, 20)
    shapes = [Shape("head", (head,), "head", HEAD), Shape("muzzle", (muzzle,), "muzzle", HEAD)]
    shapes.append(Shape("muzzle", (disc((tip - 0.045, 0.012), 0.013),), "dark", HEAD))
    shapes.append(Shape("+eye", (disc((0.115, 0.038), 0.019),), "dark", HEAD))
    if class_name == "horse":
        far_ear = Shape("-ear", (leaf((0.035, 0.07), 95 + tilt, 0.12, 0.06),), "far_upper_leg", HEAD)
        return [far_ear, *shapes, Shape("+ear", (leaf((-0.005, 0.06), 105 + tilt, 0.14, 0.07),), "ear", HEAD)]
    near_horn = limb([(0.0, 0.085), (0.03, 0.15), (0.09, 0.20)], [0.024, 0.018, 0.006])
    far_horn = limb([(0.06, 0.085), (0.10, 0.14), (0.16, 0.18)], [0.02, 0.015, 0.005])
    horns = [Shape("-horn", far_horn, "horn", HEAD), Shape("+horn", near_horn, "horn", HEAD)]
    ear = Shape("+ear", (leaf((0.01, 0.05), 170 + tilt, 0.16, 0.085),), "ear", HEAD)
    return [*horns[:1], *shapes, *horns[1:], ear]


def _front_of_head(class_name: str, anatomy: Anatomy, rng: np.random.Generator) -> list[Shape]:
    """The head from the front. The second coordinate of its frame is positive on the animal's far side."""
    half = np.array(anatomy.face_from_front)
    head = smooth(np.concatenate([half, half[-2:0:-1] * (1, -1)]))
    tip, horse = half[-1, 0], class_name == "horse"
    shapes = [Shape("head", (head,), "head", HEAD)]
    shapes.append(Shape("muzzle", (_cut_below(head, anatomy.muzzle_starts),), "muzzle", HEAD))
    before: list[Shape] = []
    for side, sign in (("-", 1), ("+", -1)):
        spread = rng.uniform(145, 165) if horse else rng.uniform(85, 110)
        ear = leaf((0.0 if horse else 0.03, 0.05), spread, 0.14 if horse else 0.16, 0.07)
        before.append(Shape(f"{side}ear", (ear * (1, sign),), "ear", HEAD))
        shapes.append(Shape(f"{side}eye", (disc((0.115, 0.072 * sign), 0.017),), "dark", HEAD))
        shapes.append(Shape("muzzle", (disc((tip - 0.05, 0.03 * sign), 0.012),), "dark", HEAD))
        if not horse:
            horn = limb(np.array([(-0.01, 0.06), (-0.06, 0.12), (-0.14, 0.11)]) * (1, sign), [0.026, 0.02, 0.006])
            before.append(Shape(f"{side}horn", horn, "horn", HEAD))
    return before + shapes


def _cut_below(outline: Points, start: float) -> Points:
    """The part of an outline whose first coordinate is at least `start`: corners before it slide up to the cut."""
    return np.maximum(outline, (start, -np.inf))


def _keep_in_box_of(outline: Points, other: Points) -> Points:
    return np.clip(outline, other.min(0), other.max(0))


def _scale(shape: Shape, factor: Points) -> Shape:
    return Shape(shape.part, tuple(outline * factor for outline in shape.outlines), shape.tone, shape.group)


def _name_sides(shape: Shape, faces_left: bool) -> Shape:
    near, far = ("l", "r") if faces_left else ("r", "l")
    mirror = (1.0, 1.0) if faces_left else (-1.0, 1.0)
    part = shape.part.replace("+", near).replace("-", far)
    return Shape(part, tuple(outline * mirror for outline in shape.outlines), shape.tone, shape.group)


# Colours -------------------------------------------------------------------------------------------------------------

_HORSE_COATS = ((104, 60, 32), (150, 84, 42), (58, 48, 44), (196, 190, 182), (196, 156, 100), (126, 100, 78))
_COW_COATS = ((150, 86, 48), (60, 50, 48), (205, 196, 184), (180, 140, 96), (96, 58, 40), (222, 214, 204))


def _mix(first: ArrayLike, second: ArrayLike, share: float) -> Colour:
    return (1 - share) * np.asarray(first, dtype=np.float64) + share * np.asarray(second, dtype=np.float64)


def _dye(rng: np.random.Generator, class_name: str) -> tuple[dict[str, Colour], Colour, float]:
    """Colours of a coat and of what goes with it in real animals: dark legs and mane, a pale belly, a muzzle."""
    coats = _HORSE_COATS if class_name == "horse" else _COW_COATS
    coat = np.array(coats[int(rng.integers(len(coats)))]) * rng.uniform(0.85, 1.15) + rng.normal(0, 5, 3)
    points = _mix(coat, (28, 24, 22), rng.uniform(0.45, 0.75))
    if rng.random() < 0.25:  # white socks, flaxen mane
        points = np.array([214.0, 204.0, 186.0]) + rng.normal(0, 8, 3)
    muzzle = (46, 40, 40) if class_name == "horse" or rng.random() < 0.4 else (196, 148, 132)
    palette = {
        "coat": coat,
        "belly": _mix(coat, (216, 196, 170), 0.2),
        "neck": _mix(coat, (30, 22, 18), 0.08),
        "head": _mix(coat, (30, 22, 18), rng.uniform(0.1, 0.25)),
        "ear": _mix(coat, (70, 44, 38), 0.3),
        "muzzle": _mix(coat, muzzle, rng.uniform(0.55, 0.9)),
        "mane": points if class_name == "horse" else _mix(coat, (40, 32, 28), 0.6),
        "upper_leg": _mix(coat, points, 0.1),
        "leg": _mix(coat, points, 0.75),
        "hoof": _mix((44, 38, 36), (120, 104, 88), rng.uniform(0, 0.6)),
        "horn": np.array([214.0, 200.0, 168.0]) * rng.uniform(0.75, 1.05),
        "udder": np.array([206.0, 158.0, 146.0]),
        "dark": np.array([20.0, 15.0, 14.0]),
    }
    for tone in ("upper_leg", "leg", "hoof"):  # the far side lies in the body's shade
        palette[f"far_{tone}"] = palette[tone] * rng.uniform(0.62, 0.8)
    pale = coat.mean() > 150
    patch_colour = np.array([52.0, 42.0, 38.0]) if pale else np.array([228.0, 222.0, 212.0])
    spotted = rng.random() < (0.2 if class_name == "horse" else 0.65)
    return palette, patch_colour, float(rng.uniform(0.25, 0.6)) if spotted else 0.0


def draw_table(rng: np.random.Generator) -> Figure:
    """A garden table: a class that PASCAL-Part annotates without parts."""
    top = np.array([(-0.5, -0.2), (0.4, -0.2), (0.5, -0.12), (-0.4, -0.12)])
    edge = np.array([(-0.4, -0.12), (0.5, -0.12), (0.5, -0.08), (-0.4, -0.08)])
    legs = [
        limb([(x, -0.1), (x + 0.02, y)], [0.02, 0.018])
        for x, y in ((-0.44, 0.2), (0.36, 0.2), (-0.36, 0.28), (0.46, 0.28))
    ]
    wood = np.array([142.0, 104.0, 70.0]) * rng.uniform(0.6, 1.3)
    pieces: Iterable[tuple[Points, ...]] = (*legs, (edge,), (top,))
    shapes = tuple(Shape("", outlines, "wood", BODY) for outlines in pieces)
    return Figure("table", shapes, {"wood": wood}, wood, 0.0, bool(rng.random() < 0.5))
