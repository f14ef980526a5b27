"""Holding out a part of labelled images."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64

from poa.errors import DataError
from poa.randomness import generator


def stratified_split(
    groups: Int64[np.ndarray, " N"], share: float, seed: int, *, least: int = 2
) -> tuple[Int64[np.ndarray, " kept"], Int64[np.ndarray, " held"]]:
    """Positions of the images that stay and of those held out: `share` of every group, at least one, rounded down.

    Both are in rising order. Groups with fewer than two images stay whole.

    Args:
        groups: the group of every image: its class, say.
        share: held out of each group.
        seed: of the draw.
        least: the smallest group that is accepted.

    Raises:
        DataError: a group has fewer than `least` images.
    """
    held = np.zeros(len(groups), dtype=bool)
    rng = generator(seed, "holdout")
    for group in np.unique(groups).tolist():
        members = np.flatnonzero(groups == group)
        if len(members) < least:
            raise DataError(f"class {group} has {len(members)} image only; {least} or more are needed to hold one out.")
        if len(members) > 1:
            held[rng.permutation(members)[: max(1, int(share * len(members)))]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)
