"""The READMEs: short, with links that work, and a map that names the existing files."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README_BYTES = 8 * 1024
PICTURE_BYTES = 300 * 1000
TEXTS = [
    "README.md",
    "configs/README.md",
    "launch/README.md",
    "shards/README.md",
    "slotscops/README.md",
    "slotscops/segment/README.md",
]


def anchors(text: str) -> set[str]:
    """What a heading is called in a link, as GitHub names it."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_to_a_file_leads_to_it(name: str) -> None:
    path = ROOT / name
    links = re.findall(r"\]\(([^)]+)\)", path.read_text())
    for link in (link for link in links if "://" not in link):
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), f"{name} links to {link}"
        if anchor:
            assert anchor in anchors(target.read_text()), f"{name} links to {link}"


def test_the_readme_is_short_and_opens_with_a_picture() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= README_BYTES
    assert re.match(r"# slotscops\n\n!\[", text)


def test_pictures_are_small() -> None:
    pictures = list((ROOT / "configs" / "pictures").iterdir())
    assert pictures
    assert sum(picture.stat().st_size for picture in pictures) < PICTURE_BYTES


def test_the_map_of_rooms_names_the_rooms_that_exist_in_the_order_of_their_test() -> None:
    named = re.findall(r"^\| `([\w.]+?)/?` \|", (ROOT / "slotscops" / "README.md").read_text(), re.MULTILINE)
    rooms = {path.name for path in (ROOT / "slotscops").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert {*named} == rooms | {"config.py"}
    held = re.findall(r'^    "(\w+)",$', (ROOT / "tests" / "test_layers.py").read_text(), re.MULTILINE)
    assert [name.removesuffix(".py") for name in named] == held


def test_the_map_of_rooms_names_files_that_exist() -> None:
    rows = re.findall(
        r"^\| `(\w+)/` \| [^|]+ \| ([^|]+) \|$", (ROOT / "slotscops" / "README.md").read_text(), re.MULTILINE
    )
    assert len(rows) == 12
    for room, files in rows:
        for file in re.findall(r"`([\w/]+)`", files):
            place = ROOT / "slotscops" / room / file
            assert place.is_dir() or place.with_suffix(".py").is_file(), f"{room}/{file}"


def test_the_map_says_of_each_room_what_the_room_says_of_itself() -> None:
    rows = re.findall(r"^\| `(\w+)/` \| ([^|]+) \|", (ROOT / "slotscops" / "README.md").read_text(), re.MULTILINE)
    for room, sentence in rows:
        docstring = ast.get_docstring(ast.parse((ROOT / "slotscops" / room / "__init__.py").read_text()))
        assert docstring is not None
        assert " ".join(docstring.split("\n\n")[0].split()) == sentence
