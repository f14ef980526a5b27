from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from poa.elastic import Cut, SearchSpace, Subnet, elastic, fixed, kept_blocks
from poa.errors import SubnetError

SPACE = SearchSpace((32, 48, 64), ((2, 3, 4),))
TWO_STAGES = SearchSpace((8, 16), ((1, 2), (3, 5)), width_emphasis=1.0, depth_emphasis=2.0)
SPACES = pytest.mark.parametrize("space", [SPACE, TWO_STAGES], ids=["one stage", "two stages"])

subnets = st.builds(Subnet, st.integers(1, 999_999), st.lists(st.integers(0, 9999), min_size=1, max_size=4).map(tuple))


@given(subnets)
def test_name_parses_back_to_the_same_subnet(subnet):
    assert Subnet.parse(str(subnet)) == subnet
    assert Subnet.parse(f"  {subnet}\n") == subnet


@pytest.mark.parametrize("text", ["", "w32", "d2", "w32-d", "w-d2", "W32-d2", "w32-d2-", "w32_d2", "w32-d2.5", "w³-d2"])
def test_text_that_is_no_name_is_refused(text):
    with pytest.raises(SubnetError, match="not the name of a sub-network"):
        Subnet.parse(text)


@SPACES
def test_every_member_is_found_by_its_name(space):
    assert len(space) == len(set(space.subnets)) == len(space.widths) * len(space.depth_tuples)
    for subnet in space.subnets:
        assert subnet in space
        assert space.parse(str(subnet)) == space.parse(subnet) == subnet


def test_a_stranger_is_refused_with_the_space_and_the_nearest_members():
    with pytest.raises(SubnetError, match=r"w50-d3 is not in this family .*32, 48, 64.* Nearest: w48-d3,"):
        SPACE.parse("w50-d3")
    with pytest.raises(SubnetError, match=r"names 2 depths, this family has 1 .* looks like w32-d2"):
        SPACE.parse("w32-d2-3")
    with pytest.raises(SubnetError, match=r"names 1 depths, this family has 2"):
        TWO_STAGES.parse(Subnet(8, (1,)))
    assert Subnet(50, (3,)) not in SPACE
    assert "w32-d2" not in SPACE


def test_nearest_are_ordered_by_distance():
    assert SPACE.nearest(Subnet(62, (3,)), num=2) == [Subnet(64, (3,)), Subnet(48, (3,))]
    assert SPACE.nearest(Subnet(1000, (4,)), num=1) == [SPACE.intact]
    assert SPACE.nearest(Subnet(1, (1,)), num=1) == [SPACE.smallest]


def test_parse_all_understands_words_and_keeps_the_order_without_repeats():
    assert SPACE.parse_all(["all"]) == list(SPACE.subnets)
    found = SPACE.parse_all(["intact", "w32-d3", "smallest", "middle", "w64-d4"])
    assert [str(subnet) for subnet in found] == ["w64-d4", "w32-d3", "w32-d2", "w48-d3"]
    assert SPACE.parse_all(["middle", "all"])[0] == SPACE.middle
    assert len(SPACE.parse_all(["middle", "all"])) == len(SPACE)
    with pytest.raises(SubnetError, match="Nearest"):
        SPACE.parse_all(["smallest", "w33-d2"])


@SPACES
@pytest.mark.parametrize("seed", [0, 7])
def test_each_walk_draws_every_entry_as_often_as_it_stands_in_the_list(space, seed):
    length = len(space.draw_list)
    expected = Counter({subnet: count for subnet, count in space.multiplicities.items() if subnet != space.intact})
    assert length == sum(expected.values())
    orders = []
    for walk in range(3):
        drawn = [space.draw(seed, position) for position in range(walk * length, (walk + 1) * length)]
        assert Counter(drawn) == expected
        orders.append(drawn)
    assert orders[0] != orders[1] != orders[2]


@SPACES
def test_drawing_depends_on_seed_and_position_alone(space):
    positions = range(3 * len(space.draw_list))
    forwards = [space.draw(5, position) for position in positions]
    again = SearchSpace(space.widths, space.depths, space.width_emphasis, space.depth_emphasis)
    assert [again.draw(5, position) for position in reversed(positions)] == forwards[::-1]
    assert [space.draw(6, position) for position in positions] != forwards


def test_a_space_of_one_draws_nothing():
    space = SearchSpace((64,), ((4,),))
    assert space.intact == space.smallest == space.middle == Subnet(64, (4,))
    assert space.draw(0, 0) is None
    assert space.draw(0, 100) is None


def test_without_emphasis_every_subnet_stands_once():
    space = SearchSpace((32, 64), ((1, 2, 3),), 1.0, 1.0)
    assert set(space.multiplicities.values()) == {1}
    assert sorted(space.draw_list) == sorted(space.subnets[:-1])


WIDTH = 12
WIDTHS = (2, 4, 6, 8, 10, 12)
CUTS = {
    "norm": (Cut((elastic(WIDTH, WIDTH),)), lambda x, w: x[:w]),
    "fixed": (Cut((fixed(5), fixed(3)), fan_in=1), lambda x, _: x),
    "patch embedding": (
        Cut((elastic(WIDTH, WIDTH), fixed(3), fixed(2), fixed(2))),
        lambda x, w: x[:w],
    ),
    "proj": (
        Cut((elastic(WIDTH, WIDTH), elastic(WIDTH, WIDTH)), fan_in=1),
        lambda x, w: x[:w, :w] * (WIDTH / w),
    ),
    "fc1": (
        Cut((elastic(4 * WIDTH, WIDTH), elastic(WIDTH, WIDTH)), fan_in=1),
        lambda x, w: x[: 4 * w, :w] * (WIDTH / w),
    ),
    "fc2": (
        Cut((elastic(WIDTH, WIDTH), elastic(4 * WIDTH, WIDTH)), fan_in=1),
        lambda x, w: x[:w, : 4 * w] * (WIDTH / w),
    ),
    "qkv weight": (
        Cut((elastic(3 * WIDTH, WIDTH, num_groups=3), elastic(WIDTH, WIDTH)), fan_in=1),
        lambda x, w: np.concatenate([x[i * WIDTH : i * WIDTH + w, :w] for i in range(3)]) * (WIDTH / w),
    ),
    "qkv bias": (
        Cut((elastic(3 * WIDTH, WIDTH, num_groups=3),)),
        lambda x, w: np.concatenate([x[i * WIDTH : i * WIDTH + w] for i in range(3)]),
    ),
    "two grouped axes": (
        Cut((fixed(2), elastic(2 * WIDTH, WIDTH, num_groups=2), elastic(3 * WIDTH, WIDTH, num_groups=3)), fan_in=2),
        lambda x, w: (
            x[:, [i for i in range(2 * WIDTH) if i % WIDTH < w]][:, :, [i for i in range(3 * WIDTH) if i % WIDTH < w]]
            * (WIDTH / w)
        ),
    ),
    "position embedding": (Cut((fixed(1), fixed(5), elastic(WIDTH, WIDTH))), lambda x, w: x[:, :, :w]),
}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", CUTS)
def test_cut_equals_slicing_by_hand(name, width):
    cut, by_hand = CUTS[name]
    full = np.random.default_rng(0).normal(size=cut.full_shape)
    found = cut.apply(torch.from_numpy(full), width)
    assert tuple(found.shape) == cut.shape(width)
    np.testing.assert_allclose(found.numpy(), by_hand(full, width), rtol=1e-15)


@pytest.mark.parametrize("name", CUTS)
def test_at_full_width_the_parameter_itself_is_given_back(name):
    cut, _ = CUTS[name]
    parameter = torch.randn(cut.full_shape, requires_grad=True)
    assert cut.apply(parameter, WIDTH) is parameter
    assert cut.scale(WIDTH) == 1.0


def test_gradient_reaches_exactly_the_part_that_is_owned():
    cut, by_hand = CUTS["qkv weight"]
    parameter = torch.randn(cut.full_shape, dtype=torch.float64, requires_grad=True)
    cut.apply(parameter, 4).sum().backward()
    index = np.arange(parameter.numel()).reshape(cut.full_shape)
    owned = np.isin(index, by_hand(index, 4) / (WIDTH / 4))
    np.testing.assert_allclose(parameter.grad.numpy(), np.where(owned, WIDTH / 4, 0.0))


@given(st.integers(1, 60).flatmap(lambda total: st.tuples(st.just(total), st.integers(1, total))))
def test_kept_blocks_rise_from_the_first_to_the_last(sizes):
    total, depth = sizes
    blocks = kept_blocks(total, depth)
    assert len(blocks) == depth
    assert list(blocks) == sorted(set(blocks))
    assert blocks[0] == 0
    assert blocks[-1] == (total - 1 if depth > 1 else 0)


def test_full_depth_keeps_every_block():
    assert kept_blocks(7, 7) == tuple(range(7))
