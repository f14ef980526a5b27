"""The order of images that lie in shards."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poa.data import EpochPlan, some_images
from poa.data.windows import WindowedOrder
from poa.distributed import Ranks
from poa.errors import ConfigError


def plan_of(sizes, *, window=4, lanes=1, batch_size=8, accumulate=1, seed=0, ranks=Ranks()):  # noqa: B008
    sizes = np.asarray(sizes)
    windows = WindowedOrder(sizes, window, lanes, seed)
    return EpochPlan(int(sizes.sum()), batch_size, accumulate, seed, ranks, windows)


def epoch_of(plan, epoch):
    per_epoch = plan.steps_per_epoch * plan.accumulate
    return [plan.position(epoch * per_epoch + step)[1] for step in range(per_epoch)]


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 20), min_size=4, max_size=25).filter(lambda sizes: sum(sizes) >= 48),
    window=st.integers(1, 30),
    lanes=st.integers(1, 4),
    each=st.integers(1, 6),
    accumulate=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_an_epoch_shows_no_image_twice_and_drops_less_than_a_step(sizes, window, lanes, each, accumulate, seed):
    batch_size = lanes * each * accumulate
    plan = plan_of(sizes, window=window, lanes=lanes, batch_size=batch_size, accumulate=accumulate, seed=seed)
    for epoch in range(2):
        shown = np.concatenate(epoch_of(plan, epoch))
        assert len(set(shown.tolist())) == len(shown) > sum(sizes) - batch_size
        assert shown.min() >= 0
        assert shown.max() < sum(sizes)


def test_every_image_comes_in_every_epoch_when_batches_fill_it():
    plan = plan_of([10] * 12, lanes=3, batch_size=12, window=2)
    assert sorted(np.concatenate(epoch_of(plan, 1)).tolist()) == list(range(120))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=8, max_size=40),
    window=st.integers(1, 8),
    lanes=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_a_lane_needs_a_window_of_shards_at_a_time_and_comes_back_to_none(sizes, window, lanes, seed):
    plan = plan_of(sizes, window=window, lanes=lanes, batch_size=lanes, seed=seed)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    batches = np.stack(epoch_of(plan, 0))
    for lane in range(lanes):
        shards = shard_of[batches[:, lane]]
        first = {shard: int(np.flatnonzero(shards == shard)[0]) for shard in set(shards.tolist())}
        last = {shard: int(np.flatnonzero(shards == shard)[-1]) for shard in set(shards.tolist())}
        open_at_once = [sum(first[shard] <= step <= last[shard] for shard in first) for step in range(len(shards))]
        assert max(open_at_once) <= window


def test_lanes_share_at_most_the_shards_that_they_are_cut_in():
    plan = plan_of([10] * 40, lanes=4, batch_size=8, window=3)
    batches = np.stack(epoch_of(plan, 0)) // 10
    shards = [set(batches[:, 2 * lane : 2 * lane + 2].ravel().tolist()) for lane in range(4)]
    assert sum(map(len, shards)) == len(set().union(*shards)) == 40


def test_machines_with_a_lane_each_fetch_a_part_of_the_shards():
    sizes = np.full(40, 10)
    seen = []
    for rank in range(4):
        plan = plan_of(sizes, lanes=2, batch_size=8, window=3, ranks=Ranks(rank, 4, rank % 2, 2))
        seen.append({int(image) // 10 for whole in epoch_of(plan, 0) for image in whole[plan.ranks.part(8)]})
    assert seen[0] == seen[1]
    assert seen[2] == seen[3]
    assert len(seen[0]) == len(seen[2]) == 20
    assert not seen[0] & seen[2]


@pytest.mark.parametrize("lanes", [1, 2])
def test_neither_ranks_nor_what_was_asked_before_change_the_order(lanes):
    one = plan_of([7, 5, 9, 3, 11, 2], lanes=lanes, window=2)
    four = plan_of([7, 5, 9, 3, 11, 2], lanes=lanes, window=2, ranks=Ranks(3, 4, 3, 4))
    forward = [one.position(step) for step in range(20)]
    backward = [pickle.loads(pickle.dumps(four)).position(step) for step in reversed(range(20))]  # noqa: S301
    for (epoch, images), (same_epoch, same) in zip(forward, reversed(backward), strict=True):
        assert epoch == same_epoch
        assert images.tolist() == same.tolist()


def test_accumulating_changes_how_a_step_is_cut_and_not_what_it_holds():
    whole, cut = (plan_of([9] * 8, lanes=2, batch_size=12, accumulate=number) for number in (1, 3))
    for step in range(10):
        parts = np.concatenate([cut.position(3 * step + part)[1] for part in range(3)])
        assert sorted(parts.tolist()) == sorted(whole.position(step)[1].tolist())


def test_a_batch_takes_equally_many_images_from_every_lane():
    plan = plan_of([10] * 40, lanes=4, batch_size=8, window=1)
    for batch in epoch_of(plan, 0):
        assert np.unique(batch // 10, return_counts=True)[1].tolist() == [2] * 4


def test_batches_mix_the_shards_of_a_window_as_drawing_at_random_would():
    plan = plan_of([100] * 32, window=8, batch_size=40)
    kinds = [len(np.unique(batch // 100)) for epoch in range(3) for batch in epoch_of(plan, epoch)]
    expected = 8 * (1 - (7 / 8) ** 40)
    assert np.mean(kinds) == pytest.approx(expected, abs=0.1)


def test_windows_are_as_even_as_can_be():
    plan = plan_of([10] * 9, window=8, batch_size=10)
    shards = np.concatenate(epoch_of(plan, 0)) // 10
    assert sorted([len(set(shards[:40].tolist())), len(set(shards[40:].tolist()))]) == [4, 5]


def test_with_a_single_window_every_image_is_as_likely_at_every_place():
    places = np.zeros((12, 12))
    for seed in range(1200):
        order = np.concatenate(epoch_of(plan_of([4, 2, 6], window=3, batch_size=4, seed=seed), 0))
        places[order, np.arange(12)] += 1
    chi_squared = ((places - 100) ** 2 / 100).sum()
    assert 70 < chi_squared < 180  # 121 degrees of freedom: mean 121, standard deviation 16


class Blocks:
    def __init__(self, sizes):
        self.block_sizes = sizes

    def __len__(self):
        return 120


@pytest.mark.parametrize("number", [5, 40, 119, 500])
def test_some_images_come_from_few_shards(number):
    sizes = np.array([10, 0] * 12)
    found = some_images(Blocks(sizes), number, np.random.default_rng(0))
    assert len(set(found.tolist())) == len(found) == min(number, 120)
    assert (np.diff(found) > 0).all()
    assert len(np.unique(np.repeat(np.arange(24), sizes)[found])) <= max(4, -(-2 * number // 10))


def test_some_images_without_shards_are_drawn_from_all():
    found = some_images(Blocks(None), 60, np.random.default_rng(0))
    assert found.tolist() == sorted(np.random.default_rng(0).permutation(120)[:60].tolist())


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {
        tuple(np.concatenate(epoch_of(plan_of([5] * 8, window=2, seed=seed), epoch)))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [({"lanes": 3}, r"data\.lanes must be a divisor .*--data\.lanes (2|4)"), ({"lanes": 9}, r"--data\.lanes 8")],
)
def test_lanes_that_cannot_be_are_refused_with_the_nearest_that_can(options, message):
    with pytest.raises(ConfigError, match=message):
        plan_of([5] * 8, **options)
