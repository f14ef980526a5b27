"""Choosing a sub-network: budgets, the rule against brute force, and putting tables together."""

from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poa.backbones import architecture
from poa.config import ResNetConfig, ViTConfig
from poa.config.segment import SegmentHead
from poa.deploy.export.registry import EXPORTERS
from poa.deploy.profile.table import ProfileRow, write_profile
from poa.deploy.select import FIGURES, Constraint, Row, SettingFilter, constraint, join, pareto_front, select
from poa.deploy.select.results import HEADLINES, is_quality
from poa.deploy.select.words import CALIBRATED, FORMATS, is_within_error
from poa.errors import ConfigError, DataError
from poa.evaluate.registry import EVALUATORS
from poa.family import FamilyCard, Preprocessing
from poa.randomness import generator
from tests import select_by_hand as by_hand

SUBNETS = [str(subnet) for subnet in architecture("resnet").space(ResNetConfig()).subnets]
NUM_TABLES, DRAWS_PER_TABLE = 20, 50


def limits(budget):
    return [Constraint(FIGURES[name], limit) for name, limit in budget.items()]


def drawn(table_number):
    """A table of the ResNet-152 space and its budgets."""
    table = by_hand.draw_table(generator(1, "table", table_number), SUBNETS)
    return table, [by_hand.draw_budget(generator(1, "budget", table_number, n), table) for n in range(DRAWS_PER_TABLE)]


# ---- the rule


@pytest.mark.parametrize("table_number", range(NUM_TABLES))
def test_pick_and_relaxation_equal_brute_force_on_465_rows(table_number):
    table, budgets = drawn(table_number)
    assert len(table) == 465
    rows = [Row(**row) for row in table]
    for budget in budgets:
        found, expected = select(rows, limits(budget)), by_hand.pick(table, budget)
        assert (found.pick and found.pick.subnet) == (expected and expected["subnet"])
        relaxed = [({each.figure.name: each.limit for each in one.limits}, one.row.subnet) for one in found.relaxations]
        assert relaxed == ([] if expected else by_hand.relaxations(table, budget))
        assert set(found.left_out) == {row["subnet"] for row in table} - {
            row["subnet"] for row in by_hand.usable(table, budget)
        }


@pytest.mark.parametrize("table_number", range(4))
def test_front_equals_the_naive_one_on_465_rows(table_number):
    table, budgets = drawn(table_number)
    rows = [Row(**row) for row in table]
    for budget in budgets[:4]:
        assert [row.subnet for row in select(rows, limits(budget)).front] == by_hand.front(table, budget)


def test_the_draws_hold_every_case():
    cases = {"fits": 0, "one helps": 0, "none helps": 0, "tie": 0, "left out": 0}
    for number in range(4):
        table, budgets = drawn(number)
        for budget in budgets:
            winner = by_hand.pick(table, budget)
            cases["left out"] += len(by_hand.usable(table, budget)) < len(table)
            if winner is None:
                relaxed = by_hand.relaxations(table, budget)
                cases["none helps" if len(relaxed[0][0]) > 1 else "one helps"] += 1
                continue
            cases["fits"] += 1
            rest = [row for row in table if row["subnet"] != winner["subnet"]]
            second = by_hand.pick(rest, budget)
            cases["tie"] += second is not None and second["quality"] == winner["quality"]
    assert min(cases.values()) >= 5, cases


COUNTS = st.integers(1, 4)
VALUES = COUNTS.map(float)


@st.composite
def tables(draw):
    figures = [name for name in FIGURES if name not in ("num_params", "flops")]
    some = {name: st.one_of(VALUES, st.none()) if draw(st.booleans()) else VALUES for name in figures}
    size = draw(st.integers(1, 8))
    return [
        Row(f"w{place}-d1", place, draw(COUNTS), draw(COUNTS), **{name: draw(value) for name, value in some.items()})
        for place in range(size)
    ]


BUDGETS = st.dictionaries(st.sampled_from(sorted(FIGURES)), VALUES, max_size=4)


def picked(rows, budget):
    """The selection; None where no row has all figures."""
    try:
        return select(rows, limits(budget))
    except DataError:
        return None


@settings(max_examples=60, deadline=None)
@given(tables(), BUDGETS)
def test_one_more_limit_never_raises_the_quality(rows, budget):
    found = picked(rows, budget)
    for name in budget:
        fewer = picked(rows, {each: at for each, at in budget.items() if each != name})
        if found is not None and found.pick is not None:
            assert fewer.pick.quality >= found.pick.quality


@settings(max_examples=60, deadline=None)
@given(tables(), BUDGETS)
def test_what_beats_the_pick_has_the_same_quality_and_without_such_it_is_on_the_front(rows, budget):
    found = picked(rows, budget)
    if found is None or found.pick is None:
        return
    tied = [row for row in found.fitting if row.quality == found.pick.quality]
    assert set(tied) & set(found.front)
    assert found.pick in found.front or len(tied) > 1
    assert {each.row for each in found.runner_ups} <= set(found.front) & set(found.fitting) - {found.pick}


@settings(max_examples=60, deadline=None)
@given(tables(), BUDGETS)
def test_every_relaxation_lets_its_row_in_and_nothing_less_does(rows, budget):
    found = picked(rows, budget)
    if found is None or found.pick is not None:
        return
    assert found.relaxations
    for relaxation in found.relaxations:
        wider = budget | {each.figure.name: each.limit for each in relaxation.limits}
        assert picked(rows, wider).pick == relaxation.row
        if len(relaxation.limits) == 1:
            name = relaxation.limits[0].figure.name
            closer = wider[name] + (0.5 if FIGURES[name].is_minimum else -0.5)
            assert picked(rows, wider | {name: closer}).pick is None


@settings(max_examples=60, deadline=None)
@given(tables(), BUDGETS, st.randoms(use_true_random=False))
def test_the_order_of_rows_and_limits_does_not_matter(rows, budget, random):
    found = picked(rows, budget)
    shuffled, names = random.sample(rows, len(rows)), random.sample(sorted(budget), len(budget))
    again = picked(shuffled, {name: budget[name] for name in names})
    assert (found is None) == (again is None)
    if found is not None:
        assert again.pick == found.pick
        assert {row.subnet for row in again.front} == {row.subnet for row in found.front}


@settings(max_examples=60, deadline=None)
@given(tables())
def test_a_row_is_on_the_front_unless_one_beats_it(rows):
    figures = (FIGURES["num_params"], FIGURES["flops"])
    front = pareto_front(rows, figures)
    for row in rows:
        beaten = any(
            other.num_params <= row.num_params
            and other.flops <= row.flops
            and (other.num_params, other.flops) != (row.num_params, row.flops)
            for other in rows
        )
        assert (row in front) != beaten


def test_runner_ups_say_what_is_lost_and_gained():
    rows = [
        Row("w1-d1", 0, 100, 10, quality=0.5, latency_ms=1.0, throughput=1000.0),
        Row("w2-d1", 1, 200, 10, quality=0.7, latency_ms=2.0, throughput=500.0),
        Row("w2-d2", 2, 300, 10, quality=0.9, latency_ms=9.0, throughput=111.0),
    ]
    found = select(rows, [constraint("latency_ms", "8ms")])
    assert found.pick == rows[1]
    (runner_up,) = found.runner_ups
    assert runner_up.lost == {"quality": pytest.approx(0.2)}
    assert runner_up.gained == {"latency_ms": 1.0, "throughput": 500.0, "num_params": 100}
    assert found.beyond == rows[2]
    assert select(rows, [], num_runner_ups=1).runner_ups[0].row == rows[1]


def test_rows_without_a_needed_figure_are_named_with_what_they_lack():
    rows = [Row("w1-d1", 0, 1, 1, quality=0.5), Row("w2-d1", 1, 2, 2, latency_ms=1.0)]
    with pytest.raises(DataError, match=r"(lack: latency, quality|lack: quality, latency)"):
        select(rows, [constraint("latency_ms", "8ms")])
    found = select(rows, [])
    assert found.pick == rows[0]
    assert found.left_out == {"w2-d1": ("quality",)}


# ---- budgets as text

TEXTS = {
    ("latency_ms", "8ms"): 8.0,
    ("latency_ms", " 0.5 s "): 500.0,
    ("latency_p95_ms", "250us"): 0.25,
    ("num_params", "25M"): 25e6,
    ("num_params", "25m"): 25e6,
    ("num_params", "25_000_000"): 25e6,
    ("num_params", "300k"): 3e5,
    ("flops", "1.2G"): 1.2e9,
    ("flops", "4e9"): 4e9,
    ("file_size_mb", "30MB"): 30.0,
    ("file_size_mb", "30MiB"): 31.45728,
    ("peak_memory_mb", "2gb"): 2000.0,
    ("file_size_mb", "500kB"): 0.5,
    ("throughput", "200"): 200.0,
    ("throughput", "200/s"): 200.0,
    ("quality", "85%"): 0.85,
    ("quality", "-0.5"): -0.5,
}


@pytest.mark.parametrize(("name", "text"), sorted(TEXTS))
def test_limits_are_read_in_their_units(name, text):
    assert constraint(name, text).limit == pytest.approx(TEXTS[name, text], rel=1e-12)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("latency_ms", "8", "Valid: 8ms, 0.5s"),
        ("latency_ms", "8MB", "'MB' is no unit of it"),
        ("latency_ms", "0ms", "above 0"),
        ("latency_ms", "-3ms", "above 0"),
        ("latency_ms", "1e999s", "above 0"),
        ("file_size_mb", "30", "Valid: 30MB, 30MiB"),
        ("num_params", "many", "a number with its unit|no unit"),
        ("num_params", "25MB", "'MB' is no unit of it"),
        ("num_params", "", "a number with its unit is needed"),
        ("quality", "nan", "a number with its unit is needed"),
    ],
)
def test_what_is_no_limit_is_refused_with_valid_forms(name, text, says):
    with pytest.raises(ConfigError, match=says) as error:
        constraint(name, text)
    assert FIGURES[name].option in str(error.value)


@given(st.sampled_from(sorted(FIGURES)), st.floats(1e-3, 1e11, allow_nan=False))
@settings(max_examples=300, deadline=None)
def test_an_option_that_is_named_lets_in_the_value_that_it_is_named_for(name, value):
    figure = FIGURES[name]
    option, text = Constraint(figure, value).option().split(" ")
    assert option == figure.option
    again = constraint(name, text)
    assert again.is_met(value)
    assert again.limit == pytest.approx(value, rel=2e-3)


# ---- tables

CARD = FamilyCard(
    architecture("vit"),
    ViTConfig(widths=(16, 32), depths=(1, 2), head_dim=8, patch_size=4, image_size=16, num_channels=2),
    Preprocessing(16, 2, (0.5,), (0.25,)),
    weights_sha256="ab" * 32,
)
NAMES = [str(subnet) for subnet in CARD.space.subnets]
PARAMS = {str(subnet): CARD.num_params(subnet) for subnet in CARD.space.subnets}
ROW = ProfileRow(
    **{"device": "Pixel 8", "runtime": "onnx", "precision": "float32", "num_threads": 1, "batch_size": 1},
    **{"image_size": 16, "subnet": NAMES[0], "is_measured": True, "latency_ms": 1.0, "latency_p95_ms": 2.0},
    **{"throughput": 1000.0, "peak_memory_mb": None, "num_params": PARAMS[NAMES[0]], "flops": 5, "file_size_mb": 3.0},
    **{"fit_error": None, "family": "ab" * 6, "date": "2026-01-02", "poa_version": "0"},
)


@pytest.fixture
def results(tmp_path):
    def write(columns, values, networks=NAMES, source="gone/run", name="results.csv"):
        lines = [f"network,source,num_params,flops,{','.join(columns)}"]
        for network, row in zip(networks, values, strict=True):
            size = PARAMS.get(network.rpartition("/")[2].split(" ")[0], 7)
            lines.append(f"{network},{source},{size},1,{','.join(map(str, row))}")
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return tmp_path / name

    return write


@pytest.fixture
def profile(tmp_path):
    def write(*rows):
        write_profile(tmp_path / "profile.csv", rows)
        return tmp_path / "profile.csv"

    return write


def test_card_profile_and_results_become_one_row_for_each_subnet(results, profile):
    table = profile(ROW, replace(ROW, subnet=NAMES[2], is_measured=False, fit_error=0.1, latency_ms=4.0))
    found = join(CARD, [table], [results(["knn/accuracy"], [[0.1], [""], ["nan"], [0.4]])], "knn")
    assert [row.subnet for row in found.rows] == NAMES
    assert [row.quality for row in found.rows] == [0.1, None, None, 0.4]
    assert [row.latency_ms for row in found.rows] == [1.0, None, 4.0, None]
    assert [row.is_measured for row in found.rows] == [True, None, False, None]
    assert [row.num_params for row in found.rows] == list(PARAMS.values())
    assert [row.flops for row in found.rows] == [CARD.flops(subnet) for subnet in CARD.space.subnets]
    assert (found.quality, found.setting) == ("knn/accuracy", ROW.setting)


def test_operations_are_those_at_the_image_size_of_the_profile(profile):
    found = join(CARD, [profile(replace(ROW, image_size=32))], [], "params")
    expected = [CARD.architecture.flops(CARD.config, subnet, 32) for subnet in CARD.space.subnets]
    assert [row.flops for row in found.rows] == expected


def test_several_settings_are_told_apart_or_refused_with_what_tells_them_apart(profile):
    others = [
        replace(ROW, num_threads=4, latency_ms=0.5),
        replace(ROW, device="Pixel 8 Pro", latency_ms=0.7),
        replace(ROW, runtime="torch", latency_ms=3.0),
    ]
    table = profile(ROW, *others)

    def latency(**wanted):
        return join(CARD, [table], [], "params", SettingFilter(**wanted)).rows[0].latency_ms

    with pytest.raises(
        ConfigError, match="4 settings; choose one with --device or --runtime or --num-threads"
    ) as error:
        latency()
    assert str(error.value).count("\n") == 4
    assert latency(device="pixel 8 pro") == 0.7
    assert latency(device="Pro") == 0.7
    assert latency(num_threads=4) == 0.5
    assert latency(runtime="torch") == 3.0
    assert latency(device="pixel 8", runtime="onnx", num_threads=1) == 1.0
    with pytest.raises(ConfigError, match="2 settings; choose one with --runtime:"):
        latency(device="Pixel 8", num_threads=1)
    with pytest.raises(ConfigError, match=r"no setting with --device iPhone. It has:\n  Pixel 8, onnx"):
        latency(device="iPhone")


def test_profiles_of_other_families_are_refused_or_named(profile):
    foreign = replace(ROW, family="cd" * 6)
    found = join(CARD, [profile(ROW, foreign)], [], "params")
    assert found.setting == ROW.setting
    assert any("cdcdcdcdcdcd" in note for note in found.notes)
    (profile(ROW)).unlink()
    with pytest.raises(DataError, match=r"no row of this family \(abababababab\), only of cdcdcdcdcdcd"):
        join(CARD, [profile(foreign)], [], "params")


def test_results_of_other_networks_are_named_or_refused(results):
    networks = [NAMES[0], f"run/{NAMES[3]}", f"{NAMES[1]} untrained", "timm:resnet18"]
    found = join(CARD, [], [results(["knn/accuracy"], [[1], [2], [3], [4]], networks)], "knn")
    assert [row.quality for row in found.rows] == [1, None, None, 2]
    assert any(f"{NAMES[1]} untrained, timm:resnet18" in note for note in found.notes)
    with pytest.raises(
        DataError, match="nothing of this family, whose sub-networks are w16-d1 to w32-d2; there are w8-d1"
    ):
        join(CARD, [], [results(["knn/accuracy"], [[1]], ["w8-d1"])], "knn")


COLUMNS = ["knn/accuracy", "linear/accuracy", "linear/learning_rate", "health/cka", "health/rankme", "health/alignment"]
COLUMNS += ["segment-linear/miou", "segment-linear/iou/sky", "fewshot/accuracy_1_sd"]


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("knn", "knn/accuracy"),
        ("health", "health/cka"),
        ("rankme", "health/rankme"),
        ("miou", "segment-linear/miou"),
        ("segment-linear", "segment-linear/miou"),
        ("segment-linear/iou/sky", "segment-linear/iou/sky"),
        ("health/rankme", "health/rankme"),
    ],
)
def test_quality_is_a_protocol_a_figure_or_both(results, name, column):
    table = results(COLUMNS, [range(place, place + len(COLUMNS)) for place in range(4)])
    found = join(CARD, [], [table], name)
    assert found.quality == column
    assert found.rows[0].quality == COLUMNS.index(column)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("accuracy", "several protocols give it. Choose one: knn/accuracy, linear/accuracy"),
        ("rankm", "Nearest: .*rankme"),
        ("alignment", "more of it is not better"),
        ("learning_rate", "more of it is not better"),
        ("accuracy_1_sd", "more of it is not better"),
        (None, "Choose with --quality: knn, linear, health"),
    ],
)
def test_what_is_no_quality_is_refused_with_valid_names(results, name, says):
    with pytest.raises(ConfigError, match=says):
        join(CARD, [], [results(COLUMNS, [range(len(COLUMNS))] * 4)], name)


def test_the_only_headline_needs_no_name(results):
    assert join(CARD, [], [results(["knn/accuracy", "knn/accuracy_k10"], [[1, 2]] * 4)], None).quality == "knn/accuracy"


def test_tables_that_contradict_each_other_are_refused(results):
    one, same = results(["knn/accuracy"], [[1]] * 4), results(["knn/accuracy"], [[1]] * 4, name="same.csv")
    other = results(["knn/accuracy"], [[2]] * 4, name="other.csv")
    assert join(CARD, [], [one, same], "knn").rows[0].quality == 1
    with pytest.raises(DataError, match=r"is 1 in .*results.csv, line 2, and 2 in .*other.csv, line 2"):
        join(CARD, [], [one, other], "knn")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot read the results"),
        ("", "the columns network, source and num_params"),
        ("network,knn/accuracy\na,1\n", "the columns network, source and num_params"),
        ("network,source,num_params,knn/accuracy\na,b,7,high\n", "line 2, column knn/accuracy: 'high' is no number"),
        ("network,source,num_params,knn/accuracy\na,b,few,1\n", "line 2, column num_params"),
        ("network,source,num_params\na,b,7,1\n", "line 2: more values than columns"),
    ],
)
def test_what_is_no_table_of_results_is_refused(tmp_path, text, says):
    path = tmp_path / "results.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=says):
        join(CARD, [], [path], "knn")


def test_parameters_stand_for_quality_where_nobody_evaluated(results):
    found = join(CARD, [], [], "params")
    assert [row.quality for row in found.rows] == list(PARAMS.values())
    picked = select(found.rows, [constraint("num_params", str(PARAMS[NAMES[2]]))], is_stand_in=True).pick
    assert picked.num_params == max(size for size in PARAMS.values() if size <= PARAMS[NAMES[2]])
    with pytest.raises(ConfigError, match="leave --results out"):
        join(CARD, [], [results(["knn/accuracy"], [[1]] * 4)], "params")
    with pytest.raises(ConfigError, match="--quality knn needs --results"):
        join(CARD, [], [], "knn")


def test_a_latency_that_is_near_its_limit_and_predicted_is_known_as_such():
    row = Row("w1-d1", 0, 1, 1, quality=1.0, latency_ms=7.8, throughput=102.0, is_measured=False, fit_error=0.04)
    assert is_within_error(row, constraint("latency_ms", "8ms"))
    assert is_within_error(row, constraint("throughput", "100"))
    assert not is_within_error(row, constraint("latency_ms", "9ms"))
    assert not is_within_error(row, constraint("num_params", "1"))
    assert not is_within_error(replace(row, is_measured=True, fit_error=None), constraint("latency_ms", "8ms"))


def test_headlines_are_those_of_the_evaluators():
    heads = SegmentHead.__args__
    expected = {name: evaluator.headline for name, evaluator in EVALUATORS.items()}
    expected |= {f"segment-{head}": "miou" for head in heads} | {"detect": "AP", "finetune": "accuracy"}
    assert expected == HEADLINES
    assert all(is_quality(f"{protocol}/{figure}") for protocol, figure in HEADLINES.items())


def test_export_formats_are_those_of_the_registry():
    assert set(FORMATS.values()) <= set(EXPORTERS)
    assert set(CALIBRATED) == {name for name, exporter in EXPORTERS.items() if exporter.needs_calibration}


def test_rows_hold_every_figure():
    assert set(FIGURES) <= set(asdict(Row("w1-d1", 0, 1, 1)))
