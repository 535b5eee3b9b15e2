"""Weights from torchvision, from files and from seeds, and every way in which loading them fails."""

import pickle
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from slotscops.core.errors import UserError
from slotscops.core.pretrained import display_name, draw, fill, fingerprint, random_seed, read_state_dict


class FakePretrained:
    """Stands for torchvision's weights, without the download."""

    url = "https://example.org/vgg19.pth"

    def __init__(self, answer: dict[str, Tensor] | Exception) -> None:
        self.answer = answer

    def get_state_dict(self, **options: Any) -> dict[str, Tensor]:
        assert options.pop("check_hash")
        assert options.pop("weights_only")
        print("Downloading")
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


NONE = FakePretrained(AssertionError("nothing may be downloaded"))


def small_network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in small_network().state_dict().items()}


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.pt"])
def test_a_network_is_filled_from_either_kind_of_file(tmp_path: Path, tensors: dict[str, Tensor], name: str) -> None:
    path = tmp_path / name
    with_more = tensors | {"classifier.weight": torch.ones(5)}
    save_file(with_more, path) if path.suffix == ".safetensors" else torch.save(with_more, path)
    with torch.device("meta"):
        network = small_network()
    fill(network, str(path), NONE)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in network.state_dict().items())
    assert fingerprint(network.state_dict()) == fingerprint(tensors)


def test_imagenet_asks_torchvision_and_keeps_stdout_clean(
    tensors: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    network = small_network()
    fill(network, "imagenet", FakePretrained(tensors))
    assert torch.equal(network[0].weight, tensors["0.weight"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "failure",
    [
        URLError("Name or service not known"),
        HTTPError("https://example.org", 403, "Forbidden", {}, None),  # type: ignore[arg-type]
        TimeoutError("timed out"),
        PermissionError("cache is read-only"),
        RuntimeError('invalid hash value (expected "dcbb9e9d")\nsecond line'),
        EOFError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_failed_download_says_what_to_give_instead(failure: Exception) -> None:
    with pytest.raises(UserError) as error:
        read_state_dict("imagenet", FakePretrained(failure))
    message = one_line(error)
    for part in ("https://example.org/vgg19.pth", ".safetensors", ".pth", "random:SEED"):
        assert part in message
    assert (str(failure).splitlines() or ["EOFError"])[0] in message


@pytest.mark.parametrize("source", ["imagnet", "vgg19", "", "random", "weights.onnx", "some/folder"])
def test_an_unknown_choice_of_weights_is_refused(source: str) -> None:
    with pytest.raises(UserError, match="no such choice; give imagenet or pretrained, a "):
        read_state_dict(source, NONE)


@pytest.mark.parametrize("source", ["random:", "random:x", "random:-1", "random:1.5", "random:²", f"random:{2**63}"])
def test_a_seed_that_is_no_whole_number_is_refused(source: str) -> None:
    with pytest.raises(UserError, match="SEED must be a whole number"):
        random_seed(source)


def test_a_seed_is_read_from_random_only() -> None:
    assert random_seed("random:17") == 17
    assert random_seed("imagenet") is None


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"{name}: no such file"):
        read_state_dict(str(tmp_path / name), NONE)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_file_cut_short_is_refused(tmp_path: Path, tensors: dict[str, Tensor], name: str, keep: float) -> None:
    path = tmp_path / name
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(UserError, match=f"{name}: cannot be read") as error:
        read_state_dict(str(path), NONE)
    one_line(error)


class Boom:
    """Pickled code that would leave a trace if it ran."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("plain_pickle", [True, False])
def test_a_file_with_code_is_refused_and_the_code_not_run(tmp_path: Path, plain_pickle: bool) -> None:
    path, trace = tmp_path / "w.pth", tmp_path / "trace"
    content = {"0.weight": Boom(trace)}
    path.write_bytes(pickle.dumps(content)) if plain_pickle else torch.save(content, path)
    with pytest.raises(UserError, match="cannot be read") as error:
        read_state_dict(str(path), NONE)
    one_line(error)
    assert not trace.exists()


@pytest.mark.parametrize("content", [{"state_dict": {"a": torch.ones(1)}}, [torch.ones(1)], {"a": 1}])
def test_a_file_of_other_things_than_tensors_by_name_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match="save a plain state dict"):
        read_state_dict(str(tmp_path / "w.pth"), NONE)


def test_the_first_missing_tensor_is_named(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    del tensors["1.running_mean"], tensors["2.weight"]
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"w.safetensors: has no tensor 1\.running_mean; "):
        fill(small_network(), str(tmp_path / "w.safetensors"), NONE)


def test_the_first_tensor_of_a_wrong_shape_is_named(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors | {"2.weight": torch.ones(2, 5)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"2\.weight has shape \(2, 5\), needed \(2, 4\)"):
        fill(small_network(), str(tmp_path / "w.safetensors"), NONE)


def test_random_weights_depend_on_the_seed_alone_and_leave_the_global_generator_untouched() -> None:
    before = torch.get_rng_state()
    networks = []
    for source in ("random:3", "random:3", "random:4"):
        with torch.device("meta"):
            networks.append(small_network())
        fill(networks[-1], source, NONE)
    prints = [fingerprint(network.state_dict()) for network in networks]
    assert prints[0] == prints[1] != prints[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_random_weights_are_bit_by_bit_those_of_the_mersenne_twister_so_the_same_on_every_machine() -> None:
    layer = nn.Conv2d(3, 64, 3)
    draw(layer, seed=5)
    bits = np.random.RandomState(5).randint(0, 2**32, size=layer.weight.numel(), dtype=np.uint32)
    uniform = (bits & 0xFFFFFF).astype(np.float32) / np.float32(2**24)
    expected = (uniform - np.float32(0.5)) * np.float32(2 * np.sqrt(6 / 27))
    assert np.array_equal(layer.weight.detach().numpy().ravel(), expected)
    assert torch.equal(layer.bias, torch.zeros(64))


def test_random_weights_keep_the_second_moment_through_relu() -> None:
    layers = [nn.Conv2d(64, 64, 3, padding=1) for _ in range(8)]
    signal = torch.randn(2, 64, 16, 16)
    for seed, layer in enumerate(layers):
        draw(layer, seed)
        signal = torch.relu(layer(signal))
    assert 0.1 < signal[..., 8, 8].square().mean() < 10


def test_the_fingerprint_sees_names_types_shapes_and_every_value_but_not_the_order() -> None:
    base = {"a": torch.arange(6.0), "b": torch.tensor(1.0)}
    print_of_base = fingerprint(base)
    changed = base["a"].clone()
    changed[3] = torch.nextafter(changed[3], torch.tensor(9.0))
    assert fingerprint({"b": base["b"], "a": base["a"]}) == print_of_base
    others = [
        base | {"a": changed},
        base | {"a": base["a"].view(2, 3)},
        base | {"a": base["a"].view(torch.int32)},
        {"c": base["a"], "b": base["b"]},
        {"a": base["a"]},
    ]
    assert len({print_of_base, *map(fingerprint, others)}) == 1 + len(others)


def test_the_fingerprint_takes_any_layout_and_type() -> None:
    weight = torch.randn(4, 3, 3, 3)
    assert fingerprint({"w": weight}) == fingerprint({"w": weight.to(memory_format=torch.channels_last)})
    fingerprint({"w": weight.bfloat16(), "n": torch.tensor(3), "empty": torch.empty(0, 2)})


def test_a_file_is_shown_without_its_folder() -> None:
    assert display_name("/some/where/vgg19.safetensors") == "vgg19.safetensors"
    assert display_name("imagenet") == "imagenet"
    assert display_name("random:0") == "random:0"
