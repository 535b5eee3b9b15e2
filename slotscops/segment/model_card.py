"""The model card: the README.md of a published model, which says what it was told, how it scores and how to use it."""

from collections.abc import Sequence
from typing import Any

from slotscops.config import Config, to_yaml
from slotscops.core import pretrained
from slotscops.core.timm_networks import OWN_WEIGHTS, PREFIX, own_licence
from slotscops.model.network import SlotScops
from slotscops.segment.names import PartNames, shown_names
from slotscops.segment.pruning import left_out_in_words
from slotscops.train.build import Trained
from slotscops.train.run.checkpoint import State
from slotscops.train.run.published import without_folders

TEMPLATE = """---
{{ card_data }}
---

# Parts of {{ data }}

Finds {{ num_parts }} parts and a background in photos of one kind of thing. No part label was used in training:
[SCOPS](https://arxiv.org/abs/1905.01298) with [Slot Attention](https://arxiv.org/abs/2006.15055), by slotscops.

## How to use it

```python
import slotscops

model = slotscops.load("OWNER/MODEL"{{ teacher_argument }})  # the id of this page
parts = model.segment("photo.jpg")  # parts.labels (H, W) uint8, parts.maps (S, H, W) float32, slot 0 = background
parts.overlay().save("parts.png")
```

On the command line: `slotscops segment --checkpoint OWNER/MODEL --out pictures photos/`.

Photos should show one object each, and most of it: the model was trained on square crops of {{ size }} px.

## Parts

{{ parts }}

## What it was told

{{ told }}

## Data

Shards `{{ data }}`{{ shard_digest }}; {{ steps }} steps, {{ samples }} crops seen, repeats counted.

## Teacher

{{ teacher }}

## Scores

{{ scores }}

## Licence

{{ licence }}

## How to cite

```bibtex
{{ citations }}
```

## Settings

```yaml
{{ settings }}
```
"""

_CITATIONS = """@software{slotscops,
  title = {slotscops: discovering the parts of objects from photos without part labels},
  author = {{The slotscops developers}},
}

@inproceedings{hung2019scops,
  title = {{SCOPS}: Self-Supervised Co-Part Segmentation},
  author = {Hung, Wei-Chih and Jampani, Varun and Liu, Sifei and Molchanov, Pavlo and Yang, Ming-Hsuan and Kautz, Jan},
  booktitle = {CVPR},
  year = {2019},
  url = {https://arxiv.org/abs/1905.01298},
}

@inproceedings{locatello2020slot,
  title = {Object-Centric Learning with Slot Attention},
  author = {Locatello, Francesco and Weissenborn, Dirk and Unterthiner, Thomas and Mahendran, Aravindh and
            Heigold, Georg and Uszkoreit, Jakob and Dosovitskiy, Alexey and Kipf, Thomas},
  booktitle = {NeurIPS},
  year = {2020},
  url = {https://arxiv.org/abs/2006.15055},
}"""
# The beginning of a score's name, after `val_` -> what is compared. See `metrics.protocols`.
_PROTOCOLS = {
    "mask_": "full image, given the true object mask",
    "fg_": "pixels of true parts only",
    "": "full image, own background",
}
_HEADINGS = {"nmi": "NMI", "ari": "ARI", "miou": "mIoU"}


def card_contents(trained: Trained, names: PartNames | None = None, class_names: Sequence[str] = ()) -> dict[str, Any]:
    """What stands in the template's places. Folders of this machine are cut to their last names.

    Args:
        names: names of the parts, if they were given.
        class_names: the classes that have parts of their own. Empty if all classes share their parts.
    """
    config, state = without_folders(trained.config), trained.state
    needs_file = trained.network.takes_features and not pretrained.is_found_by_name(state.teacher_weights)
    return {
        "data": str(config.data.shards),
        "shard_digest": f" (digest `{state.shard_digest[:12]}`)" if state.shard_digest else "",
        "num_parts": trained.network.num_slots - 1,
        "size": config.data.size,
        "steps": state.step,
        "samples": state.samples_seen,
        "parts": _part_table(trained.network, names, list(class_names)),
        "told": _told(config, state),
        "teacher": _teacher(config, state, trained.network.takes_features),
        "teacher_argument": f', teacher_weights="{state.teacher_weights or "FILE"}"' if needs_file else "",
        "scores": _scores(config, state.scores),
        "licence": _licence(config, state),
        "citations": _CITATIONS,
        "settings": to_yaml(config).strip(),
    }


def _part_table(network: SlotScops, names: PartNames | None, class_names: list[str]) -> str:
    """A table of the parts' names, one column a class, and how well the labelled photos support them.

    If parts were left out, it also says which, and which row of the maps each of the others is.
    """
    numbers = network.slot_numbers[1:]
    left_out = sorted({*range(1, network.basis.num_parts + 1)} - {*numbers})
    shown = shown_names(names, class_names, numbers)
    lines = [["slot", *(name or "part" for name in shown)]]
    lines += [[str(slot), *of_slot] for slot, of_slot in zip(numbers, zip(*shown.values(), strict=True), strict=True)]
    explanation = ""
    if left_out:
        places = ["row of maps", *map(str, range(1, len(lines)))]
        lines = [[*line, place] for line, place in zip(lines, places, strict=True)]
        explanation = (
            f"{left_out_in_words(left_out).capitalize()} of maps and labels. The others keep their numbers, which are "
            "the labels.\n\n"
        )
    lines.insert(1, ["---"] * len(lines[0]))
    rows = "\n".join(f"| {' | '.join(map(_in_table, line))} |" for line in lines)
    if names is None:
        advice = "Parts have numbers, no names. `slotscops segment --name-from LABELLED` names them from a few labels."
        return f"{explanation}{rows}\n\n{advice}" if left_out else advice
    return (
        f"{explanation}{rows}\n\nNamed from {names.num_photos} labelled photos; {100 * names.agreement:.3g} % of their "
        "labelled pixels agree with the names."
    )


def _in_table(text: str) -> str:
    """The text as a cell of a table in Markdown, without HTML."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("&", "&amp;").replace("<", "&lt;")


def _told(config: Config, state: State) -> str:
    masks = [
        name
        for name, is_used in (
            ("`losses.target_mask`", config.losses.target_mask == "object"),
            ("`losses.background`", config.losses.target_mask == "object" and config.losses.background > 0),
        )
        if is_used
    ]
    lines = ["No part label. Each crop is the true box of one object and a margin, so it knows where an object is."]
    lines.append(
        f"True object masks were used in training ({' and '.join(masks)})." if masks else "No object mask was used."
    )
    if config.slots.per_class == "own" and state.class_names:
        lines.append(
            f"The class of each crop was given in training ({', '.join(state.class_names)}); later it may be guessed."
        )
    if state.best:
        best = state.best
        lines.append(
            f"True parts of the split val chose the run's best checkpoint, step {best.get('step')}, by its "
            f"{best.get('score')}; this is step {state.step}."
        )
    return "\n".join(f"- {line}" for line in lines)


def _teacher(config: Config, state: State, takes_features: bool) -> str:
    if takes_features:
        use = "The model reads its features, so it needs the same teacher at hand (`teacher_weights=`)."
    else:
        use = "It was the target of training; the model itself does not need it."
    return (
        f"{config.teacher.network}, `{config.teacher.layer}` at {config.teacher_size} px, weights "
        f"`{state.teacher_weights or 'unknown'}` (sha256 `{state.teacher_sha256[:12] or 'unknown'}`)"
        f"{_form_of_cache(config)}. {use}"
    )


def _form_of_cache(config: Config) -> str:
    """In which form the cache held the teacher's features."""
    teacher = config.teacher
    components = "" if teacher.components is None else f", {teacher.components} principal components"
    return components + ("" if teacher.store == "float16" else f", stored as {teacher.store}")


def _scores(config: Config, scores: dict[str, float]) -> str:
    advice = "`slotscops evaluate --checkpoint OWNER/MODEL --shards SHARDS` prints all protocols."
    if not scores:
        return f"Not scored while training. {advice}"
    rows = []
    for name, value in scores.items():
        prefix = next(prefix for prefix in _PROTOCOLS if name.removeprefix("val_").startswith(prefix))
        short = name.removeprefix("val_").removeprefix(prefix)
        rows.append(f"| {_HEADINGS.get(short, short)} | {_PROTOCOLS[prefix]} | {100 * value:.1f} |")
    return (
        f"Of the last evaluation while training, x 100, on the first {config.train.eval_images} crops of val at most, "
        "pooled over their pixels; where true parts overlap, the part listed first is on top. Do not compare numbers "
        f"of different protocols. {advice}\n\n| score | protocol | value |\n|---|---|---|\n" + "\n".join(rows)
    )


def _licence(config: Config, state: State) -> str:
    lines = ["slotscops: Apache-2.0.", "This model and its training photos: fill-in."]
    networks = {"The teacher's": (config.teacher.network, state.teacher_weights)}
    if config.encoder.name != "features":
        networks["The encoder's first"] = (config.encoder.name, config.encoder.weights)
    for whose, (network, weights) in networks.items():
        lines.append(f"{whose} weights: {_licence_of_weights(network, weights)}.")
    return "\n".join(f"- {line}" for line in lines)


def _licence_of_weights(network: str, weights: str) -> str:
    if weights.startswith("random:"):
        return "random numbers, so none"
    if weights not in OWN_WEIGHTS:
        return f"`{weights or 'unknown'}`, whose licence slotscops does not know: fill-in"
    if not network.startswith(PREFIX):
        return "torchvision's, trained on ImageNet; torchvision (BSD-3-Clause) leaves their terms to the data's"
    licence = own_licence(network, weights)
    return f"{licence} (as timm says)" if licence else "timm's; see its page of the network"
