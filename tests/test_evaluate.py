import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import python
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from slotscops import baselines, evaluate
from slotscops.build import build_model
from slotscops.config import load_config
from slotscops.evaluate import evaluate_split, network_predictor, score_predictions
from slotscops.features import open_cache
from slotscops.index import open_dataset
from slotscops.loader import Split, evaluation_batches
from slotscops.records import Batch


@pytest.fixture
def split(toy_shards: Path) -> Split:
    dataset = open_dataset(toy_shards)
    return Split(dataset, "train", open_cache(dataset, "relu5_4", 64), with_labels=True)


def labels_of(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Class of each sample (N,) and true labels (N, H, W)."""
    batch = split.read(np.arange(len(split)))
    assert batch.parts is not None
    return batch.class_ids.numpy(), batch.parts.numpy()


def test_scores_of_each_class_are_those_of_scikit_learn_on_the_same_labels(split: Split) -> None:
    config = load_config(None, ["encoder.name=features", "data.size=64"])
    network = build_model(config, 512).eval()
    scores = evaluate_split(network, split)
    classes, true = labels_of(split)
    predict = network_predictor(network, torch.device("cpu"))
    predicted = predict(split.read(np.arange(len(split)))).numpy()
    assert len(np.unique(predicted)) > 1
    assert len(scores.per_class()) == 2
    for name, row in scores.per_class().items():
        mine = classes == split.dataset.class_names.index(name)
        assert row["nmi"] == pytest.approx(normalized_mutual_info_score(true[mine].ravel(), predicted[mine].ravel()))
        assert row["ari"] == pytest.approx(adjusted_rand_score(true[mine].ravel(), predicted[mine].ravel()))
        foreground = true[mine] > 0
        assert row["fg_nmi"] == pytest.approx(
            normalized_mutual_info_score(true[mine][foreground], predicted[mine][foreground])
        )


def test_pooled_scores_keep_the_parts_of_different_classes_apart(split: Split) -> None:
    classes, true = labels_of(split)
    generator = np.random.default_rng(0)
    guess = torch.from_numpy(generator.integers(0, 4, true.shape))
    places = {split.key(sample): sample for sample in range(len(split))}

    def predict(batch: Batch) -> torch.Tensor:
        return guess[[places[key] for key in batch.keys]]

    scores = score_predictions(predict, evaluation_batches(split, 4), split.dataset, 4)
    joint = np.where(true > 0, true + 100 * classes[:, None, None], 0)
    assert scores.pooled()["nmi"] == pytest.approx(normalized_mutual_info_score(joint.ravel(), guess.numpy().ravel()))


def test_a_perfect_prediction_scores_1(split: Split) -> None:
    def predict(batch: Batch) -> torch.Tensor:
        assert batch.parts is not None
        return batch.parts

    scores = score_predictions(predict, evaluation_batches(split, 4), split.dataset, 30)
    for row in scores.per_class().values():
        assert row == pytest.approx(dict.fromkeys(row, 1.0))


def test_position_clusters_are_the_same_for_every_photo_and_kmeans_clusters_are_not(split: Split) -> None:
    batch = split.read(np.arange(4))
    position = baselines.fit("position", split, 6)(batch)
    assert position.shape == (4, 64, 64)
    assert (position == position[0]).all()
    assert len(position.unique()) == 6
    kmeans = baselines.fit("kmeans", split, 6)(batch)
    assert not (kmeans == kmeans[0]).all()


def test_a_pixel_goes_to_the_nearest_centre() -> None:
    """Features that say left or right half must come back as halves."""
    features = torch.zeros(2, 3, 4, 4, dtype=torch.float16)
    features[..., :2] = 5
    batch = Batch(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), features, None, None, torch.zeros(2), ["a", "b"])
    centres = torch.tensor([[0.0, 0, 0], [5, 5, 5]])
    labels = baselines._nearest_centre_predictor(centres, use_position=False)(batch)
    expected = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0]).expand(2, 8, 8)
    assert torch.equal(labels, expected)


def test_the_command_prints_a_table_and_writes_json(
    toy_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--baseline", "position", "--shards", str(toy_shards), "--json", str(tmp_path / "scores.json")]
    assert evaluate.main(arguments) == 0
    assert "FG-NMI" in capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert set(scores) == {"cow", "horse", "all classes"}
    assert set(scores["cow"]) == {"nmi", "ari", "fg_nmi", "fg_ari", "miou"}


def test_a_checkpoint_that_is_none_is_one_line_and_code_2(toy_shards: Path, tmp_path: Path) -> None:
    done = python("-m", "slotscops.evaluate", "--checkpoint", tmp_path / "nowhere", "--shards", toy_shards)
    assert done.returncode == 2
    assert done.stderr.startswith(f"slotscops: {tmp_path / 'nowhere'}: no such run or checkpoint; give runs/NAME")
    assert len(done.stderr.splitlines()) == 1
