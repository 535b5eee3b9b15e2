"""Paints a toy photo: a landscape, the figures in it, and what of each figure's parts is seen.

H, W are the photo's sides in pixels, h, w those of the box around one figure. Colours are RGB, 0..255, float32.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from slotscops.datasets.toy.anatomy import BODY, HEAD, NEAR, Figure, Points

Pixels = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Placed:
    """A figure with a place in the photo."""

    figure: Figure
    outlines: tuple[tuple[Points, ...], ...]  # of each shape, in pixels
    unit: float  # pixels per body length

    def bounds(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom, also beyond the photo's edges."""
        corners = np.concatenate([outline for outlines in self.outlines for outline in outlines])
        return (*corners.min(0), *corners.max(0))


@dataclass(frozen=True)
class Layers:
    """One painted figure, in its box of the photo."""

    box: tuple[int, int, int, int]  # left, top, right, bottom
    colour: Pixels  # (h, w, 3)
    cover: Pixels  # (h, w) 0..1, soft at the edges
    piece: NDArray[np.uint8]  # (h, w) 1 + index of the shape seen there, 0 = none


# Noise ---------------------------------------------------------------------------------------------------------------


def smooth_noise(rng: np.random.Generator, height: int, width: int, cell: tuple[float, float]) -> Pixels:
    """(height, width) of unit variance at its grid points, with blobs `cell` pixels high and wide."""
    rows, columns = (max(2, round(side / size) + 1) for side, size in zip((height, width), cell, strict=True))
    grid = rng.standard_normal((rows, columns), dtype=np.float32)
    return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))


def _gradient(top: NDArray[np.float64], bottom: NDArray[np.float64], height: int) -> Pixels:
    """(height, 1, 3)"""
    t = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    return ((1 - t) * top + t * bottom).astype(np.float32)


# Landscape -----------------------------------------------------------------------------------------------------------

_SKIES = ((92, 142, 204), (150, 186, 222), (196, 204, 210), (226, 226, 224), (232, 190, 150), (112, 124, 140))
_GROUNDS = (
    (84, 112, 48),
    (112, 128, 62),
    (150, 134, 84),
    (176, 152, 112),
    (122, 100, 74),
    (150, 146, 136),
    (210, 212, 216),
)
_WALLS = ((132, 92, 66), (150, 140, 126), (88, 76, 70), (178, 160, 136), (110, 116, 118), (150, 74, 58))


def _pick(rng: np.random.Generator, colours: tuple[tuple[int, int, int], ...]) -> NDArray[np.float64]:
    return np.array(colours[int(rng.integers(len(colours)))]) * rng.uniform(0.85, 1.12) + rng.normal(0, 6, 3)


def paint_landscape(rng: np.random.Generator, height: int, width: int) -> tuple[Pixels, int]:
    """(H, W, 3) background, and the row of the horizon."""
    horizon = int(height * rng.uniform(0.22, 0.6))
    upper = _paint_wall if rng.random() < 0.2 else _paint_sky
    ground = _paint_ground(rng, height - horizon, width)
    photo = np.concatenate([upper(rng, horizon, width), ground])
    if upper is _paint_sky:
        for _ in range(int(rng.integers(0, 3))):
            _add_ridge(rng, photo, horizon)
    if rng.random() < 0.5:
        _add_things(rng, photo, horizon)
    return photo, horizon


def _paint_sky(rng: np.random.Generator, height: int, width: int) -> Pixels:
    high = _pick(rng, _SKIES)
    sky = _gradient(high, 0.5 * high + 0.5 * np.array([226, 228, 228]), height)
    clouds = smooth_noise(rng, height, width, (35, 90)) + 0.5 * smooth_noise(rng, height, width, (12, 28))
    share = np.clip(clouds - np.float32(rng.uniform(-0.2, 1.5)), 0, 1)[:, :, None] * np.float32(0.8)
    clouded: Pixels = sky + share * (np.float32(238) - sky)
    return clouded


def _paint_wall(rng: np.random.Generator, height: int, width: int) -> Pixels:
    """Planks or brick-coloured plaster, as behind an animal in a yard."""
    colour, plank = _pick(rng, _WALLS), int(rng.integers(14, 48))
    tints = rng.uniform(0.8, 1.15, width // plank + 1).repeat(plank)[:width].astype(np.float32)
    tints[::plank] *= 0.55
    grain = 1 + 0.06 * smooth_noise(rng, height, width, (30, 2)) + 0.08 * smooth_noise(rng, height, width, (60, 60))
    return (grain * tints)[:, :, None] * _gradient(colour * 0.8, colour, height)


def _paint_ground(rng: np.random.Generator, height: int, width: int) -> Pixels:
    """Grass, sand, earth or snow: rougher towards the viewer."""
    colour, second = _pick(rng, _GROUNDS), _pick(rng, _GROUNDS)
    patches = np.clip(smooth_noise(rng, height, width, (22, 80)), 0, 1)[:, :, None] * np.float32(rng.uniform(0, 0.6))
    ground = _gradient(colour * 1.1 + 10, colour * 0.9, height)
    ground = ground + patches * (second.astype(np.float32) - ground)
    rough = np.linspace(0.04, 0.16, height, dtype=np.float32)[:, None]
    texture = smooth_noise(rng, height, width, (5, 2.5)) + smooth_noise(rng, height, width, (11, 18))
    ground *= (1 + rough * texture)[:, :, None]
    return ground


def _add_ridge(rng: np.random.Generator, photo: Pixels, horizon: int) -> None:
    """Hills or a line of trees that stand on the horizon."""
    width, trees = photo.shape[1], rng.random() < 0.6
    tall = horizon * rng.uniform(0.1, 0.5)
    crown = smooth_noise(rng, 2, width, (2, 14 if trees else 90))[0] + smooth_noise(rng, 2, width, (2, 60))[0]
    top = horizon - tall * np.clip(0.5 + 0.3 * crown, 0.05, 1.2)
    rows = np.arange(horizon)[:, None]
    inside = rows >= top
    colour = np.array([58, 76, 44]) if trees else _pick(rng, ((96, 112, 92), (122, 130, 140), (128, 116, 88)))
    shade = 1 + (0.28 if trees else 0.06) * smooth_noise(rng, horizon, width, (7, 7))
    leaves = shade[:, :, None] * (colour * rng.uniform(0.7, 1.3)).astype(np.float32)
    photo[:horizon][inside] = leaves[inside]


def _add_things(rng: np.random.Generator, photo: Pixels, horizon: int) -> None:
    """Sheds, posts, rails and stones that an object must be told from."""
    height, width = photo.shape[:2]
    np.clip(photo, 0, 255, out=photo)
    picture = Image.fromarray(photo.astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(1, 4))):
        colour = tuple(int(value) for value in np.clip(_pick(rng, _WALLS), 0, 255))
        x, size = rng.uniform(0, width), rng.uniform(0.08, 0.3) * width
        kind = int(rng.integers(3))
        if kind == 0:  # a shed with its roof
            wall = size * rng.uniform(0.5, 0.9)
            pen.rectangle((x, horizon - wall, x + size, horizon + 4), fill=colour)
            roof = [(x - 6, horizon - wall), (x + size / 2, horizon - 1.5 * wall), (x + size + 6, horizon - wall)]
            pen.polygon(roof, fill=tuple(value // 2 for value in colour))
        elif kind == 1:  # a stone or bush
            y = rng.uniform(horizon, height)
            pen.ellipse((x - size / 3, y - size / 5, x + size / 3, y + size / 5), fill=colour)
        else:
            _draw_fence(pen, rng, width, horizon + size * 0.3, size * 0.5, colour)
    drawn = np.asarray(picture, dtype=np.float32)
    new = np.abs(drawn - photo).max(2) > 1  # more than rounding: the rest keeps the texture it has
    photo[new] = (drawn * (1 + 0.06 * smooth_noise(rng, height, width, (6, 6)))[:, :, None])[new]


def _draw_fence(
    pen: ImageDraw.ImageDraw,
    rng: np.random.Generator,
    width: int,
    foot: float,
    tall: float,
    colour: int | tuple[int, ...],
) -> None:
    """Posts and two rails across the photo; `foot` is the row where it stands."""
    thick, slope, step = max(2.0, tall * 0.09), rng.uniform(-0.05, 0.05) * width, tall * rng.uniform(1.1, 2.0)
    for share in (0.45, 0.9):
        pen.line((0, foot - share * tall, width, foot - share * tall + slope), fill=colour, width=round(thick))
    for x in np.arange(rng.uniform(0, step), width, step):
        y = foot + slope * x / width
        pen.rectangle((x, y - tall * 1.1, x + thick * 1.4, y), fill=colour)


# Figures -------------------------------------------------------------------------------------------------------------


def paint_figure(rng: np.random.Generator, placed: Placed, height: int, width: int) -> Layers | None:
    """The figure in its own box, lit from above, or None where it lies outside the photo."""
    left, top, right, bottom = placed.bounds()
    box = (max(0, int(left) - 1), max(0, int(top) - 1), min(width, int(right) + 2), min(height, int(bottom) + 2))
    if box[2] - box[0] < 2 or box[3] - box[1] < 2:
        return None
    size = (box[2] - box[0], box[3] - box[1])
    double = Image.new("L", (2 * size[0], 2 * size[1]))  # painted at twice the size, for soft edges
    pen = ImageDraw.Draw(double)
    for index, outlines in enumerate(placed.outlines):
        for outline in outlines:
            fill_outline(pen, outline, box, 2, index + 1)
    piece = np.asarray(double)
    cover = np.asarray(Image.fromarray((piece > 0).view(np.uint8) * np.uint8(255)).reduce(2), dtype=np.float32)
    cover = cover / np.float32(255)
    colour = _colour_pieces(rng, placed, piece) * _light(placed, box, piece[::2, ::2])[:, :, None]
    return Layers(box, colour, cover, piece[::2, ::2])


def fill_outline(
    pen: ImageDraw.ImageDraw, outline: Points, box: tuple[int, int, int, int], scale: int, value: int
) -> None:
    pen.polygon(((outline - box[:2]) * scale).ravel().tolist(), fill=value)


def _colour_pieces(rng: np.random.Generator, placed: Placed, piece: NDArray[np.uint8]) -> Pixels:
    """(h, w, 3) palette colours with spots, mottling and hair, from the piece map at twice the size (2h, 2w)."""
    figure, unit = placed.figure, placed.unit
    tones = [next(iter(figure.palette)), *(shape.tone for shape in figure.shapes)]  # around the figure: its coat
    palette = np.array([figure.palette[tone] for tone in tones])
    coated = np.isin(tones, ("coat", "belly", "neck", "upper_leg", "head")).astype(np.float32)
    soft = ImageFilter.BoxBlur(0.006 * unit)  # so that colours run into each other, as hair does
    flat = Image.fromarray(np.clip(palette, 0, 255).astype(np.uint8)[piece]).reduce(2).filter(soft)
    colour = np.asarray(flat, dtype=np.float32)
    height, width = colour.shape[:2]
    if figure.patch_share:
        blobs = smooth_noise(rng, height, width, (0.16 * unit, 0.2 * unit))
        level = 1.6 - 3.2 * figure.patch_share  # in standard deviations of the blobs
        share = np.clip((blobs - level) * 0.08 * unit + 0.5, 0, 1) * coated[piece[::2, ::2]]
        colour = colour + share[:, :, None] * (figure.patch_colour.astype(np.float32) - colour)
    mottled = 0.06 * smooth_noise(rng, height, width, (0.1 * unit, 0.12 * unit))
    hair = 0.04 * smooth_noise(rng, height, width, (2.5, 1.5))
    return colour * (1 + mottled + hair)[:, :, None]


def _light(placed: Placed, box: tuple[int, int, int, int], piece: NDArray[np.uint8]) -> Pixels:
    """(h, w) factor: each group of pieces is rounded, bright where it faces the sky, dark below.

    The height of a group is its blurred silhouette; the slope of that towards the light is the shading.
    """
    groups = np.array([0, *(shape.group + 1 for shape in placed.figure.shapes)], dtype=np.uint8)[piece]
    light = np.ones(piece.shape, dtype=np.float32)
    for group in range(1, HEAD + 2):
        seen = groups == group
        if not seen.any():
            continue
        canvas = Image.new("L", piece.shape[::-1])
        pen = ImageDraw.Draw(canvas)
        for shape, outlines in zip(placed.figure.shapes, placed.outlines, strict=True):
            thigh = group - 1 == NEAR and shape.group == BODY and shape.part.endswith("uleg")  # no edge at the knee
            if shape.group == group - 1 or thigh:
                for outline in outlines:
                    fill_outline(pen, outline, box, 1, 255)
        radius = placed.unit * (0.06 if group - 1 == BODY else 0.022)
        round_height = np.asarray(canvas.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32) / 255
        slope = np.gradient(round_height, axis=0) * radius * 2
        slope_x = np.gradient(round_height, axis=1) * radius * 2
        light[seen] = (0.72 + 0.36 * round_height + 0.42 * slope + 0.14 * slope_x)[seen]
    return light


def add_shadow(photo: Pixels, placed: Placed) -> None:
    """Darkens the ground below the figure's feet, in place."""
    left, _, right, bottom = placed.bounds()
    height, width = photo.shape[:2]
    deep = 0.07 * placed.unit
    rows = np.arange(max(0, int(bottom - 3 * deep)), min(height, int(bottom + 2 * deep) + 1), dtype=np.float32)
    across = (np.arange(width, dtype=np.float32) - (left + right) / 2) / (0.45 * (right - left) + 1)
    away = across**2 + ((rows[:, None] - bottom + deep / 3) / (deep + 1)) ** 2
    if rows.size:
        photo[int(rows[0]) : int(rows[0]) + rows.size] *= (1 - 0.4 * np.exp(-1.5 * away))[:, :, None]


def add_obstacle(rng: np.random.Generator, photo: Pixels, foot: float) -> Mask:
    """A fence, a post or tall grass in front of everything, in place. Returns where it stands, (H, W)."""
    height, width = photo.shape[:2]
    canvas = Image.new("L", (width, height))
    pen, kind = ImageDraw.Draw(canvas), int(rng.integers(3))
    colour = _pick(rng, _WALLS)
    if kind == 0:
        _draw_fence(pen, rng, width, foot + 0.05 * height, height * rng.uniform(0.2, 0.45), 255)
    elif kind == 1:
        x, thick = rng.uniform(0.1, 0.9) * width, rng.uniform(0.02, 0.06) * width
        pen.polygon([(x, 0), (x + thick, 0), (x + 1.2 * thick, height), (x - 0.2 * thick, height)], fill=255)
    else:
        colour = np.array([92, 118, 52]) * rng.uniform(0.7, 1.2)
        for x in rng.uniform(0, width, width // 2):
            root, tip = foot + height * rng.uniform(0, 0.15), foot - height * rng.uniform(-0.02, 0.10)
            pen.polygon([(x - 1.5, root), (x + rng.uniform(-0.03, 0.03) * width, tip), (x + 1.5, root)], fill=255)
    mask = np.asarray(canvas) > 0
    texture = 1 + 0.12 * smooth_noise(rng, height, width, (9, 3))
    photo[mask] = (texture[:, :, None] * colour.astype(np.float32))[mask]
    return mask


def finish(rng: np.random.Generator, photo: Pixels) -> Image.Image:
    """What a camera adds: exposure and colour cast, a little blur, noise."""
    height, width = photo.shape[:2]
    cast = rng.uniform(0.94, 1.06, 3) * rng.uniform(0.85, 1.12)
    sharp = Image.fromarray(np.clip(photo * cast.astype(np.float32), 0, 255).astype(np.uint8))
    seen = np.asarray(sharp.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 0.9))), dtype=np.float32)
    grain = rng.standard_normal((height, width, 3), dtype=np.float32) * np.float32(rng.uniform(1.5, 5))
    return Image.fromarray(np.clip(seen + grain + 0.5, 0, 255).astype(np.uint8))
