"""Compact caches: components of the features and 8 bits a value, alone and together, from the command to a photo."""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run as run_command
from commands import train
from forks import ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import load_file, save_file
from servers import web_server

import slotscops
from slotscops.config import load_config
from slotscops.core.errors import DamageError, UserError
from slotscops.evaluate import __main__ as evaluate
from slotscops.features import __main__ as features
from slotscops.features.cache import FeatureCache, open_cache, open_features
from slotscops.features.compact import PROJECTION, Compact, project
from slotscops.features.manifest import read_manifest
from slotscops.features.projection_fit import fit_projection
from slotscops.features.rows import FeatureShard, encode
from slotscops.features.teacher import Teacher, compute_features
from slotscops.features.verify import find_damage
from slotscops.segment import export
from slotscops.shard.index import open_dataset
from slotscops.shard.reader import ShardReader
from slotscops.train.processes import open_training_data

NETWORK, LAYER = "timm/test_vit", "blocks.2.attn.k"
TEACHER = ["--teacher", NETWORK, "--layer", LAYER]
WEIGHTS = ["--teacher-weights", "random:0"]
SMALL = Compact(components=8, store="int8")
OPTIONS = SMALL.options().split()
SETTINGS = [f"teacher.network={NETWORK}", f"teacher.layer={LAYER}", "basis.kind=free", *SMALL.settings()]


@pytest.fixture(scope="module")
def shards(toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Toy shards with a full cache of a signed teacher and a compact one, plain and mirrored. Not to be changed."""
    out = Path(shutil.copytree(toy_shards, tmp_path_factory.mktemp("compact") / "shards"))
    assert features.main(["--shards", str(out), *TEACHER, *WEIGHTS]) == 0
    assert features.main(["--shards", str(out), *TEACHER, *WEIGHTS, *OPTIONS, "--mirrored"]) == 0
    return out


@pytest.fixture
def own_shards(shards: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(shards, tmp_path / "shards"))


@pytest.fixture(scope="module")
def run(shards: Path) -> Path:
    """A short run on the compact cache."""
    more = ["train.total_steps=2", "data.mirror=true", "train.eval_every_steps=2"]
    done = train([sys.executable], shards, shards.parent / "run", *SETTINGS, *more)
    assert done.returncode == 0, done.stderr
    return shards.parent / "run"


def opened(shards: Path, compact: Compact = SMALL, mirrored: bool = False) -> FeatureCache:
    return open_cache(open_dataset(shards), LAYER, 64, network=NETWORK, mirrored=mirrored, compact=compact)


def stored(folder: Path, rows: np.ndarray) -> FeatureShard:
    path = folder / "train-000000.safetensors"
    path.write_bytes(encode(rows, "", "int8"))
    return FeatureShard(path)


# ---- 8 bits a value ----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(
    rows=hnp.arrays(
        np.float16,
        st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(2, 4), st.integers(2, 4)),
        elements=st.floats(-65504, 65504, width=16),
    )
)
def test_a_value_is_off_by_at_most_half_a_step_and_its_rounding(
    tmp_path_factory: pytest.TempPathFactory, rows: np.ndarray
) -> None:
    shard = stored(tmp_path_factory.mktemp("rows"), rows)
    came, wanted = shard.read_rows(range(len(rows))).double().numpy(), rows.astype(np.float64)
    if shard.encoding == "sparse":
        assert (came == wanted).all()
    step = np.ptp(wanted, axis=(2, 3), keepdims=True) / 255
    rounding = 2**-11 * np.abs(wanted) + 2**-24
    assert (np.abs(came - wanted) <= step / 2 * 1.001 + 2 * rounding).all()
    assert shard.has_negative == bool((rows < 0).any())
    assert shard.rows_not_finite() == []


def test_each_stored_array_of_a_row_is_checked_and_other_rows_stay_readable(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(3, 4, 5, 5)).astype(np.float16)
    path = stored(tmp_path, rows).path
    tensors = load_file(path)
    for name in ("quantised", "lowest", "step"):
        damaged = {key: tensor.clone() for key, tensor in tensors.items()}
        damaged[name][1].view(torch.uint8).flatten()[0] ^= 1
        save_file(damaged, path)
        shard = FeatureShard(path)
        with pytest.raises(DamageError, match="row 1 is damaged"):
            shard.read_rows([1])
        shard.read_rows([0, 2])
    tensors["step"][2, 0] = torch.inf
    save_file(tensors, path)
    assert FeatureShard(path).rows_not_finite() == [2]


# ---- components --------------------------------------------------------------------------------------------------


def test_a_row_is_the_projection_of_the_teachers_answer_and_the_mirrored_cache_has_the_same_matrix(
    shards: Path,
) -> None:
    dataset, teacher = open_dataset(shards), Teacher(LAYER, "random:0", NETWORK)
    cache = opened(shards, mirrored=True)
    assert cache.mirrored is not None
    assert cache.projection is not None
    assert torch.equal(cache.projection, cache.mirrored.projection)
    entry = dataset.splits["train"][0]
    crops = ShardReader(dataset, entry).read_images(range(entry.num_samples))
    for one, images in ((cache, crops), (cache.mirrored, crops.flip(-1))):
        expected = project(compute_features(teacher, images, 64), cache.projection)
        step = (expected.amax((2, 3)) - expected.amin((2, 3)))[..., None, None] / 255
        came = one.open_shard(entry).read_rows(range(entry.num_samples))
        assert one.open_shard(entry).encoding == "int8"
        assert ((came - expected).abs() <= step / 2 * 1.01 + 2e-3 * expected.abs()).all()


def test_the_matrix_keeps_the_directions_of_most_energy_and_inner_products_up_to_the_rest(shards: Path) -> None:
    dataset, teacher = open_dataset(shards), Teacher(LAYER, "random:0", NETWORK)
    projection = fit_projection(dataset, teacher, 64, 8)
    torch.testing.assert_close(projection.matrix.T @ projection.matrix, torch.eye(8), atol=1e-5, rtol=0)
    rows = torch.cat([open_features(shards, entry.name, opened(shards, Compact()).folder.name).read_rows(
        range(entry.num_samples)) for entry in dataset.splits["train"]]).double()  # fmt: skip
    vectors = rows.permute(0, 2, 3, 1).flatten(0, 2)
    kept = vectors @ projection.matrix.double()
    singular = torch.linalg.svdvals(vectors)
    assert kept.square().sum() / singular[:8].square().sum() == pytest.approx(1, abs=1e-3)
    shares = kept.var(0).sum() / vectors.var(0).sum()
    assert projection.explained_variance == pytest.approx(float(shares), abs=2e-3)
    rest = vectors - kept @ projection.matrix.double().T  # what the matrix cuts off
    torch.testing.assert_close(kept @ kept.T + rest @ rest.T, vectors @ vectors.T, atol=1e-2, rtol=1e-3)


def test_what_is_announced_is_what_is_written(own_shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for compact in (Compact(5), Compact(store="int8"), Compact(5, "int8")):
        options = compact.options().split()
        assert features.main(["--shards", str(own_shards), *TEACHER, *WEIGHTS, *options]) == 0
        said = " ".join(capsys.readouterr().out.split())
        announced = re.search(r"each: (at most )?([\d.]+) MB", said)
        assert announced
        assert bool(announced[1]) is (compact.components is None)
        manifest = read_manifest(opened(own_shards, compact).folder / "manifest.json")
        written = sum(row["bytes"] for row in manifest["files"].values())
        of_headers = 600 * len(manifest["files"])
        assert 0 <= written - float(announced[2]) * 1e6 < of_headers + 5e3  # 5 kB: two decimals of a MB


def test_a_restart_writes_the_same_bytes_and_two_processes_share_one_matrix(own_shards: Path) -> None:
    folder = opened(own_shards).folder
    expected = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("manifest.json", "train-000001.safetensors"):
        (folder / name).unlink()
    assert features.main(["--shards", str(own_shards), *TEACHER, *WEIGHTS, *OPTIONS]) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected
    shutil.rmtree(folder)
    work = ["-m", "slotscops.features", "--shards", str(own_shards), *TEACHER, *WEIGHTS, *OPTIONS]
    done = run_command([*ranks(2), *work])
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected


def test_another_form_is_another_cache_and_the_error_names_the_command_that_makes_it(shards: Path) -> None:
    assert opened(shards).folder.name == "timm-test_vit-blocks.2.attn.k-64-pca8-int8"
    with pytest.raises(UserError, match=r"needs features \S+-pca9-int8, .* --components 9 --store int8"):
        opened(shards, Compact(9, "int8"))
    with pytest.raises(UserError, match="has 64 channels; give 1 to 63"):
        features.main(["--shards", str(shards), *TEACHER, *WEIGHTS, "--components", "64"])
    plain = read_manifest(opened(shards, Compact()).folder / "manifest.json")
    assert not {"components", "store", "projection_sha256", "explained_variance"} & set(plain)


def test_a_damaged_matrix_is_found_at_opening_and_by_verify(own_shards: Path) -> None:
    assert features.main(["--shards", str(own_shards), *TEACHER, *OPTIONS, "--mirrored", "--verify"]) == 0
    path = opened(own_shards).folder / PROJECTION
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match=f"{PROJECTION}: is damaged .its sha256 differs"):
        opened(own_shards)
    assert any(PROJECTION in line and "is damaged" in line for line in find_damage(own_shards, 0))
    path.unlink()
    with pytest.raises(UserError, match=f"{PROJECTION}: cannot be read"):
        opened(own_shards)


def test_a_compact_cache_behind_a_url_comes_with_its_matrix(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLOTSCOPS_CACHE", str(tmp_path / "cache"))
    with web_server(shards) as server:
        cache = open_cache(open_dataset(server.url), LAYER, 64, network=NETWORK, compact=SMALL)
        matrix = cache.projection
    assert matrix is not None
    assert torch.equal(matrix, opened(shards).projection)


# ---- a run -------------------------------------------------------------------------------------------------------


def test_a_crop_is_segmented_as_its_cached_row_is_scored_up_to_the_stored_rounding(
    shards: Path, run: Path, tmp_path: Path
) -> None:
    slotscops.load(run).save_pretrained(tmp_path / "published")
    dataset, cache = open_dataset(shards), opened(shards)
    entry = dataset.splits["val"][0]
    crops = ShardReader(dataset, entry).read_images(range(entry.num_samples))
    cached = cache.open_shard(entry).read_rows(range(entry.num_samples))
    for model in (slotscops.load(run), slotscops.load(tmp_path / "published")):
        assert torch.equal(model.network.encoder.projection, cache.projection)
        with torch.inference_mode():
            of_row = model.network(cached).logits
        of_photo = model.forward(crops).logits
        torch.testing.assert_close(of_photo, of_row, atol=2e-2, rtol=2e-2)
        wrong = model.network.encoder.projection.flip(1)
        model.network.encoder.projection.copy_(wrong)
        assert (model.forward(crops).logits - of_row).abs().max() > 0.1  # the tolerance tells projections apart
        with pytest.raises(UserError, match="its projection is not the one"):
            evaluate.check_same_projection(cache, model.network, run)


def test_a_run_on_a_compact_cache_is_scored_and_exported(shards: Path, run: Path, tmp_path: Path) -> None:
    assert evaluate.main(["--checkpoint", str(run), "--shards", str(shards), "--baseline", "kmeans"]) == 0
    out = tmp_path / "model.pt2"
    assert export.main(["--checkpoint", str(run), "--out", str(out), "--keep-dead"]) == 0
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64), dtype=np.uint8)
    model = slotscops.load(run)
    expected = model.network.segment_maps(model.forward(torch.from_numpy(images)), torch.from_numpy(images))
    maps, _ = export.run_pt2(out.read_bytes())(images)
    np.testing.assert_allclose(maps, expected.numpy(), atol=export.TOLERANCE)


def test_a_model_without_its_matrix_is_refused(run: Path, tmp_path: Path) -> None:
    slotscops.load(run).save_pretrained(tmp_path / "model")
    text = (tmp_path / "model" / "config.yaml").read_text()
    (tmp_path / "model" / "config.yaml").write_text(text.replace("components: 8", "components: null"))
    with pytest.raises(UserError, match=r"its settings name teacher\.components None"):
        slotscops.load(tmp_path / "model")


# ---- signed features ---------------------------------------------------------------------------------------------


def test_signed_features_are_noted_with_what_rebuilds_them_and_dff_is_refused_before_anything_is_scored(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features.show_cache(opened(shards))
    captured = capsys.readouterr()
    assert "hold negative numbers, which parts rebuild with basis.kind=free" in " ".join(captured.out.split())
    names = ["--teacher", NETWORK, "--layer", LAYER, *OPTIONS]
    with pytest.raises(UserError, match="holds negative numbers, which dff"):
        evaluate.main(["--shards", str(shards), "--baseline", "kmeans,dff", *names])
    assert "scoring" not in capsys.readouterr().err


def test_training_on_signed_features_with_a_basis_that_cannot_be_negative_warns(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, warns in (("relu", True), ("free", False)):
        chosen = [*SETTINGS, f"basis.kind={kind}", f"data.shards={shards}", "data.size=64"]
        open_training_data(load_config(None, chosen))
        assert ("set basis.kind=free" in " ".join(capsys.readouterr().err.split())) is warns
