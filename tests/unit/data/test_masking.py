import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poa.config import MaskConfig
from poa.data import batch_masks, block_mask
from poa.data.masking import mask_targets
from poa.randomness import generator


@settings(max_examples=200, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    share=st.floats(0.0, 1.0),
    min_patches=st.integers(1, 12),
    min_aspect=st.floats(0.05, 1.0),
    seed=st.integers(0, 2**32),
)
def test_no_mask_has_more_patches_than_its_target(grid, share, min_patches, min_aspect, seed):
    target = int(share * grid[0] * grid[1])
    config = MaskConfig(min_patches=min_patches, min_aspect=min_aspect)
    mask = block_mask(grid, target, config, generator(seed, "mask"))
    assert mask.shape == grid
    assert mask.dtype == np.bool_
    assert mask.sum() <= target


@settings(max_examples=200, deadline=None)
@given(
    num_rows=st.integers(0, 64),
    num_patches=st.integers(1, 300),
    prob=st.floats(0.0, 1.0),
    ratio=st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 1.0)).map(sorted),
)
def test_targets_cover_the_range_of_ratios_evenly(num_rows, num_patches, prob, ratio):
    config = MaskConfig(prob=prob, ratio=tuple(ratio))
    targets = mask_targets(num_rows, num_patches, config, generator(0, "targets"))
    num_masked = int(num_rows * prob)
    assert len(targets) == num_rows
    edges = np.linspace(*ratio, num_masked + 1) * num_patches
    largest = np.sort(targets)[num_rows - num_masked :]
    assert (largest >= np.floor(edges[:-1] - 1e-9)).all()
    assert (largest <= edges[1:] + 1e-9).all()


def test_a_mask_depends_on_its_generators_only():
    def masks(seed):
        return batch_masks(16, (8, 8), MaskConfig(), generator(seed, "t"), lambda row: generator(seed, "row", row))

    assert (masks(1) == masks(1)).all()
    assert (masks(1) != masks(2)).any()


def test_a_row_keeps_its_blocks_when_others_change():
    one = batch_masks(8, (8, 8), MaskConfig(), generator(0, "t"), lambda row: generator(0, "row", row))
    two = batch_masks(
        8, (8, 8), MaskConfig(), generator(0, "t"), lambda row: generator(0, "row", row if row < 4 else row + 9)
    )
    assert (one[:4] == two[:4]).all()


@pytest.mark.parametrize(("prob", "rows"), [(0.0, 0), (1.0, 12)])
def test_the_share_of_masked_rows_may_be_none_or_all(prob, rows):
    config = MaskConfig(prob=prob)
    masks = batch_masks(12, (14, 14), config, generator(0, "t"), lambda row: generator(0, "row", row))
    assert (masks.sum(axis=1) > 0).sum() == rows


def test_masks_are_made_of_rectangles():
    config = MaskConfig()
    for seed in range(20):
        mask = block_mask((14, 14), 12, config, generator(seed, "mask"))
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        neighbours = np.zeros_like(mask, dtype=int)
        neighbours[1:] += mask[:-1]
        neighbours[:-1] += mask[1:]
        neighbours[:, 1:] += mask[:, :-1]
        neighbours[:, :-1] += mask[:, 1:]
        assert (neighbours[mask] >= 1).mean() > 0.8
        assert len(rows) < 14
        assert len(columns) < 14
