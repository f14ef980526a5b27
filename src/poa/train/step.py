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
from poa.objective import (
    PoaModel,
    StudentTerms,
    Views,
    ema_update_,
    student_loss,
    student_shares,
    student_terms,
)
from poa.pretrained import StartReport
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
    start: StartReport | None = None
    """How it started from public weights, if it just did."""


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
    """One optimiser step on `batches`, the micro-batches of that step (POA §3.1, fig. 2).

    Each student's losses go backward before the next student runs, so that only one student's activations are in
    memory; the gradients add up to those of the whole objective.
    """
    config, model, space = trainer.config, trainer.model, trainer.model.student.backbone.space
    values = trainer.schedules.at(step)
    set_step_values_(trainer.optimizer, values)
    meter = _Meter(len(batches))

    for position, batch in enumerate(batches, start=step * len(batches)):
        subnet = space.draw(config.train.seed, position)
        views = to_views(batch, trainer, values.masks)
        shares = student_shares(config.objective, has_elastic=subnet is not None)
        with autocast(trainer.runtime):
            targets = model.teacher_targets(views, values.teacher_temp)
            intact = model.student(views, space.intact, _rows_rng(config, position, student=0))
            terms = student_terms(targets, intact, views, config.objective.student_temp)
            loss = student_loss(terms, config.objective, shares[0])
        meter.backward("intact", terms, loss)
        if subnet is not None:
            with autocast(trainer.runtime):
                elastic = model.student(views, subnet, _rows_rng(config, position, student=1))
                terms = student_terms(targets, elastic, views, config.objective.student_temp, intact.detached())
                loss = student_loss(terms, config.objective, shares[1])
            meter.backward("elastic", terms, loss)
        meter.subnets.append(subnet)

    norms = clip_gradients_(model.student, config.optim.clip_grad)
    is_finite = bool(torch.stack([meter.loss, *norms.values()]).isfinite().all())
    if is_finite:
        trainer.optimizer.step()
        ema_update_(model.teacher, model.student, values.ema_momentum)
    model.targets.update_centers_(keep=is_finite)
    trainer.optimizer.zero_grad(set_to_none=True)
    return meter.record(norms, values, is_finite)


class _Meter:
    """Sums up the losses of a step; sends each backward."""

    def __init__(self, num_batches: int) -> None:
        self.num_batches = num_batches
        self.loss = torch.zeros(())
        self.terms: dict[str, Tensor] = {}
        self.subnets: list[Subnet | None] = []

    def backward(self, student: str, terms: StudentTerms, loss: Tensor) -> None:
        """Takes one student's losses in and adds their gradients."""
        (loss / self.num_batches).backward()
        self.loss = self.loss.to(loss.device) + loss.detach() / self.num_batches
        for name, value in terms._asdict().items():
            if value is not None:
                key = f"{student}/{name.rstrip('_')}"
                self.terms[key] = self.terms.get(key, 0.0) + value.detach().mean() / self.num_batches

    def record(self, norms: dict[str, Tensor], values: StepValues, is_finite: bool) -> StepRecord:
        """What the step reports."""
        return StepRecord(
            loss=float(self.loss),
            terms={name: float(value) for name, value in self.terms.items()},
            grad_norms={name: float(norm) for name, norm in norms.items()},
            subnets=tuple(self.subnets),
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


def _rows_rng(config: PretrainConfig, position: int, student: int) -> torch.Generator:
    return torch.Generator().manual_seed(derived_seed(config.train.seed, "rows", position, student))
