import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import ROOT, python
from safetensors.numpy import load_file, save_file
from small_runs import photo, publish, save_feature_run, save_resnet_run

import slotscops
from slotscops.config import load_config
from slotscops.core.errors import UserError
from slotscops.evaluate.__main__ import main as evaluate_main
from slotscops.segment.model_card import card_contents
from slotscops.segment.names import PartNames, write_names
from slotscops.segment.segmenter import Segmenter

COMMIT = "0123456789012345678901234567890123456789"
MODEL = "someone/horse-parts"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose first part has a name."""
    run = save_feature_run(tmp_path_factory.mktemp("runs") / "run", "data.shards=/home/me/shards/horse")
    write_names(run / "checkpoints" / "step-1", PartNames({"": ["h<ea>d|", None, None, None, None]}, 0.5, 3))
    return run


@pytest.fixture(scope="module")
def published(run: Path) -> Path:
    return publish(run)


def test_a_published_model_gives_what_the_run_gives_by_load_and_by_the_mixin(run: Path, published: Path) -> None:
    expected = slotscops.load(run).segment(photo((50, 64))).maps
    for model in (slotscops.load(published), Segmenter.from_pretrained(published)):
        assert (model.segment(photo((50, 64))).maps == expected).all()


def test_a_resnet_published_on_its_own_gives_what_the_run_gives(tmp_path: Path) -> None:
    model = slotscops.load(save_resnet_run(tmp_path / "run"))
    model.save_pretrained(tmp_path / "published")
    again = slotscops.load(tmp_path / "published")
    np.testing.assert_array_equal(again.segment(photo((64, 64))).maps, model.segment(photo((64, 64))).maps)


def test_nothing_is_pickled_and_no_folder_of_the_machine_is_told(published: Path) -> None:
    names = {path.name for path in published.iterdir()}
    assert names == {"model.safetensors", "config.yaml", "config.json", "part_names.json", "README.md"}
    load_config(published / "config.yaml")
    for path in published.iterdir():
        assert b"/home/me" not in path.read_bytes()
        assert str(published.parent).encode() not in path.read_bytes()


def test_the_card_says_how_to_use_it_what_it_was_told_scores_licences_and_whom_to_cite(published: Path) -> None:
    card = (published / "README.md").read_text()
    _, header, text = card.split("---\n", 2)
    fields = yaml.safe_load(header)
    assert (fields["library_name"], fields["license"], fields["license_name"]) == ("slotscops", "other", "fill-in")
    for told in (
        "Parts of horse",
        r"| 1 | h&lt;ea>d\| |",
        "| 2 | part 2 |",
        "slotscops segment --checkpoint OWNER/MODEL",
        "No object mask was used.",
        "relu5_4` at 64 px, weights `random:0`",
        "| NMI | full image, own background | 25.0 |",
        "The teacher's weights: random numbers, so none.",
        "num_parts: 5",
    ):
        assert told in text, told
    papers = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    assert all(f"url = {{{paper['url']}}}" in text for paper in papers)


def test_the_card_says_more_of_a_model_that_was_told_more(run: Path) -> None:
    trained = slotscops.load(run).trained
    overrides = ["losses.target_mask=object", "losses.background=1.0", "slots.per_class=own", "encoder.name=resnet18"]
    timm = ["teacher.network=timm/vit_small_patch14_dinov2.lvd142m", "teacher.layer=blocks.8"]
    scores = {"val_fg_nmi": 0.5, "val_mask_ari": 0.125}
    best = {"score": "nmi", "value": 0.5, "step": 3}
    state = replace(trained.state, scores=scores, best=best, class_names=["cow"], teacher_weights="imagenet")
    contents = card_contents(trained._replace(config=load_config(None, overrides + timm), state=state))
    for place, told in {
        "told": "object masks were used in training (`losses.target_mask` and `losses.background`).\n- The class of",
        "scores": "| NMI | pixels of true parts only | 50.0 |\n| ARI | full image, given the true object mask | 12.5 |",
        "licence": "The teacher's weights: apache-2.0 (as timm says).\n- The encoder's first weights: torchvision's",
    }.items():
        assert told in contents[place], contents[place]
    assert "chose the run's best checkpoint, step 3, by its nmi; this is step 1." in contents["told"]


def test_saving_over_another_model_replaces_its_card_but_no_readme_of_the_users(
    published: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(published, tmp_path, dirs_exist_ok=True)
    card = tmp_path / "README.md"
    card.write_text(card.read_text().replace("Parts of horse", "Parts of cow"))
    slotscops.load(run).save_pretrained(tmp_path)
    assert card.read_text() == (published / "README.md").read_text()
    card.write_text("# A project of mine\n")
    slotscops.load(run).save_pretrained(tmp_path)
    assert card.read_text() == "# A project of mine\n"
    assert f"{card}: was not written by slotscops" in capsys.readouterr().err


def test_a_published_model_is_evaluated_as_a_run_is(published: Path, toy_shards: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores.json"
    assert evaluate_main(["--checkpoint", str(published), "--shards", str(toy_shards), "--json", str(scores)]) == 0
    assert scores.exists()


def test_a_basis_that_is_no_matrix_is_refused(published: Path, tmp_path: Path) -> None:
    tensors = load_file(published / "model.safetensors") | {"basis_parameter": np.zeros(3, np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.yaml").write_bytes((published / "config.yaml").read_bytes())
    with pytest.raises(UserError, match="has no part basis"):
        slotscops.load(tmp_path)


def test_one_flipped_bit_in_a_published_model_is_noticed(published: Path, tmp_path: Path) -> None:
    content = bytearray((published / "model.safetensors").read_bytes())
    content[-100] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    (tmp_path / "config.yaml").write_bytes((published / "config.yaml").read_bytes())
    with pytest.raises(UserError, match=r"model\.safetensors: is damaged"):
        slotscops.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content[:1000])
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read"):
        slotscops.load(tmp_path)


def test_tensors_and_settings_of_a_checkpoint_are_enough_if_the_teacher_is_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (run / "checkpoints" / "step-1" / "model.safetensors", run / "config.yaml"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="weights that were not recorded"):
        slotscops.load(tmp_path)
    maps = slotscops.load(tmp_path, teacher_weights="random:0").segment(photo((64, 64))).maps
    assert "does not say which teacher" in capsys.readouterr().err
    assert (maps == slotscops.load(run).segment(photo((64, 64))).maps).all()


# ---- a hub on this machine ---------------------------------------------------------------------------------------


@pytest.fixture
def hub(published: Path) -> Iterator[str]:
    """Address of a server that answers like the hub, for one model of slotscops and one that is not."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            known = {MODEL: [path.name for path in published.iterdir()], "someone/other": ["pytorch_model.bin"]}
            path = self.path.partition("?")[0].lstrip("/")
            for model, names in known.items():
                if path == f"api/models/{model}/revision/main":
                    files = [{"rfilename": name} for name in names]
                    return self._send(json.dumps({"id": model, "sha": COMMIT, "siblings": files}).encode())
                if path == f"api/models/{model}/tree/{COMMIT}":
                    sizes = [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in names]
                    return self._send(json.dumps(sizes).encode())
                if path.startswith(f"{model}/resolve/{COMMIT}/"):
                    return self._send((published / path.rpartition("/")[2]).read_bytes())
            return self._send(b"", 404)

        def _send(self, content: bytes, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_id_on_the_hub_is_downloaded_and_segments(hub: str, run: Path, tmp_path: Path) -> None:
    photo((64, 40)).save(tmp_path / "horse.png")
    command = ["-m", "slotscops.segment", "--checkpoint", MODEL, "--soft", "--out", tmp_path / "out"]
    home = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    done = python(*command, tmp_path / "horse.png", **home)
    assert done.returncode == 0, done.stderr
    assert '"name":"h<ea>d|"' in (tmp_path / "out" / "gallery" / "index.js").read_text()
    maps = load_file(tmp_path / "out" / "horse.maps.safetensors")["maps"]
    np.testing.assert_allclose(maps, slotscops.load(run).segment(tmp_path / "horse.png").maps, atol=1e-5)


# The hub's address is read when huggingface_hub is imported, so all this needs a process of its own: one for all.
_ASK = """
import sys, slotscops
from slotscops.core.errors import UserError
for model in sys.argv[1:]:
    try:
        slotscops.load(model)
    except UserError as error:
        print(error)
"""


def test_what_is_neither_here_nor_on_the_hub_is_one_line_that_names_both(hub: str, tmp_path: Path) -> None:
    models = ("someone/nothing", "someone/other", "no/such/run")
    done = python("-c", _ASK, *models, HF_ENDPOINT=hub, HF_HOME=str(tmp_path / "cache"), HF_HUB_OFFLINE="0")
    nothing, other, path = done.stdout.splitlines()
    advice = "no such run or checkpoint; give runs/NAME or runs/NAME/checkpoints/step-N"
    assert nothing.startswith(f"someone/nothing: {advice}, and no model on the Hugging Face hub either (")
    assert other.endswith("without model.safetensors; it is no model of slotscops")
    assert path == f"no/such/run: {advice}"


def test_a_path_that_exists_wins_over_an_id(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone").mkdir()
    (tmp_path / MODEL).symlink_to(published)
    assert slotscops.load(MODEL).trained.path == Path(MODEL)
