"""The READMEs: short, with links that work, and a map that names the existing files."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
README_BYTES = 8 * 1024
PICTURE_BYTES = 300 * 1000
TEXTS = [
    "README.md",
    "CONTRIBUTING.md",
    "configs/README.md",
    "launch/README.md",
    "shards/README.md",
    "slotscops/README.md",
    "slotscops/segment/README.md",
]
# Longer texts lie as a README in the folder that they are about.
TOP = {"slotscops", "launch", "shards", "configs", "tests", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"}
TOP |= {"CITATION.cff", "CONTRIBUTING.md", ".ci", ".github", ".gitignore"}


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


def test_the_top_level_stays_small() -> None:
    """What git follows; in an unpacked source without git, whatever is not hidden and not built."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert {name.partition("/")[0] for name in listed.splitlines()} <= TOP


def test_the_citation_has_the_fields_that_the_format_requires_and_fits_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (citation["version"], citation["license"]) == (package["version"], package["license"])
    for reference in [citation, *citation["references"]]:
        assert reference["title"]
        assert all({*author} in ({"name"}, {"family-names", "given-names"}) for author in reference["authors"])
    papers = {reference["url"] for reference in citation["references"]}
    assert papers <= {*re.findall(r"\((https://arxiv[^)]+)\)", (ROOT / "README.md").read_text())}


def test_the_hosted_tests_run_what_a_developer_runs_on_every_supported_python() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    [job] = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash launch/test.sh"]
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [line.rpartition(" ")[2] for line in package["classifiers"] if "Python :: 3." in line]
    assert job["strategy"]["matrix"]["python"] == named == ["3.11", "3.12"]


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
