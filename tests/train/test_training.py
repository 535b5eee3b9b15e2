import shutil
from pathlib import Path

import pytest
import yaml
from commands import ONE_PROCESS, PYTHON, TWO_PROCESSES, assert_same_tensors, metrics, run, train
from safetensors.torch import load_file

NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
LOGGED = {
    "step", "samples_seen", "loss", "loss_semantic", "lr_encoder", "lr_head", "lr_basis", "grad_norm",
    "images_per_second", "data_wait", "peak_memory_bytes", "batch_digest", "slot_share_0", "background_share",
    "dead_slots", "map_entropy", "basis_cosine", "zero_basis_rows", "damaged_samples",
}  # fmt: skip


@pytest.fixture(scope="module")
def whole_run(toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    done = train(PYTHON, toy_shards, folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_optimizer_state_has_the_names_of_the_saved_parameters(whole_run: Path) -> None:
    checkpoint = whole_run / "checkpoints" / "step-6"
    parameters = load_file(checkpoint / "model.safetensors").keys() - {"target.scale"}
    assert {name.rpartition("/")[0] for name in load_file(checkpoint / "optimizer.safetensors")} == parameters


def test_a_launched_run_leaves_everything_the_run_folder_promises(toy_shards: Path, tmp_path: Path) -> None:
    settings = ("encoder.name=resnet18", "encoder.weights=random:0", "train.eval_every_steps=2", "train.total_steps=2")
    done = train(ONE_PROCESS, toy_shards, tmp_path, *settings)
    assert done.returncode == 0, done.stderr
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2]
    assert set(rows[0]) >= LOGGED
    assert {"val_nmi", "val_ari", "val_fg_nmi", "val_fg_ari", "val_miou", "val_mask_nmi", "val_mask_ari"} <= set(
        rows[-1]
    )
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["encoder"]["name"] == "resnet18"
    assert (tmp_path / "pictures" / "step-2.png").stat().st_size > 1000
    assert list((tmp_path / "tensorboard").rglob("events.out.tfevents.*"))
    names = {path.name for path in (tmp_path / "checkpoints" / "step-2").iterdir()}
    wanted = {"model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "manifest.json"}
    assert names == wanted
    assert "UNTRAINED vgg19 (random:0)" in done.stderr


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_at_step_3_gives_the_same_step_6_as_never_stopping(
    toy_shards: Path, whole_run: Path, tmp_path: Path, num_workers: int
) -> None:
    workers = f"data.num_workers={num_workers}"
    assert train(PYTHON, toy_shards, tmp_path, "train.stop_after_steps=3", workers).returncode == 0
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3]
    done = train(PYTHON, toy_shards, tmp_path, workers)
    assert done.returncode == 0, done.stderr
    assert "going on from step 3" in done.stdout
    assert_same_tensors(tmp_path / "checkpoints" / "step-6", whole_run / "checkpoints" / "step-6")
    for mine, other in zip(metrics(tmp_path), metrics(whole_run), strict=True):
        assert (mine["loss"], mine["batch_digest"]) == (other["loss"], other["batch_digest"])


@pytest.mark.parametrize(
    "settings",
    [
        ("slots.init=shared_gaussian", "train.optimizer=sgd"),
        ("train.accumulation_steps=2", "train.mixed_precision=bf16"),
        (
            "encoder.name=resnet18",
            "encoder.weights=random:0",
            "train.batch_size=4",
            "losses.equivariance=1.0",
            "losses.landmark_equivariance=1.0",
            "train.ema_decay=0.9",
        ),
        (
            "slots.init=image_conditioned",
            "slots.gradient=bilevel",
            "teacher.transform=channel_standardised",
            "basis.init=kmeans",
            "losses.entropy=0.1",
            "losses.part_contrast=0.1",
            "losses.visual_consistency=0.1",
        ),
        pytest.param(
            (
                "train.compile=true",
                "train.mixed_precision=bf16",
                "losses.mixture=1",
                "losses.target_mask=object",
                "basis.kind=free",
                "decoder.places=facing",
            ),
            marks=NEEDS_COMPILER,
        ),
    ],
    ids=["random slots, sgd", "accumulation, bf16", "resnet, warps, averaged weights", "full objective", "compiled"],
)
def test_resuming_is_exact_with(toy_shards: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    few = (*settings, "train.total_steps=4")
    assert train(PYTHON, toy_shards, tmp_path / "whole", *few).returncode == 0
    for _ in range(2):
        done = train(PYTHON, toy_shards, tmp_path / "parts", *few, "train.stop_after_steps=2")
        assert done.returncode == 0, done.stderr
    assert_same_tensors(*(tmp_path / name / "checkpoints" / "step-4" for name in ("whole", "parts")))


def test_a_crash_between_checkpoints_leaves_no_step_logged_twice(
    toy_shards: Path, whole_run: Path, tmp_path: Path
) -> None:
    assert train(PYTHON, toy_shards, tmp_path, "train.stop_after_steps=3").returncode == 0
    with (tmp_path / "metrics.jsonl").open("a") as file:  # logged after the last checkpoint, then cut off
        file.write('{"step": 4, "loss": 0.0}\n{"step": 5, "lo')
    assert train(PYTHON, toy_shards, tmp_path).returncode == 0
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert metrics(tmp_path)[3]["loss"] == metrics(whole_run)[3]["loss"]


def test_two_processes_see_the_batches_of_one_and_start_from_the_same_loss(
    toy_shards: Path, whole_run: Path, tmp_path: Path
) -> None:
    done = train(TWO_PROCESSES, toy_shards, tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = metrics(whole_run), metrics(tmp_path)
    assert [row["batch_digest"] for row in one] == [row["batch_digest"] for row in two]
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-6)
    assert two[-1]["loss"] == pytest.approx(one[-1]["loss"], rel=1e-3)
    rng = load_file(tmp_path / "checkpoints" / "step-6" / "rng.safetensors")
    assert set(rng) == {"cpu/0", "cpu/1"}


def test_accumulating_two_halves_is_the_step_of_the_whole_batch(
    toy_shards: Path, whole_run: Path, tmp_path: Path
) -> None:
    assert train(PYTHON, toy_shards, tmp_path, "train.accumulation_steps=2").returncode == 0
    for mine, other in zip(metrics(tmp_path), metrics(whole_run), strict=True):
        assert mine["batch_digest"] == other["batch_digest"]
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-2)


@pytest.mark.parametrize(
    "flags",
    [["--cpu", "--num_processes", "2", "--num_machines", "1"], ["--multi_gpu", "--num_processes", "2"]],
    ids=["--cpu starts one process", "--multi_gpu without GPUs starts two lone ones"],
)
def test_a_world_size_that_the_launcher_did_not_deliver_is_refused(
    toy_shards: Path, tmp_path: Path, flags: list[str]
) -> None:
    more = ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = ["accelerate", "launch", *flags, *more, "launch/train.py"]
    done = run([*command, f"data.shards={toy_shards}", f"run_dir={tmp_path / 'run'}"], ACCELERATE_USE_CPU="false")
    assert done.returncode != 0
    assert done.stderr.count("slotscops: the launcher") == 1
    assert "accelerate launch --multi_gpu" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_a_run_costs_and_writes_nothing(toy_shards: Path, tmp_path: Path) -> None:
    done = train(PYTHON, toy_shards, tmp_path / "run", "--dry-run", "train.total_steps=1000")
    assert done.returncode == 0, done.stderr
    assert "for 1000 steps on 1 process(es) of cpu" in done.stdout
    assert not (tmp_path / "run").exists()


def test_the_printed_settings_are_the_ones_a_run_would_have(toy_shards: Path, tmp_path: Path) -> None:
    done = train(PYTHON, toy_shards, tmp_path / "run", "--print-config")
    assert done.returncode == 0
    assert yaml.safe_load(done.stdout)["train"]["total_steps"] == 6
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_refused_in_one_line(toy_shards: Path) -> None:
    done = train(PYTHON, toy_shards, Path("/proc/run"))  # read-only even for root
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("slotscops: /proc/run: cannot be written")
    assert "choose another folder with run_dir=DIR" in " ".join(done.stderr.split())


def test_a_loss_that_is_not_finite_ends_the_run_with_the_step_and_keeps_the_checkpoint_before(
    toy_shards: Path, tmp_path: Path
) -> None:
    assert train(PYTHON, toy_shards, tmp_path, "train.stop_after_steps=2").returncode == 0
    done = train(PYTHON, toy_shards, tmp_path, "train.learning_rate=1e38", "train.clip_norm=0")
    assert done.returncode == 1
    assert "slotscops: after step 4: the loss of rank 0 has not been finite since step 4" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-2"]


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        ("train: {learning_rate: 2e-4}", "write 2.0e-4"),
        ("train: {total_step: 3}", "did you mean 'train.total_steps'"),
        ("train: {total_steps: many}", "valid integer"),
        ("data: {shards: nowhere}", "python -m slotscops.shard"),
    ],
)
def test_a_mistaken_config_ends_in_one_line_and_code_2(tmp_path: Path, text: str, needed: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    done = run([*PYTHON, "launch/train.py", "--config", str(tmp_path / "run.yaml"), f"run_dir={tmp_path / 'run'}"])
    assert done.returncode == 2
    assert done.stderr.startswith("slotscops: ")
    assert len(done.stderr.splitlines()) == 1
    assert needed in done.stderr
    assert not (tmp_path / "run").exists()


def test_going_on_with_settings_of_another_model_is_refused_by_name(toy_shards: Path, tmp_path: Path) -> None:
    assert train(PYTHON, toy_shards, tmp_path, "train.stop_after_steps=1").returncode == 0
    done = train(PYTHON, toy_shards, tmp_path, "slots.num_parts=3")
    assert done.returncode == 2
    assert "another slots.num_parts" in done.stderr


@pytest.mark.parametrize("maps", ["head", "attention"])
def test_a_basis_from_k_means_starts_far_below_a_random_one(toy_shards: Path, tmp_path: Path, maps: str) -> None:
    for init in ("kmeans", "random"):
        few = (f"basis.init={init}", f"decoder.maps={maps}", "train.stop_after_steps=1")
        assert train(PYTHON, toy_shards, tmp_path / init, *few).returncode == 0
    losses = {init: metrics(tmp_path / init)[0]["loss"] for init in ("kmeans", "random")}
    assert losses["kmeans"] < 0.8 * losses["random"]


def test_a_run_that_decides_nothing_is_told_the_likely_cause_and_the_setting_once(
    toy_shards: Path, tmp_path: Path
) -> None:
    stays = ("slots.init=shared_gaussian", "train.learning_rate=0.0", "train.batch_size=2", "train.total_steps=102")
    done = train(PYTHON, toy_shards, tmp_path, *stays)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("WARNING: step") == 1
    assert "WARNING: step 100: all slots share every cell about equally" in done.stderr
    assert "slots.init=learned" in done.stderr
    assert all(row["map_entropy"] > 0.98 for row in metrics(tmp_path)[-3:])
