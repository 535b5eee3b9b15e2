"""Encoders from timm: the last map at a fine stride, with frozen BatchNorm and the normalisation of the network."""

import itertools
from pathlib import Path

import pytest
import timm
import torch
from commands import python
from safetensors.torch import save_file
from small_runs import photo
from torch import Tensor, nn

from slotscops.config import Config, load_config
from slotscops.core.errors import UserError
from slotscops.core.pixels import normalise_images
from slotscops.core.pretrained import draw
from slotscops.model.encoder import TimmEncoder
from slotscops.train.build import build_model, build_optimizer

VIT, EFFICIENTNET, CONVNEXT = "timm/test_vit", "timm/test_efficientnet", "timm/test_convnext"


def settings(network: str, *more: str) -> Config:
    return load_config(None, [f"encoder.name={network}", "encoder.weights=random:0", "decoder.maps=attention", *more])


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)


@pytest.mark.parametrize(("network", "side"), [(VIT, 4), (EFFICIENTNET, 8), (CONVNEXT, 8), ("timm/test_resnet", 8)])
def test_the_stride_is_8_where_the_network_can_be_dilated(images: Tensor, network: str, side: int) -> None:
    encoder = TimmEncoder(network, "random:0")
    assert encoder(images).shape == (2, encoder.out_channels, side, side)


def test_tokens_are_those_of_the_last_block_with_the_weights_of_a_file(tmp_path: Path, images: Tensor) -> None:
    whole = timm.create_model("test_vit", num_classes=0)
    draw(whole, seed=4)
    save_file(whole.state_dict(), tmp_path / "vit.safetensors")
    encoder = TimmEncoder(VIT, str(tmp_path / "vit.safetensors"))
    whole.set_input_size((64, 64))
    with torch.no_grad():
        (expected,) = whole.eval().forward_intermediates(
            normalise_images(images, encoder.mean, encoder.std), indices=1, intermediates_only=True
        )
        torch.testing.assert_close(encoder.eval()(images), expected)


def test_batch_statistics_never_change_and_never_matter(images: Tensor) -> None:
    encoder = TimmEncoder(EFFICIENTNET, "random:0").train()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    together, alone = encoder(images), encoder(images[:1])
    torch.testing.assert_close(together[:1], alone)
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert not [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize("network", [VIT, EFFICIENTNET, CONVNEXT])
def test_every_stage_learns_more_slowly_than_the_one_after_it(network: str) -> None:
    config = settings(network, "encoder.layer_decay=0.5", "train.learning_rate=1.0")
    model = build_model(config, feature_channels=8)
    groups = build_optimizer(config, model).param_groups
    rates = [group["lr"] for group in groups if group["name"].startswith("encoder_")]
    assert rates[-1] == pytest.approx(0.1)
    assert all(later == pytest.approx(2 * earlier) for earlier, later in itertools.pairwise(rates))
    trained = [parameter for group in groups for parameter in group["params"]]
    assert len(trained) == len(set(trained)) == len(list(model.parameters()))


def test_frozen_stages_do_not_train_and_the_others_do() -> None:
    model = build_model(settings(VIT, "encoder.frozen_stages=2"), feature_channels=8)
    trains = {name.split("model.")[1]: parameter.requires_grad for name, parameter in model.encoder.named_parameters()}
    assert not trains["pos_embed"]
    assert not trains["blocks.1.mlp.fc1.weight"]
    assert trains["blocks.2.mlp.fc1.weight"]
    with pytest.raises(UserError, match=r"frozen_stages 6: timm/test_vit has 6 stages; give fewer"):
        TimmEncoder(VIT, "random:0", frozen_stages=6)


@pytest.mark.parametrize("network", ["timm/test_nfnet", "timm/pit_ti_224"])
def test_weights_of_the_whole_network_are_found_whatever_timm_calls_them(network: str) -> None:
    whole = timm.create_model(network.removeprefix("timm/"), num_classes=0)
    draw(whole, seed=0)
    drawn = {(tensor.shape, tensor.double().sum().item()) for tensor in whole.state_dict().values()}
    encoder = TimmEncoder(network, "random:0")
    assert {(tensor.shape, tensor.double().sum().item()) for tensor in encoder.state_dict().values()} <= drawn


def test_photos_of_a_size_that_the_network_does_not_take_are_refused_before_the_training() -> None:
    with pytest.raises(UserError, match=r"data\.size is 72, which encoder\.name timm/test_vit does not take \(.*16"):
        build_model(settings(VIT, "data.size=72"), feature_channels=8)


def test_the_setting_says_what_it_takes() -> None:
    for name in ("resnet5", "timm/../x", "timm/"):
        with pytest.raises(UserError, match=r"encoder\.name is '.*'; it must be 'resnet18', .* or timm/NAME"):
            load_config(None, [f"encoder.name={name}"])


def test_a_model_with_such_an_encoder_trains_and_segments_without_any_teacher(toy_shards: Path, tmp_path: Path) -> None:
    trained = python(
        *("-m", "slotscops.train", f"data.shards={toy_shards}", "data.size=64", f"run_dir={tmp_path / 'run'}"),
        *(f"encoder.name={EFFICIENTNET}", "encoder.weights=random:0", "decoder.maps=attention", "train.total_steps=2"),
        *("train.batch_size=4", "data.num_workers=0"),
    )
    assert trained.returncode == 0, trained.stderr
    photo((90, 60)).save(tmp_path / "a.png")
    # Neither a teacher nor anything pretrained may be asked for.
    blocked = (
        "import sys\n"
        "from slotscops.core import console, pretrained\n"
        "from slotscops.features import teacher\n"
        "def refuse(*_, **__): raise AssertionError('a teacher or its weights were asked for')\n"
        "pretrained.read_state_dict = pretrained.fill = teacher.Teacher.__init__ = refuse\n"
        "from slotscops.segment.__main__ import main\n"
        "console.run_command(lambda: main(sys.argv[1:]))\n"
    )
    (tmp_path / "blocked.py").write_text(blocked)
    done = python(
        tmp_path / "blocked.py", "--checkpoint", tmp_path / "run", "--out", tmp_path / "out", tmp_path / "a.png"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "a.parts.png").is_file()
