"""The whole photos of `evaluate --photos`: what runs and baselines find in them.

Shapes: H x W pixels of a photo.
"""

import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from slotscops.core import console, pretrained
from slotscops.core.errors import UserError
from slotscops.core.photos import to_array
from slotscops.core.pixels import crop_photo, whole_square
from slotscops.core.records import Batch
from slotscops.datasets.pascal_part.source import open_pascal_part
from slotscops.datasets.photo_folder import PhotoFolder
from slotscops.datasets.sources import Source
from slotscops.evaluate.baselines import Baseline
from slotscops.features.cache import FeatureCache
from slotscops.features.compact import project
from slotscops.features.teacher import Teacher, compute_features
from slotscops.loader.split import Split
from slotscops.metrics.photos import PhotoLabeller, PhotoSet
from slotscops.metrics.protocols import ProtocolScores
from slotscops.segment.segmenter import FoundParts, Segmenter
from slotscops.shard.index import ShardDataset
from slotscops.train.build import Trained

Teachers = Mapping[tuple[str, str, str], Teacher]  # by network, layer and sha256 of the weights


@dataclass(frozen=True)
class WholePhotos:
    """The photos of a split, and what is needed to find parts in them. Made by `open_whole_photos`."""

    _photos: PhotoSet
    _crop_size: int  # side of the shards' crops, pixels
    _segmenters: list[Segmenter]  # one for each run
    _teacher: Teacher | None  # of the baselines; None if no baseline needs it

    def __len__(self) -> int:
        """Number of photos."""
        return len(self._photos)

    def score(self, label: PhotoLabeller, scores: ProtocolScores, name: str) -> None:
        """Finds the parts in this process's share of the photos, and adds them to the scores.

        Args:
            name: of the method, for the progress bar.
        """
        mine = self._photos.batches()[console.rank() :: console.world_size()]
        self._photos.score(label, console.track(mine, len(mine), f"scoring {name}, batches of whole photos"), scores)

    def labeller_of_run(self, trained: Trained) -> PhotoLabeller:
        """Finds parts as `segment` does. A network with parts of their own for each class is told the class."""
        segmenter = next(one for one in self._segmenters if one.trained is trained)

        def label(photos: Sequence[Image.Image], class_name: str) -> list[NDArray[np.uint8]]:
            told = class_name if segmenter.class_names else None
            return [found.winners for found in segmenter.segment_batch(photos, told)]

        return label

    def labeller_of_baseline(self, baseline: Baseline, cache: FeatureCache | None) -> PhotoLabeller:
        """Clusters photos as `segment` gives them to a network: padded to a square, then at the photo's own size.

        Args:
            cache: the features that the baseline was fit to; None if it reads none.
        """

        def label(photos: Sequence[Image.Image], class_name: str) -> list[NDArray[np.uint8]]:
            squares = [crop_photo(photo, whole_square(photo.size), self._crop_size) for photo in photos]
            images = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)
            features = None
            if cache is not None:
                assert self._teacher is not None
                found = compute_features(self._teacher, images, cache.manifest["input_size"])
                features = project(found.cpu(), cache.projection)
            unknown = torch.zeros(len(photos), dtype=torch.int64)
            logits = baseline.logits(Batch(images, features, None, None, unknown, [""] * len(photos))).numpy()
            return [FoundParts(to_array(photo), maps).labels for photo, maps in zip(photos, logits, strict=True)]

        return label


def open_whole_photos(
    options: Namespace,
    split: Split,
    runs: Sequence[Trained],
    cache: FeatureCache | None,
    device: torch.device,
    stack: ExitStack,
) -> WholePhotos:
    """Opens the photos, and loads the teachers.

    Args:
        options: of the command `evaluate`, with --photos.
        runs: are scored on the photos.
        cache: what a baseline was fit to that reads features; None if none does.
        stack: what was opened is closed with it.

    Raises:
        UserError: a photo is missing, or weights cannot be found or are not those of the training or of the cache.
    """
    photos = PhotoSet(split, _open_source(options, split.dataset, stack))
    teachers: dict[tuple[str, str, str], Teacher] = {}  # loaded once for all methods
    segmenters = []
    for trained in runs:
        teacher = trained.config.teacher
        name = (teacher.network, teacher.layer, trained.state.teacher_sha256)
        segmenters.append(Segmenter(trained, options.teacher_weights, device, teachers.get(name)))
        if segmenters[-1].teacher is not None and trained.state.teacher_sha256:
            teachers[name] = segmenters[-1].teacher
    own_teacher = None if cache is None else _teacher_of(cache, options.teacher_weights, teachers).to(device)
    return WholePhotos(photos, split.dataset.size, segmenters, own_teacher)


def _open_source(options: Namespace, dataset: ShardDataset, stack: ExitStack) -> Source:
    """The photos that the shards were made of: a PASCAL-Part tree, or a folder of photos if --parts is given."""
    if options.parts is not None:
        return PhotoFolder(options.photos, options.parts, 0.0, dataset.class_names[0])
    scratch = stack.enter_context(tempfile.TemporaryDirectory())
    return stack.enter_context(open_pascal_part(options.photos, Path(scratch)))


def _teacher_of(cache: FeatureCache, weights: str | None, loaded: Teachers) -> Teacher:
    """The network that made the features of the cache.

    Raises:
        UserError: its weights cannot be found, or are not those that the features were made with.
    """
    made_with = cache.manifest
    name = (made_with["network"], made_with["layer"], made_with["weights_sha256"])
    if name in loaded:
        return loaded[name]
    if weights is None and not pretrained.is_found_by_name(made_with["weights"]):
        raise UserError(
            f"--photos: the features of the shards were made with the weights {made_with['weights']}; give that file "
            "with --teacher-weights"
        )
    teacher = Teacher(made_with["layer"], weights or made_with["weights"], made_with["network"])
    if teacher.fingerprint != made_with["weights_sha256"]:
        raise UserError(
            f"--teacher-weights: the features of the shards were made with the weights {made_with['weights']} (sha256 "
            f"{made_with['weights_sha256'][:12]}), came {teacher.weights_name} ({teacher.fingerprint[:12]})"
        )
    return teacher
