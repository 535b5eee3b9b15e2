import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import ROOT
from PIL import Image, ImageEnhance
from safetensors import safe_open
from small_runs import parts_of_labels, photo
from torch.nn import functional

import slotscops
from slotscops.datasets.toy.tree import draw_photo
from slotscops.segment import __main__ as segment
from slotscops.segment.segmenter import FoundParts

README = (ROOT / "slotscops" / "segment" / "README.md").read_text()


def test_features_boxes_and_centres_are_those_of_the_maps_at_pixel_resolution(
    varied_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slotscops.segment.segmenter._STRIP_PIXELS", 1000)  # several strips
    parts = slotscops.load(varied_run).segment(photo((90, 51)))
    assert parts.encoded is not None
    encoded = torch.from_numpy(parts.encoded)[None]
    pixels = functional.interpolate(encoded, (90, 90), mode="bilinear", align_corners=True)[0, :, 20:71]  # (C, 51, 90)
    maps = torch.from_numpy(parts.maps)  # (S, 51, 90)
    mass = maps.sum(dim=(1, 2))[:, None]
    expected = torch.einsum("syx,cyx->sc", maps, pixels) / mass
    assert parts.present.all()
    np.testing.assert_allclose(parts.features, expected, rtol=1e-4, atol=1e-5)
    rows, columns = np.mgrid[:51, :90] + 0.5
    centres = torch.einsum("syx,iyx->si", maps.double(), torch.from_numpy(np.stack([columns, rows]))) / mass
    np.testing.assert_allclose(parts.centres, centres, rtol=1e-4)
    for slot, box in enumerate(parts.boxes):
        y, x = np.nonzero(parts.labels == slot)
        assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
        assert parts.areas[slot] == len(x)


def test_a_part_without_a_pixel_is_not_present_and_has_nan() -> None:
    labels = np.zeros((5, 9), np.uint8)
    labels[2:4, 3:8] = 2
    parts = parts_of_labels(labels, 4)
    assert parts.present.tolist() == [True, False, True, False]
    assert parts.boxes[2].tolist() == [3, 2, 8, 4]
    assert parts.areas.tolist() == [35, 0, 10, 0]
    for rows in (parts.features, parts.boxes, parts.centres, parts.scores[:, None]):
        assert np.isnan(rows).all(axis=1).tolist() == [False, True, False, True]
        assert not np.isnan(rows[[0, 2]]).any()
    with pytest.raises(ValueError, match="without the features"):
        _ = FoundParts(parts.photo, parts.logits).features


def block_of(language: str) -> str:
    """The first block of code in that language after the heading of the example."""
    text = README.partition("### The same part in other photos")[2]
    found = re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert found
    return found[1]


def test_the_example_in_the_readme_finds_the_same_part_in_another_photo(
    varied_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "toy").symlink_to(varied_run)
    pictures = [draw_photo(0, "train", number)[0].resize((96, 80)) for number in range(4)]
    for name, picture in zip("abcd", pictures, strict=True):
        picture.save(tmp_path / "photos" / f"{name}.png")
    ImageEnhance.Brightness(pictures[0]).enhance(0.9).save(tmp_path / "photos" / "twin of a.png")
    program, command, *arguments = shlex.split(block_of("bash"))
    assert (program, command) == ("slotscops", "segment")
    assert segment.main(arguments) == 0

    with safe_open("found/part_features.safetensors", "np") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118, no mapping
        photos = json.loads(file.metadata()["photos"])
        written = file.get_tensor("features")[photos.index("c.png")]
    assert shapes == {"features": (5, 6, 512), "boxes": (5, 6, 4), "centres": (5, 6, 2), "present": (5, 6)}
    with Image.open("photos/c.png") as picture:
        np.testing.assert_allclose(written, slotscops.load(varied_run).segment(picture).features, rtol=1e-4, atol=1e-5)

    names: dict[str, Any] = {}
    capsys.readouterr()
    exec(block_of("python"), names)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[0].split()[:2] == ["1.00", "a.png"]
    assert lines[1][7:].startswith("twin of a.png")
