"""k-means of frozen features against the labels."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from poa.config.checks import require, require_non_negative
from poa.errors import DataError, PoaWarning
from poa.evaluate.base import Evaluator, Vectors, with_labels
from poa.evaluate.repeats import mean_and_sd
from poa.evaluate.splits import require_labels
from poa.randomness import derived_seed


@dataclass(frozen=True)
class Clustering(Evaluator):
    """k-means of normalised class vectors, several times; how well clusters and classes agree."""

    name: ClassVar[str] = "clustering"
    summary: ClassVar[str] = "k-means against the labels: NMI, ARI, FMI, accuracy"
    headline: ClassVar[str] = "nmi"
    needs_test: ClassVar[bool] = False

    num_clusters: int = 0
    """Clusters; 0: as many as classes."""
    num_repeats: int = 3
    """Runs with other starts; figures are their means, `_sd` their standard deviations."""
    num_starts: int = 4
    """Starts of each run, of which the best is kept."""
    mini_batch_from: int = 50_000
    """Images from which on mini-batch k-means takes the place of Lloyd's."""
    seed: int = 0
    """Of the starts."""

    def __post_init__(self) -> None:
        require(self.num_clusters == 0 or self.num_clusters >= 2, "num_clusters", self.num_clusters, "0, or 2 or more")
        require(self.num_repeats >= 1, "num_repeats", self.num_repeats, "1 or more")
        require(self.num_starts >= 1, "num_starts", self.num_starts, "1 or more")
        require(self.mini_batch_from >= 0, "mini_batch_from", self.mini_batch_from, "0 or more")
        require_non_negative("seed", self.seed)

    def check(self, train: Int[Tensor, "N"] | None, test: Int[Tensor, "M"] | None, num_classes: int) -> None:
        """See `Evaluator.check`."""
        del test, num_classes
        labels = require_labels(self.name, train)
        wanted = self.num_clusters or len(labels.unique())
        if wanted > len(labels):
            raise DataError(f"{wanted} clusters of {len(labels)} images cannot be. Give fewer with --num-clusters.")

    def evaluate(self, train: Vectors, test: Vectors | None, reference: Vectors | None = None) -> dict[str, float]:
        """`nmi`, `ari`, `fmi` and `accuracy` (see `agreement`), each with `_sd` over the runs."""
        del test, reference
        features, labels = with_labels(train)
        count = self.num_clusters or len(labels.unique())
        is_mini = len(features) >= self.mini_batch_from
        return mean_and_sd(
            [
                agreement(labels, clusters(features, count, self.num_starts, (self.seed, run), mini_batch=is_mini))
                for run in range(self.num_repeats)
            ]
        )


def clusters(
    features: Float[Tensor, "N C"],
    num_clusters: int,
    num_starts: int,
    position: tuple[int, int],
    *,
    mini_batch: bool = False,
) -> Int[Tensor, "N"]:
    """The cluster of each row: scikit-learn's k-means of the normalised rows.

    Rows of fewer different directions than clusters, as a collapsed network gives, fill fewer, with a warning.

    Args:
        features: the rows.
        num_clusters: clusters.
        num_starts: starts, of which the best is kept.
        position: (seed, run) that the starts are drawn from.
        mini_batch: MiniBatchKMeans instead of KMeans.
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning

    seed = derived_seed(position[0], "clusters", position[1]) % 2**32
    model = (MiniBatchKMeans if mini_batch else KMeans)(num_clusters, n_init=num_starts, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = torch.from_numpy(np.asarray(model.fit_predict(F.normalize(features, dim=1).numpy()), dtype=np.int64))
    if len(found.unique()) < num_clusters:
        text = f"k-means filled {len(found.unique())} of {num_clusters} clusters: too few vectors are different."
        warnings.warn(text, PoaWarning, stacklevel=2)
    return found


def agreement(labels: Int[Tensor, "N"], found: Int[Tensor, "N"]) -> dict[str, float]:
    """How well clusters agree with classes, whatever the clusters' numbers.

    `nmi` (arithmetic mean), `ari` and `fmi` are scikit-learn's; `accuracy` is the share of images whose cluster is
    matched to their class, in the best one-to-one matching.
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn import metrics

    table = metrics.cluster.contingency_matrix(labels.numpy(), found.numpy())
    rows, columns = linear_sum_assignment(table, maximize=True)
    return {
        "nmi": float(metrics.normalized_mutual_info_score(labels.numpy(), found.numpy())),
        "ari": float(metrics.adjusted_rand_score(labels.numpy(), found.numpy())),
        "fmi": float(metrics.fowlkes_mallows_score(labels.numpy(), found.numpy())),
        "accuracy": float(table[rows, columns].sum() / len(labels)),
    }
