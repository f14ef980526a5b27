"""Mutated files are read, or refused with an error that a user can read; no other error, and never for long."""

import zlib

import pytest

from tests.fuzzing.run import Outcome, plan, run_case
from tests.fuzzing.targets import Target, targets

NUM_CASES, NUM_MORE = 1_500, 20_000
NAMES = [
    *("config-yaml", "config-tree", "pretrain-cli", "family-json", "family-weights", "head-json", "head-weights"),
    *("timm-directory", "environment-json", "tar", "images", "png", "profile-csv", "results-csv", "subnet-names"),
    *("coco-json", "shard-index", "checkpoint-state", "checkpoint-tensors"),
]


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    return {target.name: target for target in targets(tmp_path_factory.mktemp("seeds"))}


def counts(planned, num_cases):
    return {target.name: count for target, count in plan(list(planned.values()), num_cases)}


def findings(planned, name, num_cases, seed, folder):
    found = [run_case(planned[name], seed, index, folder) for index in range(counts(planned, num_cases)[name])]
    return [each for each in found if each.is_finding]


def test_every_target_is_fuzzed(planned):
    assert sorted(planned) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_no_error_but_one_that_a_user_can_read(planned, name, tmp_path):
    assert findings(planned, name, NUM_CASES, 1, tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_no_error_but_one_that_a_user_can_read_in_many_cases(planned, name, tmp_path):
    assert findings(planned, name, NUM_MORE, 2, tmp_path) == []


@pytest.mark.parametrize("name", NAMES)
def test_what_the_mutations_begin_with_is_read(planned, name, tmp_path):
    target = planned[name]
    for number, seed in enumerate(target.seeds):
        whole = Target(target.name, (seed,), (lambda content, _: content,), target.run)
        (tmp_path / str(number)).mkdir()
        expected = "refused" if (name, number - len(target.seeds)) in REFUSED else "works"
        assert run_case(whole, 0, 0, tmp_path / str(number)).result == expected


REFUSED = {("config-yaml", -1), ("subnet-names", -4), ("subnet-names", -3)}
"""Seeds that are refused, counted from the last: tags that no option has, and names of another space."""


def test_a_case_is_a_pure_function_of_seed_target_and_number(planned):
    target = planned["tar"]
    assert target.case(1, 2) == target.case(1, 2)
    assert len({zlib.crc32(target.case(seed, index)) for seed in (1, 2) for index in range(20)}) > 35


@pytest.mark.parametrize("error", [ValueError("x"), RecursionError(), MemoryError(), AssertionError()])
def test_an_error_that_a_user_cannot_read_is_a_finding(tmp_path, error):
    def run(content, folder):
        raise error

    found = run_case(Target("t", (b"",), (lambda content, _: content,), run), 0, 0, tmp_path)
    assert found.is_finding
    assert type(error).__name__ in found.result


def test_a_case_that_takes_too_long_is_a_finding(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.fuzzing.run.CASE_SECONDS", 0.05)

    def run(content, folder):
        while True:
            pass

    found = run_case(Target("t", (b"",), (lambda content, _: content,), run), 0, 0, tmp_path)
    assert found.is_finding
    assert "TooLong" in found.result
    assert not Outcome("t", 0, "works", 0.0).is_finding
