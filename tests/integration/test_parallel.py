"""Several processes train as one does: through poa's own training code, on gloo."""

import pytest

from tests.parallel_processes import Leg, Work, largest, run_work
from tests.parallel_runs import Case

EXACT = 1e-9
SHARED = [
    Case(),
    Case(mode="fsdp", checkpoint_activations=True),
    Case(targets="centering", accumulate=2, checkpoint_activations=True, num_steps=8),
    Case(mode="fsdp", targets="centering", accumulate=2, num_steps=8),
    Case(model="convnext", checkpoint_activations=True, num_steps=5),
    Case(model="convnext", mode="fsdp", num_steps=5),
    Case(patch_start_epoch=0.5, num_steps=6),
    Case(patch_start_epoch=0.5, num_steps=6, mode="fsdp"),
]
OWN = [
    Case("wide vit", draws="cost-bucket", accumulate=2, num_steps=8),
    Case("wide vit", draws="cost-bucket", mode="fsdp", accumulate=2, checkpoint_activations=True, num_steps=8),
    Case(draws="independent", targets="centering", num_steps=8),
    Case(draws="independent", targets="centering", mode="fsdp", num_steps=8),
]
FLOAT32 = [Case(mode=mode, precision="float32", num_steps=1) for mode in ("ddp", "fsdp")]
BFLOAT16 = [Case(mode=mode, precision="bfloat16", num_steps=3) for mode in ("ddp", "fsdp")]
RUN = (Case(num_steps=9, checkpoint_activations=True), (Leg(2, "fsdp", 2), Leg(2, "ddp", 5), Leg(1)))

MANY = [
    Case(targets="centering", accumulate=2, batch_size=16),
    Case(mode="fsdp", targets="centering", accumulate=2, batch_size=16),
    Case(draws="independent"),
    Case(mode="fsdp", shard_size=2),
    Case("wide vit", mode="fsdp", shard_size=2, draws="cost-bucket", checkpoint_activations=True),
    Case(mode="fsdp", shard_size=1, targets="centering", num_steps=10),
    Case("wide vit", draws="cost-bucket"),
    Case(draws="independent", mode="fsdp"),
    Case(model="swin", mode="fsdp", checkpoint_activations=True, num_steps=10),
    Case(model="swin", draws="independent", num_steps=10),
    Case(model="resnet", mode="fsdp", draws="cost-bucket", num_steps=10),
    Case(model="resnet", checkpoint_activations=True, num_steps=10),
]
MANY_RUNS = (
    (Case(), (Leg(4, "ddp", 5), Leg(2, "fsdp", 11), Leg(1))),
    (Case(num_steps=12, batch_size=16, accumulate=2), (Leg(1, "auto", 4), Leg(2, "ddp", 9), Leg(4, "fsdp"))),
    (Case(num_steps=12, targets="centering"), (Leg(4, "fsdp", 4), Leg(4, "ddp"))),
)
COMPILED = [
    Case(is_compiled=True, num_steps=4),
    Case(is_compiled=True, mode="fsdp", num_steps=4),
    Case(is_compiled=True, mode="fsdp", checkpoint_activations=True, draws="independent", num_steps=4),
]
WORK = {
    "two": (2, Work((*SHARED, *OWN, *FLOAT32, *BFLOAT16), (RUN,))),
    "four": (4, Work(tuple(MANY), MANY_RUNS)),
    "compiled": (2, Work(tuple(COMPILED))),
}
"""What runs in one set of processes each; `benchmarks/parallel.py` measures the same."""


@pytest.fixture(scope="module")
def two():
    return run_work(*WORK["two"])


@pytest.fixture(scope="module")
def four():
    return run_work(*WORK["four"])


@pytest.fixture(scope="module")
def compiled():
    return run_work(*WORK["compiled"])


def assert_equal(found, key, tolerance=EXACT):
    difference = largest(found.differences[key])
    assert max(difference.values()) < tolerance, difference


@pytest.mark.parametrize("case", SHARED, ids=str)
def test_two_processes_give_the_losses_gradients_and_weights_of_one(two, case):
    assert_equal(two, case)
    assert [step[::2] for step in two.outcomes[case].subnets] == two.alone[case.alone].subnets


@pytest.mark.parametrize("case", OWN, ids=str)
def test_processes_that_draw_subnets_of_their_own_give_the_mean_of_their_gradients(two, case):
    assert_equal(two, case)
    assert two.outcomes[case].subnets == two.alone[case.alone].subnets
    assert sum(step[0] != step[1] for step in two.outcomes[case].subnets) > 3


@pytest.mark.parametrize("case", FLOAT32, ids=str)
def test_in_float32_the_first_step_of_two_processes_is_that_of_one(two, case):
    difference = largest(two.differences[case])
    assert max(difference["first_loss"], difference["gradients"]) < 1e-5, difference


@pytest.mark.parametrize("case", BFLOAT16, ids=str)
def test_bfloat16_on_two_processes_stays_near_float32_on_one(two, case):
    ours, theirs = two.outcomes[case].losses, two.alone[case.alone].losses
    for mine, other in zip(ours, theirs, strict=True):
        assert 0 < abs(mine["loss"] - other["loss"]) < 0.02 * other["loss"]


def test_ddp_and_fsdp_give_the_same(two):
    ddp, fsdp = (two.outcomes[case] for case in OWN[:2])
    assert max(ddp.differences(fsdp).values()) < EXACT


def test_a_run_goes_on_with_another_mode_and_fewer_processes_as_one_that_never_stopped(two):
    assert_equal(two, RUN)


def test_targets_and_koleo_of_all_rows_are_those_of_one_process_whatever_rows_each_has(two):
    for found in two.objective:
        assert max(found.values()) < 1e-12, found


@pytest.mark.slow
@pytest.mark.parametrize("case", MANY, ids=str)
def test_four_processes_give_what_one_gives(four, case):
    assert_equal(four, case)
    assert case.draws == "shared" or any(len(set(step)) > 1 for step in four.outcomes[case].subnets)


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_two_processes_with_traced_blocks_give_what_one_gives_without(compiled, case):
    assert_equal(compiled, case)


@pytest.mark.slow
@pytest.mark.parametrize("run", MANY_RUNS, ids=lambda run: " → ".join(f"{leg.num_ranks} {leg.mode}" for leg in run[1]))
def test_a_run_goes_on_with_any_number_of_processes_as_one_that_never_stopped(four, run):
    assert_equal(four, run)


@pytest.mark.slow
def test_targets_and_koleo_of_four_processes_are_those_of_one(four):
    for found in four.objective:
        assert max(found.values()) < 1e-12, found
