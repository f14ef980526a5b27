"""Figures of classifiers, summed up batch by batch."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

TOP = 5


class Scores(ABC):
    """The answers to some images, compared with the truth."""

    metric: str
    """The main figure; larger is better."""

    @abstractmethod
    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Takes in a batch; both on one device."""

    @abstractmethod
    def figures(self) -> dict[str, float]:
        """The figures of all batches; shares are 0-1."""


class SingleLabelScores(Scores):
    """Accuracy, accuracy among the five best where there are more than five classes, and cross entropy."""

    metric = "accuracy"

    def __init__(self) -> None:
        self.num_images = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, logits: Float[Tensor, "B K"], targets: Int[Tensor, "B"]) -> None:
        """See `Scores.add`; targets are classes."""
        logits = logits.float()
        best = logits.topk(min(TOP, logits.shape[1]), dim=1).indices == targets[:, None]
        found = {"accuracy": best[:, 0].sum()}
        if logits.shape[1] > TOP:
            found["top5"] = best.sum()
        found["cross_entropy"] = F.cross_entropy(logits, targets, reduction="sum")
        self.num_images += len(targets)
        for name, value in found.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value

    def figures(self) -> dict[str, float]:
        """See `Scores.figures`."""
        return {name: float(value) / self.num_images for name, value in self.sums.items()}


class MultiLabelScores(Scores):
    """Mean average precision over the classes that have an image, and binary cross entropy."""

    metric = "map"

    def __init__(self) -> None:
        self.logits: list[Tensor] = []
        self.targets: list[Tensor] = []

    def add(self, logits: Float[Tensor, "B K"], targets: Bool[Tensor, "B K"]) -> None:
        """See `Scores.add`; targets say for each class whether the image is of it."""
        self.logits.append(logits.float().cpu())
        self.targets.append(targets.cpu())

    def figures(self) -> dict[str, float]:
        """See `Scores.figures`."""
        logits, targets = torch.cat(self.logits), torch.cat(self.targets)
        loss = F.binary_cross_entropy_with_logits(logits, targets.float())
        return {
            "map": float(np.mean(average_precisions(logits, targets))),
            "binary_cross_entropy": float(loss),
        }


def average_precisions(logits: Float[Tensor, "N K"], targets: Bool[Tensor, "N K"]) -> Float[np.ndarray, " seen"]:
    """scikit-learn's average precision of each class that has an image."""
    from sklearn.metrics import average_precision_score

    seen = targets.any(dim=0)
    found = average_precision_score(targets[:, seen].int().numpy(), logits[:, seen].numpy(), average=None)
    return np.atleast_1d(np.asarray(found, dtype=np.float64))
