from collections import Counter
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poa.backbones import architecture
from poa.config import load_recipe
from poa.elastic import SearchSpace, Subnet, SubnetDraws
from poa.elastic.draws import NUM_BUCKETS

MODES = ("cost-bucket", "independent", "shared")
SPACE = SearchSpace(widths=(16, 32, 48), depths=((2, 3, 4),))


def cost_of(subnet):
    return subnet.width**2 * sum(subnet.depths)


def draws_of(space, mode="cost-bucket", num_ranks=2):
    return SubnetDraws(space, {subnet: cost_of(subnet) for subnet in space.subnets}, mode, num_ranks)


def walk(draws, number, seed=0):
    return [draws.at(seed, number * draws.num_steps + step) for step in range(draws.num_steps)]


@lru_cache
def paper(recipe):
    model = load_recipe(recipe).model
    kind = architecture(model)
    space = kind.space(model)
    return space, {subnet: kind.flops(model, subnet, None) for subnet in space.subnets}


spaces = st.builds(
    lambda widths, depths, emphasis: SearchSpace(tuple(range(8, 8 * widths + 1, 8)), depths, emphasis, emphasis),
    st.integers(1, 5),
    st.lists(st.integers(1, 4).map(lambda count: tuple(range(1, count + 1))), min_size=1, max_size=2).map(tuple),
    st.sampled_from([1.0, 2.0, 3.0]),
)


@pytest.mark.parametrize("mode", MODES)
@given(space=spaces, seed=st.integers(0, 9), position=st.integers(0, 300))
@settings(max_examples=30, deadline=None)
def test_one_rank_walks_the_list_as_a_single_process_does(mode, space, seed, position):
    assert draws_of(space, mode, 1).at(seed, position) == (space.draw(seed, position),)


@pytest.mark.parametrize("mode", MODES)
@given(space=spaces, num_ranks=st.integers(1, 9), seed=st.integers(0, 9), position=st.integers(0, 300))
@settings(max_examples=30, deadline=None)
def test_draws_are_a_pure_function_of_seed_and_position(mode, space, num_ranks, seed, position):
    first = draws_of(space, mode, num_ranks)
    first.at(seed, 0)
    found = first.at(seed, position)
    assert len(found) == num_ranks
    assert found == draws_of(space, mode, num_ranks).at(seed, position)


@given(space=spaces, num_ranks=st.integers(2, 9), seed=st.integers(0, 9), first=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_over_any_walks_by_cost_no_entry_of_the_list_is_drawn_more_often_than_another(space, num_ranks, seed, first):
    if not space.draw_list:
        return
    draws = draws_of(space, num_ranks=num_ranks)
    num_walks = 3
    counts = Counter(
        subnet for number in range(first, first + num_walks) for step in walk(draws, number, seed) for subnet in step
    )
    num_drawn = num_walks * draws.num_steps * num_ranks
    entries = Counter(space.draw_list)
    repeats = -(-NUM_BUCKETS * num_ranks // len(space.draw_list))
    low, high = divmod(num_drawn, repeats * len(space.draw_list))
    assert counts.total() == num_drawn
    for subnet, multiplicity in entries.items():
        times = multiplicity * repeats
        assert low * times <= counts[subnet] <= (low + bool(high)) * times


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_walk_by_cost_draws_each_subnet_exactly_as_often_as_its_multiplicity_says(num_ranks):
    space, _ = paper("vit-l16")
    assert len(space.draw_list) % num_ranks == 0
    assert len(space.draw_list) >= NUM_BUCKETS * num_ranks
    draws = draws_of(space, num_ranks=num_ranks)
    for number in (0, 7):
        assert Counter(subnet for step in walk(draws, number) for subnet in step) == Counter(space.draw_list)


def test_two_walks_by_cost_have_their_steps_in_another_order():
    draws = draws_of(SPACE)
    assert walk(draws, 0) != walk(draws, 1)
    assert walk(draws, 0, seed=0) != walk(draws, 0, seed=1)


@pytest.mark.parametrize("num_ranks", [2, 8, 64])
@pytest.mark.parametrize("recipe", ["vit-l16", "swin-b"])
def test_the_subnets_of_a_step_lie_in_one_bucket_of_the_list_by_cost(recipe, num_ranks):
    space, costs = paper(recipe)
    draws = SubnetDraws(space, costs, "cost-bucket", num_ranks)
    by_cost = sorted(costs[subnet] for subnet in space.draw_list)
    slack = 1 / draws.num_steps
    for step in walk(draws, 2):
        low, high = (extreme(costs[subnet] for subnet in step) for extreme in (min, max))
        num_between = sum(low < cost < high for cost in by_cost)
        assert num_between / len(by_cost) <= 1 / NUM_BUCKETS + 2 * slack


@pytest.mark.parametrize("recipe", ["vit-l16", "swin-b"])
def test_ranks_that_draw_by_cost_compute_nine_tenths_of_the_time_and_train_different_subnets(recipe):
    space, costs = paper(recipe)

    def efficiency(mode):
        steps = [SubnetDraws(space, costs, mode, 8).at(0, position) for position in range(200)]
        cost = [[costs[subnet] for subnet in step] for step in steps]
        distinct = sum(len(set(step)) for step in steps) / len(steps)
        return sum(map(sum, cost)) / sum(8 * max(step) for step in cost), distinct

    by_cost, independent, shared = (efficiency(mode) for mode in MODES)
    assert by_cost[0] > 0.9
    assert independent[0] < 0.7
    assert by_cost[1] > 2.5 > shared[1] == 1.0


@given(num_ranks=st.integers(2, 9), seed=st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_independent_ranks_walk_the_one_list_together(num_ranks, seed):
    draws = draws_of(SPACE, "independent", num_ranks)
    taken = [subnet for position in range(40) for subnet in draws.at(seed, position)]
    assert taken == [SPACE.draw(seed, position) for position in range(40 * num_ranks)]


def test_shared_draws_are_the_same_on_all_ranks_and_those_of_a_single_process():
    draws = draws_of(SPACE, "shared", 3)
    assert all(draws.at(4, position) == (SPACE.draw(4, position),) * 3 for position in range(40))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_ranks", [2, 3, 200])
def test_the_intact_network_is_never_drawn(mode, num_ranks):
    draws = draws_of(SPACE, mode, num_ranks)
    assert all(SPACE.intact not in draws.at(0, position) for position in range(30))


@pytest.mark.parametrize("mode", MODES)
def test_a_space_of_one_network_gives_nothing_to_draw(mode):
    assert draws_of(SearchSpace((16,), ((2,),)), mode, 3).at(0, 5) == (None, None, None)


@pytest.mark.parametrize("num_ranks", [2, 5])
def test_a_space_with_fewer_entries_than_ranks_repeats_them(num_ranks):
    space = SearchSpace((8, 16), ((1,),), 1.0, 1.0)
    assert draws_of(space, num_ranks=num_ranks).at(0, 3) == (Subnet(8, (1,)),) * num_ranks


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_no_rank_always_has_the_larger_subnets(rank):
    draws = draws_of(SearchSpace(tuple(range(8, 129, 8)), ((1, 2, 3, 4),)), num_ranks=4)
    steps = [step for number in range(40) for step in walk(draws, number)]
    costs = [[cost_of(subnet) for subnet in step] for step in steps]
    balance = [sum((step[rank] > cost) - (step[rank] < cost) for cost in step) for step in costs]
    assert abs(sum(balance) / len(balance)) < 0.1
