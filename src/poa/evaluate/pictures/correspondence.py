"""Which patches of two images a network takes for the same."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F


class Matches(NamedTuple):
    """Pairs of patches, the most similar first."""

    first: Int[Tensor, "K"]
    """Positions in the first image, row by row."""
    second: Int[Tensor, "K"]
    """Positions in the second image."""
    similarity: Float[Tensor, "K"]
    """Their cosines."""


def mutual_matches(first: Float[Tensor, "N C"], second: Float[Tensor, "M C"]) -> Matches:
    """All pairs of patches that are each other's nearest by cosine."""
    similarity = F.normalize(first.float(), dim=1) @ F.normalize(second.float(), dim=1).T
    nearest = similarity.argmax(dim=1)
    rows = torch.arange(len(first), device=first.device)
    rows = rows[similarity.argmax(dim=0)[nearest] == rows]
    values, order = similarity[rows, nearest[rows]].sort(descending=True, stable=True)
    rows = rows[order]
    return Matches(rows, nearest[rows], values)


def are_shared(matches: Matches, reference: Matches) -> Bool[Tensor, "K"]:
    """Whether each of the matches is one of another network's too: the same two patches, on the same grid."""
    partner = dict(zip(reference.first.tolist(), reference.second.tolist(), strict=True))
    pairs = zip(matches.first.tolist(), matches.second.tolist(), strict=True)
    return torch.tensor([partner.get(first) == second for first, second in pairs], dtype=torch.bool)


def centres(positions: Int[Tensor, "K"], grid: tuple[int, int], size: int) -> Float[Tensor, "K 2"]:
    """The centres (x, y) of patches in pixels of an image of that size, as matplotlib draws it."""
    height, width = grid
    x = (positions % width + 0.5) * size / width - 0.5
    y = (positions // width + 0.5) * size / height - 0.5
    return torch.stack([x, y], dim=1)
