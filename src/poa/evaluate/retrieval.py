"""Image retrieval by class: images ranked by the cosine of their frozen features."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from poa.config.checks import require
from poa.errors import DataError, PoaWarning
from poa.evaluate.base import Evaluator, Vectors, with_labels
from poa.evaluate.splits import require_labels

SIMILARITIES = 1 << 24
"""Similarities that exist at a time."""


@dataclass(frozen=True)
class Retrieval(Evaluator):
    """The gallery ranked by cosine similarity to each query; images of the query's class are relevant."""

    name: ClassVar[str] = "retrieval"
    summary: ClassVar[str] = "mean average precision, recall among the first k"
    headline: ClassVar[str] = "map"

    k: tuple[int, ...] = (1, 5, 10)
    """Lengths of the list in recall_at_K."""
    queries: Literal["test", "train"] = "test"
    """test: test images are looked for among the training images; train: each training image among all the others."""

    def __post_init__(self) -> None:
        require(bool(self.k) and min(self.k) >= 1, "k", self.k, "one or more numbers of 1 or more")

    @property
    def needs_test(self) -> bool:  # type: ignore[override]
        """Whether the queries are the test images."""
        return self.queries == "test"

    def check(self, train: Int[Tensor, "N"] | None, test: Int[Tensor, "M"] | None, num_classes: int) -> None:
        """See `Evaluator.check`; also refuses lists longer than the gallery. Queries without an answer are told."""
        del num_classes
        labels = require_labels(self.name, train)
        asked = test if self.needs_test else labels
        if asked is None:
            raise DataError("retrieval needs labelled images to look for: --test.")
        in_gallery = len(labels) - (not self.needs_test)
        if max(self.k) > in_gallery:
            raise DataError(f"--k {max(self.k)} is more than there are in the gallery: {in_gallery} images.")
        left_out = int((relevant_counts(asked, labels, leave_one_out=not self.needs_test) == 0).sum())
        if left_out == len(asked):
            raise DataError("no query has another image of its class in the gallery.")
        if left_out:
            text = f"{left_out} of {len(asked)} queries have no image of their class in the gallery: left out."
            warnings.warn(text, PoaWarning, stacklevel=2)

    def evaluate(self, train: Vectors, test: Vectors | None, reference: Vectors | None = None) -> dict[str, float]:
        """`map`, `map_at_r` (Musgrave et al., 2020), `recall_at_K`; `queries_left_out`: those without an answer."""
        del reference
        gallery, labels = with_labels(train)
        queries, asked = with_labels(test) if self.needs_test else (gallery, labels)
        return retrieval_figures(queries, asked, gallery, labels, ks=self.k, leave_one_out=not self.needs_test)


def relevant_counts(
    query_labels: Int[Tensor, "M"], gallery_labels: Int[Tensor, "N"], *, leave_one_out: bool = False
) -> Int[Tensor, "M"]:
    """For each query the images of its class in the gallery, itself left out where it is one of them."""
    size = int(torch.cat([query_labels, gallery_labels]).max()) + 1
    found: Tensor = gallery_labels.bincount(minlength=size)[query_labels] - int(leave_one_out)
    return found


def retrieval_figures(
    queries: Float[Tensor, "M C"],
    query_labels: Int[Tensor, "M"],
    gallery: Float[Tensor, "N C"],
    gallery_labels: Int[Tensor, "N"],
    *,
    ks: Sequence[int] = (1, 5, 10),
    leave_one_out: bool = False,
    budget: int = SIMILARITIES,
) -> dict[str, float]:
    """Means over the queries that have a relevant image, and how many have none.

    The precision at a relevant image is the share of relevant ones among all that are at least as similar as it
    (scikit-learn's average precision): what is equally similar stands before it, whatever the gallery's order. `map`
    is the mean over the relevant images, `map_at_r` that over the first R, R their number; `recall_at_K` is the share
    of queries that have a relevant image among the first K.

    Args:
        queries: their features.
        query_labels: their classes.
        gallery: its features.
        gallery_labels: its classes.
        ks: lengths of lists.
        leave_one_out: queries and gallery are the same rows, and no row is looked for in itself.
        budget: similarities that exist at a time.

    Raises:
        DataError: no query has a relevant image.
    """
    answerable = relevant_counts(query_labels, gallery_labels, leave_one_out=leave_one_out) > 0
    if not bool(answerable.any()):
        raise DataError("no query has another image of its class in the gallery.")
    lengths = torch.linalg.vector_norm(gallery, dim=1).clamp_min(1e-12)
    sums: dict[str, float] = {}
    for label in query_labels[answerable].unique():
        members = (query_labels == label).nonzero().squeeze(1)
        relevant = (gallery_labels == label).nonzero().squeeze(1)
        for rows in members.split(max(1, budget // len(gallery))):
            similarity = queries[rows] @ gallery.T / lengths
            if leave_one_out:
                similarity[torch.arange(len(rows)), rows] = -torch.inf
            for name, value in _figures(similarity, similarity[:, relevant], ks, int(leave_one_out)).items():
                sums[name] = sums.get(name, 0.0) + float(value.sum())
    means = {name: value / int(answerable.sum()) for name, value in sums.items()}
    return {**means, "queries_left_out": float((~answerable).sum())}


def _figures(
    similarity: Float[Tensor, "B N"], relevant: Float[Tensor, "B R"], ks: Sequence[int], num_hidden: int
) -> dict[str, Float[Tensor, "B"]]:
    """Figures of some queries of one class.

    Args:
        similarity: of the whole gallery.
        relevant: the part of it that is of the class.
        ks: lengths of lists.
        num_hidden: relevant images that do not count, with a similarity of -inf.
    """
    ranked, wanted = (torch.from_numpy(np.sort(part.numpy(), axis=1)) for part in (similarity, relevant))
    wanted = wanted[:, num_hidden:].contiguous()
    rank = ranked.shape[1] - torch.searchsorted(ranked, wanted)
    precision = (wanted.shape[1] - torch.searchsorted(wanted, wanted)) / rank.double()
    found = {"map": precision.mean(dim=1), "map_at_r": (precision * (rank <= wanted.shape[1])).mean(dim=1)}
    first = rank[:, -1] - (wanted == wanted[:, -1:]).sum(dim=1) + 1
    return found | {f"recall_at_{k}": (first <= k).double() for k in ks}
