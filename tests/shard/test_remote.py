"""Shards behind a URL, with real servers on loopback."""

import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from commands import TWO_PROCESSES, metrics, python, run, training
from forks import ranks
from servers import WebServer, nginx, nginx_program, s3_server, web_server

from slotscops.core import transfer
from slotscops.core.errors import RunError, UserError
from slotscops.core.files import sha256_of_file
from slotscops.features.__main__ import main as features_main
from slotscops.features.cache import open_cache, open_features
from slotscops.loader.batches import training_batches
from slotscops.loader.plan import TrainingPlan
from slotscops.loader.split import Split
from slotscops.shard import __main__ as shard
from slotscops.shard import remote
from slotscops.shard.index import ShardDataset, open_dataset
from slotscops.shard.overview import inspect_shards

TAR = "train-000000.tar"
INDEX = "index/train-000000.safetensors"
FEATURES = "features/vgg19-relu5_4-64/train-000000.safetensors"


@pytest.fixture
def server(toy_shards: Path) -> Iterator[WebServer]:
    with web_server(toy_shards) as server:
        yield server


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache for the test alone, and no pauses between tries."""
    monkeypatch.setenv("SLOTSCOPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(transfer, "PAUSES", (0.0,) * 3)
    return tmp_path / "cache"


def read_all(dataset: ShardDataset) -> list[bytes]:
    """Reads every crop and feature of the training split twice, in an order that jumps between shards."""
    split = Split(dataset, "train", open_cache(dataset, "relu5_4", 64), with_labels=True)
    numbers = np.random.default_rng(0).permutation(len(split)).tolist() * 2
    batches = [split.read(np.array([number])) for number in numbers]
    return [b.images.numpy().tobytes() + b.features.numpy().tobytes() + b.keys[0].encode() for b in batches]


def cached(cache: Path) -> list[str]:
    """Names of the files in the cache, without its locks and partial files."""
    names = (path.name for path in cache.rglob("*") if path.is_file())
    return sorted(name for name in names if name != ".bytes" and not name.endswith(".lock"))


def num_bytes(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.rglob("*") if path.is_file() and path.suffix != ".json")


# ---- over HTTP ---------------------------------------------------------------------------------------------------


def test_what_is_read_is_what_the_folder_gives_and_each_file_comes_once(server: WebServer, toy_shards: Path) -> None:
    expected = read_all(open_dataset(toy_shards))
    assert read_all(open_dataset(server.url)) == expected
    assert read_all(open_dataset(server.url + "/")) == expected
    files = {name: path for path in toy_shards.rglob("*") if (name := str(path.relative_to(toy_shards))) in server.sent}
    assert len([name for name in files if name.startswith("train-") and name.endswith(".tar")]) == 4
    for name, path in files.items():
        times = 2 if name.endswith(".json") else 1  # each start asks anew what the data set is
        assert server.sent[name] == path.stat().st_size * times, name


@pytest.mark.parametrize("name", [TAR, INDEX, FEATURES, "index/dataset.json"])
@pytest.mark.parametrize("fault", ["drop", "503"])
def test_what_breaks_is_tried_again(
    server: WebServer, toy_shards: Path, name: str, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.faults[name] = [fault, fault]
    assert read_all(open_dataset(server.url)) == read_all(open_dataset(toy_shards))
    assert not server.faults[name]
    assert f"{server.url}/{name}: " in capsys.readouterr().err.replace("\n", " ").replace("  ", " ")


def test_a_broken_transfer_goes_on_where_it_was(
    server: WebServer, toy_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "MOST_AT_ONCE", 4096)
    monkeypatch.setattr(remote, "LEAST_AT_ONCE", 1024)
    server.faults[TAR] = ["", "", "drop", "", "503", "short"]
    with open_dataset(server.url).opened(TAR, sha256_of_file(toy_shards / TAR), (toy_shards / TAR).stat().st_size) as p:
        assert p.read_bytes() == (toy_shards / TAR).read_bytes()
    assert server.sent[TAR] <= (toy_shards / TAR).stat().st_size + 4096


def test_a_process_killed_while_fetching_leaves_what_came(
    server: WebServer, toy_shards: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setattr(remote, "MOST_AT_ONCE", 4096)
    monkeypatch.setattr(transfer, "PAUSES", ())
    server.faults[TAR] = ["", "", "503"]
    size, sha256 = (toy_shards / TAR).stat().st_size, sha256_of_file(toy_shards / TAR)
    with pytest.raises(RunError, match="tried 1 times"), open_dataset(server.url).opened(TAR, sha256, size):
        pass
    assert f".{TAR}.{size}.partial" in cached(cache)
    with open_dataset(server.url).opened(TAR, sha256, size) as path:
        assert path.read_bytes() == (toy_shards / TAR).read_bytes()
    assert server.sent[TAR] == size
    assert cached(cache) == ["dataset.json", TAR]


def test_a_server_that_knows_no_ranges_is_good_enough(
    server: WebServer, toy_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "MOST_AT_ONCE", 4096)
    server.faults = {name: ["whole"] * 9 for name in (TAR, FEATURES, INDEX)}
    assert read_all(open_dataset(server.url)) == read_all(open_dataset(toy_shards))


@pytest.mark.parametrize("name", [TAR, INDEX, FEATURES])
def test_what_came_wrong_comes_once_more_and_is_refused_then(server: WebServer, toy_shards: Path, name: str) -> None:
    server.faults[name] = ["flip"]
    assert read_all(open_dataset(server.url)) == read_all(open_dataset(toy_shards))
    with web_server(toy_shards) as other:
        other.faults[name] = ["flip"] * 9
        with pytest.raises(RunError, match=rf"/{name}: came twice with sha256 \w+, needed \w+; upload"):
            read_all(open_dataset(other.url))


@pytest.mark.parametrize("name", [TAR, INDEX, FEATURES])
def test_giving_up_says_which_file_why_and_what_to_do(server: WebServer, name: str) -> None:
    server.faults[name] = ["503"] * 99
    with pytest.raises(RunError, match=rf"/{name}: cannot be fetched, tried 4 times .*503.*; check the network"):
        read_all(open_dataset(server.url))
    server.faults[name] = ["403"] * 99
    before = server.requests[name]
    with pytest.raises(RunError, match=rf"/{name}: cannot be fetched .*403.*; check the URL and your credentials"):
        read_all(open_dataset(server.url))
    assert server.requests[name] == before + 1  # no use in trying again
    server.faults[name] = ["404"] * 99
    with pytest.raises(RunError, match=rf"/{name}: is not there; upload the shards again"):
        read_all(open_dataset(server.url))


def test_no_data_set_no_server_and_no_such_cache_are_the_users_to_mend(server: WebServer) -> None:
    with pytest.raises(UserError, match=r"/elsewhere/index/dataset.json: is not there; upload a whole folder"):
        open_dataset(f"{server.url}/elsewhere")
    with pytest.raises(RunError, match="tried 4 times"):
        open_dataset("http://127.0.0.1:9/shards")
    with pytest.raises(UserError, match="give a path, https:// or s3://"):
        open_dataset("gopher://host/shards")
    with pytest.raises(UserError, match=r"needs features vgg19-relu5_2-64, has no finished .* --shards http://127"):
        open_cache(open_dataset(server.url), "relu5_2", 64)


@pytest.mark.parametrize("url", ["ftp://host/shards", "zip://shards.zip", "zip://shards::https://host/all.zip"])
def test_kinds_of_addresses_that_are_not_supported_are_refused_with_those_that_are(url: str) -> None:
    with pytest.raises(UserError, match=r"is not supported; .* https://, s3:// or gs://"):
        open_dataset(url)


def test_a_login_page_in_place_of_an_index_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "dataset.json").write_text("\n<!DOCTYPE html><html><form action=login>")
    with web_server(tmp_path) as server, pytest.raises(UserError, match=r"a web page came, perhaps to log in"):
        open_dataset(server.url)


def test_a_slow_server_is_said_to_be_waited_for(
    server: WebServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = WebServer.answer
    monkeypatch.setattr(transfer, "SAY_AFTER_S", 0.05)
    monkeypatch.setattr(WebServer, "answer", lambda self, handler: (time.sleep(0.3), plain(self, handler)))
    open_dataset(server.url)
    assert "/index/dataset.json: waiting for the server, 0 s so far\n" in capsys.readouterr().err


def test_a_url_is_not_written_to(server: WebServer, toy_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="are written to a folder"):
        shard.main(["--toy", "--out", f"{server.url}/new"])
    with pytest.raises(UserError, match="are written to a folder"):
        features_main(["--shards", server.url])
    with pytest.raises(UserError, match="verified when fetched"):
        shard.main(["--verify", server.url])
    with pytest.raises(UserError, match=r"--out FILE\.png"):
        inspect_shards(server.url)
    inspect_shards(server.url, tmp_path / "sheet.png")
    inspect_shards(toy_shards, tmp_path / "expected.png")
    assert (tmp_path / "sheet.png").read_bytes() == (tmp_path / "expected.png").read_bytes()


def test_features_are_opened_by_name(server: WebServer, toy_shards: Path) -> None:
    expected = open_features(toy_shards, "train-000000")[1]
    assert (open_features(server.url, "train-000000", "vgg19-relu5_4-64")[1] == expected).all()


def test_the_shards_of_a_batch_are_fetched_together(server: WebServer, cache: Path) -> None:
    dataset = open_dataset(server.url)
    split = Split(dataset, "train", open_cache(dataset, "relu5_4", 64), with_labels=False)
    split._fetch_together(np.array([0, 2]))
    names = [f"train-00000{number}.{kind}" for number in (0, 2) for kind in ("safetensors", "tar")]
    assert [name for name in cached(cache) if name.startswith("train")] == names


# ---- the cache's bound -------------------------------------------------------------------------------------------


def bounded(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setenv("SLOTSCOPS_CACHE_GB", f"{num_bytes / 1e9:.9f}")


def largest(toy_shards: Path) -> int:
    return max(path.stat().st_size for kind in ("tar", "safetensors") for path in toy_shards.rglob(f"*.{kind}"))


def test_the_cache_stays_within_its_bound_and_the_data_are_the_same(
    server: WebServer, toy_shards: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounded(monkeypatch, bound := largest(toy_shards) + 4000)
    expected = read_all(open_dataset(toy_shards))
    dataset = open_dataset(server.url)
    split = Split(dataset, "train", open_cache(dataset, "relu5_4", 64), with_labels=True)
    for number in range(len(split)):
        split.read(np.array([number]))
        assert num_bytes(cache) <= bound
        held = sum(os.fstat(reader._file).st_size for reader in split._readers._open.values() if reader.is_evicted)
        assert held <= bound  # of evicted files, what is still open
    assert read_all(dataset) == expected
    assert server.requests[TAR] > 1


def test_a_cache_with_room_is_looked_through_only_for_the_first_file(
    server: WebServer, toy_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    plain = remote._files_of

    def count(cache: Path, except_for: Path) -> Any:
        looks.append(except_for)
        return plain(cache, except_for)

    monkeypatch.setattr(remote, "_files_of", count)
    assert read_all(open_dataset(server.url)) == read_all(open_dataset(toy_shards))
    assert len(looks) == 1


def test_what_was_opened_last_stays(
    server: WebServer, toy_shards: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [(toy_shards / f"train-00000{number}.tar").stat().st_size for number in range(3)]
    bounded(monkeypatch, sum(sizes) - 1)
    dataset = open_dataset(server.url)
    entries = dataset.splits["train"]
    for place, number in enumerate((0, 1, 0, 2)):
        with dataset.opened(f"{entries[number].name}.tar", entries[number].sha256, sizes[number]) as path:
            if place < 2:
                os.utime(path, (place, place))  # long ago
    assert cached(cache) == ["dataset.json", "train-000000.tar", "train-000002.tar"]


def test_a_cache_that_cannot_hold_one_shard_or_cannot_be_written_is_refused(
    server: WebServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounded(monkeypatch, 1000)
    with pytest.raises(UserError, match=r"but the cache holds at most 1e-06; set SLOTSCOPS_CACHE_GB to more"):
        read_all(open_dataset(server.url))
    for wrong in ("0", "-1", "much", "nan", "inf"):
        monkeypatch.setenv("SLOTSCOPS_CACHE_GB", wrong)
        with pytest.raises(UserError, match=f"SLOTSCOPS_CACHE_GB is '{wrong}', needed"):
            open_dataset(server.url)
    monkeypatch.delenv("SLOTSCOPS_CACHE_GB")
    file = cache / "file"
    file.write_text("")
    monkeypatch.setenv("SLOTSCOPS_CACHE", str(file))
    with pytest.raises(UserError, match="set SLOTSCOPS_CACHE to a folder with room"):
        open_dataset(server.url)


def test_what_a_dead_process_left_half_fetched_gives_way(
    server: WebServer, toy_shards: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounded(monkeypatch, bound := largest(toy_shards) + 4000)
    dataset = open_dataset(server.url)
    left = dataset.folder / f".train-000001.tar.{bound - 10}.partial"
    left.write_bytes(b"some")
    os.utime(left, (0, 0))
    assert read_all(dataset) == read_all(open_dataset(toy_shards))
    assert not left.exists()


def test_many_at_once_share_one_cache_smaller_than_the_data(
    server: WebServer, toy_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = read_all(open_dataset(toy_shards))
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(read_all, open_dataset(server.url)) for _ in range(6)]
        assert all(one.result(60) == expected for one in asked)
    for name, sent in server.sent.items():
        if not name.endswith(".json"):
            assert sent == (toy_shards / name).stat().st_size, name
    bounded(monkeypatch, largest(toy_shards) + 4000)
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(read_all, open_dataset(server.url)) for _ in range(6)]
        assert all(one.result(60) == expected for one in asked)


def test_loader_workers_fetch_for_themselves(server: WebServer, toy_shards: Path) -> None:
    def keys(shards: str | Path) -> list[list[str]]:
        dataset = open_dataset(shards)
        split = Split(dataset, "train", open_cache(dataset, "relu5_4", 64), with_labels=False)
        plan = TrainingPlan(
            len(split), seed=0, batch_size=4, rank=0, num_ranks=1, accumulation_steps=1, samples_seen=0, last=24
        )
        return [batch.keys for batch in islice(training_batches(split, plan, 2, pin_memory=False), 6)]

    assert keys(server.url) == keys(toy_shards)


# ---- training ----------------------------------------------------------------------------------------------------


def losses(run_dir: Path) -> list[tuple[float, str]]:
    return [(row["loss"], row["batch_digest"]) for row in metrics(run_dir)]


def test_two_processes_train_from_a_server_that_drops_connections_with_a_cache_smaller_than_the_data(
    server: WebServer, toy_shards: Path, tmp_path: Path
) -> None:
    settings = ("data.num_workers=1", "train.eval_every_steps=3")
    local = run(training(ranks(2), toy_shards, tmp_path / "local", *settings))
    assert local.returncode == 0, local.stderr
    server.faults = {name: ["drop"] * 3 for name in (TAR, FEATURES, INDEX)}
    small = f"{(largest(toy_shards) * 2) / 1e9:.9f}"
    command = training(TWO_PROCESSES, server.url, tmp_path / "remote", *settings)
    far = run(command, SLOTSCOPS_CACHE=str(tmp_path / "cache"), SLOTSCOPS_CACHE_GB=small)
    assert far.returncode == 0, far.stderr
    assert "will be fetched again and again" in " ".join(far.stderr.split())
    assert losses(tmp_path / "remote") == losses(tmp_path / "local")


def test_a_server_that_goes_away_ends_the_run_in_one_line_and_it_goes_on_when_it_is_back(
    server: WebServer, toy_shards: Path, tmp_path: Path
) -> None:
    settings = ("train.save_every_steps=1", "train.total_steps=4")
    command = training([sys.executable], server.url, tmp_path / "run", *settings)
    server.faults = {f"train-00000{number}.tar": ["403"] * 99 for number in range(3)}
    gone = run(command)
    assert gone.returncode == 1
    assert "Traceback" not in gone.stderr
    assert "check the URL and your credentials" in " ".join(gone.stderr.split())
    server.faults = {}
    back = run(command)
    assert back.returncode == 0, back.stderr
    assert run(training([sys.executable], toy_shards, tmp_path / "local", *settings)).returncode == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "local")


# ---- other people's servers --------------------------------------------------------------------------------------


@pytest.mark.skipif(nginx_program() is None, reason="needs nginx")
def test_nginx(toy_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "nginx").mkdir()
    with nginx(toy_shards, tmp_path / "nginx") as url:
        assert read_all(open_dataset(url)) == read_all(open_dataset(toy_shards))


def test_s3_from_upload_to_scores(toy_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server() as endpoint:
        environment = {
            "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1", "SLOTSCOPS_CACHE": str(tmp_path / "cache"),
        }  # fmt: skip
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        files = fsspec.filesystem("s3", skip_instance_cache=True)
        files.mkdir("bucket")
        files.put(f"{toy_shards}/", "bucket/toy/", recursive=True)
        far = run(training(TWO_PROCESSES, "s3://bucket/toy", tmp_path / "far", "train.eval_every_steps=6"))
        assert far.returncode == 0, far.stderr
        near = run(training([sys.executable], toy_shards, tmp_path / "near", "train.eval_every_steps=6"))
        assert near.returncode == 0, near.stderr
        assert [digest for _, digest in losses(tmp_path / "far")] == [digest for _, digest in losses(tmp_path / "near")]
        scored = python("-m", "slotscops.evaluate", "--checkpoint", tmp_path / "far", "--shards", "s3://bucket/toy")
        assert scored.returncode == 0, scored.stderr
        assert "s3://bucket/toy" in scored.stdout
        missing = python("-m", "slotscops.evaluate", "--checkpoint", tmp_path / "far", "--shards", "s3://bucket/other")
        assert missing.returncode == 2
        assert "s3://bucket/other/index/dataset.json: is not there" in " ".join(missing.stderr.split())
