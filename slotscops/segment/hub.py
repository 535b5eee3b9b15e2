"""Saves models to the Hugging Face hub and loads them from it, with huggingface_hub's own mixin.

`model.save_pretrained(folder)` writes `model.safetensors`, `config.yaml`, a model card, a `config.json` by which the
hub counts downloads, and `part_names.json` if the parts have names. `model.push_to_hub("OWNER/MODEL")` uploads them.
Dead parts are left out, see `pruning`, unless `model.keep_dead` is set before.
`Segmenter.from_pretrained(...)` takes a folder or an id. No file is a pickle.
"""

import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Self

from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from slotscops.core import console
from slotscops.core.errors import UserError, first_line
from slotscops.segment import names as part_names
from slotscops.segment.model_card import TEMPLATE, card_contents
from slotscops.segment.names import PartNames
from slotscops.segment.pruning import tell_left_out
from slotscops.train.build import Trained, load_model
from slotscops.train.run.published import MODEL, SETTINGS, write_published

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class HubModel(
    ModelHubMixin,
    ABC,
    library_name="slotscops",
    pipeline_tag="image-segmentation",
    tags=["co-part-segmentation", "slot-attention", "scops"],
    license="other",
    license_name="fill-in",
    license_link="fill-in",
    model_card_template=TEMPLATE,
):
    """Gives `Segmenter` the methods of the hub's mixin: `save_pretrained`, `push_to_hub`, `from_pretrained`."""

    # Otherwise the mixin would write the arguments of `__init__`. The settings are in config.yaml.
    _hub_mixin_config = {"model_type": "slotscops"}  # noqa: RUF012  # the mixin's own name and type
    trained: Trained
    keep_dead = False  # whether `save_pretrained` and `push_to_hub` keep parts that are dead, see `pruning`

    @abstractmethod
    def __init__(self, trained: Trained, teacher_weights: str | None = None) -> None: ...

    @property
    @abstractmethod
    def names(self) -> PartNames | None:
        """Names of the parts, if they were given."""

    @abstractmethod
    def without_dead(self) -> Self:
        """This model without the parts that are dead."""

    @property
    @abstractmethod
    def class_names(self) -> list[str]:
        """Names of the classes that have parts of their own. Empty if all classes share their parts."""

    def _save_pretrained(self, save_directory: Path) -> None:
        _remove_old_card(save_directory / "README.md")
        model = self if self.keep_dead else self.without_dead()
        trained = model.trained
        if not self.keep_dead:
            tell_left_out(self.trained, "keep_dead = True")
        write_published(save_directory, trained.network.state_dict(), trained.config, trained.state)
        part_names.write_names(save_directory, model.names)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, teacher_weights: str | None = None, **download: Any) -> Self:
        folder = Path(model_id) if Path(model_id).is_dir() else fetch(model_id, **download)
        return cls(load_model(folder), teacher_weights)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The model card. `model_card_kwargs` of `save_pretrained` replace its contents."""
        model = self if self.keep_dead else self.without_dead()
        return super().generate_model_card(
            *args, **(card_contents(model.trained, model.names, model.class_names) | kwargs)
        )


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
        folder = Path(snapshot_download(model_id, allow_patterns=[MODEL, SETTINGS, part_names.FILE], **download))
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
