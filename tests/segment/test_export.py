from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from small_runs import photo, save_feature_run, save_resnet_run
from torch import Tensor, nn

import slotscops
from slotscops.core.errors import UserError
from slotscops.core.pixels import normalise_images
from slotscops.model.encoder import Encoder
from slotscops.model.refinement import refine_maps
from slotscops.segment import export
from slotscops.segment.segmenter import load


@pytest.mark.parametrize("kind", ["features", "resnet"])
def test_what_is_exported_answers_as_the_model_does_for_any_number_of_photos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    # The graph holds each iteration of the refinement anew. Two of them show what ten show.
    monkeypatch.setattr(refine_maps, "__defaults__", (2, (1, 4)))
    special = ["decoder.refinement=pamr", "slots.init=image_conditioned", "slots.token_hidden=32"]
    special += ["losses.mixture=1", "basis.kind=free", "basis.part_directions=2"]
    special += ["losses.target_mask=object", "decoder.places=facing"]
    run = save_feature_run(tmp_path / "run", *special) if kind == "features" else save_resnet_run(tmp_path / "run")
    weights = ["--teacher-weights", "random:0"] if kind == "features" else []
    photo((90, 60)).save(tmp_path / "photo.jpg")
    out = tmp_path / "model.onnx"
    assert export.main(["--checkpoint", str(run), "--out", str(out), *weights, str(tmp_path / "photo.jpg")]) == 0
    session = onnxruntime.InferenceSession(str(out))
    model = load(run, teacher_weights="random:0") if kind == "features" else load(run)
    for count in (1, 3):
        images = np.random.default_rng(count).integers(0, 256, (count, 3, 64, 64), dtype=np.uint8)
        maps, labels = session.run(["maps", "labels"], {"images": images})
        assert maps.shape == (count, 6, 64, 64)
        assert labels.shape == (count, 64, 64)
        expected = export.WholeModel(model)(torch.from_numpy(images))[0].detach().numpy()
        np.testing.assert_allclose(maps, expected, atol=export.TOLERANCE)
        output = model.forward(torch.from_numpy(images))
        of_model = model.network.segment_maps(output, torch.from_numpy(images)).numpy()
        np.testing.assert_allclose(maps, of_model, atol=export.TOLERANCE)


class Patches(Encoder):
    """Stands for ResNet-18, which takes ten times as long to export: one convolution of patches."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.out_channels, self.takes_features = out_channels, False
        self.patches = nn.Conv2d(3, out_channels, 8, 8)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.patches(normalise_images(images))
        return found


def test_an_onnx_file_of_a_pruned_model_gives_the_labels_of_segment(published: Path, tmp_path: Path) -> None:
    model = slotscops.load(published)
    model.network.encoder = Patches(model.network.encoder.out_channels)
    image, out = photo((64, 64)), tmp_path / "model.onnx"
    crops = model.crop(image)[None].numpy()
    export.export(model, out, crops)
    session = onnxruntime.InferenceSession(str(out))
    assert session.get_modelmeta().custom_metadata_map["numbers"] == "0,1,2,4,5"
    maps, labels = session.run(["maps", "labels"], {"images": crops})
    parts = model.segment(image)
    assert set(np.unique(parts.labels)) == {0, 1, 2, 4, 5}
    np.testing.assert_array_equal(labels[0], parts.labels)
    np.testing.assert_allclose(maps[0], parts.maps, atol=export.TOLERANCE)


def test_slots_that_are_drawn_at_random_are_refused(tmp_path: Path) -> None:
    run = save_feature_run(tmp_path / "run", "slots.init=shared_gaussian")
    with pytest.raises(UserError, match="which draws random numbers"):
        export.main(["--checkpoint", str(run), "--out", str(tmp_path / "m.onnx"), "--teacher-weights", "random:0"])
    assert not (tmp_path / "m.onnx").exists()
