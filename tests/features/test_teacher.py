"""The teacher: VGG19 or another of torchvision's networks, up to the named layers, on RGB photos."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import get_model, vgg19

from slotscops.core.errors import UserError
from slotscops.core.machine import own_device
from slotscops.core.pixels import IMAGENET_MEAN, IMAGENET_STD, normalise_images
from slotscops.core.pretrained import draw
from slotscops.features import teacher as teacher_module
from slotscops.features.teacher import Teacher, channels_of_layers, compute_features

MEAN = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
STD = torch.tensor(IMAGENET_STD).view(3, 1, 1)


@pytest.fixture(scope="module")
def reference() -> nn.Sequential:
    """torchvision's own network, with the weights of the files below."""
    with torch.device("meta"):
        features: nn.Sequential = vgg19(init_weights=False).features
    features.to_empty(device="cpu")
    draw(features, seed=5)
    for module in features:
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return features.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def weight_files(reference: nn.Sequential, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("weights")
    tensors = {f"features.{name}": tensor for name, tensor in reference.state_dict().items()}
    save_file(tensors, folder / "vgg.safetensors")
    torch.save(tensors | {"classifier.6.bias": torch.zeros(1000)}, folder / "vgg.pth")
    return {".safetensors": str(folder / "vgg.safetensors"), ".pth": str(folder / "vgg.pth")}


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)


@pytest.mark.parametrize("kind", [".safetensors", ".pth"])
def test_relu5_4_is_the_first_36_modules_of_torchvisions_vgg19(
    reference: nn.Sequential, weight_files: dict[str, str], images: Tensor, kind: str
) -> None:
    teacher = Teacher("relu5_4", weight_files[kind])
    expected = reference[:36]((images / 255 - MEAN) / STD)
    torch.testing.assert_close(teacher(images), expected)
    assert teacher(images).shape == (2, 512, 4, 4)


@pytest.mark.parametrize(("layer", "end"), [("conv1_1", 1), ("relu2_2", 9), ("pool3", 19), ("conv5_1", 29)])
def test_layers_are_counted_as_in_the_paper(
    reference: nn.Sequential, weight_files: dict[str, str], images: Tensor, layer: str, end: int
) -> None:
    teacher = Teacher(layer, weight_files[".pth"])
    expected = reference[:end]((images / 255 - MEAN) / STD)
    torch.testing.assert_close(teacher(images), expected)
    assert teacher.output_shape(64) == expected.shape[1:]


def test_joined_layers_stand_one_after_the_other_and_a_convolution_keeps_its_negatives(
    weight_files: dict[str, str], images: Tensor
) -> None:
    file = weight_files[".safetensors"]
    layers = ["relu5_4", "conv5_2", "relu5_2"]
    joined = Teacher("+".join(layers), file)
    parts = joined(images).split(512, dim=1)
    for layer, part in zip(layers, parts, strict=True):
        torch.testing.assert_close(part, Teacher(layer, file)(images))
    assert joined.num_channels == 1536
    assert parts[1].min() < 0
    assert torch.equal(parts[1].relu(), parts[2])


def test_layers_of_unlike_grids_are_joined_on_the_finest_grid(weight_files: dict[str, str], images: Tensor) -> None:
    fine, coarse = (Teacher(layer, weight_files[".pth"]) for layer in ("relu4_4", "relu5_4"))
    joined = Teacher("relu4_4+relu5_4", weight_files[".pth"])
    resized = functional.interpolate(coarse(images), size=(8, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(joined(images), torch.cat([fine(images), resized], dim=1))
    assert joined.output_shape(64) == (1024, 8, 8)
    assert joined.layer_shapes(64) == [(512, 8, 8), (512, 4, 4)]
    assert channels_of_layers("vgg19", "relu3_2+relu5_4") == [256, 512]


def test_shapes_at_128_and_224_pixels() -> None:
    teacher = Teacher("relu5_4", "random:0")
    for size, side in ((128, 8), (224, 14)):
        features = teacher(torch.zeros(1, 3, size, size, dtype=torch.uint8))
        assert features.shape == (1, 512, side, side)
        assert features.dtype == torch.float32
        assert teacher.grid_size(size) == (side, side)
        assert teacher.output_shape(size) == (512, side, side)


def test_pixels_are_normalised_by_the_numbers_of_imagenet_in_the_order_red_green_blue() -> None:
    orange = torch.tensor([255, 128, 0], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = [(1 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (0 - 0.406) / 0.225]
    for pixels in (orange, orange / 255, orange.double() / 255):
        normalised = normalise_images(pixels)
        assert normalised.flatten().tolist() == pytest.approx(expected)
        assert normalised.dtype == torch.float32


def test_red_and_blue_are_not_interchangeable(weight_files: dict[str, str], reference: nn.Sequential) -> None:
    teacher = Teacher("conv1_1", weight_files[".pth"])
    red = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    red[:, 0] = 255
    weight, bias = reference.state_dict()["0.weight"], reference.state_dict()["0.bias"]
    colour = torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225])
    by_hand = weight.sum(dim=(2, 3)) @ colour + bias  # inside a plain area the kernel only sees the colour
    torch.testing.assert_close(teacher(red)[0, :, 4, 4], by_hand)
    assert (teacher(red.flip(1))[0, :, 4, 4] - by_hand).abs().max() > 0.1


def test_float_and_uint8_images_give_the_same_features(weight_files: dict[str, str], images: Tensor) -> None:
    teacher = Teacher("relu3_1", weight_files[".pth"])
    torch.testing.assert_close(teacher(images), teacher(images / 255))


def test_autocast_does_not_touch_the_features(weight_files: dict[str, str], images: Tensor) -> None:
    teacher = Teacher("relu3_1", weight_files[".pth"])
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = teacher(images)
    assert torch.equal(under_autocast, teacher(images))


def test_the_teacher_never_learns(weight_files: dict[str, str], images: Tensor) -> None:
    teacher = Teacher("relu2_1", weight_files[".pth"])
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher(images).requires_grad
    assert not teacher.training


def test_the_fingerprint_is_that_of_the_tensors_used_in_whatever_file(
    weight_files: dict[str, str], reference: nn.Sequential, tmp_path: Path
) -> None:
    whole = Teacher("relu2_1", weight_files[".pth"])
    assert whole.fingerprint == Teacher("relu2_1", weight_files[".safetensors"]).fingerprint
    assert whole.fingerprint != Teacher("relu2_2", weight_files[".pth"]).fingerprint
    # relu2_1 uses the convolutions 0, 2 and 5; the one after them plays no part.
    tensors = {f"features.{name}": tensor.clone() for name, tensor in reference.state_dict().items()}
    for changed, same in (("features.7.weight", True), ("features.5.bias", False)):
        tensors[changed].view(-1)[0] += 1
        torch.save(tensors, tmp_path / "changed.pth")
        assert (Teacher("relu2_1", str(tmp_path / "changed.pth")).fingerprint == whole.fingerprint) is same


def test_a_random_teacher_depends_on_its_seed_alone() -> None:
    before = torch.get_rng_state()
    teacher = Teacher("relu1_1", "random:7")
    assert teacher.fingerprint == Teacher("relu1_1", "random:7").fingerprint
    assert teacher.fingerprint != Teacher("relu1_1", "random:8").fingerprint
    assert teacher.is_random
    assert torch.equal(torch.get_rng_state(), before)


def test_the_name_of_the_weights_holds_no_folder(weight_files: dict[str, str]) -> None:
    teacher = Teacher("relu1_1", weight_files[".pth"])
    assert teacher.weights_name == "vgg.pth"
    assert not teacher.is_random
    assert Teacher("relu1_1", "random:7").weights_name == "random:7"


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("relu5-4", "did you mean 'relu5_4'"),
        ("relu5_5", "did you mean 'relu5_"),
        ("fc7", "give one of conv1_1 ... pool5"),
        ("relu5_4+", "no such layer"),
        ("", "no such layer"),
    ],
)
def test_a_layer_that_cannot_be_had_is_refused(layer: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        Teacher(layer, "random:0")
    assert "\n" not in str(error.value)


def reference_maps(network: str, path: str, teacher: Teacher, photos: Tensor) -> Tensor:
    """What torchvision's whole network has behind the module when it sees the photos."""
    whole = get_model(network, weights=None)
    kept = teacher.layers.network.state_dict()
    assert set(kept) <= set(whole.state_dict())
    whole.load_state_dict(kept, strict=False)
    seen: list[Tensor] = []
    whole.get_submodule(path).register_forward_hook(lambda _module, _inputs, output: seen.append(output.clone()))
    with torch.no_grad():
        whole.eval()((photos / 255 - MEAN) / STD)
    return seen[0]


@pytest.mark.parametrize(
    ("network", "layer", "path"),
    [
        ("resnet18", "layer3", "layer3"),
        ("resnet18", "layer2.0.bn1", "layer2.0.bn1"),
        ("vgg11_bn", "relu4_2", "features.20"),
        ("mobilenet_v3_small", "features.7", "features.7"),
        ("densenet121", "features.denseblock1", "features.denseblock1"),
    ],
)
def test_any_convolutional_network_is_cut_at_the_layer_that_is_named(
    images: Tensor, network: str, layer: str, path: str
) -> None:
    teacher = Teacher(layer, "random:3", network)
    expected = reference_maps(network, path, teacher, images)
    torch.testing.assert_close(teacher(images), expected)
    assert teacher.output_shape(64) == expected.shape[1:]


@pytest.mark.parametrize(
    ("network", "layer", "message"),
    [
        ("vgg91", "relu5_4", "'vgg91': torchvision has no such classification network; did you mean 'vgg"),
        ("clip", "relu5_4", "no such classification network; give vgg19"),
        ("resnet50", "xyz", "resnet50 has no such layer; give one of conv1 ... fc"),
        ("resnet50", "layer5", "resnet50 has no such layer; did you mean 'layer"),
        ("resnet50", "fc", "needed channels on a square grid"),
        ("vit_b_16", "encoder.layers", "needed channels on a square grid"),
        ("swin_t", "features.1", "needed channels on a square grid"),
    ],
)
def test_a_network_or_layer_that_is_no_teacher_is_refused_in_a_line(network: str, layer: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        Teacher(layer, "random:0", network)
    assert "\n" not in str(error.value)


def test_a_photo_too_small_for_the_layer_is_refused() -> None:
    with pytest.raises(UserError, match="size 15: too small for relu5_1; give at least 16"):
        Teacher("relu5_1", "random:0").grid_size(15)


def test_a_file_of_another_network_is_refused_by_its_first_wrong_tensor(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "resnet.pth")
    with pytest.raises(UserError, match=r"resnet\.pth: has no tensor features\.0\.weight"):
        Teacher("relu1_1", str(tmp_path / "resnet.pth"))
    torch.save({"features.0.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"features\.0\.weight has shape \(64, 3, 7, 7\), needed \(64, 3, 3, 3\)"):
        Teacher("relu1_1", str(tmp_path / "other.pth"))


def test_imagenet_features_of_real_photos_are_sparse_and_of_the_known_scale(real_data: Path) -> None:
    teacher = Teacher("relu5_4", str(real_data / "weights" / "vgg19_features.safetensors"))
    photos = sorted((real_data / "pascal_part").rglob("JPEGImages/*.jpg"))
    assert len(photos) == 11
    crops = torch.from_numpy(np.stack([centre_crop(photo) for photo in photos])).permute(0, 3, 1, 2)
    features = teacher(crops)
    zeros = (features == 0).float().mean(dim=(1, 2, 3))
    # facts.md, measured on crops of objects: 92 to 97 % zeros, mean 1.4, standard deviation 7.6.
    assert 0.92 < zeros.mean() < 0.97
    assert 0.7 < features.mean() < 2.8
    assert 4 < features.std() < 15
    blue_first = functional.relu(teacher(crops.flip(1)))
    assert (blue_first - features).square().mean() > 0.05 * features.square().mean()


def centre_crop(photo: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    with Image.open(photo) as image:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return np.asarray(image.convert("RGB").resize((128, 128), box=(left, top, left + side, top + side)))


def test_crops_are_resized_on_the_cpu_and_then_go_to_the_teachers_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA has no antialiased bicubic kernel for uint8, and the one for float gives other numbers."""

    class Through(nn.Module):
        """Gives the images back, and stands on the meta device as a teacher stands on a GPU."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(1, device="meta"))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images

    resized: list[torch.Tensor] = []
    plain = torch.nn.functional.interpolate
    monkeypatch.setattr(
        "torch.nn.functional.interpolate", lambda *a, **k: resized.append(plain(*a, **k)) or resized[-1]
    )
    features = compute_features(Through(), torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8), 96)  # type: ignore[arg-type]
    assert (features.device.type, features.shape) == ("meta", (2, 3, 96, 96))
    assert [(images.device.type, images.dtype) for images in resized] == [("cpu", torch.uint8)]


def test_a_gpu_computes_features_with_cudnn_but_without_tf32() -> None:
    def flags() -> tuple[bool, bool, bool, bool]:
        cudnn = torch.backends.cudnn
        return cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32

    before = flags()
    with teacher_module._true_float32():
        assert flags() == (True, False, True, False)
    assert flags() == before


@pytest.mark.parametrize(("local_rank", "device"), [(None, "cuda:0"), ("1", "cuda:1"), ("5", "cuda:1")])
def test_each_rank_computes_on_a_gpu_of_its_own(
    monkeypatch: pytest.MonkeyPatch, local_rank: str | None, device: str
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert own_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_device() == torch.device(device)
