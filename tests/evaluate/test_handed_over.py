"""A model that was handed over: nothing that its settings name is opened or contacted unless the user names it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from audit import audited
from servers import WebServer, web_server
from small_runs import photo, save_feature_run

from slotscops.config import load_config
from slotscops.core.errors import UserError
from slotscops.evaluate import __main__ as evaluate
from slotscops.evaluate.options import parse_options
from slotscops.features.cache import open_features
from slotscops.features.manifest import cache_name, read_manifest, write_manifest
from slotscops.segment import __main__ as segment
from slotscops.segment import export
from slotscops.segment.segmenter import load
from slotscops.train.run.checkpoint import verify_checkpoint


@pytest.fixture
def seen() -> Iterator[list[str]]:
    """Files opened or made, and addresses contacted, while the test runs."""
    files, network = ("open", "os.listdir", "os.scandir", "os.mkdir"), ("socket.connect", "socket.getaddrinfo")
    with audited(*files, *network, describe=lambda event, arguments: f"{event} {arguments[:2]}") as seen:
        yield seen


@pytest.fixture
def server(toy_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    monkeypatch.setenv("SLOTSCOPS_CACHE", str(tmp_path / "cache"))
    with web_server(toy_shards) as server:
        yield server


@pytest.mark.parametrize("shards", ["URL", "trap", "../trap"])
def test_nothing_that_its_settings_name_is_opened_or_contacted(
    server: WebServer,
    toy_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seen: list[str],
    shards: str,
) -> None:
    trap = tmp_path / "trap"
    trap.symlink_to(toy_shards)  # a whole data set: what opens it goes on
    monkeypatch.chdir(tmp_path)
    named = {"URL": server.url, "trap": str(trap), "../trap": f"../{tmp_path.name}/trap"}[shards]
    weights = f"{trap}/weights.safetensors"
    settings = [f"data.shards={named}", f"teacher.weights={weights}", f"encoder.weights={weights}", f"run_dir={trap}/r"]
    run = save_feature_run(tmp_path / "run", *settings)
    picture = tmp_path / "photo.png"
    photo((40, 30)).save(picture)
    monkeypatch.setattr(export, "export", lambda model, out, crops: (0.0, 0.0))
    seen.clear()
    with pytest.raises(UserError, match=r"which are not opened unasked, .* with --shards \(--shards "):
        evaluate.main(["--checkpoint", str(run)])
    model = load(run, "random:0")
    assert model.segment(picture).labels.shape == (30, 40)
    given = ["--checkpoint", str(run), "--teacher-weights", "random:0"]
    assert segment.main([*given, "--out", str(tmp_path / "out"), str(picture)]) == 0
    assert export.main([*given, "--out", str(tmp_path / "model.pt2"), str(picture)]) == 0
    model.save_pretrained(tmp_path / "published")
    assert any("model.safetensors" in event for event in seen)
    assert not [event for event in seen if "trap" in event or "socket" in event]
    assert evaluate.main(["--checkpoint", str(run), "--shards", str(toy_shards)]) == 0
    assert not [event for event in seen if "trap" in event or "socket" in event]
    assert not server.requests


def test_a_published_model_has_no_shards_of_its_own(toy_shards: Path, tmp_path: Path) -> None:
    run = save_feature_run(tmp_path / "run", "data.shards=horse")
    load(run, "random:0").save_pretrained(tmp_path / "published")
    with pytest.raises(UserError, match="not opened unasked"):
        evaluate.main(["--checkpoint", str(tmp_path / "published")])


def test_a_run_trained_below_this_folder_is_scored_where_it_was_trained(
    toy_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "toy").symlink_to(toy_shards)
    save_feature_run(tmp_path / "run", "data.shards=shards/toy")
    assert evaluate.main(["--checkpoint", "run"]) == 0
    assert "val of shards/toy" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "/x", "timm/../x", "timm/hf-hub:owner/x", "..", ".x", "", "a\nb", "a\\b", "a b", "x" * 300]
)
def test_a_name_that_becomes_a_path_is_one_plain_component(name: str, tmp_path: Path, toy_shards: Path) -> None:
    for setting in ("network", "layer"):
        (tmp_path / "config.yaml").write_text(json.dumps({"teacher": {setting: name}}))
        with pytest.raises(UserError, match=rf"config.yaml: teacher\.{setting} is "):
            load_config(tmp_path / "config.yaml")
    if "/" in name:
        with pytest.raises(UserError, match="is no name of a feature cache"):
            cache_name(name, 64)
    for good in ("relu5_2+relu5_4", "features.7", "layer4.2.conv3"):
        assert load_config(None, [f"teacher.layer={good}"]).teacher.layer == good
    for good in ("resnet50", "timm/vit_small_patch14_dinov2.lvd142m"):
        assert load_config(None, [f"teacher.network={good}"]).teacher.network == good


def test_a_manifest_of_a_stranger_leads_to_no_other_folder(toy_shards: Path, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(toy_shards, tmp_path / "shards"))
    path = shards / "features" / "vgg19-relu5_4-64" / "manifest.json"
    manifest = read_manifest(path)
    files, shape = manifest.pop("files"), tuple(manifest.pop("shape"))
    write_manifest(path, manifest | {"layer": "x/../../../../evil"}, shape, files)
    with pytest.raises(UserError, match="is no name of a feature cache"):
        open_features(shards, "train-000000")


def test_a_checkpoint_that_names_files_elsewhere_is_damaged(tmp_path: Path) -> None:
    run = save_feature_run(tmp_path / "run")
    (checkpoint,) = (run / "checkpoints").iterdir()
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | {"../../config.yaml": manifest["state.json"]}))
    with pytest.raises(UserError, match=r"manifest\.json: is damaged"):
        verify_checkpoint(checkpoint)


def test_scores_that_could_not_be_written_are_refused_before_scoring(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    refused = {
        "missing/scores.json": "no such folder; make it first",
        "file/scores.json": "no such folder; make it first",
        "folder": "is a folder; give the name of a file",
    }
    for name, reason in refused.items():
        with pytest.raises(UserError, match=rf"--json .*{name}: {reason}"):
            parse_options(["--checkpoint", "nowhere", "--json", str(tmp_path / name)])
    assert parse_options(["--checkpoint", "nowhere", "--json", str(tmp_path / "file")]).json == tmp_path / "file"
