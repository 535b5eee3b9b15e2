"""Loads a network's tensors from torchvision's download, a file or a seed, and computes their fingerprint."""

import contextlib
import hashlib
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from slotscops.core.console import is_main
from slotscops.core.errors import UserError, first_line

IMAGENET = "imagenet"
_RANDOM = "random:"
_CHOICES = "a .safetensors or .pth file, or random:SEED (for tests only)"


class Pretrained(Protocol):
    """The part of torchvision's `WeightsEnum` that is used here."""

    @property
    def url(self) -> str: ...

    def get_state_dict(self, *, progress: bool, check_hash: bool, weights_only: bool) -> Mapping[str, Any]: ...


def random_seed(source: str) -> int | None:
    """SEED of `random:SEED`; None for weights that were trained.

    Raises:
        UserError: SEED is not a whole number from 0 to 2^63 - 1.
    """
    if not source.startswith(_RANDOM):
        return None
    seed = source.removeprefix(_RANDOM)
    if not (seed.isascii() and seed.isdigit()) or int(seed) >= 2**63:
        raise UserError(f"weights {source!r}: SEED must be a whole number below 2^63; write for example {_RANDOM}0")
    return int(seed)


def display_name(source: str) -> str:
    """The source's name in outputs: a file without its folder, because folders differ between machines."""
    return Path(source).name if _is_file_name(source) else source


def fill(module: nn.Module, source: str, pretrained: Pretrained) -> None:
    """Gives every parameter and buffer of `module` its values; modules on the meta device move to the CPU first.

    Tensors of the source that the module has no place for, such as a classifier's, are left out.

    Args:
        source: `imagenet`, a `.safetensors` or `.pth` state dict under torchvision's names, or `random:SEED`.
        pretrained: torchvision's weights, read if the source is `imagenet`.

    Raises:
        UserError: the source is none of these, cannot be downloaded or read, or lacks what the module needs.
    """
    seed = random_seed(source)
    tensors = None if seed is not None else read_state_dict(source, pretrained)
    if any(tensor.is_meta for tensor in module.state_dict(keep_vars=True).values()):
        module.to_empty(device="cpu")
    if tensors is None:
        assert seed is not None
        draw(module, seed)
    else:
        load_tensors(module, tensors, source)


def read_state_dict(source: str, pretrained: Pretrained) -> dict[str, Tensor]:
    """The tensors by name, of torchvision's weights or of a file.

    Raises:
        UserError: neither `imagenet` nor a weight file; no download; a file that is missing, damaged or pickled code.
    """
    if source == IMAGENET:
        return _download(pretrained)
    if not _is_file_name(source):
        raise UserError(f"weights {source!r}: no such choice; give {IMAGENET}, {_CHOICES}")
    return _read_file(source)


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copies the module's tensors out of a state dict that may hold more.

    Raises:
        UserError: naming the first tensor that is missing or of another shape.
    """
    needed = module.state_dict()
    for name, tensor in needed.items():
        if name not in tensors:
            raise UserError(f"weights {source}: has no tensor {name}; give a state dict under torchvision's names")
        if tensors[name].shape != tensor.shape:
            raise UserError(
                f"weights {source}: {name} has shape {tuple(tensors[name].shape)}, needed {tuple(tensor.shape)}; "
                "give the state dict of the right network"
            )
    module.load_state_dict({name: tensors[name] for name in needed})


def draw(module: nn.Module, seed: int) -> None:
    """Random weights that neither shrink nor grow the signal under ReLU: variance 2 / fan_in; biases 0, scales 1.

    The values are uniform, not normal: each takes one exact operation, so the values and their fingerprint are the same
    on every processor. Those of `torch.randn` are not. PyTorch's global generator is left alone.

    Source: He et al. (arXiv:1502.01852), equation 10.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict(keep_vars=True).items():
            if tensor.dim() > 1:
                bound = math.sqrt(6 / tensor[0].numel())
                tensor.copy_((torch.rand(tensor.shape, generator=generator) - 0.5) * (2 * bound))
            else:
                tensor.fill_(1.0 if name.endswith(("weight", "running_var")) else 0.0)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and values, in the order of the names; the file's format plays no part."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode() + b"\n")
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _is_file_name(source: str) -> bool:
    return source.endswith((".safetensors", ".pth", ".pt"))


def _download(pretrained: Pretrained) -> dict[str, Tensor]:
    try:
        # torchvision announces a download on stdout, which we keep for results.
        with contextlib.redirect_stdout(sys.stderr):
            return dict(pretrained.get_state_dict(progress=is_main(), check_hash=True, weights_only=True))
    except Exception as error:  # no network, no disk space, a wrong hash, a damaged download: too many kinds to list
        raise UserError(
            f"weights {IMAGENET}: could not get {pretrained.url} ({first_line(error)}); "
            f"connect to the internet, or give {_CHOICES}"
        ) from None


def _read_file(source: str) -> dict[str, Tensor]:
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"weights {source}: no such file; give {IMAGENET}, {_CHOICES}")
    try:
        content: Any = load_file(path) if path.suffix == ".safetensors" else _unpickle_tensors(path)
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(
            f"weights {source}: cannot be read ({first_line(error)}); give a state dict of tensors, undamaged"
        ) from None
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"weights {source}: must hold tensors by name and nothing else; save a plain state dict")
    return dict(content)


def _unpickle_tensors(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)  # weights_only: runs no code of the file
