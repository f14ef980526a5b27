"""Logistic regression on frozen features, for small data sets and transfer."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from poa.config.checks import require, require_non_negative, require_positive
from poa.errors import PoaWarning
from poa.evaluate.base import Evaluator, Vectors, with_labels
from poa.evaluate.splits import require_classes, stratified_holdout

HELD_OUT = 0.2
_CHUNK = 65_536


@dataclass(frozen=True)
class Logistic(Evaluator):
    """scikit-learn's multinomial logistic regression with an L2 penalty, on standardised class vectors.

    The penalty's strength is chosen on a fifth of the training images (Kornblith et al., 2019); then all of them are
    fitted. The vectors are standardised by the training images, so that one grid of strengths means the same for
    networks of any width and scale of features, and L-BFGS converges.
    """

    name: ClassVar[str] = "logistic"
    summary: ClassVar[str] = "logistic regression, for small sets"
    headline: ClassVar[str] = "accuracy"

    strengths: tuple[float, ...] = tuple(float(f"{10.0**power:.3g}") for power in np.linspace(-5, 2, 8))
    """scikit-learn's C: the inverse of the penalty's weight; the best on the held-out images is used."""
    max_iter: int = 1000
    """Iterations of L-BFGS, at the most."""
    seed: int = 0
    """Of the held-out images."""

    def __post_init__(self) -> None:
        require(bool(self.strengths), "strengths", self.strengths, "one or more")
        for strength in self.strengths:
            require_positive("strengths", strength)
        require(self.max_iter >= 1, "max_iter", self.max_iter, "1 or more")
        require_non_negative("seed", self.seed)

    def check(self, train: Int[Tensor, "N"] | None, test: Int[Tensor, "M"] | None, num_classes: int) -> None:
        """See `Evaluator.check`."""
        del num_classes
        require_classes(self.name, train, test, least=2)

    def evaluate(self, train: Vectors, test: Vectors | None, reference: Vectors | None = None) -> dict[str, float]:
        """`accuracy`, `mean_class_accuracy` (the mean of the classes' recalls) and the chosen `c`.

        Of strengths that are as good as each other the first of the grid is chosen.
        """
        del reference
        features, labels = with_labels(train)
        unseen, truth = with_labels(test)
        chosen = self.strengths[0] if len(self.strengths) == 1 else self._chosen(features, labels)
        right = predicted(features, labels, unseen, chosen, self.max_iter) == truth
        recalls = [float(right[truth == label].double().mean()) for label in truth.unique()]
        return {
            "accuracy": int(right.sum()) / len(truth),
            "mean_class_accuracy": sum(recalls) / len(recalls),
            "c": chosen,
        }

    def _chosen(self, features: Float[Tensor, "N C"], labels: Int[Tensor, "N"]) -> float:
        kept, held = stratified_holdout(labels, HELD_OUT, self.seed)
        seen, known, unseen, truth = features[kept], labels[kept], features[held], labels[held]
        found = {
            strength: int((_classes(fitted(seen, known, strength, self.max_iter)[0], unseen) == truth).sum())
            for strength in self.strengths
        }
        return max(found, key=lambda strength: found[strength])


def predicted(
    train: Float[Tensor, "N C"],
    labels: Int[Tensor, "N"],
    test: Float[Tensor, "M C"],
    strength: float,
    max_iter: int = 1000,
) -> Int[Tensor, "M"]:
    """The classes that the regression fitted to `train` gives `test`; it warns where the fit has not converged."""
    model, has_converged = fitted(train, labels, strength, max_iter)
    if not has_converged:
        text = f"logistic regression (C = {strength:g}) stopped after {max_iter} iterations; allow more (max_iter)."
        warnings.warn(text, PoaWarning, stacklevel=2)
    return _classes(model, test)


def fitted(train: Float[Tensor, "N C"], labels: Int[Tensor, "N"], strength: float, max_iter: int) -> tuple[Any, bool]:
    """scikit-learn's model for vectors as they are, which standardises them as `train` is; whether it has converged."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=max_iter))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(train.numpy(), labels.numpy())
    return model, int(model[-1].n_iter_.max()) < max_iter


def _classes(model: Any, vectors: Float[Tensor, "M C"]) -> Int[Tensor, "M"]:  # noqa: ANN401 (scikit-learn's)
    parts = [torch.from_numpy(np.asarray(model.predict(part.numpy()))) for part in vectors.split(_CHUNK)]
    return torch.cat(parts)
