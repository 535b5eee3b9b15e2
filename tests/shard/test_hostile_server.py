"""Servers and data sets of strangers: what they can cost, and what of an address can come to light."""

import sys
import tracemalloc
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from commands import run, training
from servers import WebServer, make_bomb, web_server

from slotscops.config import load_config
from slotscops.core import transfer
from slotscops.core.errors import RunError, UserError
from slotscops.evaluate import __main__ as evaluate
from slotscops.features.cache import open_cache
from slotscops.loader.split import Split
from slotscops.segment.segmenter import load
from slotscops.shard import remote
from slotscops.shard.index import ShardDataset, open_dataset
from slotscops.train.run import page

TAR = "train-000000.tar"
INDEX = "index/train-000000.safetensors"
FEATURES = "features/vgg19-relu5_4-64/train-000000.safetensors"
JSON = "index/dataset.json"
MANIFEST = "features/vgg19-relu5_4-64/manifest.json"
# Each secret is long enough that no time, path or tensor holds it by chance.
NAME, PASSWORD = "anna-of-somewhere", "S3cret-Word"
USER, QUERY = f"{NAME}:{PASSWORD}", "sig=Sign%2Fature&se=2030-last-day"
SECRETS = (NAME.encode(), PASSWORD.encode(), b"Sign%2Fature", b"Sign/ature", b"2030-last-day", b64encode(USER.encode()))


@pytest.fixture
def server(toy_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    monkeypatch.setenv("SLOTSCOPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(transfer, "PAUSES", (0.0,) * 3)
    with web_server(toy_shards) as server:
        yield server


def read_all(dataset: ShardDataset) -> bytes:
    """Every crop and every feature of the training split."""
    split = Split(dataset, "train", open_cache(dataset, "relu5_4", 64), with_labels=False)
    batch = split.read(np.arange(len(split)))
    assert batch.features is not None
    return batch.images.numpy().tobytes() + batch.features.numpy().tobytes()


# ---- bombs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [JSON, MANIFEST, INDEX])
@pytest.mark.parametrize("fault", ["endless", "bomb"])
def test_an_index_without_an_end_is_given_up_at_the_size_that_an_index_can_have(
    server: WebServer, monkeypatch: pytest.MonkeyPatch, name: str, fault: str
) -> None:
    monkeypatch.setattr(remote, "_MAX_INDEX_BYTES", 1_000_000)
    server.faults[name] = [fault] * 9
    make_bomb()  # before memory is measured: the server of the test is in this process
    tracemalloc.start()
    with pytest.raises(RunError, match=rf"/{name}: has more than 1,000,000 bytes, as no index has; check the URL"):
        read_all(open_dataset(server.url))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert server.requests[name] == 1
    assert server.sent[name] < 20_000_000  # what the sockets hold
    assert peak < 30_000_000


@pytest.mark.parametrize("name", [TAR, FEATURES])
def test_a_file_without_an_end_is_read_up_to_the_size_that_the_index_names(
    server: WebServer, toy_shards: Path, name: str
) -> None:
    server.faults[name] = ["endless"] * 9
    assert read_all(open_dataset(server.url)) == read_all(open_dataset(toy_shards))
    assert server.requests[name] == 1
    assert server.sent[name] < 20_000_000


def test_a_file_that_inflates_is_read_up_to_the_size_that_the_index_names(server: WebServer, tmp_path: Path) -> None:
    server.faults[TAR] = ["bomb"] * 9
    with pytest.raises(RunError, match=rf"/{TAR}: came twice with sha256"):
        read_all(open_dataset(server.url))
    assert all(path.stat().st_size < 1_000_000 for path in (tmp_path / "cache").rglob("*"))


def test_a_server_that_compresses_unasked_is_understood(server: WebServer, toy_shards: Path) -> None:
    server.faults = {name: ["gzip"] for name in (JSON, MANIFEST, INDEX)}
    assert read_all(open_dataset(server.url)) == read_all(open_dataset(toy_shards))


# ---- secrets -----------------------------------------------------------------------------------------------------


def with_secrets(server: WebServer) -> str:
    server.user, server.query = USER, QUERY
    return server.url.replace("://", f"://{USER}@") + f"?{QUERY}"


def assert_no_secret(*texts: str | bytes) -> None:
    for text in texts:
        content = text.encode() if isinstance(text, str) else text
        assert not [secret for secret in SECRETS if secret in content], content


def test_no_secret_of_an_address_is_printed_or_stored_and_a_run_goes_on_with_the_address_given_anew(
    server: WebServer, toy_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address, folder = with_secrets(server), tmp_path / "run"
    command = training([sys.executable], Path("x"), folder)
    command[command.index("data.shards=x")] = f"data.shards={address}"
    server.faults = {JSON: ["503"]}
    for _ in range(2):
        done = run([*command, "train.stop_after_steps=1"])
        assert done.returncode == 0, done.stderr
        assert_no_secret(done.stdout, done.stderr)
        assert "without its password or signed query; give data.shards=URL again" in done.stdout
    assert "trying again" not in done.stderr
    assert "going on from step 1" in done.stdout
    kept = load_config(folder / "config.yaml")
    assert str(kept.data.shards) == server.url.replace("://", "://***@") + "?sig=***&se=***"
    with pytest.raises(UserError, match=r"stored without its password .* data\.shards=URL in training, --shards URL"):
        open_dataset(kept.data.shards)
    page.main([str(folder)])
    load(folder, "random:0").save_pretrained(tmp_path / "published")
    scores = ["--checkpoint", str(folder), "--json", str(tmp_path / "scores.json")]
    assert evaluate.main([*scores, "--shards", address]) == 0
    said = capsys.readouterr()
    assert_no_secret(said.out, said.err)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 20
    for path in written:
        assert_no_secret(path.read_bytes(), str(path))


def test_retries_and_refusals_hide_the_secrets(server: WebServer, capsys: pytest.CaptureFixture[str]) -> None:
    address = with_secrets(server)
    server.faults = {JSON: ["503"] * 99}
    with pytest.raises(RunError) as refused:
        open_dataset(address)
    server.faults = {JSON: ["403"] * 99}
    with pytest.raises(RunError) as forbidden:
        open_dataset(address)
    server.faults = {JSON: ["404"] * 99}
    with pytest.raises(UserError) as missing:
        open_dataset(address)
    server.faults = {}
    with pytest.raises(UserError) as no_cache:
        open_cache(open_dataset(address), "relu5_2", 64)
    with pytest.raises(RunError) as no_server:
        open_dataset(f"http://{USER}@127.0.0.1:9/shards?{QUERY}")
    said = capsys.readouterr().err
    assert "trying again" in said
    messages = [str(raised.value) for raised in (refused, forbidden, missing, no_cache, no_server)]
    assert_no_secret(said, *messages)
    assert all("http://***@127.0.0.1:" in message for message in messages)


def test_a_password_may_stay_in_the_users_netrc(
    server: WebServer, toy_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.user = USER
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login {NAME} password {PASSWORD}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert read_all(open_dataset(server.url)) == read_all(open_dataset(toy_shards))


def test_an_address_whose_user_changes_keeps_its_copies(server: WebServer) -> None:
    def copy(url: str) -> Path:
        return remote.RemoteFolder.of(url).copy

    assert copy("https://a:word@host/horse") == copy("https://host/horse/")
    assert copy("https://host/horse?set=1") != copy("https://host/horse?set=2")
    assert "word" not in str(copy("https://host/a?sig=word"))


# ---- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "a//x", "", ".", "..", "a/.x", "a\\x", "a\0", "a\nb", "~"])
def test_nothing_is_fetched_under_a_name_that_may_lead_out_of_the_folder(server: WebServer, name: str) -> None:
    folder = remote.RemoteFolder.of(server.url)
    with pytest.raises(UserError, match="is no name of a file of a data set"):
        folder.fetch_anew(name)
    with pytest.raises(UserError, match="is no name of a file of a data set"), folder.opened(name, "", 1):
        pass
    assert not server.requests
