"""Photos in, parts out.

    python -m slotscops.segment --checkpoint RUN --out DIR PHOTO_OR_FOLDER...

For each photo: `NAME.parts.png` (indexed, pixel value = part label, VOC colours), `NAME.overlay.png`, and with
`--soft` `NAME.maps.safetensors`. The network was trained on square crops around one object, so the photo is seen as
one such crop: padded to a square, resized, and the maps are brought back to the photo's own size.

Shapes: S slots, H x W pixels of the photo.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from safetensors.numpy import save
from torch import Tensor
from torch.nn import functional

from slotscops import console
from slotscops.build import Trained, load_model
from slotscops.crops import PADDING
from slotscops.errors import RunError, UserError
from slotscops.features import compute_features
from slotscops.files import write_bytes
from slotscops.model import SlotScops
from slotscops.teacher import Teacher
from slotscops.visualise import label_image, overlay, picture_bytes

PHOTO_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"})
_MAX_PIXELS = 100_000_000  # a photo of more is refused before it is decoded


@dataclass(frozen=True)
class Parts:
    """What was found in one photo."""

    photo: NDArray[np.uint8]  # (H, W, 3) RGB
    maps: NDArray[np.float32]  # (S, H, W) share of each slot in each pixel, sums to 1; slot 0 is background

    @property
    def labels(self) -> NDArray[np.uint8]:
        """(H, W) the slot with the largest share; 0 = background."""
        labels: NDArray[np.uint8] = self.maps.argmax(axis=0).astype(np.uint8)
        return labels

    def overlay(self, opacity: float = 0.6) -> Image.Image:
        """The photo with its parts coloured."""
        return overlay(self.photo, self.labels, opacity)


class Segmenter:
    """A trained network that takes photos. Made by `slotscops.load`."""

    def __init__(self, network: SlotScops, size: int, teacher: tuple[Teacher, int] | None = None) -> None:
        self.network = network
        self.size = size  # pixels, side of the crops the network was trained on
        self._teacher = teacher  # and the side of its crops; where the network's input is the teacher's features

    def segment(self, photo: str | Path | Image.Image) -> Parts:
        """Finds the parts in one photo, of any size and mode.

        Raises:
            UserError: no such file, not an image, or more than 100 million pixels.
        """
        image = photo if isinstance(photo, Image.Image) else read_photo(Path(photo))
        image = image.convert("RGB")
        return Parts(np.asarray(image), self._soft_maps(image).numpy())

    @torch.inference_mode()
    def _soft_maps(self, image: Image.Image) -> Tensor:
        width, height = image.size
        side = max(width, height)
        square = ImageOps.pad(image, (side, side), color=PADDING).resize(
            (self.size, self.size), Image.Resampling.BICUBIC
        )
        device = next(self.network.parameters()).device
        crop = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].to(device)  # (1, 3, size, size) uint8
        if self._teacher is not None:
            crop = compute_features(self._teacher[0].to(device), crop, self._teacher[1])
        logits = self.network(crop).logits.float()
        square_logits = functional.interpolate(logits, (side, side), mode="bilinear", align_corners=True)[0]
        top, left = (side - height) // 2, (side - width) // 2
        return square_logits[:, top : top + height, left : left + width].softmax(dim=0).cpu()


def load(run_or_checkpoint: str | Path, teacher_weights: str | None = None) -> Segmenter:
    """A trained model from a run or checkpoint, on the GPU where there is one.

    Args:
        teacher_weights: VGG19's, needed only by a model that was trained on cached features: `imagenet`, a
            .safetensors or .pth file, or random:SEED; default: those it was trained with, unless they were a file.

    Raises:
        UserError: nothing there, damaged, or other teacher weights than those of the training.
    """
    trained = load_model(Path(run_or_checkpoint))
    network = trained.network.to("cuda" if torch.cuda.is_available() else "cpu")
    teacher = (_load_teacher(trained, teacher_weights), trained.config.teacher_size) if network.takes_features else None
    return Segmenter(network, trained.config.data.size, teacher)


def _load_teacher(trained: Trained, weights: str | None) -> Teacher:
    original = trained.state.teacher_weights
    if weights is None and original != "imagenet" and not original.startswith("random:"):
        raise UserError(
            f"{trained.path}: was trained on features of VGG19 with weights from {original}; "
            "give that file with --teacher-weights (in Python: teacher_weights=)"
        )
    teacher = Teacher(trained.config.teacher.layer, weights or original)
    if teacher.fingerprint != trained.state.teacher_sha256:
        raise UserError(
            f"{trained.path}: was trained with teacher {original} (sha256 {trained.state.teacher_sha256[:12]}), "
            f"came {teacher.weights_name} ({teacher.fingerprint[:12]}); give the ones of the training"
        )
    return teacher


def read_photo(path: Path) -> Image.Image:
    """The photo, turned as its EXIF says, in RGB."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise UserError(f"{path}: {image.width} x {image.height} pixels, at most {_MAX_PIXELS} are read")
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{path}: no such photo") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: is no readable image ({type(error).__name__})") from None


def find_photos(paths: Iterable[Path]) -> list[Path]:
    """The photos themselves and those anywhere below the folders, sorted within each folder."""
    photos: list[Path] = []
    for path in paths:
        if path.is_dir():
            photos += sorted(p for p in path.rglob("*") if p.suffix.lower() in PHOTO_SUFFIXES)
        elif path.exists():
            photos.append(path)
        else:
            raise UserError(f"{path}: no such photo or folder")
    return photos


def _segment_all(model: Segmenter, photos: Sequence[Path], out: Path, soft: bool) -> Iterator[str]:
    """Writes every photo's pictures; yields the reason for each photo that was passed over."""
    names = _unique_names(photos)
    for photo, name in console.track(zip(photos, names, strict=True), len(photos), "photos"):
        try:
            parts = model.segment(photo)
        except UserError as error:
            yield str(error)
            continue
        write_bytes(out / f"{name}.parts.png", picture_bytes(label_image(parts.labels)))
        write_bytes(out / f"{name}.overlay.png", picture_bytes(parts.overlay()))
        if soft:
            write_bytes(out / f"{name}.maps.safetensors", save({"maps": parts.maps}))


def _unique_names(photos: Sequence[Path]) -> list[str]:
    """File names without suffix; two photos of one name in different folders get a number."""
    seen: dict[str, int] = {}
    names = []
    for photo in photos:
        seen[photo.stem] = seen.get(photo.stem, 0) + 1
        names.append(photo.stem if seen[photo.stem] == 1 else f"{photo.stem}-{seen[photo.stem]}")
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m slotscops.segment", description="Find the parts in photos.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run's folder or one of its checkpoints")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--soft", action="store_true", help="write the soft maps too")
    parser.add_argument("--teacher-weights", help="VGG19's, for a model trained on cached features")
    parser.add_argument("photos", type=Path, nargs="+", metavar="PHOTO_OR_FOLDER")
    options = parser.parse_args(arguments)
    photos = find_photos(options.photos)
    if not photos:
        raise UserError(
            f"no photos in {', '.join(map(str, options.photos))}; needed {', '.join(sorted(PHOTO_SUFFIXES))}"
        )
    model = load(options.checkpoint, options.teacher_weights)
    options.out.mkdir(parents=True, exist_ok=True)
    passed_over = list(_segment_all(model, photos, options.out, options.soft))
    for reason in passed_over:
        console.warn(f"passed over: {reason}")
    console.say(f"{options.out}: parts of {len(photos) - len(passed_over)} photos, {len(passed_over)} passed over")
    if len(passed_over) == len(photos):
        raise RunError("no photo could be read")
    return 0


if __name__ == "__main__":
    console.run_command(main)
