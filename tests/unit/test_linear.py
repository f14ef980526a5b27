import dataclasses
import math

import pytest
import torch
from sklearn import metrics
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F

from poa.errors import ConfigError, DataError
from poa.evaluate import Vectors
from poa.evaluate.linear import LinearInput, LinearProbe, batches, fresh_weight, joined, scores
from tests.unit.test_protocols import task

QUICK = LinearProbe(last_blocks=(1, 2), vectors_per_step=32, num_epochs=3.0, min_steps=60)


def trained_alone(protocol, vectors, which, rate, num_classes):
    """One classifier by torch's own layer, loss, optimiser and schedule, over the same images in the same order."""
    parts = [*vectors.blocks[-which.num_blocks :], *([vectors.pooled] if which.pooled else [])]
    inputs = torch.cat(parts, dim=1)
    layer = nn.Linear(inputs.shape[1], num_classes)
    nn.init.zeros_(layer.bias)
    layer.weight.data.copy_(fresh_weight(num_classes, inputs.shape[1], protocol.seed, which))
    num_steps = protocol.num_steps(len(inputs))
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate * protocol.vectors_per_step / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for rows in batches(torch.arange(len(inputs)), protocol.vectors_per_step, num_steps, protocol.seed):
        optimizer.zero_grad()
        F.cross_entropy(layer(inputs[rows]), vectors.labels[rows]).backward()
        optimizer.step()
        schedule.step()
    return layer


def test_the_whole_grid_trained_together_equals_every_classifier_trained_alone_to_the_last_image():
    train, test = task(0, spread=1.5)
    protocol = dataclasses.replace(QUICK, learning_rates=(1e-3, 0.03, 1.0))
    inputs = protocol.inputs(train)
    together = protocol.trained(train, torch.arange(len(train)), inputs, protocol.learning_rates, 3)
    assert inputs == [(1, False), (1, True), (2, False), (2, True)]
    for which in inputs:
        for index, rate in enumerate(protocol.learning_rates):
            layer = trained_alone(protocol, train, which, rate, 3)
            torch.testing.assert_close(together[which].weight[index], layer.weight.data, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(together[which].bias[index], layer.bias.data, rtol=1e-3, atol=1e-5)
            guess = layer(joined(test, which, torch.arange(len(test)))).argmax(dim=1)
            score = scores(together[which], which, test)[index]
            assert score.accuracy == metrics.accuracy_score(test.labels, guess)


def test_the_chosen_classifier_is_the_best_on_held_out_images_trained_again_on_all():
    train, test = task(1, spread=1.5)
    protocol = dataclasses.replace(QUICK, learning_rates=(1e-4, 0.1))
    figures = protocol.evaluate(train, test)
    which = LinearInput(int(figures["num_blocks"]), bool(figures["pooled"]))
    guess = trained_alone(protocol, train, which, figures["learning_rate"], 3)(
        joined(test, which, torch.arange(len(test)))
    )
    assert figures["accuracy"] == metrics.accuracy_score(test.labels, guess.argmax(dim=1))


def test_the_test_images_choose_only_where_they_are_asked_to():
    train, test = task(4, spread=2.0)
    other = dataclasses.replace(test, labels=test.labels.flip(0))
    chosen = ("learning_rate", "num_blocks", "pooled")
    honest, again = (QUICK.evaluate(train, each) for each in (test, other))
    assert [honest[name] for name in chosen] == [again[name] for name in chosen]
    theirs = dataclasses.replace(QUICK, select="test")
    heads = theirs.trained(train, torch.arange(len(train)), theirs.inputs(train), theirs.learning_rates, 3)
    best = max(score.accuracy for which, each in heads.items() for score in scores(each, which, test))
    assert theirs.evaluate(train, test)["accuracy"] == best > honest["accuracy"]


def test_separable_vectors_are_told_apart_as_by_logistic_regression():
    train, test = task(2, spread=0.1)
    theirs = LogisticRegression(C=100.0).fit(train.cls, train.labels).predict(test.cls)
    assert QUICK.evaluate(train, test)["accuracy"] == metrics.accuracy_score(test.labels, theirs) == 1.0


@pytest.mark.parametrize("scale", [0.03, 30.0])
def test_vectors_of_another_scale_are_learnt_by_another_learning_rate_of_the_grid(scale):
    train, test = (
        dataclasses.replace(each, cls=scale * each.cls, blocks=(scale * each.cls,)) for each in task(3, spread=0.3)
    )
    protocol = LinearProbe(last_blocks=(1,), pooled=False, min_steps=300)
    assert protocol.evaluate(train, test)["accuracy"] > 0.95


def test_the_blocks_and_the_mean_patch_vector_are_used_where_they_help():
    train, test = task(3, spread=0.1)

    def only_in(place):
        for each in (train, test):
            zeros = torch.zeros_like(each.cls)
            lower, pooled = (each.cls if place == name else zeros for name in ("lower", "pooled"))
            yield Vectors(zeros, each.labels, 3, (lower, zeros), pooled)

    found = {place: QUICK.evaluate(*only_in(place)) for place in ("lower", "pooled", "nowhere")}
    assert found["lower"]["num_blocks"] == 2.0
    assert found["pooled"]["pooled"] == 1.0
    assert found["lower"]["accuracy"] == found["pooled"]["accuracy"] == 1.0
    assert found["nowhere"]["accuracy"] == pytest.approx(1 / 3)


def test_networks_of_fewer_blocks_give_what_they_have_and_every_input_once():
    train, _ = task(0)
    protocol = LinearProbe(last_blocks=(1, 3, 4))
    assert protocol.inputs(train) == [(1, False), (1, True), (2, False), (2, True)]
    assert protocol.num_blocks == 4
    assert LinearProbe(last_blocks=(1,)).num_blocks == 2
    assert LinearProbe(last_blocks=(1,), pooled=False).num_blocks == 1
    assert LinearProbe(last_blocks=(1,), pooled=False).inputs(Vectors(train.cls)) == [(1, False)]
    with pytest.raises(DataError, match="the mean patch vectors are not there"):
        LinearProbe().evaluate(Vectors(train.cls, train.labels, 3), Vectors(train.cls, train.labels, 3))


def test_the_first_five_count_from_six_classes_on():
    train, test = task(5, num_classes=7, spread=2.0)
    figures = QUICK.evaluate(train, test)
    assert figures["accuracy"] < figures["accuracy_top5"] < 1.0
    assert "accuracy_top5" not in QUICK.evaluate(*task(5, num_classes=5))
    which = LinearInput(1, pooled=False)
    heads = QUICK.trained(train, torch.arange(len(train)), [which], [0.1], 7)[which]
    logits = heads.logits(test.cls)[0].T.numpy()
    score = scores(heads, which, test)[0]
    assert score.accuracy_top5 == pytest.approx(metrics.top_k_accuracy_score(test.labels, logits, k=5), abs=1e-12)
    probabilities = torch.from_numpy(logits).double().softmax(dim=1)
    assert score.log_likelihood == pytest.approx(-metrics.log_loss(test.labels, probabilities), rel=1e-5)


def test_every_pass_goes_over_every_image_once_but_for_what_fills_no_batch():
    rows = torch.arange(100, 150)
    found = list(batches(rows, 16, 7, seed=0))
    assert [len(batch) for batch in found] == [16] * 7
    passes = [torch.cat(found[:3]), torch.cat(found[3:6])]
    assert all(len(each.unique()) == 48 and bool(torch.isin(each, rows).all()) for each in passes)
    assert not torch.equal(*passes)
    assert all(torch.equal(one, other) for one, other in zip(found, batches(rows, 16, 7, seed=0), strict=True))
    assert [sorted(batch.tolist()) for batch in batches(rows, 64, 2, seed=0)] == [rows.tolist()] * 2


@pytest.mark.parametrize(("num_vectors", "expected"), [(1000, 1250), (50_000, 1953), (1_280_000, 50_000)])
def test_small_sets_get_steps_enough_and_large_ones_ten_passes(num_vectors, expected):
    assert LinearProbe().num_steps(num_vectors) == expected
    assert expected == max(1250, math.floor(10 * num_vectors / 256))


@pytest.mark.parametrize(
    "options",
    [{"last_blocks": ()}, {"last_blocks": (0,)}, {"learning_rates": ()}, {"learning_rates": (0.0,)}, {"min_steps": 0}],
)
def test_numbers_that_make_no_sense_are_refused(options):
    with pytest.raises(ConfigError, match="must be"):
        LinearProbe(**options)
