"""Parts of labelled images, drawn class by class."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from poa.errors import DataError
from poa.randomness import generator


def stratified_holdout(
    labels: Int[Tensor, "N"], share: float, seed: int
) -> tuple[Int[Tensor, "kept"], Int[Tensor, "held"]]:
    """Positions of the images that stay and of those held out: `share` of every class, at least one, rounded down.

    Both are in rising order.

    Raises:
        DataError: a class has one image only.
    """
    rng = generator(seed, "holdout")
    held: list[int] = []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().squeeze(1).numpy()
        if len(members) < 2:
            raise DataError(f"class {label} has one image only; two or more are needed to hold one out.")
        count = min(len(members) - 1, max(1, int(share * len(members))))
        held += rng.permutation(members)[:count].tolist()
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[held] = True
    return (~chosen).nonzero().squeeze(1), chosen.nonzero().squeeze(1)
