import json
from pathlib import Path

from commands import metrics
from scripts import run_script

from slotscops.datasets.toy import tree as toy

SMALL = (
    "data.num_workers=0", "train.batch_size=4", "train.total_steps=4", "train.save_every_steps=2",
    "train.log_every_steps=1", "train.eval_every_steps=2", "data.size=48", "teacher.size=64",
)  # fmt: skip
TRAIN = 2  # its number among the script's commands


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_the_benchmark_script_continues_after_a_kill_and_ends_with_a_page(tmp_path: Path) -> None:
    toy.write_tree(tmp_path / "tree", num_train=5, num_val=2, seed=4)
    out = tmp_path / "out"

    def start(name: str, *settings: str, killed: int = -1) -> int:
        (tmp_path / name).mkdir()
        done = run_script(
            "pascal_part.sh", tmp_path / "tree", *SMALL, *settings, folder=tmp_path / name, killed=killed,
            OUT=str(out), CLASSES="cow", TEACHER_WEIGHTS="random:0",
        )  # fmt: skip
        assert killed >= 0 or done.returncode == 0, done.stdout + done.stderr
        return done.returncode

    assert start("first", "train.stop_after_steps=2", killed=TRAIN) == 137
    run, shards = out / "cow", files(out / "shards")
    assert not (run / "scores.json").exists()
    half = (run / "metrics.jsonl").read_text()
    start("second")
    assert files(out / "shards") == shards
    assert (run / "metrics.jsonl").read_text().startswith(half)
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4]
    methods = json.loads((run / "scores.json").read_text())["methods"]
    assert [method["kind"] for method in methods] == ["run", *["baseline"] * 3]
    assert all(0 <= method["scores"]["photo"]["small"]["cow"]["nmi"] < 1 for method in methods)
    check_page(out, run)


def check_page(out: Path, run: Path) -> None:
    page = (out / "index.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 1
    for needed in ("Whole photo, own background", "Choudhury et al., published", 'href="cow/report.html"'):
        assert needed in page
    costs = [json.loads(line) for line in (run / "cost.jsonl").read_text().splitlines()]
    assert [cost["stage"] for cost in costs] == ["shard", "features", "train", "train", "evaluate"]
    (row,) = [line for line in page.splitlines() if "CPU " in line and ">cow<" in line]
    assert f"<td>{sum(cost['seconds'] for cost in costs):,.0f}</td>" in row
