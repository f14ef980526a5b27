"""What a run is made of before its first step, and the family that it leaves behind."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import torch

from poa.backbones import architecture
from poa.config import PretrainConfig
from poa.data import ImageSource
from poa.distributed import whole
from poa.elastic import SearchSpace, SubnetDraws
from poa.family import Family, FamilyCard
from poa.objective import PoaModel
from poa.pretrained import start_from_
from poa.randomness import derived_seed
from poa.runtime import Runtime
from poa.train.monitor import preprocessing_of
from poa.train.optim import make_optimizer
from poa.train.parallel import parallelize_
from poa.train.run_directory import RunDirectory
from poa.train.schedules import make_schedules
from poa.train.step import Trainer
from poa.version import __version__


def build_trainer(
    config: PretrainConfig, steps_per_epoch: int, runtime: Runtime, images: ImageSource | None = None
) -> Trainer:
    """A trainer with fresh weights, a pure function of the configuration's seed; or with those of `config.init`.

    Args:
        config: the run.
        steps_per_epoch: optimiser steps per epoch.
        runtime: where it computes. All its processes call this together.
        images: where the run starts from public weights, the images that say which of their channels matter. Without
            them the weights are fresh: for a run that goes on from a checkpoint.

    Raises:
        ConfigError: no stock network could be cut from such a family, or as `parallelize_` and `start_from_`.
        CheckpointError, DataError: as `start_from_`.
    """
    backbone = architecture(config.model).build(config.model)
    backbone.timm_model(backbone.space.intact, config.model.image_size)  # refuses what could be trained but not cut
    model = PoaModel(backbone, config.heads, config.objective)
    model.init_weights_(torch.Generator().manual_seed(derived_seed(config.train.seed, "weights")))
    model.to(runtime.device, runtime.dtype)
    start = None
    if config.init.source and images is not None:
        start = start_from_(model.student.backbone, config, images)
        model.restart_teacher_()
    if config.runtime.checkpoint_activations:
        model.student.backbone.checkpoint_blocks_()
    if runtime.compile:
        model.student.backbone.compile_blocks_()
        model.teacher.backbone.compile_blocks_()
    return Trainer(
        config=config,
        model=model,
        parallel=parallelize_(model, config.parallel, runtime),
        optimizer=make_optimizer(model.student, config.optim),
        schedules=make_schedules(config, steps_per_epoch),
        draws=_draws(config, backbone.space, runtime),
        runtime=runtime,
        start=start,
    )


def _draws(config: PretrainConfig, space: SearchSpace, runtime: Runtime) -> SubnetDraws:
    """What the processes draw; a sub-network costs its operations."""
    kind, size = architecture(config.model), config.model.image_size
    costs = {subnet: kind.flops(config.model, subnet, size) for subnet in space.subnets}
    return SubnetDraws(space, costs, config.train.draws, runtime.ranks.num_ranks)


def save_family(trainer: Trainer, source: ImageSource, run: RunDirectory) -> None:
    """Writes the finished family: the teacher's backbone.

    All processes call it together. What is divided among them is put together parameter by parameter, in the memory
    of the main process's machine, not of its GPU.

    Raises:
        CheckpointError: it cannot be written.
    """
    weights = {}
    for name, tensor in trainer.model.teacher.backbone.state_dict().items():
        complete = whole(tensor)
        if trainer.runtime.ranks.is_main:
            weights[name] = complete.to("cpu", torch.float32)
    if not trainer.runtime.ranks.is_main:
        return
    config = trainer.config
    backbone = architecture(config.model).build(config.model)
    backbone.load_state_dict(weights, strict=True)
    card = FamilyCard(
        architecture(config.model),
        config.model,
        preprocessing_of(config),
        provenance=_provenance(trainer, source) | run.recorded_start(),
    )
    Family(card, backbone).save(run.family)


def _provenance(trainer: Trainer, source: ImageSource) -> dict[str, Any]:
    config = trainer.config
    return {
        "method": "POA (Zhang et al., ECCV 2024), weights of the teacher",
        "poa": __version__,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": {"source": source.spec, "num_images": len(source), "fingerprint": source.fingerprint},
        "epochs": config.train.epochs,
        "steps": trainer.schedules.num_steps,
        "batch_size": config.train.batch_size,
        "seed": config.train.seed,
        "runtime": trainer.runtime.describe(),
    }
