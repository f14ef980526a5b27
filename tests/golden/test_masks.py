"""The masks against statistics of the reference implementation's, over 1,000 samples of each kind.

Our means and the reference's must agree within 0.1 %, or within 4 standard errors of the two samples where
these are larger.
"""

import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from poa.config import MaskConfig
from poa.data import batch_masks, block_mask
from poa.randomness import generator

GOLDEN = json.loads((Path(__file__).parent / "data" / "masks.json").read_text())
GRID = (14, 14)
NUM_DIRECT, NUM_BATCHES, NUM_GOLDEN = 6000, 60, 1000
RATIOS = {
    "vit_ratio_0.1_0.5_batch64": (0.1, 0.5),
    "swin_resnet_ratio_0.1_0.3_batch64": (0.1, 0.3),
    "vit_batch50": (0.1, 0.5),
}


@cache
def direct_counts(target):
    rngs = (generator(0, "direct", target, sample) for sample in range(NUM_DIRECT))
    return np.array([block_mask(GRID, target, MaskConfig(), rng).sum() for rng in rngs])


@cache
def batches(name):
    rows, config = GOLDEN[name]["rows"], MaskConfig(ratio=RATIOS[name])
    return np.stack(
        [
            batch_masks(
                rows, GRID, config, generator(0, "targets", batch), lambda row, b=batch: generator(0, "row", b, row)
            )
            for batch in range(NUM_BATCHES)
        ]
    )


def masked_counts(name):
    counts = batches(name).sum(axis=2).ravel()
    return counts[counts > 0]


def assert_same_mean(ours, golden_mean, golden_std):
    error = math.hypot(ours.std() / math.sqrt(len(ours)), golden_std / math.sqrt(NUM_GOLDEN))
    assert abs(ours.mean() - golden_mean) <= max(1e-3 * golden_mean, 4 * error)


@pytest.mark.parametrize("target", sorted(GOLDEN["generator_direct"], key=int))
def test_masks_of_one_target_have_the_references_statistics(target):
    golden, counts = GOLDEN["generator_direct"][target], direct_counts(int(target))
    assert_same_mean(counts, golden["mean"], golden["std"])
    assert counts.max() == golden["max"]
    assert counts.min() >= golden["min"] - 2
    for level in (5, 50, 95):
        assert abs(np.percentile(counts, level) - golden[f"q{level:02d}"]) <= 1
    share = (counts == int(target)).mean()
    expected = golden["exact_fraction"]
    error = math.sqrt(expected * (1 - expected) * (1 / NUM_GOLDEN + 1 / NUM_DIRECT))
    assert abs(share - expected) <= 4 * error
    assert counts.std() == pytest.approx(golden["std"], rel=0.25)


@pytest.mark.parametrize("name", RATIOS)
def test_masked_rows_of_batches_have_the_references_statistics(name):
    golden, counts = GOLDEN[name], masked_counts(name)
    assert_same_mean(counts, golden["mean"], golden["std"])
    assert counts.std() == pytest.approx(golden["std"], rel=0.03)
    assert abs(counts.min() - golden["min"]) <= 2
    assert abs(counts.max() - golden["max"]) <= 1
    np.testing.assert_allclose(np.percentile(counts, range(0, 101, 10)), golden["deciles"], atol=2)


@pytest.mark.parametrize("name", RATIOS)
def test_as_many_rows_and_patches_are_masked_as_in_the_reference(name):
    golden, masks = GOLDEN[name], batches(name)
    rows_masked = (masks.sum(axis=2) > 0).sum(axis=1)
    assert set(rows_masked.tolist()) == set(golden["rows_masked_per_batch"])
    assert masks.mean() == pytest.approx(golden["fraction_of_all_tokens_masked"], rel=5e-3)
    assert masks.sum(axis=(1, 2)).mean() == pytest.approx(golden["tokens_masked_per_batch_mean"], rel=5e-3)
    assert masks.sum(axis=(1, 2)).max() <= golden["upperbound"][0]


@pytest.mark.parametrize("name", RATIOS)
def test_masked_rows_scatter_over_both_views(name):
    half = GOLDEN[name]["rows"] // 2
    in_first_view = (batches(name)[:, :half].sum(axis=2) > 0).sum(axis=1)
    low, high = GOLDEN[name]["masked_in_first_global_view_of_B"]
    assert in_first_view.min() < in_first_view.max()
    assert abs(in_first_view.mean() - half / 2) < 4 * 0.5 * math.sqrt(half / 2 / NUM_BATCHES)
    assert in_first_view.min() >= low - 8
    assert in_first_view.max() <= high + 8
