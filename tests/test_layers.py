"""The data's way is the folder's way: a module imports only from rows above its own."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "slotscops"
ROWS = [
    ["errors"],
    ["files"],
    ["config"],
    ["console"],
    ["work", "records", "images", "remote", "machine"],
    [
        "losses",
        "regularisers",
        "contrast",
        "refine",
        "warp",
        "schedule",
        "metrics",
        "plan",
        "stopwatch",
        "visualise",
        "literature",
        "monitors",
    ],
    ["averaging", "finite", "interruption", "reduction"],
    ["protocols"],
    ["landmarks", "scoreboard"],
    ["weights"],
    ["model.encoder", "model.slots", "model.target"],
    ["model.decoder"],
    ["model"],
    ["objective"],
    ["crops", "matlab", "pascal_classes"],
    ["archives"],
    ["pascal_tree"],
    ["pascal_part"],
    ["sources", "photo_folder"],
    ["toy_anatomy"],
    ["toy_animals", "toy_scene"],
    ["toy"],
    ["teacher"],
    ["index", "feature_manifest"],
    ["shard_reader"],
    ["shard_writer"],
    ["feature_shard"],
    ["feature_writer"],
    ["features"],
    ["inspect_shards"],
    ["verify"],
    ["shard"],
    ["loader"],
    ["checkpoint"],
    ["run_folder"],
    ["published", "damage", "report", "trackers"],
    ["build"],
    ["clusters", "snapshot"],
    ["baselines"],
    ["supervised", "evaluate_options"],
    ["startup", "failures", "checkpoint_writer"],
    ["evaluate"],
    ["trainer"],
    ["fit"],
    ["photos", "gallery", "hub"],
    ["segmenter"],
    ["segment", "export"],
    ["benchmark", "benchmark.measure"],
    ["benchmark.start", "benchmark.contestants"],
    ["benchmark.loss", "benchmark.loader", "benchmark.scaling", "benchmark.sharding", "benchmark.report"],
    ["benchmark.step"],
    ["benchmark.__main__"],
    ["__init__"],
]
ROW_OF = {module: number for number, row in enumerate(ROWS) for module in row}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> set[str]:
    """Modules of the package that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute here"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("slotscops.") for name in found} & set(ROW_OF)


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_module_imports_only_from_rows_above_it(path: Path) -> None:
    name = module_name(path)
    assert name in ROW_OF, f"give {name} a row in this test and in the README"
    for imported in imported_modules(path):
        assert ROW_OF[imported] < ROW_OF[name], f"{name} imports {imported}, which is not above it"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_file_is_much_over_300_lines_and_no_function_needs_scrolling(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 320
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.end_lineno:
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"
