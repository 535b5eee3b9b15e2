"""Writes a trained model as one file for other programs: ONNX, or PyTorch's own exported program.

    python -m slotscops.export --checkpoint RUN --out model.onnx [PHOTO_OR_FOLDER...]
    python -m slotscops.export --checkpoint RUN --out model.pt2  [PHOTO_OR_FOLDER...]

The input `images` is (B, 3, size, size) uint8 RGB, 0..255, with any B. The file contains the normalisation, and also
the teacher if the model reads its features. The outputs are `maps`, (B, S, size, size) float32, the share of each slot
in each pixel (slot 0 is the background), and `labels`, (B, size, size) uint8, the number of the slot with the largest
share. The property `numbers` of an ONNX file, and `slotscops.json` in a `.pt2` file, say which slot each row of `maps`
is. They are 0 to S - 1, unless dead parts were left out; see `pruning`. As `model.segment` does, pad a photo to a
square with the colour `slotscops.core.pixels.PADDING` and resize it to `size`.

Before the file is written, the exported model is loaded and compared with the original on the photos. If they differ
by more than `TOLERANCE`, no file is written.
"""

import io
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from slotscops.core import console
from slotscops.core.command_line import command_parser
from slotscops.core.errors import RunError, UserError, first_line
from slotscops.core.files import why_not_writable, write_bytes
from slotscops.core.photos import find_photos, read_photo
from slotscops.model.maps import interpolation_matrix
from slotscops.model.refinement import refine_maps
from slotscops.segment.pruning import tell_left_out
from slotscops.segment.segmenter import Segmenter, load, network_inputs

TOLERANCE = 1e-3  # largest allowed difference of a share; shares lie in 0..1
_LARGEST_CHECK = 32  # photos at most in the comparison
_OPSET = 20
Runner = Callable[[NDArray[np.uint8]], tuple[NDArray[Any], NDArray[Any]]]


class WholeModel(nn.Module):
    """The network with all steps from pixels to maps and labels in one forward pass."""

    numbers: Tensor | None  # (S,) uint8 label of each row of the maps; None if the rows' places are the labels

    def __init__(self, model: Segmenter) -> None:
        """
        Raises:
            UserError: if the slots start from random numbers, which cannot be exported.
        """
        super().__init__()
        config = model.trained.config
        if config.slots.init == "shared_gaussian":
            raise UserError(
                "slots.init is shared_gaussian, which draws random numbers and cannot be exported; train with "
                "slots.init=learned"
            )
        self.network, self.teacher, self.teacher_size = model.network, model.teacher, config.teacher_size
        blank = torch.zeros(1, 3, model.size, model.size, dtype=torch.uint8, device=model.device)
        grid = model.forward(blank).logits.shape[2:]
        for name, side in zip(("down", "across"), grid, strict=True):
            self.register_buffer(name, interpolation_matrix(side, model.size, align_corners=True).clone())
        self.register_buffer("numbers", _numbers_of_rows(model))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, size, size) uint8 images -> (B, S, size, size) float32 maps and (B, size, size) uint8 labels."""
        inputs = network_inputs(self.network, self.teacher, images, self.teacher_size)
        output = self.network(inputs)
        logits = (output.logits if output.unpruned is None else output.unpruned).float()  # (B, S, h, w)
        maps = (self.down @ (logits @ self.across.T)).softmax(dim=1)
        if self.network.refinement == "pamr":
            maps = refine_maps(maps, images)
        maps = self.network.keep_rows(maps)
        winners = maps.argmax(dim=1)
        return maps, winners.to(torch.uint8) if self.numbers is None else self.numbers[winners]


def _numbers_of_rows(model: Segmenter) -> Tensor | None:
    """(S,) uint8, see `WholeModel.numbers`."""
    numbers = model.network.slot_numbers
    return None if numbers == tuple(range(len(numbers))) else torch.tensor(numbers, dtype=torch.uint8)


def export_program(whole: WholeModel, size: int) -> torch.export.ExportedProgram:
    """The model as one graph that takes any number of `size` x `size` images."""
    example = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    shapes = {"images": {0: torch.export.Dim("batch", min=1)}}
    with torch.no_grad():
        return torch.export.export(whole, (example,), dynamic_shapes=shapes)


def to_pt2(program: torch.export.ExportedProgram, notes: dict[str, str]) -> bytes:
    """The bytes of a `.pt2` file.

    Args:
        notes: stored in the file as `slotscops.json`, which `torch.export.load(..., extra_files=...)` reads.
    """
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"slotscops.json": json.dumps(notes)})
    return file.getvalue()


def to_onnx(program: torch.export.ExportedProgram, notes: dict[str, str]) -> bytes:
    """The bytes of an `.onnx` file.

    Args:
        notes: properties to store in the file.

    Raises:
        UserError: if the packages that write and run ONNX are not installed.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401  # needed later for the comparison
        from onnxscript import optimizer  # PyTorch's exporter needs onnxscript
    except ImportError as error:
        raise UserError(
            f"ONNX needs the package {error.name}; install it with pip install 'slotscops[export]'"
        ) from None
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    exported = torch.onnx.export(
        program, dynamo=True, opset_version=_OPSET, output_names=["maps", "labels"], verbose=False, optimize=False
    )
    assert exported is not None
    # The exporter's own optimisation also rewrites patterns. On the refinement's graph this takes minutes in vain.
    optimizer.inline(exported.model)
    optimizer.fold_constants(exported.model)
    optimizer.remove_unused_nodes(exported.model)
    proto = exported.model_proto
    onnx.helper.set_model_props(proto, notes)
    onnx.checker.check_model(proto)
    content: bytes = proto.SerializeToString()
    return content


def run_pt2(content: bytes) -> Runner:
    """A function that runs the model of a `.pt2` file on (B, 3, size, size) images and returns maps and labels."""
    module = torch.export.load(io.BytesIO(content)).module()

    def run(images: NDArray[np.uint8]) -> tuple[NDArray[Any], NDArray[Any]]:
        with torch.inference_mode():
            maps, labels = module(torch.from_numpy(images))
        return maps.numpy(), labels.numpy()

    return run


def run_onnx(content: bytes) -> Runner:
    """A function that runs the model of an `.onnx` file on (B, 3, size, size) images and returns maps and labels."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(images: NDArray[np.uint8]) -> tuple[NDArray[Any], NDArray[Any]]:
        maps, labels = session.run(["maps", "labels"], {"images": images})
        return maps, labels

    return run


def largest_difference(whole: WholeModel, run: Runner, crops: NDArray[np.uint8]) -> tuple[float, float]:
    """Compares an exported model with the original, on (N, 3, size, size) uint8 crops.

    It runs the first crop alone and then all crops together, to test different batch sizes.

    Returns:
        The largest difference of a share, and the fraction of the pixels whose labels differ.
    """
    with torch.inference_mode():
        maps, labels = (tensor.numpy() for tensor in whole(torch.from_numpy(crops)))
    alone, together = run(crops[:1]), run(crops)
    assert together[0].shape == maps.shape
    assert together[1].shape == labels.shape
    difference = max(float(np.abs(together[0] - maps).max()), float(np.abs(alone[0] - maps[:1]).max()))
    return difference, float((together[1] != labels).mean())


def _crops_for_check(model: Segmenter, paths: Sequence[Path]) -> tuple[NDArray[np.uint8], str]:
    """(N, 3, size, size) uint8 crops of the photos, or noise if no photos were given, and a description of them."""
    if not paths:
        noise = np.random.default_rng(0).integers(0, 256, (4, 3, model.size, model.size), dtype=np.uint8)
        return noise, "4 images of noise (give photos to check on them)"
    photos = find_photos(paths).photos[:_LARGEST_CHECK]
    if not photos:
        raise UserError(f"no photos in {', '.join(map(str, paths))}")
    return np.stack([model.crop(read_photo(photo)).numpy() for photo in photos]), f"{len(photos)} photos"


def export(model: Segmenter, out: Path, crops: NDArray[np.uint8]) -> tuple[float, float]:
    """Exports the model to `out` (`.onnx` or `.pt2`) and writes the file if its results agree with the model's.

    Args:
        crops: (N, 3, size, size) uint8 RGB, for the comparison.

    Returns:
        The largest difference of a share, and the fraction of the pixels whose labels differ.

    Raises:
        UserError: if the model cannot be exported, or packages are missing.
        RunError: if the exporter failed, or the exported model differs by more than `TOLERANCE`.
    """
    whole = WholeModel(model).cpu().eval()
    settings = {"size": str(model.size), "slots": str(model.network.num_slots), "input": "uint8 RGB 0..255"}
    settings["numbers"] = ",".join(map(str, model.network.slot_numbers))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporters' warnings are of no use to our users
            program = export_program(whole, model.size)
            content = to_onnx(program, settings) if out.suffix == ".onnx" else to_pt2(program, settings)
            run = run_onnx(content) if out.suffix == ".onnx" else run_pt2(content)
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:  # the exporters raise many kinds of errors
        raise RunError(f"{out}: could not be exported ({type(error).__name__}: {first_line(error)})") from error
    difference, relabelled = largest_difference(whole, run, crops)
    if not difference <= TOLERANCE:
        raise RunError(f"{out}: not written, it differs from the model by {difference:.2g} (allowed {TOLERANCE:g})")
    write_bytes(out, content)
    return difference, relabelled


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser(
        "export",
        "Write a trained model as ONNX or as PyTorch's exported program.",
        "--checkpoint runs/toy --out toy.onnx photos/",
    )
    parser.add_argument("--checkpoint", required=True, help="a run, one of its checkpoints, or a model's id on the hub")
    parser.add_argument(
        "--out", type=Path, required=True, help="file to write, whose ending .onnx or .pt2 says the format"
    )
    parser.add_argument(
        "--teacher-weights", help="weights of the teacher, for a model that was trained on cached features"
    )
    parser.add_argument(
        "--keep-dead", action="store_true",
        help="keep parts that won next to no pixel in the last evaluation of the training",
    )  # fmt: skip
    parser.add_argument(
        "photos", type=Path, nargs="*", metavar="PHOTO_OR_FOLDER", help="photos on which the written model is checked"
    )
    options = parser.parse_args(arguments)
    if options.out.suffix not in (".onnx", ".pt2"):
        raise UserError(f"--out {options.out}: give a name that ends in .onnx or .pt2")
    if refusal := why_not_writable(options.out):
        raise UserError(f"--out {options.out}: {refusal}")
    model = load(options.checkpoint, options.teacher_weights)
    if not options.keep_dead:
        tell_left_out(model.trained, "--keep-dead")
        model = model.without_dead()
    crops, what = _crops_for_check(model, options.photos)
    difference, relabelled = export(model, options.out, crops)
    console.say(
        f"{options.out}: images (B, 3, {model.size}, {model.size}) uint8 RGB -> maps, labels; on {what} the largest "
        f"difference to the model is {difference:.1e}, {relabelled:.4%} of labels differ"
    )
    return 0
