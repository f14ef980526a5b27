"""Which images a prototype likes: those of a projection head, or centres of clusters where there is no head."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from poa.config.checks import require
from poa.objective.heads import ProjectionHead

CHUNK = 256
"""Rows that go through a head at once."""


@torch.no_grad()
def head_scores(head: ProjectionHead, vectors: Float[Tensor, "N C"], width: int) -> Float[Tensor, "N K"]:
    """The logits of a projection head for the class vectors of a sub-network of that width."""
    return torch.cat([head(part, width) for part in vectors.float().split(CHUNK)])


def cluster_scores(vectors: Float[Tensor, "N C"], assigned: Int[Tensor, "N"]) -> Float[Tensor, "N P"]:
    """The cosine of every class vector with every centre, a network's mean direction of the images of a cluster.

    Where a cluster is empty its column is 0.

    Args:
        vectors: a network's class vectors.
        assigned: the cluster of each image, found by any network (`poa.evaluate.clustering.clusters`).
    """
    rows = F.normalize(vectors.float(), dim=1)
    sums = rows.new_zeros(int(assigned.max()) + 1, rows.shape[1]).index_add_(0, assigned, rows)
    return rows @ F.normalize(sums, dim=1).T


def most_used(scores: Float[Tensor, "N K"], count: int) -> Int[Tensor, "P"]:
    """The `count` prototypes that the most images like best, the most used first; all of them if there are fewer."""
    uses = torch.bincount(scores.argmax(dim=1), minlength=scores.shape[1])
    return uses.argsort(descending=True, stable=True)[:count]


def top_images(scores: Float[Tensor, "N P"], k: int) -> Int[Tensor, "P k"]:
    """For each prototype the k images with the largest scores, the largest first.

    Raises:
        ConfigError: there are fewer than k images, or k is below 1.
    """
    require(1 <= k <= len(scores), "the number of images of a prototype", k, f"1 to the {len(scores)} there are")
    return scores.topk(k, dim=0).indices.T
