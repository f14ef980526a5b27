"""Block-wise masks on the patches of the global views (BEiT, iBOT)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int64

from poa.config import MaskConfig

_MAX_TRIES = 10
_LARGEST_BLOCK = 0.5


def block_mask(
    grid: tuple[int, int], target: int, config: MaskConfig, rng: np.random.Generator
) -> Bool[np.ndarray, "h w"]:
    """A mask that is a union of rectangles, with `target` patches or a few less.

    Rectangle after rectangle is added. Each has an area uniform between `config.min_patches` and what is
    still missing (at most half the grid) and a log-uniform aspect; the first of 10 tries is taken that fits
    into the grid and adds at least one patch and no more than are missing. It ends at the target, or when
    none of the 10 does. (Bao et al., BEiT, 2022, algorithm 1; Zhou et al., iBOT, 2022.)

    Args:
        grid: rows and columns of patches.
        target: patches to mask.
        config: the smallest area and the range of aspects.
        rng: every random number comes from here.
    """
    mask = np.zeros(grid, dtype=np.bool_)
    missing = target
    while missing > 0:
        added = _add_block(mask, missing, config, rng)
        if not added:
            break
        missing -= added
    return mask


def _add_block(mask: Bool[np.ndarray, "h w"], missing: int, config: MaskConfig, rng: np.random.Generator) -> int:
    """Masks one more rectangle in place; gives back how many patches that added, 0 if no try succeeded."""
    rows, columns = mask.shape
    least, most = config.min_patches, min(missing, _LARGEST_BLOCK * mask.size)
    log_aspect = math.log(config.min_aspect)
    for area_draw, aspect_draw, top_draw, left_draw in rng.random((_MAX_TRIES, 4)).tolist():
        area = least + (most - least) * area_draw
        aspect = math.exp(log_aspect * (1.0 - 2.0 * aspect_draw))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < height < rows and 0 < width < columns):
            continue
        top, left = int(top_draw * (rows - height + 1)), int(left_draw * (columns - width + 1))
        block = mask[top : top + height, left : left + width]
        added = height * width - int(np.count_nonzero(block))
        if 0 < added <= missing:
            block[...] = True
            return added
    return 0


def mask_targets(
    num_rows: int, num_patches: int, config: MaskConfig, rng: np.random.Generator
) -> Int64[np.ndarray, " rows"]:
    """How many patches to mask in every row of a batch.

    int(rows · prob) rows are masked. The range of ratios is cut into as many equal parts, each part gives
    one row a ratio uniform within it; these rows are scattered at random over the batch, the others get 0.
    (iBOT's and DINOv2's collation.)

    Args:
        num_rows: rows of the batch, two global views of every image.
        num_patches: patches of a row.
        config: share of rows, range of ratios.
        rng: every random number comes from here.
    """
    num_masked = int(num_rows * config.prob)
    edges = np.linspace(config.ratio[0], config.ratio[1], num_masked + 1)
    targets = np.zeros(num_rows, dtype=np.int64)
    ratios = edges[:-1] + (edges[1:] - edges[:-1]) * rng.random(num_masked)
    targets[:num_masked] = (num_patches * ratios).astype(np.int64)
    return rng.permutation(targets)


def batch_masks(
    num_rows: int,
    grid: tuple[int, int],
    config: MaskConfig,
    rng_for_targets: np.random.Generator,
    rng_for_row: Callable[[int], np.random.Generator],
    rows: Int64[np.ndarray, " part"] | None = None,
) -> Bool[np.ndarray, "_ patches"]:
    """The masks of a batch: `mask_targets` says how much of each row, `block_mask` which patches.

    Args:
        num_rows: rows of the batch, two global views of every image.
        grid: rows and columns of patches of a view.
        config: share of rows, range of ratios, shape of blocks.
        rng_for_targets: draws the targets.
        rng_for_row: the generator that draws a row's blocks; called for masked rows only.
        rows: those whose masks are given back; all of them by default.
    """
    num_patches = grid[0] * grid[1]
    targets = mask_targets(num_rows, num_patches, config, rng_for_targets)
    wanted = np.arange(num_rows) if rows is None else rows
    masks = np.zeros((len(wanted), num_patches), dtype=np.bool_)
    for place in np.flatnonzero(targets[wanted]).tolist():
        row = int(wanted[place])
        masks[place] = block_mask(grid, int(targets[row]), config, rng_for_row(row)).ravel()
    return masks
