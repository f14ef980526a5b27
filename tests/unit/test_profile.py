"""The table of costs, what of a space is measured, and what is predicted from it."""

import ast
import itertools
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from poa.backbones import architecture
from poa.config import ResNetConfig, ViTConfig
from poa.deploy.profile import ProfileRow, read_profile, write_profile
from poa.deploy.profile.fit import MIN_MEASURED, cost_features, fitted, held_out_errors, predicted_rows
from poa.deploy.profile.kit import script
from poa.deploy.profile.kit.machine import memory_of_process
from poa.deploy.profile.kit.rows import COLUMNS, text_of, write_rows
from poa.deploy.profile.kit.timing import Network, Timing, groups, percentile, time_in_turn, warm_up
from poa.deploy.profile.plan import corners, design
from poa.deploy.profile.run import planned
from poa.deploy.profile.sizes import timm_file_sizes
from poa.elastic import Subnet
from poa.errors import ConfigError, DataError
from poa.family import Family, FamilyCard, Preprocessing
from poa.task_head import TaskHead
from tests.contract.configs import SMALLEST

ROW = ProfileRow(
    device='Pixel 8, the "green" one',
    runtime="onnx",
    precision="float32",
    num_threads=1,
    batch_size=1,
    image_size=32,
    subnet="w24-d3",
    is_measured=True,
    latency_ms=1.2345,
    latency_p95_ms=2.5,
    throughput=810.04,
    peak_memory_mb=None,
    num_params=1000,
    flops=20000,
    file_size_mb=0.004321,
    fit_error=None,
    family="0123456789ab",
    date="2026-11-25",
    poa_version="0.1.0",
)
PREDICTED = replace(ROW, is_measured=False, fit_error=0.031, latency_ms=9.0, latency_p95_ms=9.5)
WIDE = ViTConfig(widths=(128, 192, 256, 320), depths=tuple(range(6, 13)), head_dim=64, patch_size=16, image_size=224)
TWO_STAGES = ResNetConfig(widths=(128, 192, 256), stage2_depths=(2, 3, 4), stage3_depths=(3, 4, 5, 6), image_size=64)


def card_of(config):
    how = Preprocessing(config.image_size, config.num_channels, (0.5,), (0.25,))
    return FamilyCard(architecture(config), config, how, weights_sha256="0123456789abcdef")


# The table


def test_a_table_that_was_written_reads_the_same(tmp_path):
    rows = (
        ROW,
        replace(ROW, subnet="w32-d3-4", num_params=2000, peak_memory_mb=12.5),
        replace(PREDICTED, subnet="w40-d3"),
    )
    write_profile(tmp_path / "new" / "profile.csv", rows)
    assert set(read_profile(tmp_path / "new" / "profile.csv")) == set(rows)


def test_the_columns_are_those_of_the_contract(tmp_path):
    write_profile(tmp_path / "profile.csv", [ROW])
    assert (tmp_path / "profile.csv").read_text().splitlines()[0] == (
        "device,runtime,precision,num_threads,batch_size,image_size,subnet,is_measured,latency_ms,latency_p95_ms,"
        "throughput,peak_memory_mb,num_params,flops,file_size_mb,fit_error,family,date,poa_version"
    )


def test_a_measured_row_replaces_a_predicted_one_and_never_the_other_way(tmp_path):
    table = tmp_path / "profile.csv"
    assert write_profile(table, [PREDICTED]) == (PREDICTED,)
    assert write_profile(table, [ROW]) == (ROW,)
    assert write_profile(table, [PREDICTED]) == (ROW,)
    newer = replace(ROW, latency_ms=1.0)
    assert write_profile(table, [newer]) == (newer,)


@pytest.mark.parametrize(
    "other", [{"num_threads": 2}, {"device": "Raspberry"}, {"runtime": "torch"}, {"batch_size": 8}]
)
def test_rows_of_other_settings_stay(tmp_path, other):
    write_profile(tmp_path / "profile.csv", [ROW])
    assert len(write_profile(tmp_path / "profile.csv", [replace(ROW, **other)])) == 2


@pytest.mark.parametrize(
    ("column", "text", "said"),
    [
        ("latency_ms", "fast", "'fast' is no number > 0"),
        ("latency_ms", "nan", "'nan' is no number > 0"),
        ("latency_p95_ms", "-1", "'-1' is no number > 0"),
        ("num_params", "1e6", "'1e6' is no whole number ≥ 1"),
        ("subnet", "small", "'small' is not the name of a sub-network"),
        ("is_measured", "yes", "'yes' is neither true nor false"),
        ("fit_error", "0.1", "measured rows have none"),
        ("date", "yesterday", "yesterday"),
        ("family", "", "empty"),
    ],
)
def test_a_wrong_value_is_refused_with_its_line_and_column(tmp_path, column, text, said):
    table = tmp_path / "profile.csv"
    good, bad = ({name: text_of(getattr(ROW, name)) for name in COLUMNS} for _ in range(2))
    write_rows(table, [good, {**bad, "subnet": "w8-d1", column: text}])
    with pytest.raises(DataError, match=rf"line 3, column {column}: .*{said}"):
        read_profile(table)


def test_what_is_no_table_is_refused(tmp_path):
    table = tmp_path / "profile.csv"
    with pytest.raises(DataError, match="cannot read"):
        read_profile(table)
    table.write_text("network,latency\na,1\n")
    with pytest.raises(DataError, match="lacks device"):
        read_profile(table)
    table.write_text(",".join((*COLUMNS, "note")) + "\n")
    with pytest.raises(DataError, match="has note"):
        read_profile(table)
    table.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        read_profile(table)
    row = {name: text_of(getattr(ROW, name)) for name in COLUMNS}
    write_rows(table, [row, row])
    with pytest.raises(DataError, match="line 3: w24-d3 stands there twice"):
        read_profile(table)


# What is measured


def test_a_design_holds_the_corners_and_leaves_no_network_far_from_a_measured_one():
    for config, num in ((WIDE, 12), (TWO_STAGES, 14)):
        subnets = card_of(config).space.subnets
        chosen = design(subnets, num)
        assert len(set(chosen)) == num
        assert set(corners(subnets)) <= set(chosen)
        assert chosen == design(subnets, num)
        assert _coverage(subnets, chosen) < 0.7 * _coverage(subnets, corners(subnets))


def _coverage(subnets, chosen):
    """The largest distance of a network to the nearest chosen one."""
    points = np.array([(each.width, *each.depths) for each in subnets], dtype=float)
    points = (points - points.min(0)) / np.ptp(points, 0)
    taken = points[[subnets.index(each) for each in chosen]]
    return np.linalg.norm(points[:, None] - taken, axis=-1).min(1).max()


def test_corners_are_the_extremes_of_every_axis_smallest_and_intact_first():
    space = card_of(TWO_STAGES).space
    found = corners(space.subnets)
    assert found[:2] == (space.smallest, space.intact)
    assert {str(each) for each in found} == {
        f"w{width}-d{a}-{b}" for width, a, b in itertools.product((128, 256), (2, 4), (3, 6))
    }
    assert corners([Subnet(8, (2,))]) == (Subnet(8, (2,)),)


def test_small_spaces_are_measured_whole_and_large_ones_by_a_design():
    small = card_of(WIDE).space.subnets
    large = card_of(ViTConfig()).space.subnets
    assert planned(small, None) == small
    assert len(planned(large, None)) == 40
    assert len(planned(small, 12)) == 12
    assert planned(small[:3], 3) == small[:3]
    for count in (29, MIN_MEASURED - 1):
        with pytest.raises(ConfigError, match="num-measured"):
            planned(small, count)


# What is predicted


def test_a_fit_finds_the_truth_where_the_truth_is_of_its_form():
    for config in (WIDE, TWO_STAGES):
        card = card_of(config)
        subnets = card.space.subnets
        features = cost_features(card, subnets, config.image_size)
        truth = features @ (np.arange(1, features.shape[1] + 1) / features.max(0))
        chosen = [subnets.index(each) for each in design(subnets, min(20, len(subnets)))]
        predicted = features @ fitted(features[chosen], truth[chosen])
        assert np.abs(predicted / truth - 1).max() < 1e-3


def test_the_stated_error_is_of_the_size_of_the_noise():
    card = card_of(WIDE)
    subnets = card.space.subnets
    features = cost_features(card, subnets, 224)
    truth = features[:, -2] / 1e9 + 0.4 * features[:, 3] / features[:, 3].max() + 0.1
    rng = np.random.default_rng(0)
    stated, real = [], []
    for _ in range(20):
        noisy = truth * (1 + 0.05 * rng.standard_normal(len(truth)))
        chosen = [subnets.index(each) for each in design(subnets, 14)]
        held = [row for row, index in enumerate(chosen) if subnets[index] not in corners(subnets)]
        errors = held_out_errors(features[chosen], noisy[chosen], held)
        assert len(errors) == 10
        stated.append(np.sqrt(np.mean(np.square(errors))))
        left = [index for index in range(len(subnets)) if index not in chosen]
        predicted = features[left] @ fitted(features[chosen], noisy[chosen])
        real.append(np.sqrt(np.mean((predicted / noisy[left] - 1) ** 2)))
    assert 0.04 < np.mean(stated) < 0.09
    assert np.mean(real) < 1.2 * np.mean(stated)


def test_a_held_out_row_does_not_touch_its_own_prediction():
    features = cost_features(card_of(WIDE), card_of(WIDE).space.subnets, 224)
    truth = features @ (np.ones(features.shape[1]) / features.max(0))
    spoilt = truth.copy()
    spoilt[9] *= 3
    (error,) = held_out_errors(features, spoilt, [9])
    assert error == pytest.approx(1 / 3 - 1, abs=1e-3)


def test_predicted_rows_are_told_apart_and_have_exact_parameters_operations_and_file_sizes():
    family = _family(ViTConfig(widths=(16, 24, 32), depths=(1, 2, 3), head_dim=8, patch_size=4, image_size=32))
    card, subnets = family.card, family.space.subnets
    costs = {str(each): 1.0 + 1e-6 * card.flops(each) for each in subnets}
    left_out = subnets[4:5]
    rows = [_measured(card, each, costs[str(each)]) for each in subnets if each not in left_out]
    sizes = timm_file_sizes(family, left_out, 32)
    (row,), error = predicted_rows(card, rows, left_out, sizes)
    assert not row.is_measured
    assert row.fit_error == pytest.approx(error.root_mean_square, abs=1e-4)
    assert row.latency_ms == pytest.approx(costs[str(left_out[0])], rel=0.05)
    assert row.latency_p95_ms >= row.latency_ms
    assert row.throughput == pytest.approx(1e3 * row.batch_size / row.latency_ms, rel=1e-3)
    assert (row.num_params, row.flops) == (card.num_params(left_out[0]), card.flops(left_out[0]))
    assert row.file_size_mb == pytest.approx(sizes[0], abs=1e-9)
    assert row.peak_memory_mb == pytest.approx(_memory(card, left_out[0]), rel=0.05)
    without = [replace(each, peak_memory_mb=None) for each in rows]
    assert predicted_rows(card, without, left_out)[0][0].peak_memory_mb is None


def test_too_few_measured_rows_are_refused():
    card = card_of(WIDE)
    rows = [_measured(card, each, 1.0) for each in corners(card.space.subnets)]
    with pytest.raises(DataError, match=r"at least 6 measured.*w128-d6"):
        predicted_rows(card, rows, card.space.subnets[5:6])


def _measured(card, subnet, latency):
    return replace(
        ROW,
        subnet=str(subnet),
        latency_ms=latency,
        latency_p95_ms=1.1 * latency,
        peak_memory_mb=_memory(card, subnet),
        num_params=card.num_params(subnet),
        batch_size=2,
    )


def _memory(card, subnet):
    return 3.0 + 8e-6 * card.num_params(subnet)


def _family(config):
    card = card_of(config)
    return Family(card, card.architecture.build(config))


@pytest.mark.parametrize("name", SMALLEST)
@pytest.mark.parametrize("has_head", [False, True])
def test_file_sizes_are_exact_without_writing(tmp_path, name, has_head):
    import torch

    family = _family(SMALLEST[name])
    if has_head:
        channels = family.supernet.layout.features.size
        family.head = TaskHead(torch.zeros(3, channels), torch.zeros(3), ("a", "b", "c"))
    size = 2 * SMALLEST[name].image_size
    sizes = timm_file_sizes(family, family.subnets, size)
    for subnet, megabytes in zip(family.subnets, sizes, strict=True):
        family.write_timm(subnet, tmp_path, size)
        assert (tmp_path / "model.safetensors").stat().st_size == round(1e6 * megabytes)


# Measuring


class Clock:
    """Tells a time that networks move forward."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def network(self, name, seconds):
        times = itertools.chain(seconds, itertools.repeat(seconds[-1]))

        def run():
            self.calls.append(name)
            self.now += next(times)

        return run


def test_warming_up_ends_when_the_time_is_stable():
    clock = Clock()
    assert warm_up(clock.network("a", [0.5, 0.3, 0.2, 0.15, 0.1]), clock) == pytest.approx(0.1)
    assert 10 <= len(clock.calls) < 20
    clock = Clock()
    warm_up(clock.network("slow", [10.0]), clock)
    assert len(clock.calls) == 3


def test_networks_take_turns_and_first_passes_are_not_timed():
    clock = Clock()
    runs = [clock.network("a", [0.001]), clock.network("b", [0.004])]
    timing = Timing(num_runs=20, num_rounds=4, clock=clock)
    seconds = time_in_turn(runs, timing)
    assert [len(each) for each in seconds] == [20, 20]
    assert np.allclose(seconds[0], 0.001)
    assert np.allclose(seconds[1], 0.004)
    turns = [name for name, _ in itertools.groupby(clock.calls)]
    assert "".join(turns) == "abababa", "warmed up ab, then the rounds ab, ba, ab, ba"


def test_slow_networks_are_timed_less_often_but_at_least_twice_a_round():
    clock = Clock()
    timing = Timing(num_runs=60, num_rounds=3, max_seconds=30.0, clock=clock)
    seconds = time_in_turn([clock.network("a", [1.0]), clock.network("b", [100.0])], timing)
    assert [len(each) for each in seconds] == [30, 6]


def test_groups_mix_sizes_and_stay_within_memory():
    networks = [Network(str(index), 10**6 * (1 + index), 1, nullcontext) for index in range(20)]
    timing = Timing(max_group=8, max_group_bytes=3e8)
    found = groups(networks, timing)
    assert sorted(each.subnet for group in found for each in group) == sorted(each.subnet for each in networks)
    assert len(found) == 3
    means = [np.mean([each.num_params for each in group]) for group in found]
    assert max(means) < 1.3 * min(means)
    assert [len(group) for group in groups(networks, replace(timing, max_group_bytes=1.0))] == [1] * 20


def test_percentiles_are_values_that_were_measured():
    values = [float(value) for value in range(1, 101)]
    assert percentile(values, 0.95) == 95.0
    assert percentile([3.0], 0.95) == 3.0
    assert percentile([1.0, 2.0], 0.95) == 2.0


def test_the_peak_of_memory_is_counted_above_what_is_in_use():
    # In a process of its own, as `poa profile` does it: memory that others give back would count against the peak.
    lines = """
import numpy as np
from poa.deploy.profile.kit.machine import peak_memory

held = np.ones(20_000_000)
found = peak_memory(lambda: lambda: np.ones(5_000_000).sum())
print("null" if found is None else found)
"""
    found = memory_of_process([sys.executable, "-c", lines])
    assert found is None or 30e6 < found < 100e6


def test_the_kit_is_python_3_9():
    files = list(Path(script.__file__).parent.glob("*.py"))
    assert len(files) == 5
    for file in files:
        ast.parse(file.read_text(), feature_version=(3, 9))
