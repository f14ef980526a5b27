"""Which sub-networks of a large space are measured: its corners, and a spread over what lies between."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from poa.elastic import Subnet

MAX_ALL = 60
"""Spaces of up to this many sub-networks are measured whole unless told otherwise."""
DEFAULT_MEASURED = 40
"""How many are measured of larger ones."""


def corners(subnets: Sequence[Subnet]) -> tuple[Subnet, ...]:
    """Those that are narrowest or widest and, in every stage, shallowest or deepest; the extremes of size first."""
    stages = list(zip(*(each.depths for each in subnets), strict=True))
    widths = [each.width for each in subnets]
    depths = list(itertools.product(*((min(stage), max(stage)) for stage in stages)))
    depths = [depths[0], depths[-1], *depths[1:-1]]
    found = [Subnet(width, each) for each in depths for width in (min(widths), max(widths))]
    extremes_first = [found[0], found[3], *found]
    return tuple(dict.fromkeys(each for each in extremes_first if each in subnets))


def design(subnets: Sequence[Subnet], num: int) -> tuple[Subnet, ...]:
    """`num` of the sub-networks to measure, so that none is far from a measured one; a function of its arguments.

    The corners are taken first. Then always the one that is farthest from all taken (Kennard and Stone 1969), widths
    and depths counted from 0 for the least to 1 for the largest; of equally far ones the first.

    Args:
        subnets: what is chosen from.
        num: how many, at most all.
    """
    places = _places(subnets)
    chosen = [subnets.index(each) for each in corners(subnets)][:num]
    nearest = np.min([_distances(places, index) for index in chosen], axis=0)
    while len(chosen) < min(num, len(subnets)):
        chosen.append(int(np.argmax(np.round(nearest, 9))))
        nearest = np.minimum(nearest, _distances(places, chosen[-1]))
    return tuple(subnets[index] for index in sorted(chosen))


def _places(subnets: Sequence[Subnet]) -> Float64[np.ndarray, "N D"]:
    raw = np.array([(each.width, *each.depths) for each in subnets], dtype=np.float64)
    spread = raw.max(axis=0) - raw.min(axis=0)
    found: Float64[np.ndarray, "N D"] = (raw - raw.min(axis=0)) / np.where(spread > 0, spread, 1.0)
    return found


def _distances(places: Float64[np.ndarray, "N D"], index: int) -> Float64[np.ndarray, "N"]:
    found: Float64[np.ndarray, "N"] = np.linalg.norm(places - places[index], axis=1)
    return found
