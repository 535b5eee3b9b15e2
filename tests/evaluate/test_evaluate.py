import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import python, run, train
from forks import ranks
from scipy.optimize import nnls
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from slotscops.config import load_config
from slotscops.core.errors import UserError
from slotscops.core.records import IGNORED, Batch
from slotscops.evaluate import __main__ as evaluate
from slotscops.evaluate import baselines, scoreboard
from slotscops.evaluate import ceiling as supervised
from slotscops.evaluate import published_numbers as literature
from slotscops.features.cache import open_cache
from slotscops.loader.batches import evaluation_batches
from slotscops.loader.split import Split
from slotscops.metrics.protocols import ALL_CLASSES, ORDERS, PROTOCOLS, Prediction, Predictor
from slotscops.metrics.scoring import evaluate_split, network_predictor, score_predictions
from slotscops.model import clusters
from slotscops.model.refinement import refine_maps
from slotscops.shard import __main__ as shard
from slotscops.shard.index import open_dataset
from slotscops.train.build import build_model


@pytest.fixture
def split(toy_shards: Path) -> Split:
    dataset = open_dataset(toy_shards)
    return Split(dataset, "train", open_cache(dataset, "relu5_4", 64), with_labels=True)


def labels_of(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Class of each sample (N,) and true labels (N, H, W)."""
    batch = split.read(np.arange(len(split)))
    assert batch.part_labels is not None
    return batch.class_ids.numpy(), batch.part_labels.numpy()


def test_scores_of_each_class_are_those_of_scikit_learn_on_the_same_labels(split: Split) -> None:
    config = load_config(None, ["encoder.name=features", "data.size=64"])
    network = build_model(config, 512).eval()
    scores = evaluate_split(network, split)
    assert scores is not None
    assert evaluate_split(network, split, should_stop=lambda: True) is None
    classes, true = labels_of(split)
    predict = network_predictor(network, torch.device("cpu"))
    predicted = predict(split.read(np.arange(len(split)))).labels.numpy()
    assert len(np.unique(predicted)) > 1
    assert len(scores.seen_classes()) == 2
    foreground_rows = scores.scores("foreground", "first")
    for name, row in scores.scores("own", "first").items():
        if name == ALL_CLASSES:
            continue
        mine = classes == split.dataset.class_names.index(name)
        assert row["nmi"] == pytest.approx(normalized_mutual_info_score(true[mine].ravel(), predicted[mine].ravel()))
        assert row["ari"] == pytest.approx(adjusted_rand_score(true[mine].ravel(), predicted[mine].ravel()))
        foreground = true[mine] > 0
        assert foreground_rows[name]["nmi"] == pytest.approx(
            normalized_mutual_info_score(true[mine][foreground], predicted[mine][foreground])
        )


def test_pooled_scores_keep_the_parts_of_different_classes_apart(split: Split) -> None:
    classes, true = labels_of(split)
    generator = np.random.default_rng(0)
    guess = torch.from_numpy(generator.integers(0, 4, true.shape))
    places = {split.key(sample): sample for sample in range(len(split))}

    def predict(batch: Batch) -> Prediction:
        labels = guess[[places[key] for key in batch.keys]]
        return Prediction(labels, labels.clamp(min=1))

    scores = score_predictions(predict, evaluation_batches(split, 4), split.part_names, 4)
    joint = np.where(true > 0, true + 100 * classes[:, None, None], 0)
    assert scores.pooled()["nmi"] == pytest.approx(normalized_mutual_info_score(joint.ravel(), guess.numpy().ravel()))


def test_a_perfect_prediction_scores_1(split: Split) -> None:
    def predict(batch: Batch) -> Prediction:
        assert batch.part_labels is not None
        return Prediction(batch.part_labels, batch.part_labels)

    scores = score_predictions(predict, evaluation_batches(split, 4), split.part_names, 30)
    for protocol in PROTOCOLS:
        row = scores.scores(protocol, "first")["cow"]
        assert row == pytest.approx(dict.fromkeys(row, 1.0))


def test_position_clusters_are_the_same_for_every_photo_and_kmeans_clusters_are_not(split: Split) -> None:
    batch = split.read(np.arange(4))
    position = baselines.fit("position", split, 6)(batch).labels
    assert position.shape == (4, 64, 64)
    assert (position == position[0]).all()
    assert len(position.unique()) == 6
    kmeans = baselines.fit("kmeans", split, 6)(batch).labels
    assert not (kmeans == kmeans[0]).all()


@pytest.mark.parametrize("name", baselines.NAMES)
def test_a_baseline_finds_g_labels_and_one_fewer_on_the_object_and_the_same_again(split: Split, name: str) -> None:
    batch = split.read(np.arange(6))
    first, second = (baselines.fit(name, split, 4, seed=1, transform="sqrt")(batch) for _ in range(2))
    assert set(first.labels.unique().tolist()) <= set(range(4))
    assert set(first.labels_without_background.unique().tolist()) <= set(range(1, 4))
    assert torch.equal(first.labels, second.labels)
    assert torch.equal(first.labels_without_background, second.labels_without_background)


def test_a_classifier_taught_the_true_parts_beats_clusters_of_the_same_features(split: Split) -> None:
    def score(predict: Predictor, num_predicted: int, own_parts: bool) -> float:
        batches = evaluation_batches(split, 16)
        scores = score_predictions(predict, batches, split.part_names, num_predicted, own_parts)
        return scores.scores("own", "small")["all classes"]["nmi"]

    taught, again = (supervised.fit(split, seed=1) for _ in range(2))
    batch = split.read(np.arange(6))
    assert torch.equal(taught(batch).labels, again(batch).labels)
    assert set(taught(batch).labels_without_background.unique().tolist()) <= set(
        range(1, supervised.num_predicted(split))
    )
    assert score(taught, supervised.num_predicted(split), True) > 1.5 * score(
        baselines.fit("kmeans", split, 6), 6, False
    )


def test_the_classifier_is_not_taught_pixels_to_be_ignored(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    read, taught = split.read, []

    def read_with_rim(samples: np.ndarray) -> Batch:
        batch = read(samples)
        assert batch.part_labels_small is not None
        labels = batch.part_labels_small.clone()
        labels[:, :20] = IGNORED  # one of four rows of cells and a part of the second
        return dataclasses.replace(batch, part_labels_small=labels)

    def classify(cells: np.ndarray, labels: np.ndarray, seed: int) -> object:
        taught.append(labels)
        return classifier(cells, labels, seed)

    classifier = supervised._classifier
    monkeypatch.setattr(supervised, "_classifier", classify)
    monkeypatch.setattr(split, "read", read_with_rim)
    predict = supervised.fit(split)
    assert sum(map(len, taught)) == len(split) * 3 * 4
    assert max(labels.max() for labels in taught) < supervised.num_predicted(split)
    assert predict(split.read(np.arange(2))).labels.max() < supervised.num_predicted(split)


def test_of_a_class_that_it_was_never_taught_the_classifier_finds_nothing(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    class_ids = split.class_ids()
    monkeypatch.setattr(split, "class_ids", lambda: np.full_like(class_ids, class_ids[0]))
    predict = supervised.fit(split)
    assert predict(split.read(np.flatnonzero(class_ids == class_ids[0]))).labels.any()
    assert not predict(split.read(np.flatnonzero(class_ids != class_ids[0]))).labels.any()


def test_vectors_inside_objects_are_those_of_covered_cells(split: Split) -> None:
    """Features that say how much of their cell the object covers must all come back as more than half."""

    def coverage(batch: Batch) -> torch.Tensor:
        assert batch.object_masks is not None
        return torch.nn.functional.adaptive_avg_pool2d(batch.object_masks[:, None].float(), 16)

    inside = clusters.sample_vectors(split, 0, coverage, inside_objects=True)
    everywhere = clusters.sample_vectors(split, 0, coverage)
    assert inside.min() >= 0.5
    assert len(inside) == int((everywhere >= 0.5).sum())
    assert len(everywhere) == len(split) * 256


def test_labels_of_a_baseline_are_refined_where_asked(split: Split) -> None:
    batch = split.read(np.arange(4))
    plain, refined = (baselines.fit("kmeans", split, 4, refine=refine)(batch) for refine in (False, True))
    shares = torch.nn.functional.one_hot(plain.labels, 4).movedim(-1, 1).float()
    assert torch.equal(refined.labels, refine_maps(shares, batch.images).argmax(1))
    assert not torch.equal(refined.labels, plain.labels)


def test_of_partitions_as_good_as_each_other_the_least_even_is_taken() -> None:
    """Two pairs of near groups, one pair with more vectors: three clusters cut one pair, and either is as cheap."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([400, 400, 100, 100])
    groups = torch.arange(4).repeat_interleave(counts)
    # The inertia left in a pair is its number times the square of half its distance: 800 * 1 and 200 * 3.99.
    centres = torch.tensor([[0.0, 0.0], [0.0, 2.0], [50.0, 0.0], [50.0, 3.995]])
    vectors = centres[groups] + 0.01 * torch.randn(1000, 2, generator=generator)
    sizes = []
    for find in (clusters.find_centres, clusters.find_uneven_centres):
        nearest = torch.cdist(vectors, find(vectors, 3, seed=0)).argmin(dim=1)
        sizes.append(sorted(torch.bincount(nearest).tolist()))
    assert sizes == [[200, 400, 400], [100, 100, 800]]


def test_non_negative_factors_are_found_again_and_so_are_their_weights() -> None:
    """X = W H with factors that share no channel: the factorisation is unique up to order and scale."""
    generator = torch.Generator().manual_seed(0)
    true = torch.zeros(3, 12)
    for factor in range(3):
        true[factor, 4 * factor : 4 * factor + 4] = torch.rand(4, generator=generator) + 0.5
    true = torch.nn.functional.normalize(true, dim=1)
    weights = torch.rand(3000, 3, generator=generator) ** 4
    found = clusters.find_factors(weights @ true, 3, seed=0)
    likeness = found @ true.T
    order = likeness.argmax(dim=1)
    assert sorted(order.tolist()) == [0, 1, 2]
    assert likeness.amax(dim=1).min() > 0.99
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))  # or a weight would say nothing


def test_weights_of_overlapping_factors_are_those_of_scipy() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = torch.nn.functional.normalize(torch.rand(3, 12, generator=generator) ** 3, dim=1)
    vectors = torch.rand(1, 12, 4, 4, generator=generator) ** 2
    solved = baselines.factor_weights(vectors, factors)
    expected = [nnls(factors.T.numpy(), cell.numpy())[0] for cell in vectors[0].flatten(1).T]
    np.testing.assert_allclose(solved[0].flatten(1).T.numpy(), np.array(expected), atol=0.02)


def test_a_pixel_goes_to_the_nearest_centre() -> None:
    """Features that say left or right half must come back as halves."""
    features = torch.zeros(2, 3, 4, 4, dtype=torch.float16)
    features[..., :2] = 5
    batch = Batch(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), features, None, None, torch.zeros(2), ["a", "b"])
    centres = torch.tensor([[0.0, 0, 0], [5, 5, 5]])
    assert batch.features is not None
    labels = baselines.nearness(batch.features.float(), centres).argmax(dim=1)
    assert torch.equal(labels, torch.tensor([1, 1, 0, 0]).expand(2, 4, 4))


def rows_of(value: float) -> dict[scoreboard.Row, dict[str, float]]:
    scores = dict.fromkeys(("nmi", "ari", "miou", "majority_miou"), value)
    return {scoreboard.Row(protocol, order, "horse"): scores for protocol in PROTOCOLS for order in ORDERS}


def scored(seed: int, value: float, steps: int = 10) -> scoreboard.Scored:
    settings = {"seed": seed, "run_dir": f"runs/{seed}", "train": {"total_steps": steps}}
    return scoreboard.Scored(f"runs/{seed}", "run", 4, rows_of(value), {"horse": value}, settings)


def test_runs_that_differ_in_their_seed_alone_have_a_mean_and_a_sample_deviation() -> None:
    runs = [scored(0, 0.2), scored(1, 0.4), scored(2, 0.6), scored(3, 0.9, steps=11)]
    (mean,) = scoreboard.means([*runs, scoreboard.Scored("position", "baseline", 4, rows_of(0.1), {})])
    assert mean.names == ["runs/0", "runs/1", "runs/2"]
    for protocol in PROTOCOLS:
        row = scoreboard.Row(protocol, "small", "horse")
        assert mean.mean.rows[row]["ari"] == pytest.approx(0.4)
        assert mean.deviation.rows[row]["ari"] == pytest.approx(0.2)
    assert mean.mean.landmarks == pytest.approx({"horse": 0.4})
    (nothing,) = scoreboard.means([scored(0, float("nan")), scored(1, 0.4)])  # a split without a pixel of a true part
    assert np.isnan(nothing.deviation.rows[scoreboard.Row("own", "first", "horse")]["nmi"])


def test_published_numbers_stand_only_beside_the_protocol_class_and_number_of_parts_they_are_of(
    capsys: pytest.CaptureFixture[str],
) -> None:
    scoreboard.show("title", [scored(0, 0.2)], full=True)
    own, rest = capsys.readouterr().out.split("given object mask")
    mask, foreground = rest.split("foreground only")
    assert "SCOPS, published" in mask
    assert "29.4" in mask
    assert "55.7" in mask
    assert "published" not in own
    assert "29.4" not in foreground
    assert "other people's numbers, not measured here" in foreground  # below all tables
    assert literature.published_scores("horse", 5) == []
    assert literature.published_scores("person", 4) == []


def test_the_small_table_shows_four_numbers_of_each_method_and_says_which_are_good(
    toy_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--baseline", "position,kmeans", "--shards", str(toy_shards), "--json", str(tmp_path / "scores.json")]
    assert evaluate.main(arguments) == 0
    out = capsys.readouterr().out
    assert "100 means that found and true parts are the same" in out
    scores = json.loads((tmp_path / "scores.json").read_text())["methods"][0]["scores"]
    expected = [scores[place]["small"]["all classes"][score] for place in ("own", "mask") for score in ("nmi", "ari")]
    (row,) = [line for line in out.splitlines() if "position" in line and "│" in line]
    assert [cell.strip() for cell in row.split("│")[2:-1]] == [f"{100 * value:.1f}" for value in expected]
    assert evaluate.main(["--read", str(tmp_path / "scores.json")]) == 0
    assert row in capsys.readouterr().out
    scoreboard.show("title", [scored(0, 0.2), scored(1, 0.4)])
    assert "30.0 ± 14.1" in capsys.readouterr().out


def test_the_command_prints_a_table_a_protocol_and_writes_json(
    toy_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--baseline", "position,dff", "--shards", str(toy_shards), "--json", str(tmp_path / "scores.json")]
    assert evaluate.main([*arguments, "--landmarks", "--full", "--clusters", "4"]) == 0
    out = capsys.readouterr().out
    for needed in ("own background", "given object mask", "foreground only", "FG-NMI", "landmarks", "position"):
        assert needed in out
    methods = json.loads((tmp_path / "scores.json").read_text())["methods"]
    assert [method["name"] for method in methods] == ["position", "dff relu5_4 64 px"]
    for method in methods:
        assert method["num_parts"] == 3
        assert set(method["scores"]) == set(PROTOCOLS)
        assert set(method["scores"]["own"]) == set(ORDERS)
        assert set(method["scores"]["mask"]["small"]) == {"cow", "horse", "all classes"}
        assert set(method["scores"]["mask"]["small"]["cow"]) == {"nmi", "ari", "miou", "majority_miou"}
        assert 0 < method["landmark_error"]["cow"] < 0.7
    assert evaluate.main(["--read", str(tmp_path / "scores.json"), "--full"]) == 0
    again = capsys.readouterr().out
    assert set(again.splitlines()[1:]) == set(out.splitlines()[1:])  # but for what was scored; classes by name


@pytest.mark.parametrize("content", [None, "{", "[]", '{"methods": [{"name": "x"}]}'])
def test_scores_that_cannot_be_read_again_are_one_line(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "scores.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"needed scores written by python -m slotscops\.evaluate --json"):
        evaluate.main(["--read", str(path)])


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        ([], "give --checkpoint RUN, --baseline NAME or both"),
        (["--read", "x", "--baseline", "kmeans"], "without --checkpoint and --baseline"),
        (["--baseline", "kmeans"], "give --shards SHARDS"),
        (["--baseline", "kmean", "--shards", "x"], "did you mean 'kmeans'?"),
        (["--baseline", "kmeans", "--shards", "x", "--clusters", "1"], "needed 2 to 255"),
    ],
)
def test_a_mistaken_command_is_told_what_to_give(arguments: list[str], needed: str) -> None:
    with pytest.raises(UserError, match=needed.replace("?", r"\?")):
        evaluate.main(arguments)


def test_one_and_two_processes_give_the_same_numbers(toy_shards: Path, tmp_path: Path) -> None:
    done = train([sys.executable], toy_shards, tmp_path / "run", "train.total_steps=2", "train.learning_rate=0.01")
    assert done.returncode == 0, done.stderr
    contents = []
    for launcher in ([sys.executable], ranks(2)):
        out = tmp_path / f"{len(contents)}.json"
        # The shards and the baselines' features are those of the run; given twice, it deviates from itself by nothing.
        runs = ["--checkpoint", str(tmp_path / "run"), str(tmp_path / "run"), "--baseline", "kmeans"]
        runs += ["--shards", str(toy_shards), "--photos", str(toy_shards / "photos"), "--merge", "left-right"]
        options = ["--split", "train", "--landmarks", "--full", "--json", str(out)]
        done = run([*launcher, "-m", "slotscops.evaluate", *runs, *options])
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("foreground only") == 1
        contents.append(json.loads(out.read_text()))
    assert contents[0] == contents[1]
    assert contents[0]["means"][0]["deviation"]["scores"]["own"]["first"]["cow"]["nmi"] == 0
    assert contents[0]["methods"][0] == contents[0]["methods"][1]
    assert contents[0]["methods"][2]["scores"]["photo"]["small"]["cow"]["nmi"] > 0
    assert contents[0]["methods"][2]["name"] == "kmeans relu5_4 64 px"


def test_a_checkpoint_that_is_none_is_one_line_and_code_2(toy_shards: Path, tmp_path: Path) -> None:
    done = python("-m", "slotscops.evaluate", "--checkpoint", tmp_path / "nowhere", "--shards", toy_shards)
    assert done.returncode == 2
    assert done.stderr.startswith(f"slotscops: {tmp_path / 'nowhere'}: no such run or checkpoint; give runs/NAME")
    assert len(done.stderr.splitlines()) == 1


def test_on_real_annotations_the_orders_differ_and_every_protocol_has_its_numbers(
    real_data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "shards"
    small = ["--size", "64", "--no-features", "--workers", "1", "--min-box-val", "0.1"]
    assert shard.main(["--root", str(real_data / "pascal_part"), "--out", str(out), *small]) == 0
    split = Split(open_dataset(out), "train", None, with_labels=True)
    batch = split.read(np.arange(len(split)))
    assert batch.part_labels is not None
    assert batch.part_labels_small is not None
    assert torch.equal(batch.part_labels > 0, batch.part_labels_small > 0)
    # Heads are listed before the eyes on them: only with the smallest on top are there parts below others.
    assert (batch.part_labels != batch.part_labels_small).float().mean() > 0.01
    assert len(torch.unique(batch.part_labels_small)) > len(torch.unique(batch.part_labels))
    json_path = tmp_path / "scores.json"
    command = ["--baseline", "position", "--shards", str(out), "--split", "train", "--json", str(json_path)]
    assert evaluate.main(command) == 0
    scores = json.loads(json_path.read_text())["methods"][0]["scores"]
    values = {scores[protocol][order][ALL_CLASSES]["nmi"] for protocol in PROTOCOLS for order in ORDERS}
    assert len(values) == len(PROTOCOLS) * len(ORDERS)
    assert scores["mask"]["first"][ALL_CLASSES]["nmi"] > scores["own"]["first"][ALL_CLASSES]["nmi"]
