import os
import textwrap
from pathlib import Path

import pytest
import torch
from commands import PYTHON, ROOT, metrics, python, run, sabotaged, train, training

from slotscops.train.run.checkpoint import State, list_checkpoints, load_checkpoint
from slotscops.train.run.folder import resolve_checkpoint
from slotscops.train.run.writer import CheckpointWriter


def state_of(step: int) -> State:
    return State(step, step * 4, {"seed": 0}, "shards", "features", "random:0", "")


def tensors_of(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {name: {"weight": torch.full((4, 3), float(step))} for name in ("model", "optimizer", "rng", "ema")}


# Dies by SIGKILL right before the n-th time that the writing of a checkpoint touches the file system.
KILLED_WHILE_WRITING = textwrap.dedent(
    """
    import os, signal, sys
    from pathlib import Path
    sys.path[:0] = sys.argv[1].split(os.pathsep)
    from test_writer import state_of, tensors_of
    from slotscops.train.run.checkpoint import save_checkpoint

    folder, step = Path(sys.argv[2]), int(sys.argv[3])
    for number in range(1000):
        child = os.fork()
        if child == 0:
            seen = 0
            def count(event, arguments):
                global seen
                touches = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "shutil.rmtree")
                if touches or (event == "open" and str(folder) in str(arguments[0])):
                    if seen == number:
                        os.kill(os.getpid(), signal.SIGKILL)
                    seen += 1
            sys.addaudithook(count)
            save_checkpoint(folder / str(number), tensors_of(step), state_of(step), keep=1, best_step=2)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            print(number)
            break
    """
)


@pytest.mark.parametrize("step", [3, 2], ids=["a new step", "the same step again"])
def test_killed_at_whatever_write_an_earlier_or_the_new_checkpoint_is_whole(tmp_path: Path, step: int) -> None:
    for number in range(60):  # a folder for each moment, with checkpoints 1 and 2 in it
        for earlier in (1, 2):
            with CheckpointWriter(tmp_path / str(number), keep=2) as writer:
                writer.save(tensors_of(earlier), state_of(earlier))
    places = os.pathsep.join([str(Path(__file__).parent), str(ROOT / "tests" / "helpers")])
    (tmp_path / "killed.py").write_text(KILLED_WHILE_WRITING)
    done = python(tmp_path / "killed.py", places, tmp_path, str(step))
    assert done.returncode == 0, done.stderr
    num_moments = int(done.stdout)
    assert 20 < num_moments < 60
    for number in range(num_moments + 1):
        found = resolve_checkpoint(tmp_path / str(number))
        content = load_checkpoint(found)
        assert content.state.step in (1, 2, 3)
        assert all(
            torch.equal(group["weight"], torch.full((4, 3), float(content.state.step)))
            for group in (content.model, content.optimizer, content.rng)
        )
        with CheckpointWriter(tmp_path / str(number), keep=2) as writer:  # what was left half-done is no obstacle
            writer.save(tensors_of(4), state_of(4))
        assert load_checkpoint(resolve_checkpoint(tmp_path / str(number))).state.step == 4
        assert not [path for path in (tmp_path / str(number)).iterdir() if ".partial" in path.name]


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, keep=2) as writer:
        for step, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 2)):
            writer.save(tensors_of(step), state_of(step), best_step=best)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-2", "step-4", "step-5"]
    assert load_checkpoint(resolve_checkpoint(tmp_path / "best")).state.step == 2


def test_what_is_saved_is_the_tensors_as_they_were_when_asked(tmp_path: Path) -> None:
    tensors = tensors_of(1)
    with CheckpointWriter(tmp_path, keep=1) as writer:
        writer.save(tensors, state_of(1))
        for group in tensors.values():
            group["weight"].zero_()  # training goes on
    assert torch.equal(load_checkpoint(tmp_path / "step-1").model["weight"], torch.ones(4, 3))


def test_a_full_disk_costs_the_checkpoint_but_not_the_run(
    toy_shards: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert train(PYTHON, toy_shards, tmp_path, "train.stop_after_steps=1").returncode == 0
    # The kernel refuses files beyond 64 KB, as a full disk would; the model is larger.
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))\n"
    script = sabotaged(tmp_path_factory.mktemp("limited"), "pass")
    script.write_text(limit + script.read_text())
    done = run(training(PYTHON, toy_shards, tmp_path, "train.save_every_steps=2", script=script))
    assert done.returncode == 1
    assert done.stderr.count("could not be written") >= 2
    assert "training goes on" in done.stderr
    assert "the run ended without its last checkpoint: make room, start again" in done.stderr
    assert resolve_checkpoint(tmp_path).name == "step-1"
    done = train(PYTHON, toy_shards, tmp_path)
    assert done.returncode == 0
    assert resolve_checkpoint(tmp_path).name == "step-6"


def test_the_best_evaluation_of_a_run_keeps_its_checkpoint(toy_shards: Path, tmp_path: Path) -> None:
    settings = ("train.eval_every_steps=1", "train.keep_checkpoints=1", "train.save_every_steps=100")
    assert train(PYTHON, toy_shards, tmp_path, *settings, "train.ema_decay=0.5").returncode == 0
    scores = {row["step"]: row["val_nmi"] for row in metrics(tmp_path)}
    best = load_checkpoint(resolve_checkpoint(tmp_path / "checkpoints" / "best"))
    assert best.state.step == max(scores, key=lambda step: (scores[step], -step))
    assert best.state.best == {"score": "nmi", "value": scores[best.state.step], "step": best.state.step}
    assert best.ema is not None
    assert resolve_checkpoint(tmp_path).name == "step-6"
