"""What other programs make of finished shards (`datasets`, plain WebDataset), and the data set card for the hub."""

import gc
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import webdataset
from commands import python
from huggingface_hub import DatasetCard
from PIL import Image

from slotscops.core.errors import UserError
from slotscops.shard import __main__ as shard
from slotscops.shard.card import command_options, make_card
from slotscops.shard.index import open_dataset
from slotscops.shard.left_out import read_left_out
from slotscops.shard.reader import ShardReader

COMMON = ["--no-features", "--size", "32", "--workers", "1"]
NAMES = [*(f"{number:02d}" for number in range(6)), "a/1", "b/1", "ein Pferd, von dem Übles bekannt ist", "x" * 120]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos with odd names, of which the first six show no part. Not to be changed."""
    folder = tmp_path_factory.mktemp("mine")
    for number, name in enumerate(NAMES):
        photo, labels = folder / "photos" / f"{name}.jpg", folder / "parts" / f"{name}.png"
        for path in (photo, labels):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (200, 10 * number, 0)).save(photo)
        label_map = np.zeros((40, 40), np.uint8)
        label_map[5:30, 5:30] = 255 if number < 6 else 1
        Image.fromarray(label_map).save(labels)
    options = ["--images", str(folder / "photos"), "--parts", str(folder / "parts"), "--val-share", "0"]
    more = ["--class-name", "horse|<b>", "--samples-per-shard", "7", "--card", "--out", str(folder / "out")]
    assert shard.main([*options, *more, *COMMON]) == 0
    return folder / "out"


# `datasets` is slow to import and keeps state, so all that is asked of it is asked in one process.
_LOAD = """
import json, sys
import datasets
datasets.disable_progress_bars()
folder = sys.argv[1]
for source in ({"path": folder}, {"path": "webdataset", "data_files": {"train": folder + "/train-*1.tar"}}):
    for streaming in (False, True):
        samples = list(datasets.load_dataset(**source, split="train", streaming=streaming))
        images = {name: [image.mode, *image.size] for name, image in samples[0].items() if hasattr(image, "mode")}
        rows = [[sample["__key__"], sample["json"], sum(sample["parts.png"].tobytes())] for sample in samples]
        print(json.dumps([images, rows]))
"""


def test_hugging_face_datasets_load_all_samples_at_once_and_streamed(shards: Path, tmp_path: Path) -> None:
    done = python("-c", _LOAD, shards, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    by_card, streamed_by_card, by_files, streamed_by_files = map(json.loads, done.stdout.splitlines())
    masks = ("parts.png", "parts_small.png", "object.png")
    expected = []
    dataset = open_dataset(shards)
    for reader in (ShardReader(dataset, entry) for entry in dataset.split("train")):
        for row in range(len(reader.index)):
            labels = int(reader.read_part_labels(row).sum())
            expected.append([reader.index.key(row), reader.read_description(row), labels])
    assert len(expected) == len(NAMES)
    for images, rows in (by_card, streamed_by_card):
        assert images == {"jpg": ["RGB", 32, 32]} | {name: ["L", 32, 32] for name in masks}
        assert rows == expected
    # Without the card, types come from the first samples of the second tar, which show parts.
    assert by_files[1] == streamed_by_files[1] == expected[7:]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to the garbage collector
def test_plain_webdataset_reads_photos_with_odd_names(shards: Path) -> None:
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert len(samples) == len(NAMES)
    for sample in samples:
        assert sample["jpg"].size == sample["parts.png"].size == (32, 32)
        assert sample["__key__"].endswith("_0")
    assert {Path(sample["json"]["image"]).with_suffix("").as_posix() for sample in samples} == set(NAMES)
    gc.collect()


def test_the_card_is_read_back_with_counts_parts_splits_and_what_was_left_out(shards: Path) -> None:
    card = DatasetCard.load(shards / "README.md")
    header = card.data.to_dict()
    assert (header["license"], header["license_name"], header["size_categories"]) == ("other", "fill-in", ["n<1K"])
    [config] = header["configs"]
    assert config["data_files"] == [{"split": "train", "path": "train-*.tar"}]
    for told in (
        "| horse&#124;&lt;b&gt; | train | 10 | 10 | 4 |",
        "| horse&#124;&lt;b&gt; | 1 part_1 |",
        f"Digest of all shards: `{open_dataset(shards).digest}`",
        "## Left out\n\nNothing.",
        "- licence of the photos: fill-in",
        "train-{000000..000001}.tar",
    ):
        assert told in card.text, told
    assert str(shards.parent) not in card.content


def test_a_card_written_again_keeps_the_licence_that_was_filled_in_and_no_readme_of_the_users_is_lost(
    shards: Path, tmp_path: Path
) -> None:
    card = shards / "README.md"
    before = card.read_text()
    filled = before.replace("license_name: fill-in", "license_name: mine").replace("photos: fill-in", "photos: CC0")
    card.write_text(filled.replace("| 10 | 10 | 4 |", "| 9 | 9 | 9 |"))
    assert shard.main(["--card", str(shards)]) == 0
    assert card.read_text() == filled
    card.write_text("# mine\n")
    with pytest.raises(UserError, match="was not written by slotscops"):
        shard.main(["--card", str(shards)])
    card.write_text(before)


@pytest.mark.parametrize("content", ["[", "[3]", '[{"image": 3}]', "[" * 100_000])
def test_a_damaged_list_of_what_was_left_out_is_said_on_the_card_and_refused_where_it_is_needed(
    shards: Path, content: str
) -> None:
    path = shards / "index" / "left_out.json"
    whole = path.read_text()
    path.write_text(content)
    with pytest.raises(UserError, match=r"left_out\.json: is damaged; remove .* and make the shards again"):
        read_left_out(path, f"remove {shards} and make the shards again")
    assert "is missing or damaged" in str(make_card(open_dataset(shards)))
    path.write_text(whole)
    assert "is missing or damaged" not in str(make_card(open_dataset(shards)))


@pytest.mark.parametrize(
    "options",
    [
        ["--toy", "--toy-train", "6", "--toy-val", "2", "--toy-seed", "3", "--samples-per-shard", "5"],
        ["--root", "DIR", "--classes", "cow,horse", "--min-box-val", "0.3", "--context", "0.5,0.25"],
        ["--images", "DIR", "--parts", "DIR", "--val-share", "0.25", "--class-name", "my horse"],
        ["--images", "DIR"],
    ],
    ids=lambda options: options[0][2:] + str(len(options)),
)
def test_the_command_on_the_card_is_the_one_that_made_the_shards(
    options: list[str],
) -> None:
    asked = shard._parse([*options, *COMMON, "--out", "SHARDS"])
    written = command_options(shard._source_text(asked), asdict(shard._settings(asked)))
    made = shard._parse([*written, "--workers", "1"])
    asked.min_box_train, asked.min_box_val = (shard._min_box_share(asked, split) for split in ("train", "val"))
    assert vars(made) == vars(asked)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--card"], "--card needs the folder"),
        (["--card", "SHARDS", "--toy"], "--card SHARDS goes alone"),
        ([], "one of the arguments --root --toy"),
    ],
)
def test_mistakes_with_the_card_end_in_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        shard.main(arguments)
    assert said in capsys.readouterr().err
