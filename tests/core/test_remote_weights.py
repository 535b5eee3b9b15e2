"""Weights behind a URL: only the tensors that a network needs are fetched, whatever the server does."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from servers import WebServer, web_server
from torch import nn

from slotscops.config import load_config, to_yaml
from slotscops.core import transfer
from slotscops.core.errors import RunError, UserError
from slotscops.core.pretrained import display_name, fill, fingerprint, is_found_by_name
from slotscops.features.teacher import Teacher

FILE = "whole.safetensors"


class NoOwnWeights:
    url = "none"

    def get_state_dict(self, **_: object) -> dict[str, torch.Tensor]:
        raise AssertionError("nothing may be downloaded")


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    """Serves the network's tensors with larger ones of a classifier before, between and behind them."""
    monkeypatch.setattr(transfer, "PAUSES", (0.0,) * 3)
    monkeypatch.setenv("SLOTSCOPS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "served").mkdir()
    of_classifier = {name: torch.randn(50_000) for name in ("0.a", "0.x", "z")}
    save_file(network().state_dict() | of_classifier, tmp_path / "served" / FILE)
    with web_server(tmp_path / "served") as server:
        yield server


def filled(source: str) -> nn.Sequential:
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2))
    fill(other, source, NoOwnWeights())
    return other


def test_only_the_needed_tensors_are_fetched_once_and_have_the_fingerprint_of_the_whole_file(
    server: WebServer, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        tensors = filled(f"{server.url}/{FILE}").state_dict()
        assert fingerprint(tensors) == fingerprint(network().state_dict())
        assert fingerprint(tensors) == fingerprint(filled(str(server.folder / FILE)).state_dict())
    assert server.requests[FILE] <= 5
    assert server.sent[FILE] < 3_000 < (server.folder / FILE).stat().st_size / 100
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("fetching 0.0 MB, the tensors that the network needs") == 1


def test_a_teacher_has_one_fingerprint_however_its_weights_came(
    server: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = Teacher("relu1_1", "random:3", "vgg11")
    save_file(
        dict(wanted.layers.network.state_dict()) | {"classifier.0.weight": torch.ones(9, 9)}, server.folder / FILE
    )
    came = Teacher("relu1_1", f"{server.url}/{FILE}", "vgg11")
    assert came.fingerprint == wanted.fingerprint
    assert came.weights_name == FILE == Teacher("relu1_1", str(server.folder / FILE), "vgg11").weights_name


@pytest.mark.parametrize("fault", ["drop", "503", "short", "gzip"])
def test_what_breaks_is_tried_again(server: WebServer, fault: str) -> None:
    server.faults[FILE] = [fault, "", fault]
    assert fingerprint(filled(f"{server.url}/{FILE}").state_dict()) == fingerprint(network().state_dict())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("404", r"is not there; check the address, or download the file"),
        ("403", r"cannot be fetched .*403"),
        ("bomb", r"is no .safetensors file"),
        ("whole", r"its server sends whole files only; download the file"),
    ],
)
def test_a_server_that_cannot_serve_it_is_refused_in_a_line(server: WebServer, fault: str, message: str) -> None:
    server.faults[FILE] = [fault] * 9
    with pytest.raises((UserError, RunError), match=message) as error:
        filled(f"{server.url}/{FILE}")
    assert "\n" not in str(error.value)
    assert not list(server.folder.parent.glob("cache/weights/*.safetensors"))


def write_table(path: Path, table: object, num_bytes: int | None = None) -> None:
    text = json.dumps(table).encode()
    path.write_bytes((num_bytes or len(text)).to_bytes(8, "little") + text + bytes(1_000))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"dtype": "F32", "shape": [4, 3, 3, 4], "data_offsets": [0, 576]}, "0.weight has shape .4, 3, 3, 4., needed"),
        ({"dtype": "F32", "shape": [4, 3, 3, 3], "data_offsets": [0, 10**12]}, "does not fit its type and shape"),
        ({"dtype": "F32", "shape": [4, 3, 3, 3], "data_offsets": [-432, 0]}, "does not fit its type and shape"),
        ({"dtype": "F4", "shape": [4, 3, 3, 3], "data_offsets": [0, 432]}, "does not fit its type and shape"),
        ({"dtype": "F32", "shape": "4333", "data_offsets": [0, 432]}, "its table of tensors is damaged"),
        (None, "its table of tensors is damaged"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_before_any_tensor_is_fetched(
    server: WebServer, row: object, message: str
) -> None:
    others = {name: {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [0, 4 * tensor.numel()]}
              for name, tensor in network().state_dict().items()}  # fmt: skip
    write_table(server.folder / FILE, others | {"0.weight": row})
    with pytest.raises(UserError, match=message):
        filled(f"{server.url}/{FILE}")
    assert server.requests[FILE] == 2


def test_what_is_no_safetensors_file_is_refused(server: WebServer) -> None:
    write_table(server.folder / FILE, {}, num_bytes=1 << 40)
    with pytest.raises(UserError, match=r"is no .safetensors file"):
        filled(f"{server.url}/{FILE}")
    write_table(server.folder / FILE, {})
    with pytest.raises(UserError, match=r"has no tensor 0.weight"):
        filled(f"{server.url}/{FILE}")
    with pytest.raises(UserError, match=r"only a .safetensors file can be read from a URL"):
        filled(f"{server.url}/weights.pth")


def test_a_signed_address_works_and_its_secret_is_neither_printed_nor_stored(
    server: WebServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.query = "sig=TOPSECRET"
    source = f"{server.url}/{FILE}?{server.query}"
    filled(source)
    (copy,) = (tmp_path / "cache" / "weights").glob("*.safetensors")
    assert load_file(copy).keys() == network().state_dict().keys()
    config = load_config(None, [f"encoder.weights={source}", f"teacher.weights={source}"])
    server.query = "sig=another"
    with pytest.raises(RunError) as error:
        fill(nn.Linear(2, 2), source, NoOwnWeights())
    texts = [str(copy), to_yaml(config), display_name(source), str(error.value), *capsys.readouterr()]
    assert not [text for text in texts if "TOPSECRET" in text]
    assert not is_found_by_name(source)  # a model from elsewhere contacts no address by itself
    with pytest.raises(UserError, match="was stored without its password or signed query"):
        filled(f"{server.url}/{FILE}?sig=***")
