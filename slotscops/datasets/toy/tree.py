"""A synthetic PASCAL-Part: horses and cows in landscapes, with part masks, in the official on-disk layout.

It stands in for the real photos where those are not at hand (tests, the demo, a first training run), and is read by the
same code. What makes the real files hard is kept: parts overlap, hide each other and leave the photo, objects occlude
one another and may be tiny, some have no parts at all. H, W are a photo's height and width in pixels.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from scipy.io import savemat

from slotscops.core.errors import UserError
from slotscops.core.files import remove_abandoned, write_bytes
from slotscops.datasets.toy.anatomy import PART_NAMES, Figure, turn
from slotscops.datasets.toy.animals import draw_animal, draw_table
from slotscops.datasets.toy.scene import (
    Layers,
    Mask,
    Pixels,
    Placed,
    add_obstacle,
    add_shadow,
    fill_outline,
    finish,
    paint_figure,
    paint_landscape,
)

SPLITS = ("train", "val")
MAX_IMAGES = 500_000  # a split; names of the second split start here, so that growing the first renames nothing
CLASS_INDEX = {"cow": 10, "table": 11, "horse": 13}  # as in PASCAL-Part
LIST_NAMES = {"cow": "cow", "table": "diningtable", "horse": "horse"}  # PASCAL-Part's class to VOC's
JPEG_QUALITY = 92
MAT_HEADER = b"MATLAB 5.0 MAT-file, Platform: slotscops toy".ljust(116)

# A part's mask continues under these neighbours that hide it, as in the real files.
_LEGS = [side + end for side in "lr" for end in "fb"]
RUNS_UNDER = {
    "torso": ("neck", *(f"{leg}uleg" for leg in _LEGS)),
    **{f"{leg}uleg": (f"{leg}lleg",) for leg in _LEGS},
    **{f"{leg}lleg": (f"{leg}ho",) for leg in _LEGS},
}
HEAD_HOLDS = ("lear", "rear", "leye", "reye", "muzzle", "lhorn", "rhorn")
FEWEST_PIXELS = 12  # of an object's visible mask: below that no annotator would have seen it
SMALLEST_UNIT_WITH_PARTS = 26.0  # pixels per body length: a smaller animal is annotated without parts


@dataclass(frozen=True)
class Annotated:
    """One object of a photo as PASCAL-Part stores it."""

    class_name: str
    mask: Mask  # (H, W)
    parts: list[tuple[str, Mask]]  # in the order of the real files, each (H, W)


def write_tree(root: Path, *, num_train: int = 600, num_val: int = 150, seed: int = 0) -> None:
    """Writes `root/VOCdevkit/VOC2010/{JPEGImages,ImageSets/Main}` and `root/Annotations_Part`.

    Image i of a split depends on (seed, split, i) alone: the same call gives the same bytes, and a larger one only adds
    images. The lists are written last, so a tree without them is one that was not finished.

    Raises:
        UserError: a number of images outside 1 to `MAX_IMAGES`.
    """
    counts = dict(zip(SPLITS, (num_train, num_val), strict=True))
    for split, count in counts.items():
        if not 1 <= count <= MAX_IMAGES:
            raise UserError(f"the toy's {split} split was asked for {count} images; give 1 to {MAX_IMAGES}")
    photos, annotations = root / "VOCdevkit/VOC2010/JPEGImages", root / "Annotations_Part"
    lists = root / "VOCdevkit/VOC2010/ImageSets/Main"
    for folder in (photos, annotations, lists):
        folder.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder)
    for split, count in counts.items():
        classes_of: dict[str, set[str]] = {}
        for index in range(count):
            name = image_name(split, index)
            photo, objects = draw_photo(seed, split, index)
            encoded = io.BytesIO()
            photo.save(encoded, "JPEG", quality=JPEG_QUALITY)
            # The file must be whole at every moment: another process that draws the same tree may read it already.
            write_bytes(photos / f"{name}.jpg", encoded.getvalue(), durable=False)
            write_bytes(annotations / f"{name}.mat", annotation_bytes(name, objects), durable=False)
            classes_of[name] = {item.class_name for item in objects}
        _write_lists(lists, split, classes_of)


def image_name(split: str, index: int) -> str:
    return f"toy_{SPLITS.index(split) * MAX_IMAGES + index:06d}"


def _write_lists(folder: Path, split: str, classes_of: dict[str, set[str]]) -> None:
    write_bytes(folder / f"{split}.txt", "".join(f"{name}\n" for name in classes_of).encode())
    for class_name, list_name in LIST_NAMES.items():
        lines = (f"{name} {1 if class_name in present else -1:2d}\n" for name, present in classes_of.items())
        write_bytes(folder / f"{list_name}_{split}.txt", "".join(lines).encode())


# One photo -----------------------------------------------------------------------------------------------------------


def draw_photo(seed: int, split: str, index: int) -> tuple[Image.Image, list[Annotated]]:
    """Photo `index` of a split and its visible objects, the nearest first."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, SPLITS.index(split), index])))
    height, width = _choose_size(rng)
    photo, horizon = paint_landscape(rng, height, width)
    figures = _choose_figures(rng, height, width, horizon)
    painted: list[tuple[Placed, Layers]] = []
    for placed in sorted(figures, key=lambda item: item.bounds()[3]):  # the higher its feet, the farther away
        layers = paint_figure(rng, placed, height, width)
        if layers is not None:
            add_shadow(photo, placed)
            _lay_over(photo, layers)
            painted.append((placed, layers))
    hidden = np.zeros((height, width), dtype=np.bool_)
    if rng.random() < 0.2:
        hidden = add_obstacle(rng, photo, max(placed.bounds()[3] for placed in figures))
    return finish(rng, photo), _annotate(painted[::-1], hidden)


def _choose_size(rng: np.random.Generator) -> tuple[int, int]:
    """Height and width: one side of most VOC photos is 500."""
    long, short = (500, int(rng.integers(332, 400))) if rng.random() < 0.25 else rng.integers(240, 420, 2)
    height, width = sorted((int(long), int(short)))
    return (width, height) if rng.random() < 0.25 else (height, width)


def _choose_figures(rng: np.random.Generator, height: int, width: int, horizon: int) -> list[Placed]:
    """A main animal, and in half of the photos others beside it or far behind."""
    main_class = str(rng.choice(["horse", "cow"]))
    share = rng.uniform(0.02, 0.09) if rng.random() < 0.1 else rng.uniform(0.24, 0.8)  # of the photo, by its box
    main = _place(rng, draw_animal(rng, main_class), (height, width), share, horizon)
    figures = [main]
    others = int(rng.choice([0, 1, 2, 3], p=[0.5, 0.28, 0.14, 0.08]))
    for _ in range(others):
        class_name = main_class if rng.random() < 0.7 else str(rng.choice(["horse", "cow"]))
        figure = draw_animal(rng, class_name)
        share = rng.uniform(0.05, 0.35) if rng.random() < 0.4 else rng.uniform(0.001, 0.03)
        figures.append(_place(rng, figure, (height, width), share, horizon))
    if rng.random() < 0.08:
        figures.append(_place(rng, draw_table(rng), (height, width), rng.uniform(0.02, 0.15), horizon))
    return figures


def _place(rng: np.random.Generator, figure: Figure, size: tuple[int, int], share: float, horizon: int) -> Placed:
    """Turns a figure a little, scales it until its box covers `share` of the photo and stands it on the ground."""
    height, width = size
    angle = rng.normal(0, 5) if rng.random() < 0.8 else rng.uniform(-22, 22)
    turned = [tuple(turn(outline, angle) for outline in shape.outlines) for shape in figure.shapes]
    corners = np.concatenate([outline for outlines in turned for outline in outlines])
    low, extent = corners.min(0), np.ptp(corners, axis=0)
    unit = float(min(np.sqrt(share * height * width / extent.prod()), *(np.array([width, height]) * 1.08 / extent)))
    slack = rng.uniform(0, 0.2) if rng.random() < 0.25 else 0.02  # how much may leave the photo, of the figure
    free = width - extent[0] * unit
    left = rng.uniform(*sorted((-slack * extent[0] * unit, free + slack * extent[0] * unit)))
    near = np.sqrt(min(1.0, share / 0.3))  # smaller figures stand farther back
    foot = horizon + (height - horizon) * rng.uniform(near * 0.75, 0.35 + 0.65 * near)
    foot = max(foot, min(extent[1] * unit, 0.98 * height))
    shift = np.array([left, foot - extent[1] * unit]) - low * unit
    outlines = tuple(tuple(outline * unit + shift for outline in pieces) for pieces in turned)
    return Placed(figure, outlines, unit)


def _lay_over(photo: Pixels, layers: Layers) -> None:
    left, top, right, bottom = layers.box
    below = photo[top:bottom, left:right]
    below += layers.cover[:, :, None] * (layers.colour - below)


# Annotations ---------------------------------------------------------------------------------------------------------


def _annotate(painted: list[tuple[Placed, Layers]], hidden: Mask) -> list[Annotated]:
    """What is seen of each figure, from the nearest to the farthest; `hidden` (H, W) is covered by something else."""
    hidden, objects = hidden.copy(), []
    for placed, layers in painted:
        left, top, right, bottom = layers.box
        window = np.s_[top:bottom, left:right]
        seen = (layers.piece > 0) & ~hidden[window]
        hidden[window] |= layers.piece > 0
        if seen.sum() < FEWEST_PIXELS:
            continue
        parts = _find_parts(placed, layers) if placed.unit >= SMALLEST_UNIT_WITH_PARTS else {}
        names = [name for name in PART_NAMES[placed.figure.class_name] if (parts.get(name, False) & seen).any()]
        spread = [(name, _spread(parts[name] & seen, window, hidden.shape)) for name in names]
        objects.append(Annotated(placed.figure.class_name, _spread(seen, window, hidden.shape), spread))
    return objects


def _find_parts(placed: Placed, layers: Layers) -> dict[str, Mask]:
    """(h, w) masks of the parts in the figure's box, before other objects hide them."""
    shapes = placed.figure.shapes
    names = sorted({shape.part for shape in shapes} - {""})
    number = {name: 1 + index for index, name in enumerate(names)}
    part_of_piece = np.array([0, *(number.get(shape.part, 0) for shape in shapes)], dtype=np.uint8)
    seen = part_of_piece[layers.piece]
    parts = {name: seen == number[name] for name in names}
    masks = dict(parts)
    for name, neighbours in RUNS_UNDER.items():
        above = [parts[neighbour] for neighbour in neighbours if neighbour in parts]
        if name in parts and above:
            masks[name] = parts[name] | (_draw_whole(placed, layers, name) & np.any(above, axis=0))
    masks["head"] = np.any([parts[name] for name in ("head", *HEAD_HOLDS) if name in parts], axis=0)
    return masks


def _draw_whole(placed: Placed, layers: Layers, part: str) -> Mask:
    """(h, w) the part as if nothing lay over it."""
    left, top, right, bottom = layers.box
    canvas = Image.new("L", (right - left, bottom - top))
    pen = ImageDraw.Draw(canvas)
    for shape, outlines in zip(placed.figure.shapes, placed.outlines, strict=True):
        if shape.part == part:
            for outline in outlines:
                fill_outline(pen, outline, layers.box, 1, 255)
    return np.asarray(canvas) > 0


def _spread(mask: Mask, window: tuple[slice, slice], size: tuple[int, ...]) -> Mask:
    """The mask of a window as a mask of the whole photo."""
    whole = np.zeros(size, dtype=np.bool_)
    whole[window] = mask
    return whole


def annotation_bytes(name: str, objects: list[Annotated]) -> bytes:
    """A PASCAL-Part `.mat` file: `anno` with `imname` and (1, N) `objects`, each with (1, P) or (0, 0) `parts`."""
    items = np.empty((1, len(objects)), dtype=[(field, object) for field in ("class", "class_ind", "mask", "parts")])
    for column, item in enumerate(objects):
        shape = (1, len(item.parts)) if item.parts else (0, 0)
        parts = np.empty(shape, dtype=[("part_name", object), ("mask", object)])
        for place, (part, mask) in enumerate(item.parts):
            parts[0, place] = (part, mask.view(np.uint8))
        index = np.array([[CLASS_INDEX[item.class_name]]], dtype=np.uint8)
        items[0, column] = (item.class_name, index, item.mask.view(np.uint8), parts)
    anno = np.empty((1, 1), dtype=[("imname", object), ("objects", object)])
    anno[0, 0] = (name, items)
    file: Any = io.BytesIO()  # savemat takes open files too, its types know only paths
    savemat(file, {"anno": anno}, do_compression=True)
    content: bytes = file.getvalue()
    return MAT_HEADER + content[len(MAT_HEADER) :]  # the writer puts the time of day into its header
