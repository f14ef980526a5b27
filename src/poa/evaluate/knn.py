"""Weighted k-nearest-neighbour classification of frozen features (Wu et al., 2018; DINO's protocol)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from poa.config.checks import require, require_positive
from poa.errors import DataError, PoaWarning
from poa.evaluate.base import CPU, Evaluator, Vectors, with_labels
from poa.evaluate.splits import require_classes

DEFAULT_KS = (10, 20, 100, 200)
"""The numbers of neighbours of DINO's protocol."""


@dataclass(frozen=True)
class Knn(Evaluator):
    """Weighted k-nearest-neighbour accuracy (Wu et al., 2018; DINO's protocol)."""

    name: ClassVar[str] = "knn"
    summary: ClassVar[str] = "weighted k-nearest neighbours"
    headline: ClassVar[str] = "accuracy"

    k: tuple[int, ...] = DEFAULT_KS
    """Numbers of neighbours."""
    temp: float = 0.07
    """Temperature of the votes."""

    def __post_init__(self) -> None:
        require(bool(self.k) and min(self.k) >= 1, "k", self.k, "one or more numbers of 1 or more")
        require_positive("temp", self.temp)

    def check(self, train: Int[Tensor, "N"] | None, test: Int[Tensor, "M"] | None, num_classes: int) -> None:
        """See `Evaluator.check`."""
        del num_classes
        require_classes(self.name, train, test)
        if train is not None and len(train) < min(self.k):
            raise DataError(
                f"k-NN needs at least {min(self.k)} training images for k = {min(self.k)}; got {len(train)}."
            )

    def evaluate(self, train: Vectors, test: Vectors | None, reference: Vectors | None = None) -> dict[str, float]:
        """`accuracy_k20` and so on, and `accuracy`: the best over k."""
        del reference
        seen, unseen = with_labels(train), with_labels(test)
        found = knn_accuracies(*seen, *unseen, ks=self.k, temp=self.temp, device=train.device)
        return {"accuracy": max(found.values()), **{f"accuracy_k{k}": value for k, value in found.items()}}


def knn_accuracies(
    train: Float[Tensor, "N C"],
    train_labels: Int[Tensor, "N"],
    test: Float[Tensor, "M C"],
    test_labels: Int[Tensor, "M"],
    *,
    ks: Sequence[int] = DEFAULT_KS,
    temp: float = 0.07,
    chunk: int = 8192,
    device: torch.device = CPU,
) -> dict[int, float]:
    """The share of test rows that `knn_hits` finds right, for each k; arguments and errors are its own."""
    found = knn_hits(train, train_labels, test, test_labels, ks=ks, temp=temp, chunk=chunk, device=device)
    return {k: int(right.sum()) / len(test) for k, right in found.items()}


def knn_hits(
    train: Float[Tensor, "N C"],
    train_labels: Int[Tensor, "N"],
    test: Float[Tensor, "M C"],
    test_labels: Int[Tensor, "M"],
    *,
    ks: Sequence[int] = DEFAULT_KS,
    temp: float = 0.07,
    chunk: int = 8192,
    device: torch.device = CPU,
) -> dict[int, Bool[Tensor, "M"]]:
    """Which test rows the vote of their k nearest training rows gets right, for each k; on the CPU.

    Neighbours are those of largest cosine similarity s; each votes with weight exp(s / temp). Of classes with as many
    votes the first wins. At most chunk × chunk / 8 similarities exist at a time.

    Args:
        train: features of the labelled images.
        train_labels: their classes, counted from 0.
        test: features of the images to classify.
        test_labels: their classes.
        ks: numbers of neighbours; those above N are left out with a warning.
        temp: temperature of the votes.
        chunk: rows of `train` that are compared at a time.
        device: where they are compared.

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
    right: dict[int, list[Tensor]] = {k: [] for k in usable}
    for rows, truth in zip(test.split(chunk // 8), test_labels.split(chunk // 8), strict=True):
        similarity, labels = _nearest(rows.to(device), train, train_labels, usable[-1], chunk)
        weights = ((similarity.double() - similarity[:, :1]) / temp).exp()
        votes, counted = weights.new_zeros(len(rows), num_classes), 0
        for k in usable:
            votes.scatter_add_(1, labels[:, counted:k], weights[:, counted:k])
            counted = k
            right[k].append(votes.argmax(dim=1) == truth)
    return {k: torch.cat(parts) for k, parts in right.items()}


def _nearest(rows: Tensor, train: Tensor, labels: Tensor, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Similarities and labels of the k nearest training rows, nearest first, on the CPU; computed where `rows` are."""
    rows = F.normalize(rows.float(), dim=-1)
    best = torch.empty(len(rows), 0)
    best_labels = labels.new_empty(len(rows), 0)
    for part, part_labels in zip(train.split(chunk), labels.split(chunk), strict=True):
        known = F.normalize(part.to(rows.device).float(), dim=-1)
        similarity, order = (rows @ known.T).topk(min(k, len(part)), dim=1)
        best = torch.cat([best, similarity.cpu()], dim=1)
        best_labels = torch.cat([best_labels, part_labels[order.cpu()]], dim=1)
        best, order = best.topk(min(k, best.shape[1]), dim=1)
        best_labels = best_labels.gather(1, order)
    return best, best_labels
