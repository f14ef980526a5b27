"""The first three principal components of patch vectors as colours (Oquab et al., 2023, DINOv2's figure 1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch.nn import functional as F

from poa.evaluate.pictures.sheet import scaled

NUM_COMPONENTS = 3
_NOTHING = 1e-6
"""Components whose deviation is below this share of the first one's are rounding errors."""


def components(vectors: Float[np.ndarray, "M C"]) -> Float[np.ndarray, "M 3"]:
    """The scores of the first three principal components, each with standard deviation 1.

    Where the vectors span fewer components, the others are 0. Signs are scikit-learn's.
    """
    from sklearn.decomposition import PCA

    found = np.zeros((len(vectors), NUM_COMPONENTS))
    count = min(NUM_COMPONENTS, *vectors.shape)
    if len(vectors) < 2:
        return found
    scores = PCA(count, svd_solver="covariance_eigh").fit_transform(vectors.astype(np.float64))
    spread = scores.std(axis=0)
    kept = np.flatnonzero((spread > _NOTHING * spread[0]) & (spread > 0))
    found[:, kept] = scores[:, kept] / spread[kept]
    return found


def foreground(scores: Float[np.ndarray, "N h w 3"]) -> Bool[np.ndarray, "N h w"]:
    """The patches on one side of the first component's mean: the side where fewer of the images' borders lie."""
    first = scores[..., 0]
    inner = np.zeros(first.shape[1:], dtype=bool)
    inner[1:-1, 1:-1] = True
    return first > 0 if first[:, ~inner].mean() <= 0 else first < 0


def aligned(scores: Float[np.ndarray, "M D"], target: Float[np.ndarray, "M D"]) -> Float[np.ndarray, "M D"]:
    """The scores rotated and mirrored to be nearest to those of another network: orthogonal Procrustes."""
    from scipy.linalg import orthogonal_procrustes

    rotation, _ = orthogonal_procrustes(scores, target)
    return np.asarray(scores @ rotation)


def colours(
    patches: Sequence[Float[np.ndarray, "N _ _ _"]], reference: int, *, only_foreground: bool = False
) -> list[Float[np.ndarray, "N _ _ 3"]]:
    """The patches of each network in colours that agree between networks.

    The components are of all images together. Those of every other network are rotated towards the reference's (on
    its grid where the grids differ), then each is scaled to its own 1-99 %.

    Args:
        patches: the maps [N, C, h, w] of each network, of the same N images.
        reference: the position of the network whose colours the others follow.
        only_foreground: the components are of the reference's foreground; the rest is black.

    Returns:
        Red, green and blue, 0-1, for each network.
    """
    grids = [part.transpose(0, 2, 3, 1) for part in patches]
    target = _scores(grids[reference], np.ones(grids[reference].shape[:3], dtype=bool))
    mask = foreground(target) if only_foreground else np.ones(target.shape[:3], dtype=bool)
    if only_foreground:
        target = _scores(grids[reference], mask)
    return [_coloured(grid, target, mask) for grid in grids]


def _scores(grid: Float[np.ndarray, "N h w C"], mask: Bool[np.ndarray, "N h w"]) -> Float[np.ndarray, "N h w 3"]:
    """The components of the patches in the mask; 0 outside."""
    found = np.zeros((*grid.shape[:3], NUM_COMPONENTS))
    found[mask] = components(grid[mask])
    return found


def _coloured(
    grid: Float[np.ndarray, "N h w C"], target: Float[np.ndarray, "N H W 3"], mask: Bool[np.ndarray, "N H W"]
) -> Float[np.ndarray, "N h w 3"]:
    sides = grid.shape[1:3]
    ours = _resized(mask[..., None].astype(np.float64), sides)[..., 0] >= 0.5
    goal = _resized(target, sides)
    found = np.zeros((*grid.shape[:3], NUM_COMPONENTS))
    if ours.any():
        turned = aligned(_scores(grid, ours)[ours], goal[ours])
        found[ours] = np.stack([scaled(column) for column in turned.T], axis=1)
    return found


def _resized(grid: Float[np.ndarray, "N _ _ C"], sides: tuple[int, ...]) -> Float[np.ndarray, "N _ _ C"]:
    if grid.shape[1:3] == sides:
        return grid
    maps = torch.from_numpy(grid).permute(0, 3, 1, 2)
    resized = F.interpolate(maps, size=sides, mode="bilinear", align_corners=False, antialias=True)
    return resized.permute(0, 2, 3, 1).numpy()
