import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from commands import python
from damages import CACHE, DAMAGES, OTHER, ROW, SHARD, flip, index_of, offset, tar

from slotscops.core.errors import RunError, UserError
from slotscops.features.cache import open_cache
from slotscops.features.verify import find_damage, tar_header
from slotscops.loader.split import Split
from slotscops.shard import __main__ as shard
from slotscops.shard.index import open_dataset

README = Path(__file__).parents[2] / "shards" / "README.md"


@pytest.fixture
def own_shards(toy_shards: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(toy_shards, tmp_path / "shards"))


def opens(shards: Path) -> bool:
    try:
        dataset = open_dataset(shards)
        open_cache(dataset, "relu5_4", 64)
    except UserError:
        return False
    return True


def reads(shards: Path) -> bool:
    """Whether evaluation can read every sample without an error."""
    dataset = open_dataset(shards)
    split = Split(dataset, "train", open_cache(dataset, "relu5_4", 64), with_labels=True)
    try:
        for sample in range(len(split)):
            split.read(np.array([sample]))
    except (RunError, UserError):
        return False
    return True


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_damage_passes_silently_and_each_is_found_where_the_readme_says(own_shards: Path, damage: str) -> None:
    harm, expected = DAMAGES[damage]
    harm(own_shards)
    lines = list(find_damage(own_shards, num_workers=1))
    found = [] if opens(own_shards) else ["O"]
    if not found and not reads(own_shards):
        found.append("R")
    found += ["V"] * bool(lines)
    assert " ".join(found) == expected
    assert all("\n" not in line and str(own_shards) in line for line in lines)
    assert any(SHARD in line or ".json" in line for line in lines)


def test_the_readme_lists_every_damage_with_where_it_is_found() -> None:
    rows = [line.split("|")[1:3] for line in README.read_text().splitlines() if line.startswith("|")]
    listed = {what.strip(): where.strip() for what, where in rows}
    assert {name: listed.get(name) for name in DAMAGES} == {name: where for name, (_, where) in DAMAGES.items()}


def test_whole_shards_verify_with_code_0_and_damaged_ones_name_every_member_and_row(
    toy_shards: Path, own_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shard.main(["--verify", str(toy_shards), "--workers", "1"]) == 0
    assert capsys.readouterr().out == f"{toy_shards}: every file is as it was written\n"
    key = index_of(own_shards).key(ROW)
    for member in ("jpg", "json"):
        flip(tar(own_shards), offset(own_shards, member) + 4)
    flip(tar(own_shards), offset(own_shards, "object.png") - 512)
    flip(own_shards / f"{OTHER}.tar", 512 + 30)
    features = own_shards / "features" / CACHE / f"{SHARD}.safetensors"
    flip(features, -1)
    done = python("-m", "slotscops.shard", "--verify", own_shards, "--workers", "2")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    for needed in (f"{key}.jpg is damaged", f"{key}.json is damaged", f"the tar header of {key}.object.png"):
        assert sum(f"{SHARD}.tar: {needed}" in line for line in lines) == 1
    assert sum(f"{OTHER}.tar" in line for line in lines) == 1
    assert sum(str(features) in line for line in lines) == 1
    assert len(lines) == 5
    assert done.stderr.splitlines()[-1] == f"slotscops: {own_shards}: 5 damages found"


def test_verifying_what_is_no_data_set_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no shards"):
        shard.main(["--verify", str(tmp_path)])


def test_headers_are_those_the_tar_holds_also_for_long_names(tmp_path: Path) -> None:
    for name in ("a_0.jpg", f"{'long' * 40}_0.parts.png", "é_1.json"):
        with tarfile.open(tmp_path / "one.tar", "w", format=tarfile.GNU_FORMAT) as out:
            entry = tarfile.TarInfo(name)
            out.addfile(entry)
        content = (tmp_path / "one.tar").read_bytes()
        assert content.startswith(tar_header(name, 0))
