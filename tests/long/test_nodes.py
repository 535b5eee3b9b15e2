"""Several nodes on one machine. Each is a network namespace, and a bridge joins them (Linux, as root)."""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from commands import PYTHON, Running, last_step, metrics, orphans, process_ids, started, train, training, wait_for_step

RUN = ("train.batch_size=12", "train.timeout_minutes=0.15", "train.save_every_steps=2")


class Nodes:
    """Namespaces with the addresses 10.77.0.1, 10.77.0.2, ... on one bridge."""

    def __init__(self, count: int) -> None:
        self.names = [f"slotscops{os.getpid()}-{number}" for number in range(count)]
        self._switch = f"slotscops{os.getpid()}-switch"

    def open(self) -> None:
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "bridge", "up")
        for number, name in enumerate(self.names):
            _ip("netns", "add", name)
            _ip(
                "-n",
                name,
                "link",
                "add",
                "eth0",
                "type",
                "veth",
                "peer",
                "name",
                f"port{number}",
                "netns",
                self._switch,
            )
            _ip("-n", self._switch, "link", "set", f"port{number}", "master", "bridge", "up")
            _ip("-n", name, "address", "add", f"10.77.0.{number + 1}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                _ip("-n", name, "link", "set", device, "up")

    def cut(self, number: int) -> None:
        _ip("-n", self._switch, "link", "set", f"port{number}", "down")

    def mend(self, number: int) -> None:
        _ip("-n", self._switch, "link", "set", f"port{number}", "up")

    def close(self) -> None:
        for name in (*self.names, self._switch):
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", name)

    def launch(self, stack: ExitStack, kind: str, shards: Path, run_dir: Path, *settings: str) -> list[Running]:
        """Starts one launcher on each node, with one process each."""
        count = len(self.names)
        running = []
        for number, name in enumerate(self.names):
            if kind == "torchrun":
                launcher = ["torchrun", "--nnodes", f"{count}", "--nproc-per-node", "1", "--rdzv-backend", "c10d",
                            "--rdzv-endpoint", "10.77.0.1:29500", "--local-addr", f"10.77.0.{number + 1}",
                            "--rdzv-conf", f"is_host={number == 0}"]  # fmt: skip
            else:
                launcher = ["accelerate", "launch", "--multi_gpu", "--num_machines", f"{count}", "--num_processes",
                            f"{count}", "--machine_rank", f"{number}", "--main_process_ip", "10.77.0.1",
                            "--main_process_port", "29500", "--mixed_precision", "no",
                            "--dynamo_backend", "no"]  # fmt: skip
            command = ["ip", "netns", "exec", name, *training(launcher, shards, run_dir, *RUN, *settings)]
            environment = {"GLOO_SOCKET_IFNAME": "eth0", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "2"}
            running.append(stack.enter_context(started(command, **environment)))
        return running


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def wait_until_no_rank_runs(run_dir: Path) -> None:
    ends = time.monotonic() + 60
    while any("RANK" in variables for variables in process_ids(f"run_dir={run_dir}").values()):
        assert time.monotonic() < ends
        time.sleep(0.2)


@pytest.fixture(params=[("accelerate", 2), ("torchrun", 3)], ids=lambda param: f"{param[1]} nodes, {param[0]}")
def nodes(request: pytest.FixtureRequest) -> Iterator[tuple[str, Nodes]]:
    kind, count = request.param
    made = Nodes(count)
    try:
        made.open()
    except (OSError, subprocess.CalledProcessError) as error:
        made.close()
        pytest.skip(f"needs the right to make network namespaces ({error})")
    try:
        yield kind, made
    finally:
        made.close()


def test_nodes_train_together_and_a_cut_link_ends_the_run_and_a_relaunch_goes_on(
    toy_shards: Path, tmp_path: Path, nodes: tuple[str, Nodes]
) -> None:
    kind, made = nodes
    run_dir = tmp_path / "run"
    endless = ("train.total_steps=100000",)
    with ExitStack() as stack:
        running = made.launch(stack, kind, toy_shards, run_dir, *endless)
        wait_for_step(run_dir, 4, running[0])
        made.cut(len(running) - 1)
        assert running[0].wait(timeout=90) != 0
        wait_until_no_rank_runs(run_dir)
        said = "".join(node.said(node.err) for node in running)
        # The launcher of the node cut off waits five minutes more for the others; Slurm ends it (--kill-on-bad-exit).
    assert "slotscops: rank " in said
    assert "lost " in said
    assert orphans(run_dir) == []
    made.mend(len(made.names) - 1)
    reached = last_step(run_dir)
    with ExitStack() as stack:
        for node in made.launch(stack, kind, toy_shards, run_dir, *endless, "train.stop_after_steps=4"):
            assert node.wait(timeout=120) == 0, node.said(node.err)
    assert last_step(run_dir) >= reached - 2
    whole = tmp_path / "whole"
    few = (*RUN, *endless, f"train.stop_after_steps={last_step(run_dir)}")
    assert train(PYTHON, toy_shards, whole, *few).returncode == 0
    assert [row["batch_digest"] for row in metrics(run_dir)] == [row["batch_digest"] for row in metrics(whole)]
