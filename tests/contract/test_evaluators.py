"""What every registered evaluator must do."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from poa.cli.evaluate import PROTOCOLS
from poa.cli.main import main
from poa.config import from_dict, to_dict
from poa.errors import DataError
from poa.evaluate.registry import EVALUATORS
from tests.unit.test_protocols import task

SHARES = ("accuracy", "mean_class_accuracy", "map", "recall", "nmi", "fmi")
CHANCE = {"accuracy": 1 / 3, "accuracy_damaged": 1 / 3, "map": 1 / 3, "nmi": 0.0}


QUICK = {
    "linear": {"min_steps": 50, "num_epochs": 1.0},
    "fewshot": {"num_repeats": 2},
    "robustness": {"corruptions": ("fog",), "drops": (0.5,)},
}


@pytest.fixture(params=sorted(EVALUATORS))
def evaluator(request):
    return EVALUATORS[request.param](**QUICK.get(request.param, {}))


@pytest.fixture(params=sorted(name for name, kind in EVALUATORS.items() if kind.needs_labels))
def labelled(request):
    return EVALUATORS[request.param](**QUICK.get(request.param, {}))


def given(evaluator, **how):
    """Vectors of training images, of test images under every look of the evaluator, and of the intact network."""
    train, test = task(0, **how)
    test = dataclasses.replace(test, under=dict.fromkeys(evaluator.test_looks, test.cls))
    return dataclasses.replace(train, second=train.cls + 0.1), test, train


def parts_of(vectors):
    parts = (vectors.cls, *vectors.blocks, vectors.pooled, vectors.second, *vectors.under.values())
    return [part for part in parts if part is not None]


def test_the_command_line_lists_every_evaluator_in_its_own_words():
    assert {name: kind.summary for name, kind in EVALUATORS.items()} == PROTOCOLS


def test_figures_are_finite_shares_are_shares_and_the_headline_is_one_of_them(evaluator):
    figures = evaluator.evaluate(*given(evaluator))
    assert evaluator.headline in figures
    assert all(isinstance(value, float) and math.isfinite(value) for value in figures.values())
    shares = [value for name, value in figures.items() if name.startswith(SHARES)]
    assert all(0.0 <= value <= 1.0 for value in shares)


def test_the_same_vectors_give_the_same_figures(evaluator):
    assert evaluator.evaluate(*given(evaluator)) == evaluator.evaluate(*given(evaluator))


def test_vectors_in_files_give_the_same_figures_and_are_left_as_they_are(evaluator, tmp_path):
    files = []

    def in_file(part):
        if part is None:
            return None
        files.append(tmp_path / f"{len(files)}.npy")
        np.save(files[-1], part.numpy())
        return torch.from_numpy(np.asarray(np.load(files[-1], mmap_mode="r+")))

    def moved(vectors):
        blocks = tuple(in_file(part) for part in vectors.blocks)
        places = {"cls": blocks[-1], "blocks": blocks}
        places |= {name: in_file(getattr(vectors, name)) for name in ("pooled", "second")}
        places["under"] = {name: in_file(part) for name, part in vectors.under.items()}
        return dataclasses.replace(vectors, **places)

    train, test, intact = given(evaluator)
    expected = evaluator.evaluate(train, test, intact)
    in_files = [moved(each) for each in (train, test, intact)]
    before = [file.read_bytes() for file in files]
    assert evaluator.evaluate(*in_files) == expected
    assert [file.read_bytes() for file in files] == before


def test_vectors_are_left_as_they_are(evaluator):
    seen, unseen, intact = given(evaluator)
    before = [part.clone() for each in (seen, unseen) for part in parts_of(each)]
    evaluator.evaluate(seen, unseen, intact)
    after = [part for each in (seen, unseen) for part in parts_of(each)]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_the_order_of_the_test_images_does_not_matter(evaluator):
    train, test, intact = given(evaluator)
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
    shuffled = {name: getattr(test, name)[order] for name in ("cls", "labels", "pooled")}
    shuffled["under"] = {name: part[order] for name, part in test.under.items()}
    other = dataclasses.replace(test, blocks=tuple(part[order] for part in test.blocks), **shuffled)
    figures = evaluator.evaluate(train, other, intact)
    assert figures == pytest.approx(evaluator.evaluate(train, test, intact), rel=1e-9)


def test_pure_class_information_scores_at_the_top_and_noise_at_chance(labelled):
    assert labelled.evaluate(*given(labelled, spread=0.02))[labelled.headline] > 0.99
    found = labelled.evaluate(*given(labelled, distance=0.0))[labelled.headline]
    assert found == pytest.approx(CHANCE[labelled.headline], abs=0.15)


def test_labels_that_teach_nothing_are_refused_before_features_are_computed(labelled):
    one, three = torch.zeros(300, dtype=torch.long), torch.arange(300) % 3
    with pytest.raises(DataError, match="needs labelled images"):
        labelled.check(None, None, 0)
    with pytest.raises(DataError, match="two or more classes"):
        labelled.check(one, one, 1)
    labelled.check(three, three, 3)


def test_too_few_images_are_refused_before_features_are_computed(evaluator):
    few = torch.arange(2)
    if evaluator.name in ("fewshot", "clustering"):
        evaluator.check(few, few, 2)
        return
    with pytest.raises(DataError, match=r"2 or more|at least [12]0|more than there are|needs 12 or more"):
        evaluator.check(few, few, 2)


def test_options_survive_their_dictionary(evaluator):
    assert from_dict(type(evaluator), to_dict(evaluator), "options") == evaluator


def test_every_field_is_an_option_of_the_command(evaluator, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", evaluator.name, "--help"])
    assert stop.value.code == 0
    listed = capsys.readouterr().out
    for field in dataclasses.fields(evaluator):
        assert f"--{field.name.replace('_', '-')}" in listed
