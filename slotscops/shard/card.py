"""A data set card: the README.md by which the Hugging Face hub and the `datasets` library know finished shards.

Its YAML header names the files of each split and the type of each member, so that `datasets.load_dataset(FOLDER)` needs
no other argument. Without the header, `datasets` infers the types from the first five samples, which fails where these
show no part and later ones do.
"""

import html
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData
from yaml import YAMLError

from slotscops.core import console
from slotscops.core.errors import UserError, visible
from slotscops.core.files import read_json_or_none, write_bytes
from slotscops.core.records import MEMBERS
from slotscops.datasets.pascal_part.classes import PART_NAMES
from slotscops.shard.counts import Counts, count_split
from slotscops.shard.index import ShardDataset, open_dataset
from slotscops.shard.left_out import left_out_path, read_left_out
from slotscops.shard.reader import ShardReader

_NAME = "README.md"
_TAG = "slotscops"  # in the header; a README.md without it is the user's own and stays
_FILL_IN = "fill-in"
_LICENCE = """To be filled in by whoever publishes this data set, here and in the header (`license`, `license_name`,
`license_link`):

- licence of the photos: fill-in
- licence of the annotations: fill-in
- whom to name: fill-in
"""
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
_MEMBER_TEXTS = {
    "jpg": "square crop, RGB",
    "parts.png": "part labels: 0 = none, 255 = to be ignored; where masks overlap, the part listed first is on top",
    "parts_small.png": "the same, but the smallest part is on top",
    "object.png": "255 on the object, 0 elsewhere",
    "json": "image, object number, class, box and crop in the source photo, its size, names of the visible parts",
}


def write_card(shards: Path) -> Path:
    """Writes `SHARDS/README.md` and returns its path. Licence fields that were filled in before are kept.

    Raises:
        UserError: there are no finished shards, or `README.md` is not one of ours.
        RunError: a member is damaged.
    """
    dataset, path = open_dataset(shards), shards / _NAME
    if console.is_main():
        write_bytes(path, f"{make_card(dataset, check_place(shards))}".encode())
    console.say(f"data set card: {path}; fill in its licence fields before you publish the shards")
    return path


def check_place(shards: Path) -> DatasetCard | None:
    """The card that is there already, if any. Raises UserError if `README.md` is not one of ours."""
    path = shards / _NAME
    if not path.exists():
        return None
    try:
        old = DatasetCard(path.read_text())
        if _TAG in (_fields_of(old).get("tags") or []):
            return old
    except (OSError, ValueError, YAMLError):  # a folder, bytes that are no text, or a header that is no YAML
        pass
    raise UserError(f"{path}: was not written by slotscops and stays; move it away to get a card")


def make_card(dataset: ShardDataset, old: DatasetCard | None = None) -> DatasetCard:
    """The card of finished shards.

    Args:
        old: an earlier card, from which the licence is taken.
    """
    counts = {split: count_split(dataset, split) for split in dataset.splits if dataset.num_samples(split)}
    plan = read_json_or_none(dataset.folder / "index" / "plan.json")
    header = DatasetCardData(**_licence_fields(old), **_header(dataset, list(counts)))
    sections = {
        "Loading": _loading(dataset, next(iter(counts), "train")),
        "Content": _content(dataset, counts),
        "Parts": _parts(dataset, counts),
        "Left out": _left_out(dataset.folder),
        "Members": _table(("member", "content"), [(f"`.{name}`", _MEMBER_TEXTS.get(name, "")) for name in MEMBERS]),
        "How it was made": _made(dataset, plan),
        "Licence": _licence_section(old),
    }
    title = f"# {_safe(dataset.folder.resolve().name)}\n\nSquare crops of single objects with their parts."
    text = "\n\n".join([title, *(f"## {name}\n\n{body.strip()}" for name, body in sections.items())])
    return DatasetCard(f"---\n{header.to_yaml()}\n---\n\n{text}\n")


# ---- what was filled in before -----------------------------------------------------------------------------------


def _licence_fields(old: DatasetCard | None) -> dict[str, Any]:
    fields = {"license": "other", "license_name": _FILL_IN, "license_link": _FILL_IN}
    if old is not None:
        present = _fields_of(old)
        fields = {name: present[name] for name in fields if name in present} or fields
    return fields


def _fields_of(card: DatasetCard) -> dict[str, Any]:
    return dict(card.data.to_dict())  # type: ignore[no-untyped-call]


def _licence_section(old: DatasetCard | None) -> str:
    found = old and re.search(r"^## Licence\n(.*?)(?=^## |\Z)", old.text, re.MULTILINE | re.DOTALL)
    return found[1] if found else _LICENCE


# ---- the header --------------------------------------------------------------------------------------------------


def _header(dataset: ShardDataset, splits: Sequence[str]) -> dict[str, Any]:
    num_samples = sum(dataset.num_samples(split) for split in splits)
    files = [{"split": split, "path": f"{split}-*.tar"} for split in splits]
    return {
        "pretty_name": dataset.folder.resolve().name,
        "task_categories": ["image-segmentation"],
        "size_categories": [next((name for bound, name in _SIZES if num_samples < bound), "10M<n<100M")],
        "tags": [_TAG, "webdataset", "co-part-segmentation"],
        "configs": [{"config_name": "default", "data_files": files}],
        "dataset_info": {"features": _features(dataset)},
    }


def _features(dataset: ShardDataset) -> list[dict[str, Any]]:
    """The type of each member, as `datasets` writes it in YAML. Those of the description are read from a sample."""
    first = next(entry for entries in dataset.splits.values() for entry in entries if entry.num_samples)
    description = ShardReader(dataset, first).read_description(0)
    features = [_feature("json", description) if name == "json" else _image(name) for name in MEMBERS]
    return [*features, {"name": "__key__", "dtype": "string"}, {"name": "__url__", "dtype": "string"}]


def _image(name: str) -> dict[str, Any]:
    return {"name": name, "dtype": "image"}


def _feature(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {"name": name, "struct": [_feature(key, value[key]) for key in sorted(value)]}
    if isinstance(value, list):
        return {"name": name, "list": _dtype(value[0] if value else "")}
    return {"name": name, "dtype": _dtype(value)}


def _dtype(value: Any) -> str:
    return {bool: "bool", int: "int64", float: "float64"}.get(type(value), "string")


# ---- the text ----------------------------------------------------------------------------------------------------


def _loading(dataset: ShardDataset, split: str) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", dataset.folder.resolve().name)  # as the hub takes it
    last = len(dataset.split(split)) - 1
    return f"""```python
import datasets, webdataset

crops = datasets.load_dataset("OWNER/{name}", split="{split}")  # or a local folder; streaming=True reads on the go
crops = webdataset.WebDataset("{split}-{{000000..{last:06d}}}.tar", shardshuffle=False).decode("pil")
```

With slotscops: `data.shards=FOLDER_OR_URL`. The format: `shards/README.md` in slotscops."""


def _content(dataset: ShardDataset, counts: Mapping[str, Counts]) -> str:
    rows = []
    for split, of_split in counts.items():
        for name in [name for name in dataset.class_names if of_split["objects", name]]:
            numbers = [f"{of_split[what, name]:,}" for what in ("images", "objects", "parts")]
            rows.append((_safe(name), split, *numbers, f"{of_split['bytes', name] / 1e6:.2f}"))
    totals = ", ".join(
        f"{split} {dataset.num_samples(split):,} in {len(dataset.split(split))} tars" for split in counts
    )
    table = _table(("class", "split", "images", "objects", "visible parts", "MB"), rows)
    return f"Crops of {dataset.size} x {dataset.size} pixels: {totals}.\n\n{table}"


def _parts(dataset: ShardDataset, counts: Mapping[str, Counts]) -> str:
    rows = []
    for name in dataset.class_names:
        parts = dataset.part_names[name]
        if parts and any(of_split["objects", name] for of_split in counts.values()):
            labels = ", ".join(f"{label} {_safe(part)}" for label, part in enumerate(parts, start=1))
            rows.append((_safe(name), labels))
    return _table(("class", "part labels"), rows) if rows else "No parts are annotated."


def _left_out(shards: Path) -> str:
    try:
        items = read_left_out(left_out_path(shards), "")
    except (OSError, UserError):
        return "Unknown: `index/left_out.json` is missing or damaged."
    reasons = Counter((item.kind, item.class_name or "-", item.split or "-") for item in items)
    rows = [(*map(_safe, reason), f"{count:,}") for reason, count in sorted(reasons.items())]
    return _table(("reason", "class", "split", "objects or files"), rows) if rows else "Nothing."


def _made(dataset: ShardDataset, plan: Any) -> str:
    source = str(plan.get("source")) if isinstance(plan, dict) else ""
    command = " ".join(["python -m slotscops.shard", *map(shlex.quote, command_options(source, dataset.settings))])
    return f"```\n{command}\n```\n\nDigest of all shards: `{dataset.digest}`."


def command_options(source: str, settings: Mapping[str, Any]) -> list[str]:
    """The options that made the shards, with DIR and SHARDS in place of folders, which concern nobody else.

    Args:
        source: what `index/plan.json` says of the photos.
        settings: those of `index/dataset.json`.
    """
    options = []
    if toy := re.fullmatch(r"toy, seed (\d+), (\d+) \+ (\d+) photos", source):
        options += ["--toy", "--toy-seed", toy[1], "--toy-train", toy[2], "--toy-val", toy[3]]
    elif photos := re.fullmatch(r"photos, parts (True|False), val (\S+)", source):
        options += ["--images", "DIR", *(["--parts", "DIR"] if photos[1] == "True" else []), "--val-share", photos[2]]
        options += ["--class-name", settings["classes"][0]]
    else:
        options += ["--root", "DIR"]
    if "--images" not in options and settings["classes"] != list(PART_NAMES):
        options += ["--classes", ",".join(settings["classes"])]
    options += ["--size", str(settings["size"]), "--samples-per-shard", str(settings["samples_per_shard"])]
    for split, share in sorted(settings["min_box_share"].items()):
        options += [f"--min-box-{split}", str(share)]
    if context := settings.get("context"):
        options += ["--context", f"{context['share']},{context['jitter']}"]
    return [*options, "--no-features", "--out", "SHARDS"]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _safe(name: str) -> str:
    """A name from elsewhere as text of Markdown: it begins no link, no tag and no other column."""
    shown = html.escape(visible(name), quote=False)
    return re.sub(r"[|\[\]`*]", lambda found: f"&#{ord(found[0])};", shown)
