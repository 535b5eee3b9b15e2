"""Many classes in one model: `slots.per_class: own`."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import metrics, train
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

import slotscops
from slotscops.config import config_from_mapping, load_config
from slotscops.core.errors import UserError
from slotscops.evaluate import __main__ as evaluate
from slotscops.features.cache import open_cache
from slotscops.loader.split import Split
from slotscops.model.basis import start_from_features
from slotscops.model.encoder import FeatureEncoder
from slotscops.model.network import SlotScops, build_network
from slotscops.segment import __main__ as segment
from slotscops.shard.index import open_dataset
from slotscops.train.run.checkpoint import load_checkpoint
from slotscops.train.run.folder import resolve_checkpoint

OWN = ["slots.per_class=own", "decoder.maps=attention", "basis.init=kmeans", "train.learning_rate=0.01"]


def network_of(num_classes: int | None, *settings: str) -> SlotScops:
    torch.manual_seed(0)
    config = load_config(None, ["decoder.maps=attention", "slots.num_parts=2", *settings])
    return build_network(FeatureEncoder(8), config, 8, num_classes)


@pytest.mark.parametrize("init", ["learned", "image_conditioned"])
def test_each_image_is_seen_as_by_a_network_of_its_class_alone(init: str) -> None:
    network = network_of(3, f"slots.init={init}")
    inputs, class_ids = torch.randn(4, 8, 5, 5), torch.tensor([2, 0, 2, 1])
    output = network(inputs, class_ids=class_ids)
    for number, class_id in enumerate(class_ids.tolist()):
        alone = network_of(3, f"slots.init={init}")
        single = network_of(None, f"slots.init={init}")
        tensors = {name: tensor for name, tensor in alone.state_dict().items() if not name.startswith("class_head")}
        tensors["slot_attention.start"] = tensors["slot_attention.start"][class_id]
        tensors["basis_parameter"] = tensors["basis_parameter"][2 * class_id : 2 * class_id + 2]
        single.load_state_dict(tensors)
        expected = single(inputs[number : number + 1])
        torch.testing.assert_close(output.logits[number], expected.logits[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.basis[number], expected.basis)


def test_bf16_does_not_round_the_rows_of_a_class() -> None:
    network, class_ids = network_of(3), torch.tensor([2, 0])
    exact = network.basis(class_ids)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network.basis(class_ids)
    assert torch.equal(rounded, exact)


def test_the_guess_decides_where_no_class_is_given_and_trains_nothing_but_itself() -> None:
    network = network_of(3)
    inputs = torch.randn(5, 8, 4, 4)
    guessed = network(inputs)
    assert guessed.class_logits is not None
    same = network(inputs, class_ids=guessed.class_logits.argmax(1))
    assert torch.equal(guessed.logits, same.logits)
    cross_entropy(guessed.class_logits, torch.tensor([0, 1, 2, 0, 1])).backward()
    assert {name for name, p in network.named_parameters() if p.grad is not None} == {
        "class_head.weight",
        "class_head.bias",
    }


@pytest.mark.parametrize(
    ("setting", "named"),
    [("slots.init=shared_gaussian", r"slots\.init is shared_gaussian"), ("decoder.maps=head_only", "head_only")],
)
def test_what_has_no_starts_of_its_own_is_refused(setting: str, named: str) -> None:
    with pytest.raises(UserError, match=rf"slots\.per_class is own, but .*{named}"):
        network_of(3, setting)


def test_a_class_starts_from_clusters_of_its_own_photos_and_one_without_photos_from_chance(toy_shards: Path) -> None:
    dataset = open_dataset(toy_shards)
    slots = {"per_class": "own", "num_parts": 2}
    config = config_from_mapping({"slots": slots, "basis": {"init": "kmeans"}, "encoder": {"name": "features"}}, "test")
    split = Split(dataset, "train", open_cache(dataset, "relu5_4", 64), with_labels=True)
    present = sorted(set(split.class_ids().tolist()))
    num_classes = max(present) + 2  # the last one has no photos
    network = build_network(FeatureEncoder(512), config, 512, num_classes)
    before = network.basis.basis_parameter.detach().clone().split(2)
    start_from_features(network.basis, network.target, split, config)
    after = network.basis.basis_parameter.detach().split(2)
    moved = [number for number in range(num_classes) if not torch.equal(before[number], after[number])]
    assert moved == present
    assert len(present) == 2
    assert not torch.equal(after[present[0]], after[present[1]])


@pytest.fixture(scope="module")
def run(toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps without a break, and the same six with a stop after three. Both must end with the same result."""
    folder = tmp_path_factory.mktemp("own")
    for name, stops in (("straight", [[]]), ("resumed", [["train.stop_after_steps=3"], []])):
        for settings in stops:
            done = train(["python"], toy_shards, folder / name, *OWN, "train.eval_every_steps=6", *settings)
            assert done.returncode == 0, done.stderr
    return folder / "straight"


def test_a_run_with_own_classes_resumes_exactly_and_learns_to_tell_them_apart(run: Path, toy_shards: Path) -> None:
    folders = [resolve_checkpoint(run.parent / name) for name in ("straight", "resumed")]
    tensors = [load_file(folder / "model.safetensors") for folder in folders]
    assert tensors[0]["slot_attention.start"].ndim == 3
    for name, tensor in tensors[0].items():
        assert torch.equal(tensor, tensors[1][name]), name
    rows = metrics(run)
    assert rows[-1]["loss_classification"] < rows[0]["loss_classification"]
    assert "val_nmi" in rows[-1]
    assert load_checkpoint(folders[0]).state.class_names == open_dataset(toy_shards).class_names


def test_photos_are_segmented_as_the_class_given_or_guessed(run: Path, toy_shards: Path, tmp_path: Path) -> None:
    model = slotscops.load(run, teacher_weights="random:0")
    photo = next((toy_shards / "photos").rglob("*.jpg"))
    cow, horse = model.segment(photo, "cow"), model.segment(photo, "horse")
    assert (cow.class_name, horse.class_name) == ("cow", "horse")
    assert (cow.logits != horse.logits).any()
    guessed = model.segment(photo)
    assert (guessed.logits == {"cow": cow, "horse": horse}[str(guessed.class_name)].logits).all()
    with pytest.raises(UserError, match=r"class 'hrose'; did you mean 'horse'\?"):
        model.segment(photo, "hrose")
    command = ["--checkpoint", str(run), "--teacher-weights", "random:0", "--class", "cow", str(photo)]
    assert segment.main([*command, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / f"{photo.stem}.parts.png").exists()
    with pytest.raises(UserError, match=r"class 'hrose'"):
        segment.main([*command, "--class", "hrose", "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "index.html").exists()  # of the call before


def test_a_run_is_scored_on_its_own_classes_by_name_and_on_no_others(run: Path, toy_shards: Path) -> None:
    assert evaluate.main(["--checkpoint", str(run), "--shards", str(toy_shards)]) == 0
    trained = evaluate.load_model(run)
    dataset = open_dataset(toy_shards)
    names = dataset.class_names
    fewer = trained._replace(state=replace(trained.state, class_names=["horse", *names[2:]]))
    with pytest.raises(UserError, match=rf"holds {names[0]}, {names[1]}, but .* has slots of its own for horse, "):
        evaluate._classes_of_network(fewer, dataset, run)
    turned = trained._replace(state=replace(trained.state, class_names=["unicorn", *reversed(names)]))
    assert evaluate._classes_of_network(turned, dataset, run) == list(range(len(names), 0, -1))
