"""Saves models to the Hugging Face hub and loads them from it, with huggingface_hub's own mixin.

`model.save_pretrained(folder)` writes `model.safetensors`, `config.yaml`, a model card, and a `config.json` by which
the hub counts downloads. `model.push_to_hub("OWNER/MODEL")` uploads them. `Segmenter.from_pretrained(...)` takes a
folder or an id. No file is a pickle.
"""

import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Self

from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from slotscops.config import Config, to_yaml
from slotscops.core import console, pretrained
from slotscops.core.errors import UserError, first_line
from slotscops.core.timm_networks import own_licence
from slotscops.train.build import Trained, load_model
from slotscops.train.run.published import MODEL, SETTINGS, without_folders, write_published

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CARD = """---
{{ card_data }}
---

# Parts of {{ data }}

Finds {{ num_parts }} parts and a background in photos of one kind of thing. No part label was used in training:
[SCOPS](https://arxiv.org/abs/1905.01298) with [Slot Attention](https://arxiv.org/abs/2006.15055), by slotscops.

```python
import slotscops

model = slotscops.load("OWNER/MODEL"{{ teacher_argument }})  # the id of this page
parts = model.segment("photo.jpg")  # parts.labels (H, W) uint8, parts.maps (S, H, W) float32, slot 0 = background
parts.overlay().save("parts.png")
```

Photos should show one object each, and most of it: the model was trained on square crops of {{ size }} px.

## Data

Shards `{{ data }}`{{ shard_digest }}; {{ steps }} steps, {{ samples }} crops seen, repeats counted.

## Encoder

{{ encoder }}

## Teacher

{{ teacher }}

## Scores

{{ scores }}

## Settings

```yaml
{{ settings }}
```
"""


class HubModel(
    ModelHubMixin,
    ABC,
    library_name="slotscops",
    pipeline_tag="image-segmentation",
    tags=["co-part-segmentation", "slot-attention", "scops"],
    model_card_template=_CARD,
):
    """Gives `Segmenter` the methods of the hub's mixin: `save_pretrained`, `push_to_hub`, `from_pretrained`."""

    # Otherwise the mixin would write the arguments of `__init__`. The settings are in config.yaml.
    _hub_mixin_config = {"model_type": "slotscops"}  # noqa: RUF012  # the mixin's own name and type
    trained: Trained

    @abstractmethod
    def __init__(self, trained: Trained, teacher_weights: str | None = None) -> None: ...

    def _save_pretrained(self, save_directory: Path) -> None:
        _remove_old_card(save_directory / "README.md")
        write_published(save_directory, self.trained.network.state_dict(), self.trained.config, self.trained.state)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, teacher_weights: str | None = None, **download: Any) -> Self:
        folder = Path(model_id) if Path(model_id).is_dir() else fetch(model_id, **download)
        return cls(load_model(folder), teacher_weights)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The model card from the template above. `model_card_kwargs` of `save_pretrained` replace its contents."""
        return super().generate_model_card(*args, **(_card_contents(self.trained) | kwargs))


def fetch(model_id: str, **download: Any) -> Path:
    """The local folder of a model from the hub. The model is downloaded only once.

    Args:
        model_id: OWNER/MODEL.
        download: more arguments of `huggingface_hub.snapshot_download`.

    Raises:
        UserError: if the id is not valid, the hub cannot be reached or refuses, or the model is not one of slotscops.
    """
    nothing_here = f"{model_id}: no such run or checkpoint; give runs/NAME or runs/NAME/checkpoints/step-N"
    if not _HUB_ID.fullmatch(model_id):
        raise UserError(nothing_here)
    try:
        folder = Path(snapshot_download(model_id, allow_patterns=[MODEL, SETTINGS], **download))
    except (HfHubHTTPError, OSError, ValueError) as error:  # refused, no network, or not a valid id
        raise UserError(f"{nothing_here}, and no model on the Hugging Face hub either ({first_line(error)})") from None
    if not (folder / MODEL).is_file():
        raise UserError(f"{model_id}: on the Hugging Face hub, but without {MODEL}; it is no model of slotscops")
    return folder


def _remove_old_card(path: Path) -> None:
    """Removes the model card of an earlier model, because the mixin does not replace an existing card."""
    if not path.exists():
        return
    if "library_name: slotscops" in path.read_text(errors="replace").splitlines():
        path.unlink()
    else:
        console.warn(f"{path}: was not written by slotscops and stays; move it away to get a card of this model")


def _card_contents(trained: Trained) -> dict[str, Any]:
    config, state = without_folders(trained.config), trained.state
    if trained.network.takes_features:
        use = "The model reads its features, so it needs the same teacher at hand (`teacher_weights=`)."
    else:
        use = "It was the target of training; the model itself does not need it."
    needs_file = trained.network.takes_features and not pretrained.is_found_by_name(state.teacher_weights)
    return {
        "data": str(config.data.shards),
        "shard_digest": f" (digest `{state.shard_digest[:12]}`)" if state.shard_digest else "",
        "num_parts": config.slots.num_parts,
        "size": config.data.size,
        "steps": state.step,
        "samples": state.samples_seen,
        "teacher": f"{config.teacher.network}, `{config.teacher.layer}` at {config.teacher_size} px, weights "
        f"`{state.teacher_weights or 'unknown'}` (sha256 `{state.teacher_sha256[:12] or 'unknown'}`"
        f"{_licence_note(config.teacher.network, state.teacher_weights)}){_form_note(config)}. {use}",
        "encoder": _encoder_note(config),
        "teacher_argument": f', teacher_weights="{state.teacher_weights or "FILE"}"' if needs_file else "",
        "scores": _score_table(state.scores),
        "settings": to_yaml(config).strip(),
    }


def _licence_note(network: str, weights: str) -> str:
    licence = own_licence(network, weights)
    return f", licence `{licence}`, as timm says" if licence else ""


def _form_note(config: Config) -> str:
    """In which form the cache held the teacher's features."""
    teacher = config.teacher
    components = "" if teacher.components is None else f", {teacher.components} principal components"
    return components + ("" if teacher.store == "float16" else f", stored as {teacher.store}")


def _encoder_note(config: Config) -> str:
    """What the encoder started from. Its licence is that of the published weights, too."""
    encoder = config.encoder
    if encoder.name == "features":
        return "None: the model reads the teacher's features."
    weights = pretrained.display_name(encoder.weights)
    return f"{encoder.name}, trained from weights `{weights}`{_licence_note(encoder.name, encoder.weights)}."


def _score_table(scores: dict[str, float]) -> str:
    if not scores:
        return "Not scored while training: `python -m slotscops.evaluate --checkpoint FOLDER --shards SHARDS`."
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in scores.items())
    return f"Of the last evaluation while training, on the first images of val:\n\n| score | value |\n|---|---|\n{rows}"
