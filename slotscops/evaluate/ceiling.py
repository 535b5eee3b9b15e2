"""An upper bound for what the teacher's features can give: a classifier that is trained on the true parts.

It is not a competitor of the other methods, because it sees the labels that they have to find. But a score that it
does not reach can hardly be reached with these features on this grid. There is one classifier for each class of
objects, and the class of each image is given.

Shapes: B images, C channels on an h x w grid, H x W pixels, T true labels of a class, M sampled cells.
"""

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from slotscops.config import BaselineTransform
from slotscops.core.records import IGNORED, Batch
from slotscops.evaluate.baselines import transformed_features
from slotscops.loader.split import Split
from slotscops.metrics.protocols import Prediction, Predictor
from slotscops.model.clusters import sample_vectors
from slotscops.model.refinement import refine_maps

_HIDDEN = 256
_NUM_PASSES = 15  # passes over at most 50,000 cells


def fit(train: Split, seed: int = 0, transform: BaselineTransform = "none", refine: bool = False) -> Predictor:
    """Fits a network with one hidden layer (scikit-learn) to single cells, for each class of the training split.

    Args:
        train: must be read with labels. The label of a cell is that of most of its pixels, with the smallest part on
            top. Ignored pixels do not count, and cells that hold nothing else are not used.
        seed: for the sampled cells and the networks.
        transform: applied to the features, see `TargetTransform`.
        refine: refine the maps with `refine_maps`, as networks do with `decoder.refinement: pamr`.

    Returns:
        A function that predicts the labels of a batch; see `Prediction`.
    """

    def labelled(batch: Batch) -> Tensor:
        features = transformed_features(batch, transform)
        return torch.cat([features, _cell_labels(batch, features.shape[-2], features.shape[-1])], dim=1)

    classifiers = {}
    for class_id in np.unique(train.class_ids()).tolist():
        cells = sample_vectors(train, seed, labelled, class_id=class_id).numpy()
        cells = cells[cells[:, -1] != IGNORED]
        if len(cells):
            classifiers[class_id] = _classifier(cells[:, :-1], cells[:, -1].astype(np.int64), seed)
    num_labels = num_predicted(train)

    def predict(batch: Batch) -> Prediction:
        features = transformed_features(batch, transform)
        maps = torch.zeros(len(batch), num_labels, *features.shape[-2:])
        for class_id in set(batch.class_ids.tolist()) & set(classifiers):
            chosen = batch.class_ids == class_id
            cells = features[chosen].movedim(1, -1)
            shares = classifiers[class_id].predict_proba(cells.flatten(0, 2).numpy())
            of_class = torch.zeros(*cells.shape[:3], num_labels)
            of_class[..., classifiers[class_id].classes_] = torch.from_numpy(shares).float().view(*cells.shape[:3], -1)
            maps[chosen] = of_class.movedim(-1, 1)
        maps = functional.interpolate(maps, batch.images.shape[-2:], mode="bilinear", align_corners=True)
        if refine:
            maps = refine_maps(maps, batch.images)
        return Prediction(maps.argmax(dim=1), maps[:, 1:].argmax(dim=1) + 1)

    return predict


def num_predicted(split: Split) -> int:
    """Number of labels that the predictor of `fit` uses: the largest number of parts of a class, plus 1 for no part."""
    return 1 + max(1, *(len(names) for names in split.part_names.values()))


def _classifier(cells: NDArray[np.float32], labels: NDArray[np.int64], seed: int) -> Any:
    """A scikit-learn classifier, fit to (M, C) cells with (M,) labels."""
    from sklearn.dummy import DummyClassifier  # imported here, because it takes a second
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(labels)) < 2:
        return DummyClassifier().fit(cells, labels)
    network = MLPClassifier((_HIDDEN,), batch_size=min(256, len(cells)), max_iter=_NUM_PASSES, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the number of passes is limited on purpose
        return make_pipeline(StandardScaler(), network).fit(cells, labels)


def _cell_labels(batch: Batch, height: int, width: int) -> Tensor:
    """(B, 1, h, w) float32 label of each cell: the one that most of its pixels have, `IGNORED` if none has any."""
    assert batch.part_labels_small is not None
    is_known = batch.part_labels_small != IGNORED
    one_hot = functional.one_hot(batch.part_labels_small.long().where(is_known, 0)).movedim(-1, 1)  # (B, T, H, W)
    shares = functional.adaptive_avg_pool2d((one_hot * is_known[:, None]).float(), (height, width))
    most, labels = shares.max(dim=1, keepdim=True)
    return labels.float().where(most > 0, IGNORED)
