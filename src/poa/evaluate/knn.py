"""Weighted k-nearest-neighbour classification of frozen features (Wu et al., 2018; DINO's protocol)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from poa.config.checks import require, require_positive
from poa.data import ImageSource, SkippedImage
from poa.elastic import Subnet
from poa.errors import DataError, PoaWarning
from poa.evaluate.features import DEFAULT_LOADING, Features, Loading, extract_features
from poa.family import Family

DEFAULT_KS = (10, 20, 100, 200)
"""The numbers of neighbours of DINO's protocol."""


@dataclass(frozen=True)
class KnnConfig:
    """The numbers of the k-NN protocol."""

    ks: tuple[int, ...] = DEFAULT_KS
    """Numbers of neighbours."""
    temp: float = 0.07
    """Temperature of the votes."""

    def __post_init__(self) -> None:
        require(bool(self.ks) and min(self.ks) >= 1, "k", self.ks, "one or more numbers of 1 or more")
        require_positive("temp", self.temp)


DEFAULT_KNN = KnnConfig()


@dataclass(frozen=True)
class KnnResult:
    """k-NN accuracies of one sub-network."""

    subnet: str
    num_params: int
    flops: int
    accuracy: dict[int, float]
    """For each k the share of test images classified right, 0-1."""

    @property
    def best(self) -> float:
        """The best accuracy over all k."""
        return max(self.accuracy.values())


@dataclass(frozen=True)
class KnnReport:
    """The results of a k-NN evaluation."""

    results: tuple[KnnResult, ...]
    num_train: int
    num_test: int
    skipped: tuple[SkippedImage, ...]


def knn_accuracies(
    train: Float[Tensor, "N C"],
    train_labels: Int[Tensor, "N"],
    test: Float[Tensor, "M C"],
    test_labels: Int[Tensor, "M"],
    *,
    ks: Sequence[int] = DEFAULT_KS,
    temp: float = 0.07,
    chunk: int = 8192,
) -> dict[int, float]:
    """The share of test rows that the vote of their k nearest training rows gets right, for each k.

    Neighbours are those of largest cosine similarity s; each votes with weight exp(s / temp). At most
    chunk × chunk / 8 similarities exist at a time.

    Args:
        train: features of the labelled images.
        train_labels: their classes, counted from 0.
        test: features of the images to classify.
        test_labels: their classes.
        ks: numbers of neighbours; those above N are left out with a warning.
        temp: temperature of the votes.
        chunk: rows of `train` that are compared at a time.

    Raises:
        DataError: a k is below 1 or no k is at most N, or the temperature is not above 0.
    """
    if not ks or min(ks) < 1 or not temp > 0:
        raise DataError(f"k-NN needs numbers of neighbours of 1 or more and a temperature above 0; got {ks}, {temp}.")
    usable = [k for k in sorted(set(ks)) if 1 <= k <= len(train)]
    if not usable:
        raise DataError(f"k-NN needs at least {min(ks)} training images for k = {min(ks)}; got {len(train)}.")
    if len(usable) < len(set(ks)):
        left_out = ", ".join(str(k) for k in sorted(set(ks)) if k not in usable)
        warnings.warn(f"k = {left_out} left out: there are {len(train)} training images.", PoaWarning, stacklevel=2)
    num_classes = int(torch.cat([train_labels, test_labels]).max()) + 1
    right = dict.fromkeys(usable, 0)
    for rows, truth in zip(test.split(chunk // 8), test_labels.split(chunk // 8), strict=True):
        similarity, labels = _nearest(rows, train, train_labels, usable[-1], chunk)
        votes = F.one_hot(labels, num_classes) * (similarity / temp).exp().unsqueeze(-1)
        for k in usable:
            right[k] += int((votes[:, :k].sum(dim=1).argmax(dim=1) == truth).sum())
    return {k: count / len(test) for k, count in right.items()}


def _nearest(rows: Tensor, train: Tensor, labels: Tensor, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Similarities and labels of the k nearest training rows, nearest first."""
    rows = F.normalize(rows.float(), dim=-1)
    best = rows.new_empty(len(rows), 0)
    best_labels = labels.new_empty(len(rows), 0)
    for part, part_labels in zip(train.split(chunk), labels.split(chunk), strict=True):
        similarity, order = (rows @ F.normalize(part.float(), dim=-1).T).topk(min(k, len(part)), dim=1)
        best = torch.cat([best, similarity], dim=1)
        best_labels = torch.cat([best_labels, part_labels[order]], dim=1)
        best, order = best.topk(min(k, best.shape[1]), dim=1)
        best_labels = best_labels.gather(1, order)
    return best, best_labels


def evaluate_knn(
    family: Family,
    train: ImageSource,
    test: ImageSource,
    subnets: Sequence[Subnet],
    *,
    knn: KnnConfig = DEFAULT_KNN,
    loading: Loading = DEFAULT_LOADING,
    on_progress: Callable[[str, int], None] | None = None,
) -> KnnReport:
    """k-NN of many sub-networks at once: every image is decoded once, memory stays bounded.

    Args:
        family: the family; it runs on the device that its weights are on.
        train: labelled images that vote.
        test: labelled images to classify.
        subnets: the sub-networks.
        knn: the protocol's numbers.
        loading: batch size and workers.
        on_progress: called with ("train" or "test", images done).

    Raises:
        DataError: a source has no labels, or their classes differ.
    """
    train_labels, test_labels = _labels(train), _labels(test)
    if train.class_names and test.class_names and train.class_names != test.class_names:
        only = sorted(set(train.class_names) ^ set(test.class_names))[:5]
        raise DataError(
            f"{train.spec} and {test.spec} have different classes; only one of them has: {', '.join(only)}."
        )
    how = family.card.preprocessing

    def features(source: ImageSource, phase: str) -> AbstractContextManager[Features]:
        report = None if on_progress is None else partial(on_progress, phase)
        return extract_features(family.backbone, source, subnets, how, loading=loading, on_progress=report)

    with features(train, "train") as seen, features(test, "test") as unseen:
        truth = (torch.from_numpy(train_labels[seen.indices]), torch.from_numpy(test_labels[unseen.indices]))
        results = tuple(
            KnnResult(
                str(subnet),
                family.card.num_params(subnet),
                family.card.flops(subnet),
                knn_accuracies(seen.of(subnet), truth[0], unseen.of(subnet), truth[1], ks=knn.ks, temp=knn.temp),
            )
            for subnet in subnets
        )
        return KnnReport(results, len(seen.indices), len(unseen.indices), (*seen.skipped, *unseen.skipped))


def _labels(source: ImageSource) -> np.ndarray:
    if source.labels is None:
        raise DataError(
            f"{source.spec} has no labels. Give one folder for each class, or a parquet file with a label column."
        )
    return source.labels
