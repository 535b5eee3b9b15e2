"""Checkpoints: a folder that appears whole or not at all, every file hashed, no pickle anywhere.

`checkpoints/step-{N}/` holds `model.safetensors`, `optimizer.safetensors`, `rng.safetensors` (one row per process),
`ema.safetensors` if weights are averaged, `state.json` (step, samples_seen, what it was trained on) and
`manifest.json` (sha256 and size of all others). The link `checkpoints/best` leads to the one with the best score.
"""

import json
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from pydantic import Field, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from slotscops.core.errors import UserError, first_line
from slotscops.core.files import (
    fsync,
    is_plain_name,
    remove_abandoned,
    sha256_of_bytes,
    sha256_of_file,
    write_bytes,
    write_json,
    writer_name,
)
from slotscops.model.saved_names import saved_parameter_names
from slotscops.train.averaging import WeightAverage

FORMAT = 1
_FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json")
_BEST_NAME = "best.txt"
_EMA = "ema.safetensors"  # only where weights are averaged


Count = Annotated[int, Field(ge=0, le=2**53)]


@dataclass(frozen=True)
class State:
    """All of a run's state that is not a tensor."""

    step: Count
    samples_seen: Count
    config: dict[str, Any]
    shard_digest: str = ""  # this and the next three: empty where unknown
    feature_digest: str = ""
    teacher_weights: str = ""  # imagenet, random:SEED, or the name of the file
    teacher_sha256: str = ""  # of the teacher's tensors
    scores: dict[str, float] = field(default_factory=dict)  # of the last evaluation
    best: dict[str, Any] = field(default_factory=dict)  # score, value, step of the best evaluation so far
    class_names: list[str] = field(default_factory=list)  # of the data, in the order of class ids
    format: int = FORMAT
    order: int = (
        1  # number of the rule for the order of samples, see `loader.plan.ORDER`; older runs do not name theirs
    )
    slot_pixels: dict[str, list[Count]] = field(default_factory=dict)  # of the last evaluation: by class, of each slot
    slot_numbers: list[Count] = field(default_factory=list)  # slots of a published model, see `keep_slots`; empty: all

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The state in `state.json`. Earlier versions wrote the step of the evaluation among its scores.

        Raises:
            ValueError, TypeError: a value is missing, unknown, or of another type.
        """
        TypeAdapter(cls).validate_json(text, strict=True)
        state = cls(**json.loads(text))
        if type(state.best.get("step", 0)) is not int or not isinstance(state.best.get("value", 0.0), int | float):
            raise ValueError("the best score is none")
        return replace(state, scores={name: score for name, score in state.scores.items() if name != "step"})


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back, its hashes checked."""

    path: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rng: dict[str, Tensor]
    ema: dict[str, Tensor] | None  # averaged weights, under the model's names
    state: State

    def tensors(self) -> list[Tensor]:
        """All tensors, in the same order on every process."""
        return [*self.model.values(), *self.optimizer.values(), *self.rng.values(), *(self.ema or {}).values()]

    def with_tensors(self, make: Callable[[Tensor], Tensor]) -> Self:
        """The same checkpoint with the tensors that `make` makes of its own."""

        def remade(group: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: make(tensor) for name, tensor in group.items()}

        ema = None if self.ema is None else remade(self.ema)
        return replace(self, model=remade(self.model), optimizer=remade(self.optimizer), rng=remade(self.rng), ema=ema)


# ---- writing -----------------------------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: State,
    keep: int,
    best_step: int | None = None,
) -> Path:
    """Writes `folder/step-{N}`, then removes all but the newest `keep` and the best.

    If the process dies at any moment, every checkpoint that was whole before stays whole.

    Args:
        tensors: what each safetensors file holds, by its name without ending: model, optimizer, rng, and ema if any.
        best_step: step of a checkpoint that is kept, however old it is. The link `best` leads to it; where links cannot
            be made, the file `best.txt` names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{state.step}"
    _remove_left_overs(folder)
    # A unique name, so that two writers never mix their files, not even on a file system without locks.
    writer = f"{writer_name()}.{uuid.uuid4().hex[:8]}"
    partial, replaced = (folder / f".{final.name}.{writer}.{end}" for end in ("partial", "replaced"))
    partial.mkdir()
    try:
        _write_files(partial, tensors, state)
        if final.exists():  # damaged, or of a run that was resumed from an earlier checkpoint
            final.rename(replaced)
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    fsync(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    if best_step is not None:
        _link_best(folder, best_step)
    for old in list_checkpoints(folder)[:-keep]:
        if old.name != f"step-{best_step}":
            _remove(old)
    return final


def _remove_left_overs(folder: Path) -> None:
    """Removes what processes left behind that died while writing, replacing or removing a checkpoint."""
    remove_abandoned(folder)
    for ending in ("replaced", "removed"):  # not needed any more, whoever renamed it
        for path in folder.glob(f".step-*.{ending}"):
            shutil.rmtree(path, ignore_errors=True)


def _write_files(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: State) -> None:
    for name, group in tensors.items():
        # safetensors' own save_file would make files that only their owner may read, whatever the umask.
        write_bytes(folder / f"{name}.safetensors", save(dict(group)))
    write_json(folder / "state.json", asdict(state))
    names = [*(f"{name}.safetensors" for name in tensors), "state.json"]
    write_json(folder / "manifest.json", {name: _describe(folder / name) for name in names})


def _link_best(folder: Path, step: int) -> None:
    link = folder / ".best"
    try:
        link.unlink(missing_ok=True)
        link.symlink_to(f"step-{step}")
        link.replace(folder / "best")
    except OSError:  # no links on this file system, or `best` was copied into a folder; the checkpoint itself is whole
        link.unlink(missing_ok=True)
        write_bytes(folder / _BEST_NAME, f"step-{step}\n".encode())
    else:
        (folder / _BEST_NAME).unlink(missing_ok=True)


def best_checkpoint(folder: Path) -> Path | None:
    """The best checkpoint as `best.txt` names it, which is written where links cannot be made; None without it."""
    try:
        name = (folder / _BEST_NAME).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return folder / name if re.fullmatch(r"step-\d+", name) else None


def _remove(checkpoint: Path) -> None:
    # We rename it first, so that no half-removed folder has a checkpoint's name.
    leaving = checkpoint.with_name(f".{checkpoint.name}.{uuid.uuid4().hex[:8]}.removed")
    checkpoint.rename(leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def gather_tensors(
    network: nn.Module, average: WeightAverage[Any] | None, optimizer: Optimizer, accelerator: Accelerator
) -> dict[str, dict[str, Tensor]]:
    """The tensors of each of a checkpoint's files. Every process must call it: each has random numbers of its own."""
    generators: dict[str, Tensor] = {}
    for states in gather_object([rng_tensors(accelerator.process_index)]):
        generators |= states
    tensors = {
        "model": network.state_dict(),
        "optimizer": optimizer_tensors(optimizer, saved_parameter_names(network)),
        "rng": generators,
    }
    if average:
        tensors["ema"] = average.network.state_dict()
    return tensors


def optimizer_tensors(optimizer: Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The optimizer's state by "{parameter}/{quantity}", such as "basis/exp_avg"."""
    return {
        f"{names[parameter]}/{quantity}": value
        for parameter, state in optimizer.state.items()
        for quantity, value in state.items()
        if isinstance(value, Tensor)
    }


def rng_tensors(rank: int) -> dict[str, Tensor]:
    """The states of PyTorch's random number generators of this process."""
    states = {f"cpu/{rank}": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"cuda/{rank}"] = torch.cuda.get_rng_state()
    return states


def _describe(path: Path) -> dict[str, Any]:
    return {"sha256": sha256_of_file(path), "bytes": path.stat().st_size}


# ---- reading -----------------------------------------------------------------------------------------------------


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints below `folder`, by step."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def verify_checkpoint(path: Path) -> Path:
    """Returns the path. Raises UserError naming the first file that is missing or differs from the manifest."""
    for name, (sha256, num_bytes) in _read_manifest(path).items():
        with _reading(path / name) as file:
            _check(file, file.stat().st_size == num_bytes and sha256_of_file(file) == sha256)
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint and checks every hash. Each file is opened once, and what was hashed is what is used.

    Raises:
        UserError: missing, damaged, or of another format.
    """
    contents = {}
    for name, (sha256, num_bytes) in _read_manifest(path).items():
        with _reading(path / name) as file:
            contents[name] = file.read_bytes()
            _check(file, len(contents[name]) == num_bytes and sha256_of_bytes(contents[name]) == sha256)
    try:
        state = State.from_json(contents["state.json"].decode())
        model, optimizer, rng = (load(contents.pop(name)) for name in _FILES[:3])
        ema = load(contents[_EMA]) if _EMA in contents else None
    except (OSError, ValueError, TypeError, RecursionError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); {_USE_ANOTHER}") from None
    if state.format != FORMAT:
        raise UserError(f"{path}: has format {state.format}, this version reads {FORMAT}")
    return Checkpoint(path, model, optimizer, rng, ema, state)


def _read_manifest(path: Path) -> dict[str, tuple[str, int]]:
    """The sha256 and bytes of each file of a checkpoint."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        names = {*_FILES, *manifest}
        if not all(map(is_plain_name, names)):
            raise ValueError("names files elsewhere")
        return {name: (manifest[name]["sha256"], manifest[name]["bytes"]) for name in sorted(names)}
    except FileNotFoundError:
        raise UserError(f"{path}: is no checkpoint (no manifest.json); give a folder step-N of a run") from None
    except OSError as error:
        raise UserError(f"{path}/manifest.json: cannot be read ({error.strerror}); {_USE_ANOTHER}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}/manifest.json: is damaged; {_USE_ANOTHER}") from None


@contextmanager
def _reading(file: Path) -> Iterator[Path]:
    """Names a file that is missing or cannot be read."""
    try:
        if not file.is_file():
            raise UserError(f"{file}: is missing; {_USE_ANOTHER}")
        yield file
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); {_USE_ANOTHER}") from None


def _check(file: Path, is_whole: bool) -> None:
    if not is_whole:
        raise UserError(f"{file}: is damaged (its sha256 differs from the manifest); {_USE_ANOTHER}")


def restore(
    saved: Checkpoint, network: nn.Module, average: WeightAverage[Any] | None, optimizer: Optimizer, rank: int
) -> None:
    """The inverse of `gather_tensors`: puts a checkpoint's tensors back into network, average and optimizer.

    A checkpoint without averaged weights starts their average at the weights themselves.

    Raises:
        UserError: tensors of a model with other settings.
    """
    restore_model(network, saved.model, saved.path)
    restore_optimizer(optimizer, saved_parameter_names(network), saved.optimizer, saved.path)
    if average:
        average.restart()
        if saved.ema is not None:
            restore_model(average.network, saved.ema, saved.path)
    restore_rng(saved.rng, rank, saved.path)


def restore_model(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Loads the model's tensors. Raises UserError that names one that is missing, foreign, misshapen or not finite."""
    own = module.state_dict()
    for name in sorted(set(own) ^ set(tensors)):
        side = "lacks" if name in own else "has the foreign"
        raise UserError(f"{path}: {side} tensor {name}; it was saved by a model with other settings")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise UserError(
                f"{path}: {name} has shape {tuple(tensors[name].shape)}, needed {tuple(tensor.shape)}; "
                "it was saved by a model with other settings"
            )
        if tensor.dtype != tensors[name].dtype:
            raise UserError(f"{path}: {name} has type {tensors[name].dtype}, needed {tensor.dtype}; {_USE_ANOTHER}")
        if not tensors[name].isfinite().all():
            raise UserError(f"{path}: {name} holds NaN or infinity; {_USE_ANOTHER}")
    module.load_state_dict(dict(tensors))


def restore_optimizer(
    optimizer: Optimizer, names: Mapping[Tensor, str], tensors: Mapping[str, Tensor], path: Path
) -> None:
    """The inverse of `optimizer_tensors`. Learning rates and other settings stay those of the optimizer.

    Raises:
        UserError: if a tensor is missing, foreign or not finite, or has another shape or type than its parameter. The
            fused optimizers would read beyond it.
    """
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, quantity = key.rpartition("/")
        by_parameter.setdefault(name, {})[quantity] = tensor
    _check_optimizer_tensors(optimizer, names, by_parameter, path)
    content = optimizer.state_dict()
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    content["state"] = {
        number: {quantity: _laid_out_as(parameter, tensor) for quantity, tensor in state.items()}
        for number, parameter in enumerate(ordered)
        if (state := by_parameter.get(names[parameter]))
    }
    optimizer.load_state_dict(content)


def _check_optimizer_tensors(
    optimizer: Optimizer, names: Mapping[Tensor, str], by_parameter: dict[str, dict[str, Tensor]], path: Path
) -> None:
    trained = {names[parameter]: parameter for group in optimizer.param_groups for parameter in group["params"]}
    foreign = sorted(set(by_parameter) - set(trained))
    if foreign:
        raise UserError(f"{path}: its optimizer has the foreign parameter {foreign[0]}; {_USE_ANOTHER}")
    momentum = any(group.get("momentum") for group in optimizer.param_groups)
    wanted = {"exp_avg", "exp_avg_sq"} if isinstance(optimizer, AdamW) else {"momentum_buffer"} if momentum else set()
    for name, parameter in trained.items():
        state = by_parameter.get(name, {})
        steps = {"step"} if isinstance(optimizer, AdamW) else set()
        if state.keys() != wanted | steps:
            came, needed = ", ".join(sorted(state)) or "nothing", ", ".join(sorted(wanted | steps))
            raise UserError(f"{path}: the optimizer's state of {name} is {came}, needed {needed}; {_USE_ANOTHER}")
        for quantity, tensor in state.items():
            shape, dtype = (torch.Size([]), torch.float32) if quantity == "step" else (parameter.shape, parameter.dtype)
            if tensor.shape != shape or tensor.dtype != dtype:
                raise UserError(
                    f"{path}: {name}/{quantity} is {tensor.dtype} of shape {tuple(tensor.shape)}, needed {dtype} of "
                    f"{tuple(shape)}; {_USE_ANOTHER}"
                )
            if not tensor.isfinite().all():
                raise UserError(f"{path}: {name}/{quantity} holds NaN or infinity; {_USE_ANOTHER}")


def _laid_out_as(parameter: Tensor, tensor: Tensor) -> Tensor:
    """The tensor in the parameter's memory layout: fused optimizers read both in memory order, without a check."""
    if tensor.shape != parameter.shape:
        return tensor  # a step counter
    return torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)


def restore_rng(tensors: Mapping[str, Tensor], rank: int, path: Path) -> bool:
    """Restores this process's generators. Returns False if the checkpoint was written by fewer processes.

    Raises:
        UserError: if a state is not one of a generator, or the states of the first process are missing.
    """
    if "cpu/0" not in tensors:
        raise UserError(f"{path}: lacks the random numbers cpu/0; {_USE_ANOTHER}")
    if f"cpu/{rank}" not in tensors:
        return False
    for name, present in rng_tensors(rank).items():
        saved = tensors.get(name, present)
        if saved.shape != present.shape or saved.dtype != present.dtype:
            raise UserError(
                f"{path}: the random numbers {name} are {saved.dtype} of shape {tuple(saved.shape)}, needed "
                f"{present.dtype} of {tuple(present.shape)}; {_USE_ANOTHER}"
            )
    try:
        torch.set_rng_state(tensors[f"cpu/{rank}"])
        if torch.cuda.is_available() and f"cuda/{rank}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda/{rank}"])
    except RuntimeError as error:  # of the right shape, but no state that the generator can be in
        raise UserError(
            f"{path}: its random numbers cannot be restored ({first_line(error)}); {_USE_ANOTHER}"
        ) from None
    return True


_USE_ANOTHER = "use an older checkpoint of the run"
