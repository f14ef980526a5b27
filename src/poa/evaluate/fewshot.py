"""Few-shot and semi-supervised classification of frozen features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from poa.config.checks import require, require_non_negative, require_positive
from poa.errors import DataError
from poa.evaluate.base import Evaluator, Vectors, with_labels
from poa.evaluate.knn import knn_accuracies
from poa.evaluate.logistic import predicted
from poa.evaluate.repeats import mean_and_sd
from poa.evaluate.splits import require_classes, stratified_draw

DEFAULT_SHOTS = (1, 5, 10)
_CHUNK = 65_536


@dataclass(frozen=True)
class FewShot(Evaluator):
    """A classifier from a few images of every class, or from a share of the labels, drawn several times."""

    name: ClassVar[str] = "fewshot"
    summary: ClassVar[str] = "few images per class, or a share of the labels: mean and deviation over draws"
    headline: ClassVar[str] = "accuracy"

    shots: tuple[int, ...] | None = None
    """Images of every class; by default those of 1, 5 and 10 that the smallest class has."""
    shares: tuple[float, ...] = (0.01, 0.1)
    """Shares of the images of every class, rounded, at least one of each."""
    num_repeats: int = 5
    """Independent draws."""
    classifier: Literal["logistic", "knn", "centroid"] = "logistic"
    """Logistic regression; k-NN; or the class whose mean vector is nearest by angle."""
    strength: float = 0.1
    """Logistic regression: scikit-learn's C."""
    k: int = 20
    """k-NN: neighbours; fewer where fewer images are drawn."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self) -> None:
        require(all(shot >= 1 for shot in self.shots or ()), "shots", self.shots, "1 or more")
        require(all(0 < share <= 1 for share in self.shares), "shares", self.shares, "above 0 and at most 1")
        require(self.shots != () or bool(self.shares), "shots", self.shots, "one or more where there are no shares")
        require(self.num_repeats >= 1, "num_repeats", self.num_repeats, "1 or more")
        require(self.k >= 1, "k", self.k, "1 or more")
        require_positive("strength", self.strength)
        require_non_negative("seed", self.seed)

    def check(self, train: Int[Tensor, "N"] | None, test: Int[Tensor, "M"] | None, num_classes: int) -> None:
        """See `Evaluator.check`; also refuses more shots than the smallest class has."""
        del num_classes
        require_classes(self.name, train, test)
        if train is None or not self.shots:
            return
        classes, counts = train.unique(return_counts=True)
        fewest, label = int(counts.min()), int(classes[counts.argmin()])
        if max(self.shots) > fewest:
            raise DataError(
                f"{max(self.shots)} shots are more than there are: class {label} has {fewest} training images. "
                f"Give --shots of at most {fewest}."
            )

    def evaluate(self, train: Vectors, test: Vectors | None, reference: Vectors | None = None) -> dict[str, float]:
        """`accuracy_5shot`, `accuracy_1pct` and so on: means over the draws, each with `_sd`.

        `accuracy` is the one with the most labels.
        """
        del reference
        settings = self.settings(with_labels(train)[1])
        figures = mean_and_sd(
            [
                {f"accuracy_{text}": self._accuracy(train, test, counts, draw) for text, counts in settings.items()}
                for draw in range(self.num_repeats)
            ]
        )
        most = max(settings, key=lambda text: sum(settings[text].values()))
        return {"accuracy": figures[f"accuracy_{most}"], **figures}

    def settings(self, labels: Int[Tensor, "N"]) -> dict[str, dict[int, int]]:
        """By the name in the figures how many images of every class are drawn."""
        classes, counts = labels.unique(return_counts=True)
        present = dict(zip(classes.tolist(), counts.tolist(), strict=True))
        fewest = min(present.values())
        shots = [shot for shot in DEFAULT_SHOTS if shot <= fewest] if self.shots is None else self.shots
        found = {f"{shot}shot": dict.fromkeys(present, shot) for shot in shots}
        for share in self.shares:
            found[f"{100 * share:g}pct"] = {label: max(1, round(share * many)) for label, many in present.items()}
        return found

    def _accuracy(self, train: Vectors, test: Vectors | None, counts: dict[int, int], draw: int) -> float:
        features, labels = with_labels(train)
        unseen, truth = with_labels(test)
        rows = stratified_draw(labels, counts, self.seed, draw)
        seen, known = features[rows], labels[rows]
        if self.classifier == "knn":
            k = min(self.k, len(rows))
            return knn_accuracies(seen, known, unseen, truth, ks=[k])[k]
        if self.classifier == "centroid":
            return float((nearest_mean(seen, known, unseen) == truth).double().mean())
        return float((predicted(seen, known, unseen, self.strength) == truth).double().mean())


def nearest_mean(train: Float[Tensor, "N C"], labels: Int[Tensor, "N"], test: Float[Tensor, "M C"]) -> Int[Tensor, "M"]:
    """For each row of `test` the class whose mean of normalised training rows has the largest cosine with it."""
    classes = labels.unique()
    unit = F.normalize(train, dim=1)
    means = F.normalize(torch.stack([unit[labels == label].mean(dim=0) for label in classes]), dim=1)
    nearest = torch.cat([(part @ means.T).argmax(dim=1) for part in test.split(_CHUNK)])
    found: Tensor = classes[nearest]
    return found
