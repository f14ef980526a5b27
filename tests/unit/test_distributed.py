"""Who is who among several processes, and what each of them gets of a batch."""

from dataclasses import replace

import pytest
import torch

from poa.config import PretrainConfig, from_dict, load_recipe, to_dict
from poa.config.files import merged
from poa.data import EpochPlan, MultiCropBatches, open_source
from poa.distributed import (
    ONE,
    Ranks,
    agreed,
    all_sum,
    gathered_rows,
    lost_processes_told,
    process_group,
    ranks_of_environment,
)
from poa.errors import ConfigError, DataError, TrainingError

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


def test_torchruns_environment_says_who_a_process_is():
    assert ranks_of_environment(TORCHRUN) == Ranks(1, 4, 1, 2)
    assert not ranks_of_environment(TORCHRUN).is_main
    assert ranks_of_environment({}) == ONE
    assert ONE.is_main


@pytest.mark.parametrize(
    "change",
    [
        {"RANK": "4"},
        {"RANK": "-1"},
        {"RANK": "one"},
        {"LOCAL_RANK": "2"},
        {"LOCAL_RANK": ""},
        {"LOCAL_WORLD_SIZE": "5"},
    ],
)
def test_an_environment_that_contradicts_itself_is_refused(change):
    with pytest.raises(ConfigError, match="torchrun"):
        ranks_of_environment(TORCHRUN | change)


def test_half_an_environment_is_refused():
    with pytest.raises(ConfigError, match="LOCAL_RANK"):
        ranks_of_environment({"RANK": "0", "WORLD_SIZE": "2"})


def test_one_process_talks_to_nobody():
    with process_group(ONE, torch.device("cpu")):
        assert not torch.distributed.is_initialized()
    x = torch.randn(3, 2)
    assert all_sum(x) is x
    assert gathered_rows(x) is x


def test_an_error_of_one_process_stays_its_own():
    with pytest.raises(DataError, match="no images") as caught, agreed(ONE):
        raise DataError("no images")
    assert not caught.value.is_told


def test_the_end_of_another_process_is_told_and_other_errors_are_not_hidden():
    two = Ranks(0, 2)
    with pytest.raises(TrainingError, match="another process"), lost_processes_told(two):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:525] Connection closed by peer")
    with pytest.raises(RuntimeError, match="shape"), lost_processes_told(two):
        raise RuntimeError("shape mismatch")
    with pytest.raises(RuntimeError, match="gloo"), lost_processes_told(ONE):
        raise RuntimeError("gloo")


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_processes_parts_together_are_the_batch_of_one(num_ranks, accumulate):
    values = {
        "data": {"source": "digits"},
        "train": {"batch_size": 16},
        "optim": {"accumulate": accumulate},
        "mask": {"prob": 0.5},
    }
    config = from_dict(PretrainConfig, merged(to_dict(load_recipe("digits")), values), "test")
    source = open_source("digits", config.data, 1)
    plan = EpochPlan.of(source, config)
    for micro_step in (0, 3, 2 * plan.steps_per_epoch * accumulate - 1):
        whole = MultiCropBatches(source, plan, config)[micro_step]
        parts = [
            MultiCropBatches(source, replace(plan, ranks=Ranks(rank, num_ranks)), config)[micro_step]
            for rank in range(num_ranks)
        ]
        assert torch.equal(torch.cat([part.indices for part in parts]), whole.indices)
        assert torch.equal(torch.cat([part.global_crops for part in parts], dim=1), whole.global_crops)
        assert torch.equal(torch.cat([part.local_crops for part in parts], dim=1), whole.local_crops)
        masks = torch.cat([part.masks.unflatten(0, (2, -1)) for part in parts], dim=1)
        assert torch.equal(masks.flatten(0, 1), whole.masks)
        assert whole.masks.any()


@pytest.mark.parametrize(("batch_size", "nearest"), [(15, 16), (4, 8), (9, 8)])
def test_a_batch_that_the_processes_cannot_share_is_refused_with_the_nearest(batch_size, nearest):
    with pytest.raises(ConfigError, match=f"--train.batch-size {nearest} "):
        EpochPlan(100, batch_size, 1, 0, Ranks(0, 4))
