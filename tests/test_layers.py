"""The rooms of the package, in the order in which data passes through them: a room imports only from rooms above it."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "slotscops"
# One row for each room, as in slotscops/README.md. A file beside the rooms is a room of its own.
ROOMS = [
    "core",
    "config",
    "datasets",
    "shard",
    "features",
    "loader",
    "model",
    "losses",
    "metrics",
    "train",
    "segment",
    "evaluate",
    "benchmark",
]
# Files that only start a command or hand out a name: they may import anything.
DOORS = {"__init__", "__main__", "app", "export", "report"}
MODULE_IN_TEXT = re.compile(r"slotscops((?:\.\w+)+)")


def is_door(path: Path) -> bool:
    return path.name == "__main__.py" or (path.parent == PACKAGE and path.stem in DOORS)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def modules() -> set[str]:
    """Every module and package, dotted, without `slotscops.` before it."""
    names = set()
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names |= {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
    return names


def imported_names(tree: ast.AST) -> set[str]:
    """What a file imports, wherever in the file, without `slotscops.` before it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports are absolute here"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("slotscops.") for name in found if name.startswith("slotscops.")}


def named_in_strings(tree: ast.AST) -> set[str]:
    """Modules named in strings that start them: a preload, or what follows `-m` in a list of arguments."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            match = MODULE_IN_TEXT.fullmatch(node.value)
            found |= {match.group(1)[1:]} if match else set()
    return found & modules()


FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", [path for path in FILES if not is_door(path)], ids=name_of)
def test_a_room_imports_only_from_rooms_above_it(path: Path) -> None:
    room = room_of(path)
    assert room in ROOMS, f"give {room} a row in this test and in slotscops/README.md"
    tree = ast.parse(path.read_text())
    for name in imported_names(tree) | named_in_strings(tree):
        other = name.split(".")[0]
        if other in ROOMS:
            assert ROOMS.index(other) <= ROOMS.index(room), f"{name_of(path)} names {name}, a room below its own"


def test_a_module_named_in_a_string_is_seen() -> None:
    tree = ast.parse('context.set_forkserver_preload(["slotscops.shard.writer"])')
    assert named_in_strings(tree) == {"shard.writer"}
    assert not named_in_strings(ast.parse('say("python -m slotscops.shard --root DIR")'))


def test_the_package_has_few_entries_at_its_top() -> None:
    entries = [path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 20, entries


def test_every_folder_of_tests_is_a_room() -> None:
    tests = Path(__file__).parent
    folders = {path.name for path in tests.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= {*ROOMS, "helpers", "long"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_function_needs_scrolling(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.end_lineno:
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"
