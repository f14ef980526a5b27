"""The health of a representation, without labels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from poa.config.checks import require, require_non_negative
from poa.errors import DataError
from poa.evaluate.base import Evaluator, Vectors
from poa.evaluate.rankme import rankme
from poa.randomness import generator


@dataclass(frozen=True)
class Health(Evaluator):
    """RankMe, alignment, uniformity, and how far a network agrees with the intact one of its family."""

    name: ClassVar[str] = "health"
    summary: ClassVar[str] = "RankMe, alignment, uniformity, agreement with the intact network; needs no labels"
    headline: ClassVar[str] = "cka"
    needs_labels: ClassVar[bool] = False
    needs_test: ClassVar[bool] = False
    needs_views: ClassVar[bool] = True
    needs_intact: ClassVar[bool] = True

    num_images: int = 5000
    """Images, at the most, that the figures are computed from, drawn at random."""
    k: int = 10
    """Neighbours of neighbour_overlap."""
    seed: int = 0
    """Of the draw."""

    def __post_init__(self) -> None:
        require(self.num_images >= 4, "num_images", self.num_images, "4 or more")
        require(1 <= self.k <= self.num_images - 2, "k", self.k, "1 or more, and 2 or more below num_images")
        require_non_negative("seed", self.seed)

    def check(self, train: Int[Tensor, "N"] | None, test: Int[Tensor, "M"] | None, num_classes: int) -> None:
        """See `Evaluator.check`; without labels the number of images is not known before they are read."""
        del test, num_classes
        if train is not None:
            self._require(len(train))

    def _require(self, num_images: int) -> None:
        least = max(4, self.k + 2)
        if num_images < least:
            raise DataError(f"health needs {least} or more images for k = {self.k}; got {num_images}.")

    def evaluate(self, train: Vectors, test: Vectors | None, reference: Vectors | None = None) -> dict[str, float]:
        """`cka` and `neighbour_overlap` with the intact network, and what needs no other network.

        That is `rankme`, `rankme_share` of the channels, `alignment` and `uniformity`.
        """
        del test
        self._require(len(train))
        if reference is None or train.second is None:
            raise DataError("health needs the intact network's vectors and a second view of the images.")
        order = generator(self.seed, "health").permutation(len(train))[: self.num_images]
        rows = torch.from_numpy(order).sort().values
        mine, intact, second = train.cls[rows], reference.cls[rows], train.second[rows]
        rank = rankme(mine)
        return {
            "cka": cka(mine, intact),
            "neighbour_overlap": neighbour_overlap(mine, intact, self.k),
            "rankme": rank,
            "rankme_share": rank / min(mine.shape),
            "alignment": alignment(mine, second),
            "uniformity": uniformity(mine),
        }


def cka(a: Float[Tensor, "N C"], b: Float[Tensor, "N D"]) -> float:
    """Linear centred kernel alignment with the unbiased estimator of HSIC (Kornblith et al., 2019; Song et al., 2012).

    1 for features that differ by a rotation and a scale; about 0 for unrelated ones, whatever N, C and D. Takes
    O(N (C + D)) memory: no N × N matrix is made. Needs 4 rows or more.
    """
    x, y = (part.double() - part.double().mean(dim=0) for part in (a, b))
    cross, within, across = _hsic(x, y), _hsic(x, x), _hsic(y, y)
    return float(cross / max(within * across, 1e-300) ** 0.5)


def _hsic(x: Float[Tensor, "N C"], y: Float[Tensor, "N D"]) -> float:
    """Unbiased HSIC of the linear kernels without their diagonals, times N (N − 3) (Song et al., 2012, eq. 5)."""
    n = len(x)
    xx, yy = (x * x).sum(dim=1), (y * y).sum(dim=1)
    trace = float((x.T @ y).square().sum() - (xx * yy).sum())
    row_x, row_y = x @ x.sum(dim=0) - xx, y @ y.sum(dim=0) - yy
    return trace + float(row_x.sum() * row_y.sum()) / ((n - 1) * (n - 2)) - 2 * float(row_x @ row_y) / (n - 2)


def neighbour_overlap(a: Float[Tensor, "N C"], b: Float[Tensor, "N D"], k: int, chunk: int = 1024) -> float:
    """The mean share of each row's k nearest rows by cosine that are the same in both features."""
    units = [F.normalize(part.float(), dim=1) for part in (a, b)]
    shared = 0
    for start in range(0, len(a), chunk):
        found = []
        for unit in units:
            similarity = unit[start : start + chunk] @ unit.T
            rows = torch.arange(len(similarity))
            similarity[rows, start + rows] = -2.0
            found.append(similarity.topk(k, dim=1).indices)
        shared += int((found[0].unsqueeze(2) == found[1].unsqueeze(1)).sum())
    return shared / (k * len(a))


def alignment(a: Float[Tensor, "N C"], b: Float[Tensor, "N C"], alpha: float = 2.0) -> float:
    """The mean of ‖a − b‖^alpha over normalised rows, two views of each image (Wang & Isola, 2020); 0 is best."""
    difference = F.normalize(a.double(), dim=1) - F.normalize(b.double(), dim=1)
    return float(difference.norm(dim=1).pow(alpha).mean())


def uniformity(a: Float[Tensor, "N C"], t: float = 2.0, chunk: int = 1024) -> float:
    """Log of the mean of exp(−t ‖x − y‖²) over pairs of different normalised rows (Wang & Isola, 2020).

    0 if all are alike; the lower, the more evenly they fill the sphere.
    """
    unit = F.normalize(a.double(), dim=1)
    total = 0.0
    for start in range(0, len(unit), chunk):
        part = unit[start : start + chunk]
        total += float((-t * (2.0 - 2.0 * part @ unit.T)).exp().sum()) - len(part)
    return math.log(total / (len(unit) * (len(unit) - 1)))
