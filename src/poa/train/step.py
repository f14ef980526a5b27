"""One optimiser step of POA, in the paper's order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from poa.config import PretrainConfig
from poa.data import Batch, normalize
from poa.distributed import all_sum
from poa.elastic import Subnet, SubnetDraws
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
from poa.train.parallel import Alone
from poa.train.schedules import Schedules, StepValues


@dataclass(frozen=True)
class Trainer:
    """What a step works on."""

    config: PretrainConfig
    model: PoaModel
    parallel: Alone
    optimizer: torch.optim.Optimizer
    schedules: Schedules
    draws: SubnetDraws
    runtime: Runtime
    start: StartReport | None = None
    """How it started from public weights, if it just did."""


@dataclass(frozen=True)
class StepRecord:
    """What a step reports, the same on every process. The losses are means over micro-batches and processes."""

    loss: float
    terms: dict[str, float]
    grad_norms: dict[str, float]
    subnets: tuple[Subnet | None, ...]
    """Of every micro-batch and process, in this order."""
    values: StepValues
    is_finite: bool
    """False: loss or gradients were not finite on some process, and nothing was updated on any."""
    num_skipped_images: int = 0
    """Images of the step that could not be read."""
    is_interrupted: bool = False
    """Whether some process was asked to stop."""


def train_step(
    trainer: Trainer, batches: Sequence[Batch], step: int, *, is_interrupted: Callable[[], bool] = lambda: False
) -> StepRecord:
    """One optimiser step on `batches`, this process's micro-batches of that step (POA §3.1, fig. 2).

    Each student's losses go backward before the next student runs, so that only one student's activations are in
    memory; the gradients add up to those of the whole objective.
    """
    config, model, parallel = trainer.config, trainer.model, trainer.parallel
    values = trainer.schedules.at(step)
    set_step_values_(trainer.optimizer, values)
    temp, is_shared = config.objective.student_temp, config.train.draws == "shared"
    meter = _Meter(batches, trainer)

    for position, batch in enumerate(batches, start=step * len(batches)):
        subnet = meter.draw(position)
        views = to_views(batch, trainer, values.masks)
        shares = student_shares(config.objective, has_elastic=subnet is not None)
        is_last = batch is batches[-1]
        with parallel.accumulating(is_last=is_last and subnet is None):
            with autocast(trainer.runtime):
                targets = model.teacher_targets(views, values.teacher_temp)
                intact = parallel.student(views, trainer.draws.space.intact, _rows_rng(trainer, position, student=0))
                terms = student_terms(targets, intact, views, temp)
            meter.backward("intact", terms, student_loss(terms, config.objective, shares[0]))
        if subnet is None:
            continue
        with parallel.accumulating(is_last=is_last):
            with autocast(trainer.runtime):
                elastic = parallel.student(views, subnet, _rows_rng(trainer, position, student=1))
                terms = student_terms(targets, elastic, views, temp, intact.detached(), koleo_over_ranks=is_shared)
            meter.backward("elastic", terms, student_loss(terms, config.objective, shares[1]))

    parallel.finish_gradients_()
    norms = clip_gradients_(model.student, config.optim.clip_grad)
    record = meter.record(norms, values, is_interrupted())
    if record.is_finite:
        trainer.optimizer.step()
        ema_update_(model.teacher, model.student, values.ema_momentum)
    model.targets.update_centers_(keep=record.is_finite)
    trainer.optimizer.zero_grad(set_to_none=True)
    return record


class _Meter:
    """Sums up the losses of a step; sends each backward."""

    def __init__(self, batches: Sequence[Batch], trainer: Trainer) -> None:
        self.num_batches = len(batches)
        self.num_skipped_images = sum(len(batch.skipped) for batch in batches)
        self.draws = trainer.draws
        self.seed = trainer.config.train.seed
        self.ranks = trainer.runtime.ranks
        self.loss = torch.zeros((), device=trainer.runtime.device)
        self.terms: dict[str, Tensor] = {}
        self.subnets: list[Subnet | None] = []

    def draw(self, position: int) -> Subnet | None:
        """The sub-network that this process trains on micro-batch number `position`."""
        drawn = self.draws.at(self.seed, position)
        self.subnets += drawn
        return drawn[self.ranks.rank]

    def backward(self, student: str, terms: StudentTerms, loss: Tensor) -> None:
        """Takes one student's losses in and adds their gradients."""
        (loss / self.num_batches).backward()
        self.loss = self.loss + loss.detach() / self.num_batches
        for name, value in terms._asdict().items():
            if value is not None:
                key = f"{student}/{name.rstrip('_')}"
                self.terms[key] = self.terms.get(key, 0.0) + value.detach().mean() / self.num_batches

    def record(self, norms: dict[str, Tensor], values: StepValues, is_interrupted: bool) -> StepRecord:
        """What the step reports: one sum over the processes of all that they have to tell each other."""
        is_finite = torch.stack([self.loss, *norms.values()]).isfinite().all()
        flags = [~is_finite, torch.tensor(self.num_skipped_images), torch.tensor(is_interrupted)]
        own = torch.stack([self.loss, *self.terms.values(), *(flag.to(self.loss) for flag in flags)])
        loss, *terms, num_bad, num_skipped, num_interrupted = all_sum(own).tolist()
        each = self.ranks.num_ranks
        return StepRecord(
            loss=loss / each,
            terms={name: value / each for name, value in zip(self.terms, terms, strict=True)},
            grad_norms={name: float(norm) for name, norm in norms.items()},
            subnets=tuple(self.subnets),
            values=values,
            is_finite=num_bad == 0,
            num_skipped_images=int(num_skipped),
            is_interrupted=num_interrupted > 0,
        )


def to_views(batch: Batch, trainer: Trainer, masks: bool) -> Views:
    """A batch on the device, normalised; without masks where they are off."""
    device, dtype, how = trainer.runtime.device, trainer.runtime.dtype, trainer.config.augment
    crops = [batch.global_crops, batch.local_crops]
    crops = [normalize(part.to(device, non_blocking=True), how.mean, how.std).flatten(0, 1).to(dtype) for part in crops]
    hidden = batch.masks if masks else torch.zeros_like(batch.masks)
    weights = (1.0 / hidden.sum(dim=1, keepdim=True).clamp(min=1).to(dtype)).expand(hidden.shape)[hidden]
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


def _rows_rng(trainer: Trainer, position: int, student: int) -> torch.Generator:
    """For the stochastic depth of a pass; processes draw for their own rows."""
    rank = trainer.runtime.ranks.rank
    own = (position, student, rank) if rank else (position, student)
    return torch.Generator().manual_seed(derived_seed(trainer.config.train.seed, "rows", *own))
