"""Shapes of the network, the encoder compared with torchvision's, gradients and precision of the whole."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel.distributed import _find_tensors
from torch.utils._pytree import tree_flatten, tree_map_only

from slotscops.config import load_config
from slotscops.core.errors import UserError
from slotscops.core.pixels import normalise_images
from slotscops.model.encoder import Encoder, FeatureEncoder, FrozenBatchNorm, ResNetEncoder
from slotscops.model.network import ModelOutput, SlotScops, build_network


def network_of(encoder: Encoder, *settings: str, feature_channels: int = 512) -> SlotScops:
    return build_network(encoder, load_config(None, settings), feature_channels)


def photos(batch_size: int, size: int) -> Tensor:
    coarse = torch.rand(batch_size, 3, 8, 8) * 255
    return functional.interpolate(coarse, size=(size, size), mode="bilinear").to(torch.uint8)


@pytest.fixture(scope="session")
def _resnet50() -> ResNetEncoder:
    return ResNetEncoder("resnet50", "random:0")


@pytest.fixture(scope="session")
def _resnet18() -> ResNetEncoder:
    return ResNetEncoder("resnet18", "random:0")


@pytest.fixture
def resnet50(_resnet50: ResNetEncoder) -> ResNetEncoder:
    return copy.deepcopy(_resnet50)


@pytest.fixture
def resnet18(_resnet18: ResNetEncoder) -> ResNetEncoder:
    return copy.deepcopy(_resnet18)


# ---- shapes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "side"), [(128, 17), (224, 29)])
def test_every_intermediate_has_the_shape_of_the_design(resnet50: ResNetEncoder, size: int, side: int) -> None:
    model = network_of(resnet50)
    with torch.no_grad():
        output = model(photos(2, size))
    parts_of_output = (output, output.slot_output, output.slot_output.decoded)
    tensors = {
        name: value for part in parts_of_output for name, value in part._asdict().items() if torch.is_tensor(value)
    }
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "encoded": (2, 2048, side, side),
        "tokens": (2, side * side, 64),
        "slots": (2, 6, 64),
        "attention": (2, 6, side * side),
        "broadcast": (12, 64, 8, 8),
        "slot_logits": (12, 1, 8, 8),
        "logits": (2, 6, 8, 8),
        "basis": (5, 512),
    }
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert output.attention_maps().shape == (2, 6, side, side)
    maps = output.maps((size, size))
    assert maps.shape == (2, 6, size, size)
    torch.testing.assert_close(maps.sum(dim=1), torch.ones(2, size, size))
    assert resnet50.grid_size(size) == (side, side)


def test_cached_features_need_no_backbone_and_are_taken_as_they_are() -> None:
    model = network_of(
        FeatureEncoder(1024), "slots.num_parts=3", "slots.dim=32", "decoder.grid=4", feature_channels=1024
    )
    features = torch.rand(2, 1024, 8, 8).half()
    output = model(features)
    assert torch.equal(output.encoded, features.float())
    assert output.logits.shape == (2, 4, 4, 4)
    assert output.basis.shape == (3, 1024)
    assert model.takes_features
    assert model.parameter_groups()["encoder"] == []


def test_slot_s_of_image_b_lands_in_channel_s_of_image_b() -> None:
    model = network_of(FeatureEncoder(16))
    output = model(torch.rand(3, 16, 4, 4))
    _, alone = model.part_logits.decoder(output.slot_output.slots[1:2, 4:5])
    torch.testing.assert_close(output.logits[1, 4], alone[0, 0])
    logits = torch.zeros(1, 6, 2, 2)
    logits[0, 2, :, 1] = 3.0
    maps = output._replace(logits=logits).maps((3, 5))
    # align_corners: the corner pixels are the corner cells, and the five columns are evenly spaced between them.
    assert maps[0, 2, 1, 1].item() == pytest.approx(math.exp(0.75) / (math.exp(0.75) + 5))
    assert maps[0, 2, 0, 4].item() == pytest.approx(math.exp(3) / (math.exp(3) + 5))
    assert maps[0, 2, 1, 2].item() == pytest.approx(math.exp(1.5) / (math.exp(1.5) + 5))
    assert maps[0, 2, 2, 0].item() == pytest.approx(1 / 6)


def test_the_basis_starts_as_the_absolute_value_of_normal_numbers_and_is_never_negative() -> None:
    model = network_of(FeatureEncoder(4), "slots.num_parts=20")
    start = model.basis.basis_parameter.detach()
    assert start.min() >= 0
    assert start.mean().item() == pytest.approx(math.sqrt(2 / math.pi), rel=0.05)
    with torch.no_grad():
        model.basis.basis_parameter[0] -= 10
    basis = model(torch.rand(1, 4, 2, 2)).basis
    assert torch.equal(basis[0], torch.zeros(512))
    assert torch.equal(basis[1:], start[1:])


# ---- encoder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_dilation_changes_no_output_and_only_puts_new_ones_in_between(
    name: str, request: pytest.FixtureRequest
) -> None:
    encoder: ResNetEncoder = request.getfixturevalue(name)
    plain = getattr(torchvision.models, name)().eval()
    plain.load_state_dict(encoder.trunk.state_dict(), strict=False)
    plain.maxpool.ceil_mode = True
    images = photos(1, 128)
    with torch.no_grad():
        expected = nn.Sequential(*list(plain.children())[:-2])(normalise_images(images))  # (1, C, 5, 5), stride 32
        encoded = encoder(images)  # (1, C, 17, 17), stride 8
    torch.testing.assert_close(encoded[:, :, ::4, ::4], expected, rtol=1e-3, atol=1e-3)


def test_the_bottleneck_trunk_is_dilated_as_torchvision_does_it(resnet50: ResNetEncoder) -> None:
    ours = resnet50.trunk
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True])
    for name, module in theirs.named_modules():
        if isinstance(module, nn.Conv2d):
            mine = ours.get_submodule(name)
            assert isinstance(mine, nn.Conv2d)
            for quantity in ("stride", "dilation", "padding", "kernel_size"):
                assert getattr(mine, quantity) == getattr(module, quantity), name


@pytest.mark.parametrize("size", [32, 33, 63, 100, 128, 129, 131])
def test_the_grid_size_is_known_beforehand(resnet18: ResNetEncoder, size: int) -> None:
    with torch.no_grad():
        assert resnet18(photos(1, size)).shape == (1, 512, *resnet18.grid_size(size))


def test_batch_norm_is_frozen_in_every_mode(resnet18: ResNetEncoder) -> None:
    images = photos(2, 64)
    with torch.no_grad():
        together = resnet18.train()(images)
        alone = resnet18.eval()(images[:1])
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-4)
    assert not any("bn" in name for name, _ in resnet18.named_parameters())


def test_batch_norm_computes_what_torchvisions_does_and_keeps_bfloat16() -> None:
    frozen, plain = FrozenBatchNorm(6), nn.BatchNorm2d(6).eval()
    for tensor in plain.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 2)
    frozen.load_state_dict(plain.state_dict())
    maps = torch.randn(2, 6, 3, 3)
    torch.testing.assert_close(frozen(maps), plain(maps))
    assert frozen(maps.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("frozen_stages", [0, 1, 3, 4])
def test_frozen_stages_and_the_stem_before_them_do_not_train(frozen_stages: int) -> None:
    encoder = ResNetEncoder("resnet18", None, frozen_stages)
    trains = {name.split(".")[1] for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    stem = [] if frozen_stages else ["conv1"]
    assert trains == {*stem, *(f"layer{stage}" for stage in range(frozen_stages + 1, 5))}


def test_a_random_encoder_is_the_same_for_the_same_seed_and_neither_dies_nor_explodes(resnet18: ResNetEncoder) -> None:
    before = torch.get_rng_state()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    again = ResNetEncoder("resnet18", "random:0")
    torch.set_num_threads(threads)
    assert all(map(torch.equal, resnet18.state_dict().values(), again.state_dict().values()))
    assert torch.equal(torch.get_rng_state(), before)
    assert resnet18.is_random
    with torch.no_grad():
        for images in (photos(2, 64), torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)):
            assert 0.1 < resnet18(images).std() < 10


def test_a_saved_trunk_is_read_back_without_its_classifier(resnet18: ResNetEncoder, tmp_path: Path) -> None:
    file = tmp_path / "resnet18.pth"
    torch.save(resnet18.trunk.state_dict() | {"fc.bias": torch.zeros(1000)}, file)
    again = ResNetEncoder("resnet18", str(file))
    assert all(map(torch.equal, resnet18.state_dict().values(), again.state_dict().values()))
    assert not again.is_random
    with pytest.raises(UserError, match=r"resnet18\.pth: layer1\.0\.conv1\.weight has shape"):
        ResNetEncoder("resnet50", str(file))


@pytest.mark.parametrize(
    ("name", "frozen_stages", "message"),
    [("resnet152", 0, "give one of resnet18, resnet34"), ("resnet18", 5, "frozen_stages 5: a ResNet has 4")],
)
def test_an_encoder_that_does_not_exist_is_refused(name: str, frozen_stages: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ResNetEncoder(name, "random:0", frozen_stages)


# ---- training ----------------------------------------------------------------------------------------------------


def loss_of(output: ModelOutput) -> Tensor:
    target = torch.linspace(0, 1, output.logits.numel()).view_as(output.logits).roll(7, dims=1)
    return (output.logits * target).sum() + output.basis.square().sum()


@pytest.mark.parametrize("slot_init", ["learned", "shared_gaussian"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_every_trainable_parameter_gets_a_gradient_in_either_precision(
    resnet18: ResNetEncoder, slot_init: str, precision: torch.dtype
) -> None:
    model = network_of(resnet18, f"slots.init={slot_init}").to(memory_format=torch.channels_last)
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        output = model(photos(2, 64))
    assert output.encoded.dtype == precision
    for tensor in (output.slot_output.slots, output.slot_output.attention, output.logits, output.basis):
        assert tensor.dtype == torch.float32
    torch.autograd.backward(loss_of(output))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        # Single weights may get no gradient, such as a tap of the head that sees only padding, but no whole tensor may.
        assert parameter.grad.abs().max() > 0, name


def test_maps_are_float32_under_autocast() -> None:
    model = network_of(FeatureEncoder(16))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(torch.rand(2, 16, 8, 8))
        maps = output.maps((32, 32))
    assert maps.dtype == torch.float32
    assert torch.equal(maps, output.maps((32, 32)))


def test_the_groups_hold_every_trainable_parameter_once() -> None:
    model = network_of(ResNetEncoder("resnet18", None, frozen_stages=2))
    groups = model.parameter_groups()
    assert list(groups) == ["encoder", "head", "basis"]
    assert [id(parameter) for parameter in groups["basis"]] == [id(model.basis.basis_parameter)]
    assert {id(parameter) for parameter in groups["encoder"]} <= {id(p) for p in model.encoder.parameters()}
    collected = [id(parameter) for group in groups.values() for parameter in group]
    assert len(set(collected)) == len(collected)
    assert set(collected) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


@pytest.mark.parametrize("maps", ["head", "attention", "head_only"])
def test_the_whole_network_is_one_graph_for_the_compiler(resnet18: ResNetEncoder, maps: str) -> None:
    model = network_of(resnet18, f"decoder.maps={maps}")
    images = photos(1, 64)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=keep, fullgraph=True)
    eager, traced = model(images), compiled(images)
    assert type(traced) is type(eager)
    assert type(traced.slot_output) is type(eager.slot_output)
    torch.testing.assert_close(traced, eager)
    parameter = model.encoder.get_parameter("trunk.conv1.weight")
    gradients = [torch.autograd.grad(output.logits.square().sum(), parameter)[0] for output in (eager, traced)]
    torch.testing.assert_close(gradients[1], gradients[0])
    (graph,) = graphs
    # DDP cuts the graph into buckets, and some versions of PyTorch cannot cut one that holds other graphs.
    assert not [name for name, part in graph.named_modules() if name and isinstance(part, torch.fx.GraphModule)]
    assert "gru_cell" not in str(graph.graph)  # on a GPU the compiler does not know this operator


@pytest.mark.parametrize("maps", ["head", "attention", "head_only"])
def test_accelerate_and_ddp_find_the_tensors_in_the_nested_output(maps: str) -> None:
    model = network_of(FeatureEncoder(16), f"decoder.maps={maps}")
    output = model(torch.rand(2, 16, 4, 4))
    half = tree_map_only(torch.Tensor, lambda tensor: tensor.bfloat16(), output)
    converted = convert_to_fp32(half)  # Accelerate does this to the output under bf16
    assert [type(member) for member in converted] == [type(member) for member in output]
    found, _ = tree_flatten(converted)
    tensors = [tensor for tensor in found if tensor is not None]
    assert all(tensor.dtype == torch.float32 for tensor in tensors)
    # This is the function with which DDP finds where to start looking for unused parameters.
    assert {id(tensor) for tensor in _find_tensors(converted)} == {id(tensor) for tensor in tensors}


def test_without_decoder_the_maps_are_the_attention_on_the_encoders_grid() -> None:
    model = network_of(FeatureEncoder(8), "decoder.maps=attention", feature_channels=8)
    output = model(torch.rand(2, 8, 5, 7))
    assert output.slot_output.decoded is None
    assert output.logits.shape == (2, 6, 5, 7)
    torch.testing.assert_close(output.logits.softmax(dim=1), output.attention_maps())
    (output.logits.square().sum() + output.basis.sum()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_without_decoder_a_single_iteration_is_refused() -> None:
    with pytest.raises(UserError, match=r"slots\.iterations"):
        network_of(FeatureEncoder(8), "slots.iterations=1", "decoder.maps=attention")


def test_batch_norm_follows_what_is_loaded_and_saves_nothing_more_than_torchvisions() -> None:
    frozen, other = FrozenBatchNorm(3), FrozenBatchNorm(3)
    assert list(frozen.state_dict()) == ["weight", "bias", "running_mean", "running_var"]
    other.load_state_dict({name: torch.rand(3) + 0.5 for name in frozen.state_dict()})
    maps = torch.randn(1, 3, 2, 2)
    assert not torch.equal(frozen(maps), other(maps))
    nn.Sequential(frozen).load_state_dict({f"0.{name}": tensor for name, tensor in other.state_dict().items()})
    assert torch.equal(frozen(maps), other(maps))
