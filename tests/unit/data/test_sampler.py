import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poa.data import EpochPlan
from poa.errors import ConfigError


@settings(max_examples=60, deadline=None)
@given(micro=st.integers(1, 8), accumulate=st.integers(1, 4), extra=st.integers(0, 60), seed=st.integers(0, 99))
def test_an_epoch_shows_no_image_twice_and_drops_less_than_a_step(micro, accumulate, extra, seed):
    batch_size = micro * accumulate
    plan = EpochPlan(batch_size + extra, batch_size, accumulate, seed)
    per_epoch = plan.steps_per_epoch * accumulate
    for epoch in range(3):
        parts = [plan.position(epoch * per_epoch + step) for step in range(per_epoch)]
        assert {part[0] for part in parts} == {epoch}
        assert {len(part[1]) for part in parts} == {micro}
        shown = np.concatenate([part[1] for part in parts])
        assert len(set(shown.tolist())) == len(shown) > plan.num_images - batch_size
        assert shown.min() >= 0
        assert shown.max() < plan.num_images


def test_accumulating_changes_how_a_step_is_cut_and_not_what_it_holds():
    whole, cut = EpochPlan(50, 12, 1, 3), EpochPlan(50, 12, 3, 3)
    for step in range(9):
        parts = np.concatenate([cut.position(3 * step + part)[1] for part in range(3)])
        assert (parts == whole.position(step)[1]).all()


def test_positions_do_not_depend_on_what_was_asked_before():
    plan = EpochPlan(20, 5, 1, 0)
    forward = [plan.position(step) for step in range(20)]
    backward = [pickle.loads(pickle.dumps(plan)).position(step) for step in reversed(range(20))]  # noqa: S301
    for one, other in zip(forward, reversed(backward), strict=True):
        assert one[0] == other[0]
        assert (one[1] == other[1]).all()


def test_what_a_caller_does_to_the_indices_stays_with_the_caller():
    plan = EpochPlan(20, 5, 1, 0)
    first = plan.position(0)[1]
    kept = first.copy()
    first[:] = 0
    assert (plan.position(0)[1] == kept).all()


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(EpochPlan(30, 30, 1, seed).position(epoch)[1]) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, 6, 1, 0), r"--train\.batch-size 5"),
        ((50, 12, 5, 0), r"--optim\.accumulate (4|6)"),
        ((50, 12, 0, 0), r"--optim\.accumulate 1"),
    ],
)
def test_plans_that_cannot_be_are_refused_with_the_nearest_that_can(arguments, message):
    with pytest.raises(ConfigError, match=message):
        EpochPlan(*arguments)


def test_negative_positions_are_refused():
    with pytest.raises(IndexError, match="counted from 0"):
        EpochPlan(5, 5, 1, 0).position(-1)
