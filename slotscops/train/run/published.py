"""A model on its own, to be given away: `model.safetensors` with `config.yaml` beside it, no folder of a run.

The header of `model.safetensors` says what a checkpoint keeps in `state.json` (steps, teacher, scores) and holds the
fingerprint of the tensors, for safetensors itself loads flipped bits without a word.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from slotscops.config import Config, load_config, to_mapping, to_yaml
from slotscops.core.address import Address
from slotscops.core.errors import UserError, first_line
from slotscops.core.files import write_bytes
from slotscops.core.pretrained import display_name, fingerprint
from slotscops.train.run.checkpoint import State

MODEL, SETTINGS = "model.safetensors", "config.yaml"
_STATE, _SHA256 = "slotscops.state", "slotscops.sha256"


def is_published(folder: Path) -> bool:
    """True where there is a model without the manifest of a checkpoint."""
    return (folder / MODEL).is_file() and not (folder / "manifest.json").exists()


def write_published(folder: Path, tensors: Mapping[str, Tensor], config: Config, state: State) -> None:
    """Writes both files; paths of this machine, which are nobody's business, shrink to their last names."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    config = without_folders(config)
    header = {
        "format": "pt",
        _STATE: json.dumps(asdict(replace(state, config=to_mapping(config)))),
        _SHA256: fingerprint(whole),
    }
    write_bytes(folder / MODEL, save(whole, header))
    write_bytes(folder / SETTINGS, to_yaml(config).encode())


def read_published(folder: Path) -> tuple[dict[str, Tensor], Config, State]:
    """The tensors, settings and state.

    A header without a state, as in a checkpoint's own `model.safetensors`, gives one that knows no teacher or scores.

    Raises:
        UserError: no settings; damaged.
    """
    path = folder / MODEL
    if not (folder / SETTINGS).is_file():
        raise UserError(f"{path}: no {SETTINGS} beside it; copy it there from the run's folder")
    config = load_config(folder / SETTINGS)
    try:
        tensors = load(path.read_bytes())
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
        state = _read_state(header.get(_STATE), config)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); get it again") from None
    if _SHA256 in header and fingerprint(tensors) != header[_SHA256]:
        raise UserError(f"{path}: is damaged (the sha256 of its tensors differs from its header); get it again")
    return tensors, config, state


def _read_state(text: str | None, config: Config) -> State:
    if text is None:
        return State(step=0, samples_seen=0, config=to_mapping(config))
    return State.from_json(text)


def without_folders(config: Config) -> Config:
    """The settings with the last names of files and folders only."""
    teacher = config.teacher
    if teacher.weights is not None:
        teacher = replace(teacher, weights=display_name(teacher.weights))
    return replace(
        config,
        run_dir=Path(config.run_dir).name,
        data=replace(config.data, shards=Address(config.data.shards.name)),
        encoder=replace(config.encoder, weights=display_name(config.encoder.weights)),
        teacher=teacher,
    )
