"""Other devices, precisions and compiled blocks compute what the plain CPU path computes."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from poa.backbones import architecture
from poa.config import PretrainConfig, from_dict, load_recipe, to_dict
from poa.config.files import merged
from poa.data import EpochPlan, MultiCropBatches, open_source
from poa.distributed import whole
from poa.runtime import resolve_runtime
from poa.train.optim import make_optimizer
from poa.train.parallel import Replicated, Sharded
from poa.train.run_directory import RunDirectory
from poa.train.setup import build_trainer, save_family
from poa.train.step import train_step
from tests.contract.configs import SMALLEST
from tests.devices import needs_cuda
from tests.golden.reference import relative_error
from tests.unit.test_extraction import make_family

TINY = {
    "model": {"widths": [32, 48, 64], "depths": [2, 3], "head_dim": 16, "drop_path": 0.2},
    "heads": {"num_prototypes": [64, 128], "hidden_dim": 64, "bottleneck_dim": 32},
    "objective": {"patch_weight": 1.0, "patch_start_epoch": 0},
    "augment": {"num_local_crops": 2, "local_size": 4},
    "optim": {"warmup_epochs": 0.1},
    "train": {"batch_size": 16},
}

MODELS = {
    "vit": {},
    "rope": {"head_dim": 8, "position": "rope", "mlp": "swiglu", "num_reg_tokens": 2},
    **{name: to_dict(replace(SMALLEST[name], num_channels=1)) for name in ("swin", "resnet", "convnext")},
}


def steps(num, model=None, divide=None, **runtime):
    model = model or {}
    values = merged(merged(to_dict(load_recipe("digits")), TINY), {"model": model})
    config = from_dict(PretrainConfig, merged(values, {"runtime": {"num_workers": 0, **runtime}}), "test")
    source = open_source("digits", config.data, 1)
    plan = EpochPlan(len(source), 16, 1, 0)
    batches = MultiCropBatches(source, plan, config)
    trainer = build_trainer(config, plan.steps_per_epoch, resolve_runtime(config.runtime))
    if divide is not None:
        parallel = divide(trainer.model)
        trainer = replace(trainer, parallel=parallel, optimizer=make_optimizer(trainer.model.student, config.optim))
    records = [train_step(trainer, [batches[step]], step + 1) for step in range(num)]
    weights = [whole(part).detach().flatten().float().cpu() for part in trainer.model.student.parameters()]
    return records, torch.cat(weights)


def assert_alike(ours, theirs, loss_tolerance, weight_tolerance):
    for mine, other in zip(ours[0], theirs[0], strict=True):
        assert mine.is_finite
        assert mine.subnets == other.subnets
        assert abs(mine.loss - other.loss) <= loss_tolerance * abs(other.loss)
    assert relative_error(ours[1], theirs[1]) < weight_tolerance


@pytest.mark.slow
def test_compiled_blocks_train_as_plain_blocks():
    small = {"widths": [32, 48], "depths": [1]}
    compiled = steps(3, small, device="cpu", compile="on")
    assert_alike(compiled, steps(3, small, device="cpu", compile="off"), 1e-5, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rope", "swin", "resnet", "convnext"])
def test_blocks_of_every_architecture_are_traced_without_a_change(name, monkeypatch):
    # Tracing only: generating code takes minutes for each of these on a CPU.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    values = merged(merged(to_dict(load_recipe("digits")), TINY), {"model": MODELS[name]})
    config = from_dict(PretrainConfig, values, "test").model
    backbone = architecture(config).build(config)
    backbone.init_weights_(torch.Generator().manual_seed(0))
    images = torch.randn(2, config.num_channels, config.image_size, config.image_size)
    plain = backbone([images], backbone.space.smallest)[0].cls
    backbone.compile_blocks_()
    traced = backbone([images], backbone.space.smallest)[0].cls
    assert relative_error(traced, plain) < 1e-6


SLOW_IN_BFLOAT16 = {"resnet"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW_IN_BFLOAT16 else ()) for name in sorted(MODELS)]
)
def test_bfloat16_autocast_stays_near_float32(name):
    plain = steps(2, MODELS[name], device="cpu", precision="float32")
    assert_alike(steps(2, MODELS[name], device="cpu", precision="bfloat16"), plain, 2e-2, 5e-2)


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"resnet"}))
def test_under_autocast_the_residual_stream_stays_float32(name):
    values = merged(merged(to_dict(load_recipe("digits")), TINY), {"model": MODELS[name]})
    config = from_dict(PretrainConfig, values, "test")
    backbone = architecture(config.model).build(config.model)
    backbone.init_weights_(torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        between = backbone.forward_intermediates(
            torch.randn(2, 1, config.model.image_size, config.model.image_size), backbone.space.intact
        )
    assert {part.dtype for part in between} == {torch.float32}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_cuda)])
def group_of_one(request, tmp_path):
    """The device of a process group with a single member: what DDP and FSDP do, on one GPU."""
    device = torch.device(request.param, 0) if request.param == "cuda" else torch.device("cpu")
    backend = "cpu:gloo,cuda:nccl" if request.param == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield device
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_ddp_and_fsdp_train_as_the_plain_model(group_of_one, mode, precision):
    runtime = {"device": group_of_one.type, "precision": precision, "compile": "off"}

    def divide(model):
        if mode == "ddp":
            return Replicated(model)
        return Sharded(model, init_device_mesh(group_of_one.type, (1,), mesh_dim_names=("shard",)))

    tolerances = (1e-5, 1e-4) if precision == "float32" else (2e-2, 5e-2)
    assert_alike(steps(3, divide=divide, **runtime), steps(3, **runtime), *tolerances)


def test_the_family_of_a_divided_teacher_is_that_of_a_whole_one(group_of_one, tmp_path):
    config = from_dict(PretrainConfig, merged(to_dict(load_recipe("digits")), TINY), "test")
    source = open_source("digits", config.data, 1)
    runtime = resolve_runtime(replace(config.runtime, device=group_of_one.type, compile="off"))
    saved = []
    for name in ("whole", "divided"):
        trainer = build_trainer(config, 1, runtime)
        if name == "divided":
            mesh = init_device_mesh(group_of_one.type, (1,), mesh_dim_names=("shard",))
            trainer = replace(trainer, parallel=Sharded(trainer.model, mesh))
            assert all(isinstance(part, DTensor) for part in trainer.model.teacher.parameters())
        save_family(trainer, source, RunDirectory(tmp_path / name))
        saved.append((tmp_path / name / "family" / "weights.safetensors").read_bytes())
    assert saved[0] == saved[1]


@needs_cuda
@pytest.mark.parametrize("name", sorted(MODELS))
def test_cuda_in_float32_trains_as_the_cpu(name):
    plain = steps(4, MODELS[name], device="cpu")
    assert_alike(steps(4, MODELS[name], device="cuda", precision="float32", compile="off"), plain, 1e-4, 1e-2)


@needs_cuda
@pytest.mark.parametrize("name", sorted(MODELS))
def test_cuda_in_bfloat16_with_compiled_blocks_stays_near_the_cpu(name):
    assert_alike(steps(4, MODELS[name], device="cuda"), steps(4, MODELS[name], device="cpu"), 2e-2, 5e-2)


@needs_cuda
@pytest.mark.parametrize("name", sorted(MODELS))
def test_views_on_cuda_compute_what_they_do_on_the_cpu(name):
    values = merged(merged(to_dict(load_recipe("digits")), TINY), {"model": MODELS[name]})
    family = make_family(from_dict(PretrainConfig, values, "test").model)
    how = family.card.preprocessing
    images = torch.randn(2, how.num_channels, how.image_size, how.image_size)
    with torch.inference_mode():
        expected = [family.backbone(subnet)(images) for subnet in family.subnets]
        family.to("cuda")
        found = [family.backbone(subnet)(images.to("cuda")).cpu() for subnet in family.subnets]
    assert all(relative_error(ours, theirs) < 1e-4 for ours, theirs in zip(found, expected, strict=True))
