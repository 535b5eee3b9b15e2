import gc
import json
import pickle
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import webdataset
from commands import python
from PIL import Image

from slotscops.core import claims
from slotscops.core.errors import UserError
from slotscops.core.files import sha256_of_bytes, writer_name
from slotscops.core.records import MEMBERS, from_members
from slotscops.datasets.toy import tree as toy
from slotscops.shard import __main__ as shard
from slotscops.shard import writer
from slotscops.shard.index import ShardEntry, ShardTable, open_dataset
from slotscops.shard.reader import ShardReader

COMMON = ["--no-features", "--size", "48", "--samples-per-shard", "4", "--workers", "1"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy tree of 10 training and 4 validation photos. Not to be changed."""
    root = tmp_path_factory.mktemp("tree")
    toy.write_tree(root, num_train=10, num_val=4, seed=1)
    return root


@pytest.fixture
def own_tree(tree: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tree, tmp_path / "tree"))


def write(tree: Path, out: Path, *more: str) -> int:
    return shard.main(["--root", str(tree), "--out", str(out), *COMMON, *more])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def shards(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "out"
    assert write(tree, out) == 0
    return out


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to the garbage collector
def test_plain_webdataset_reads_every_sample_with_its_members(shards: Path) -> None:
    dataset = open_dataset(shards)
    for split, entries in dataset.splits.items():
        assert len(entries) > 1 or split == "val"
        urls = [str(dataset.tar_path(entry)) for entry in entries]
        samples = list(webdataset.WebDataset(urls, shardshuffle=False))
        assert [sample["__key__"] for sample in samples] == [
            dataset.read_index(entry).key(row) for entry in entries for row in range(entry.num_samples)
        ]
        for sample in samples:
            record = from_members(sample["__key__"], {name: sample[name] for name in sample if name[0] != "_"})
            assert record.image.shape == (48, 48, 3)
            assert record.part_labels.shape == record.object_mask.shape == (48, 48)
            assert record.key == f"{record.description['image']}_{record.description['object']}"
            names = dataset.part_names[record.description["class"]]
            shown = {names[label - 1] for label in np.unique(record.part_labels) if label}
            assert shown <= set(record.description["part_names"])
    gc.collect()


def test_reading_by_index_gives_what_reading_the_tar_gives(shards: Path) -> None:
    dataset = open_dataset(shards)
    for entry in dataset.splits["train"]:
        reader = ShardReader(dataset, entry)
        with tarfile.open(dataset.tar_path(entry)) as tar:
            for row in range(entry.num_samples):
                for member in MEMBERS:
                    file = tar.extractfile(f"{reader.index.key(row)}.{member}")
                    assert file is not None
                    assert bytes(reader.read_member(row, member)) == file.read()


def test_every_object_is_written_or_left_out_with_a_reason(tree: Path, shards: Path) -> None:
    dataset = open_dataset(shards)
    written = sum(entry.num_samples for entries in dataset.splits.values() for entry in entries)
    left_out = json.loads((shards / "index" / "left_out.json").read_text())
    paths = sorted((tree / "Annotations_Part").glob("*.mat"))
    in_files = sum(scipy.io.loadmat(path)["anno"][0, 0]["objects"].size for path in paths)
    assert written + len(left_out) == in_files
    assert all(item["reason"] for item in left_out)


@pytest.mark.parametrize("more", [("--workers", "2"), ()], ids=["two workers", "again"])
def test_writing_again_gives_the_same_bytes(tree: Path, shards: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    assert write(tree, tmp_path / "out", *more) == 0
    assert contents(tmp_path / "out") == contents(shards)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_finishes_what_others_left_undone(
    tree: Path, shards: Path, tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(shards, tmp_path / "out"))
    for name in ("index/dataset.json", "index/left_out.json", "index/train-000001.safetensors", "train-000000.tar"):
        (out / name).unlink()
    (out / "index" / "train-000000.safetensors").unlink()
    (out / "train-000001.tar").write_bytes(b"half")
    ended = subprocess.Popen(["true"])
    ended.wait()
    for name in ("train-000001", "val-000000", "dataset.json"):  # what they held when they were killed
        lease = out / "index" / "scan" / f".{name}.lease"
        lease.write_text(f"{writer_name().partition('-')[0]}-{ended.pid}")
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert write(tree, out) == 0
    assert contents(out) == contents(shards)


def test_two_processes_do_each_unit_of_the_work_once(
    tree: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads stand for the processes; to a lease they are the same."""
    done: list[str] = []
    for name in ("_make_samples", "_index_tar", "_finish"):
        plain = getattr(writer, name)

        def counted(*arguments: Any, name: str = name, plain: Any = plain) -> Any:
            done.append(name if name == "_finish" else f"{name} {arguments[-1][0] if name[1] == 'm' else arguments[0]}")
            time.sleep(0.01)
            return plain(*arguments)

        monkeypatch.setattr(writer, name, counted)
    monkeypatch.setattr(claims, "_POLL_S", 0.01)
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(lambda _: write(tree, tmp_path / "out"), range(2))) == [0, 0]
    assert len(done) == len(set(done)) > 10
    assert contents(tmp_path / "out") == contents(shards)


def test_a_finished_folder_is_left_as_it_is(tree: Path, shards: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in shards.rglob("*")}
    assert write(tree, shards) == 0
    assert {path: path.stat().st_mtime_ns for path in shards.rglob("*")} == before


OTHER = [(["--size", "40"], "size"), (["--classes", "cow"], "classes"), (["--context", "0.5,0.2"], "context")]


@pytest.mark.parametrize(("more", "field"), OTHER)
def test_a_folder_of_other_shards_is_refused_by_the_setting(
    tree: Path, shards: Path, more: list[str], field: str
) -> None:
    before = contents(shards)
    with pytest.raises(UserError, match=f"another {field}"):
        write(tree, shards, *more)
    assert contents(shards) == before


def test_without_context_the_settings_and_crops_are_those_of_earlier_versions(tree: Path, shards: Path) -> None:
    assert write(tree, shards, "--context", "0.05") == 0  # the default, so the folder is finished already
    dataset = open_dataset(shards)
    assert set(dataset.settings) == {"classes", "size", "min_box_share", "samples_per_shard"}
    reader = ShardReader(dataset, dataset.splits["train"][0])
    for row in range(len(reader.index)):
        description = reader.read_description(row)
        (left, top, right, bottom), crop = description["box"], description["crop"]
        side = max(right - left, bottom - top) + 2 * max(1, round(0.05 * max(right - left, bottom - top)))
        assert crop[:2] == [(left + right - side) // 2, (top + bottom - side) // 2]
        assert crop[2:] == [crop[0] + side, crop[1] + side]


def test_with_context_the_object_is_smaller_and_not_in_the_middle_and_the_digest_is_another(
    tree: Path, shards: Path, tmp_path: Path
) -> None:
    assert write(tree, tmp_path / "out", "--context", "0.5,0.5") == 0
    plain, loose = open_dataset(shards), open_dataset(tmp_path / "out")
    assert loose.settings == plain.settings | {"context": {"share": 0.5, "jitter": 0.5}}
    assert loose.context.side_per_box == 2
    assert loose.digest != plain.digest
    masks = [
        from_members("x", {name: bytes(reader.read_member(0, name)) for name in MEMBERS}).object_mask
        for reader in (ShardReader(dataset, dataset.splits["train"][0]) for dataset in (plain, loose))
    ]
    assert masks[0].mean() > 2.5 * masks[1].mean() > 0
    centre = np.argwhere(masks[1]).mean(axis=0)
    assert abs(centre - 24).max() > 3


@pytest.mark.parametrize("context", ["0.1,0.2", "x", "1,2,3", "-1", "nan", "11"])
def test_a_context_that_cuts_the_object_off_or_is_no_number_is_one_line(tmp_path: Path, context: str) -> None:
    with pytest.raises(UserError, match=r"--context is .*, needed"):
        shard.main(["--root", str(tmp_path), "--out", str(tmp_path / "out"), "--context", context])


def test_a_toy_of_other_numbers_is_refused_and_the_drawn_photos_stay(tmp_path: Path) -> None:
    few = ["--toy", "--toy-train", "3", "--toy-val", "1", "--out", str(tmp_path), *COMMON]
    assert shard.main(few) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert shard.main(few) == 0
    with pytest.raises(UserError, match="another source"):
        shard.main([*few, "--toy-seed", "1"])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_folder_with_foreign_tars_is_refused(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "foreign.tar").write_bytes(b"x")
    with pytest.raises(UserError, match="holds other shards"):
        write(tree, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["foreign.tar"]


def test_only_the_classes_asked_for_are_written(tree: Path, tmp_path: Path) -> None:
    assert write(tree, tmp_path / "out", "--classes", "cow") == 0
    dataset = open_dataset(tmp_path / "out")
    assert dataset.class_names == ["cow"]
    reader = ShardReader(dataset, dataset.splits["train"][0])
    assert {reader.read_description(row)["class"] for row in range(len(reader.index))} == {"cow"}


# ---- damage ------------------------------------------------------------------------------------------------------


def cut_annotation(annotation: Path, photo: Path) -> None:
    annotation.write_bytes(annotation.read_bytes()[:700])


def no_matlab(annotation: Path, photo: Path) -> None:
    annotation.write_text("not MATLAB")


def no_anno(annotation: Path, photo: Path) -> None:
    scipy.io.savemat(annotation, {"other": 1})


def other_size(annotation: Path, photo: Path) -> None:
    Image.new("RGB", (31, 17)).save(photo)


def no_image(annotation: Path, photo: Path) -> None:
    photo.write_text("no image")


def cut_photo(annotation: Path, photo: Path) -> None:
    photo.write_bytes(photo.read_bytes()[:3000])


def no_photo(annotation: Path, photo: Path) -> None:
    photo.unlink()


DAMAGES = [cut_annotation, no_matlab, no_anno, other_size, no_image, cut_photo, no_photo]
Damage = Callable[[Path, Path], None]


def paths_of(root: Path, image: str) -> tuple[Path, Path]:
    return root / "Annotations_Part" / f"{image}.mat", root / "VOCdevkit" / "VOC2010" / "JPEGImages" / f"{image}.jpg"


def first_kept_image(shards: Path) -> str:
    dataset = open_dataset(shards)
    return str(ShardReader(dataset, dataset.splits["train"][0]).read_description(0)["image"])


@pytest.mark.parametrize("damage", DAMAGES)
def test_one_bad_file_costs_no_other_and_is_listed(
    own_tree: Path, shards: Path, tmp_path: Path, damage: Damage, capsys: pytest.CaptureFixture[str]
) -> None:
    image = first_kept_image(shards)
    damage(*paths_of(own_tree, image))
    assert write(own_tree, tmp_path / "out") == 0
    kept = {sample for sample in keys(tmp_path / "out") if not sample.startswith(image)}
    assert kept == {sample for sample in keys(shards) if not sample.startswith(image)}
    assert not any(sample.startswith(image) for sample in keys(tmp_path / "out"))
    assert f"left out {image}: " in capsys.readouterr().err
    assert write(own_tree, tmp_path / "out", "--strict") == 1


def keys(shards: Path) -> set[str]:
    dataset = open_dataset(shards)
    entries = [entry for split in dataset.splits.values() for entry in split]
    return {dataset.read_index(entry).key(row) for entry in entries for row in range(entry.num_samples)}


@pytest.mark.parametrize("damage", DAMAGES)
def test_where_nothing_else_is_left_a_bad_file_is_a_one_line_error_and_leaves_nothing(
    own_tree: Path, shards: Path, tmp_path: Path, damage: Damage
) -> None:
    image = first_kept_image(shards)
    for path in (own_tree / "Annotations_Part").glob("*.mat"):
        if path.stem != image:
            path.unlink()
    damage(*paths_of(own_tree, image))
    with pytest.raises(UserError) as caught:
        write(own_tree, tmp_path / "out")
    assert image in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_mistakes_on_the_command_line_end_in_one_line_and_code_2(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for root, more, needed in (
        (tmp_path / "nowhere", (), "no such folder"),
        (tmp_path / "empty", (), "no folder"),
        (tree, ("--classes", "hors"), "did you mean 'horse'"),
        (tree, ("--size", "0"), "--size is 0"),
    ):
        done = python("-m", "slotscops.shard", "--root", root, "--out", tmp_path / "out", "--no-features", *more)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("slotscops: ")
        assert len(done.stderr.splitlines()) == 1
        assert needed in done.stderr
        assert not (tmp_path / "out").exists()


def test_a_missing_teacher_is_an_error_before_any_work(tree: Path, tmp_path: Path) -> None:
    arguments = ["--root", str(tree), "--out", str(tmp_path / "out"), "--teacher-weights", str(tmp_path / "no.pth")]
    with pytest.raises(UserError, match=r"no\.pth"):
        shard.main(arguments)
    assert not (tmp_path / "out").exists()


# ---- real photos -------------------------------------------------------------------------------------------------


def test_all_real_photos_are_accounted_for(real_data: Path, tmp_path: Path) -> None:
    assert write(real_data / "pascal_part", tmp_path / "out") == 0
    left_out = json.loads((tmp_path / "out" / "index" / "left_out.json").read_text())
    assert len(keys(tmp_path / "out")) == 12
    assert len(left_out) == 10
    assert not any(item["damaged"] for item in left_out)


def test_the_layout_of_choudhury_gives_the_same_shards(real_data: Path, tmp_path: Path) -> None:
    official, other = real_data / "pascal_part", tmp_path / "other" / "VOCdevkit_2010"
    other.mkdir(parents=True)
    (other / "VOC2010").symlink_to(official / "VOCdevkit" / "VOC2010")
    (other / "Annotations_Part").symlink_to(official / "Annotations_Part")
    assert write(official, tmp_path / "a") == 0
    assert write(tmp_path / "other", tmp_path / "b") == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_the_real_faces_are_650_and_150_records(real_data: Path, tmp_path: Path) -> None:
    assert write(real_data / "faces", tmp_path / "out", "--workers", "2", "--samples-per-shard", "400") == 0
    dataset = open_dataset(tmp_path / "out")
    assert [dataset.num_samples(split) for split in ("train", "val")] == [650, 150]


def test_a_table_of_shards_holds_the_entries_that_it_was_made_of() -> None:
    entries = [
        ShardEntry(f"train-{number:06d}", number, 10**12, sha256_of_bytes(bytes([number])), sha256_of_bytes(b""))
        for number in range(5)
    ]
    table = ShardTable(entries)
    assert list(table) == entries
    assert table == entries
    assert table != entries[:4]
    assert table[1:3] == entries[1:3]
    assert table[-1] == entries[-1]
    assert pickle.loads(pickle.dumps(table)) == table
    assert len(ShardTable([])) == 0
