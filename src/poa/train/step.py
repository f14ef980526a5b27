"""One optimiser step of POA, in the paper's order."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from poa.config import PretrainConfig
from poa.data import Batch, normalize
from poa.elastic import Subnet
from poa.objective import LossTerms, PoaModel, Views, ema_update_, poa_losses, total_loss
from poa.randomness import derived_seed
from poa.runtime import Runtime
from poa.train.optim import clip_gradients_, set_step_values_
from poa.train.schedules import Schedules, StepValues


@dataclass(frozen=True)
class Trainer:
    """What a step works on."""

    config: PretrainConfig
    model: PoaModel
    optimizer: torch.optim.Optimizer
    schedules: Schedules
    runtime: Runtime


@dataclass(frozen=True)
class StepRecord:
    """What a step reports. With several micro-batches the losses are their means."""

    loss: float
    terms: dict[str, float]
    grad_norms: dict[str, float]
    subnets: tuple[Subnet | None, ...]
    values: StepValues
    is_finite: bool
    """False: loss or gradients were not finite, and nothing was updated."""


def train_step(trainer: Trainer, batches: Sequence[Batch], step: int) -> StepRecord:
    """One optimiser step on `batches`, the micro-batches of that step.

    Draw a sub-network, teacher targets, intact student, elastic student, losses, backward; then clip, check,
    update, and move the teacher (POA §3.1, fig. 2).
    """
    config, model, space = trainer.config, trainer.model, trainer.model.student.backbone.space
    values = trainer.schedules.at(step)
    set_step_values_(trainer.optimizer, values)
    losses, terms, subnets = [], [], []

    for position, batch in enumerate(batches, start=step * len(batches)):
        subnet = space.draw(config.train.seed, position)
        views = to_views(batch, trainer, values.masks)
        with autocast(trainer.runtime):
            targets = model.teacher_targets(views, values.teacher_temp)
            intact = model.student(views, space.intact, _rows_rng(config, position, branch=0))
            elastic = None
            if subnet is not None:
                elastic = model.student(views, subnet, _rows_rng(config, position, branch=1))
            found = poa_losses(targets, intact, elastic, views, config.objective.student_temp)
            loss = total_loss(found, config.objective)
        (loss / len(batches)).backward()
        losses.append(loss.detach())
        terms.append(_named(found))
        subnets.append(subnet)

    norms = clip_gradients_(model.student, config.optim.clip_grad)
    loss = torch.stack(losses).mean()
    is_finite = bool(torch.stack([loss, *norms.values()]).isfinite().all())
    if is_finite:
        trainer.optimizer.step()
        ema_update_(model.teacher, model.student, values.ema_momentum)
    trainer.optimizer.zero_grad(set_to_none=True)
    return StepRecord(
        loss=float(loss),
        terms={name: float(torch.stack([part[name] for part in terms]).mean()) for name in terms[0]},
        grad_norms={name: float(norm) for name, norm in norms.items()},
        subnets=tuple(subnets),
        values=values,
        is_finite=is_finite,
    )


def to_views(batch: Batch, trainer: Trainer, masks: bool) -> Views:
    """A batch on the device, normalised; without masks where they are off."""
    device, how = trainer.runtime.device, trainer.config.augment
    crops = [batch.global_crops, batch.local_crops]
    crops = [normalize(part.to(device, non_blocking=True), how.mean, how.std).flatten(0, 1) for part in crops]
    hidden = batch.masks if masks else torch.zeros_like(batch.masks)
    weights = (1.0 / hidden.sum(dim=1, keepdim=True).clamp(min=1)).expand(hidden.shape)[hidden]
    return Views(
        global_crops=crops[0],
        local_crops=crops[1],
        masks=hidden.to(device, non_blocking=True) if masks else None,
        masked=hidden.flatten().nonzero().squeeze(1).to(device, non_blocking=True),
        mask_weights=weights.to(device, non_blocking=True),
    )


def autocast(runtime: Runtime) -> AbstractContextManager[object]:
    """Autocast to the runtime's precision; no effect in float32."""
    return torch.autocast(
        runtime.device.type, dtype=torch.bfloat16, enabled=runtime.precision == "bfloat16", cache_enabled=True
    )


def _rows_rng(config: PretrainConfig, position: int, branch: int) -> torch.Generator:
    return torch.Generator().manual_seed(derived_seed(config.train.seed, "rows", position, branch))


def _named(terms: LossTerms) -> dict[str, Tensor]:
    named = {f"intact/{name.rstrip('_')}": value for name, value in terms.intact._asdict().items()}
    if terms.elastic is not None:
        named |= {f"elastic/{name.rstrip('_')}": value for name, value in terms.elastic._asdict().items()}
    if terms.distill_local is not None and terms.distill_global is not None:
        named |= {"distill/local": terms.distill_local, "distill/global": terms.distill_global}
    return {name: value.detach().mean() for name, value in named.items()}
