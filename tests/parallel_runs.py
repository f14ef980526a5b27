"""The same training by one process and by several, and how far their results lie apart."""

from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from poa.config import (
    AugmentConfig,
    ConvNeXtConfig,
    DataConfig,
    HeadsConfig,
    MaskConfig,
    MonitorConfig,
    ObjectiveConfig,
    OptimConfig,
    ParallelConfig,
    PretrainConfig,
    ResNetConfig,
    RuntimeConfig,
    SwinConfig,
    TrainConfig,
    ViTConfig,
)
from poa.data import EpochPlan, ImageSource, MultiCropBatches, open_source
from poa.distributed import ONE, Ranks, whole
from poa.elastic import SubnetDraws
from poa.objective import ema_update_, student_loss, student_shares, student_terms
from poa.objective.losses import koleo_loss
from poa.objective.poa import BranchOutput, HeadRows, HeadTargets, Views
from poa.objective.targets import CenteredTargets, sinkhorn_knopp
from poa.runtime import resolve_runtime
from poa.train.optim import clip_gradients_, set_step_values_
from poa.train.setup import build_trainer
from poa.train.step import StepRecord, Trainer, to_views, train_step

MODELS = {
    "vit": ViTConfig(
        widths=(16, 32), depths=(1, 2), head_dim=16, patch_size=2, image_size=8, num_channels=1, init_values=0.1
    ),
    # Of so many sub-networks that those of nearly equal cost differ.
    "wide vit": ViTConfig(
        widths=(16, 32, 48, 64),
        depths=(1, 2, 3, 4),
        head_dim=16,
        patch_size=2,
        image_size=8,
        num_channels=1,
        init_values=0.1,
        draw_emphasis=1.0,
    ),
    "convnext": ConvNeXtConfig(widths=(4, 8), depths=(1, 2), other_depths=(1, 1, 1), image_size=32, num_channels=1),
    "swin": SwinConfig(
        widths=(8, 16),
        depths=(1, 2),
        other_depths=(1, 1, 1),
        head_dim=4,
        window_size=4,
        patch_size=2,
        image_size=32,
        num_channels=1,
    ),
    "resnet": ResNetConfig(
        widths=(32, 64),
        stage2_depths=(1, 2),
        stage3_depths=(1, 2),
        outer_depths=(1, 1),
        base_channels=8,
        image_size=32,
        num_channels=1,
        # At zero, whole branches would have no gradient at first.
        zero_init_last=False,
    ),
}


@dataclass(frozen=True)
class Case:
    """A training that several processes should do as one does."""

    model: str = "vit"
    mode: str = "ddp"
    shard_size: int = 0
    targets: str = "sinkhorn"
    batch_size: int = 8
    accumulate: int = 1
    draws: str = "shared"
    precision: str = "float64"
    checkpoint_activations: bool = False
    is_compiled: bool = False
    """Whether blocks are traced; no code is generated, for that takes minutes."""
    patch_start_epoch: float = 0.0
    """After which share of the steps there are masks."""
    num_steps: int = 20

    def __str__(self) -> str:
        parts = [self.model, f"{self.mode}{self.shard_size or ''}", self.targets, f"accumulate {self.accumulate}"]
        parts += [self.draws, self.precision, *(["checkpointed"] if self.checkpoint_activations else [])]
        parts += [*(["compiled"] if self.is_compiled else []), *(["late masks"] if self.patch_start_epoch else [])]
        return ", ".join(parts)

    @property
    def alone(self) -> "Case":
        """What one process does to compare with; by hand, where the processes draw sub-networks of their own."""
        precision = "float32" if self.precision == "bfloat16" else self.precision
        plain = replace(self, mode="auto", shard_size=0, checkpoint_activations=False, is_compiled=False)
        return replace(plain, precision=precision)

    @property
    def config(self) -> PretrainConfig:
        """The configuration."""
        model = replace(MODELS[self.model], **({} if self.model == "resnet" else {"drop_path": 0.0}))
        return PretrainConfig(
            data=DataConfig(source="digits"),
            model=model,
            heads=HeadsConfig(num_prototypes=(8, 12), hidden_dim=16, bottleneck_dim=8),
            objective=ObjectiveConfig(patch_start_epoch=self.patch_start_epoch, targets=self.targets),
            augment=AugmentConfig(num_local_crops=2, local_size=model.image_size // 2, mean=(0.3,), std=(0.35,)),
            mask=MaskConfig(min_patches=2),
            optim=OptimConfig(
                base_lr=1e-2, warmup_epochs=0.0, freeze_last_layer_epochs=0.0, accumulate=self.accumulate
            ),
            train=TrainConfig(epochs=1.0, batch_size=self.batch_size, draws=self.draws, log_every=1),
            monitor=MonitorConfig(every=0),
            runtime=RuntimeConfig(
                device="cpu",
                precision=self.precision,
                num_workers=0,
                num_threads=1,
                compile="on" if self.is_compiled else "off",
                checkpoint_activations=self.checkpoint_activations,
            ),
            parallel=ParallelConfig(self.mode, self.shard_size),
        )


@dataclass
class Outcome:
    """What a training left behind."""

    losses: list[dict[str, float]] = field(default_factory=list)
    """Of each step the loss, its terms and the gradient norms."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Of the first step."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """After the last step, those of student and teacher, and the centres."""
    subnets: list[tuple[str, ...]] = field(default_factory=list)
    """Of each step those of every micro-batch and process."""

    def add(self, record: StepRecord) -> None:
        assert record.is_finite
        norms = {f"grad_norm/{name}": value for name, value in record.grad_norms.items()}
        self.losses.append({"loss": record.loss, **record.terms, **norms})
        self.subnets.append(tuple(map(str, record.subnets)))

    def differences(self, other: "Outcome") -> dict[str, float]:
        """The largest differences from another outcome, relative to its numbers; of tensors to their largest."""
        assert len(self.losses) == len(other.losses) > 0
        pairs = list(zip(self.losses, other.losses, strict=True))
        return {
            "first_loss": relative_difference(*pairs[0]),
            "losses": max(relative_difference(*pair) for pair in pairs),
            "gradients": relative_difference(self.gradients, other.gradients),
            "weights": relative_difference(self.weights, other.weights),
        }


def relative_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """The largest difference between values of the same name, relative to the largest entry of the second."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    pairs = [[torch.as_tensor(each[name], dtype=torch.float64) for each in (ours, theirs)] for name in ours]
    return max((float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs), default=0.0)


@lru_cache
def digits() -> ImageSource:
    """The images."""
    return open_source("digits", DataConfig(), 1)


def _batches(config: PretrainConfig, ranks: Ranks) -> MultiCropBatches:
    plan = EpochPlan(len(digits()), config.train.batch_size, config.optim.accumulate, config.train.seed, ranks)
    return MultiCropBatches(digits(), plan, config)


def _trainer(case: Case, ranks: Ranks, outcome: Outcome) -> Trainer:
    """A trainer whose first gradients come into the outcome."""
    trainer = build_trainer(case.config, case.num_steps, resolve_runtime(case.config.runtime, ranks))

    def take(*_: object) -> None:
        if not outcome.gradients:
            named = trainer.model.student.named_parameters()
            outcome.gradients = {name: whole(part.grad).clone() for name, part in named if part.grad is not None}

    trainer.optimizer.register_step_pre_hook(take)
    return trainer


def _finish(trainer: Trainer, outcome: Outcome) -> Outcome:
    outcome.weights = {name: whole(part).detach().clone() for name, part in trainer.model.state_dict().items()}
    return outcome


def train(case: Case, ranks: Ranks = ONE) -> Outcome:
    """Trains with poa's own step; all processes call it together."""
    outcome = Outcome()
    with patch.object(torch, "compile", partial(torch.compile, backend="eager")):
        trainer = _trainer(case, ranks, outcome)
    batches, num = _batches(case.config, ranks), case.accumulate
    for step in range(case.num_steps):
        outcome.add(train_step(trainer, [batches[step * num + part] for part in range(num)], step))
    return _finish(trainer, outcome)


def train_by_hand(case: Case, num_ranks: int) -> Outcome:
    """What `num_ranks` processes should do that draw sub-networks of their own, by one.

    Teacher and intact student see the whole micro-batch. Each process's part goes through its own sub-network, with
    its part of the targets and of the intact student's outputs; its losses count 1 / `num_ranks`.
    """
    outcome = Outcome()
    trainer = _trainer(case, ONE, outcome)
    draws = SubnetDraws(trainer.draws.space, trainer.draws.costs, case.draws, num_ranks)
    parts = [_batches(case.config, Ranks(rank, num_ranks)) for rank in range(num_ranks)]
    batches = _batches(case.config, ONE)
    for step in range(case.num_steps):
        outcome.add(_step_by_hand(trainer, draws, batches, parts, step))
    return _finish(trainer, outcome)


def _step_by_hand(
    trainer: Trainer, draws: SubnetDraws, batches: MultiCropBatches, parts: list[MultiCropBatches], step: int
) -> StepRecord:
    config, model, values = trainer.config, trainer.model, trainer.schedules.at(step)
    set_step_values_(trainer.optimizer, values)
    temp, num, num_ranks = config.objective.student_temp, config.optim.accumulate, len(parts)
    shares = student_shares(config.objective, has_elastic=True)
    sums: dict[str, float] = {}
    subnets: list[Any] = []

    def backward(student: str, terms: Any, loss: Tensor, weight: float) -> None:
        (weight * loss).backward()
        named = {f"{student}/{key.rstrip('_')}": value for key, value in terms._asdict().items() if value is not None}
        for name, value in {"loss": loss, **named}.items():
            sums[name] = sums.get(name, 0.0) + weight * float(value.detach().mean())

    for position in range(step * num, (step + 1) * num):
        views = to_views(batches[position], trainer, values.masks)
        targets = model.teacher_targets(views, values.teacher_temp)
        intact = model.student(views, draws.space.intact)
        terms = student_terms(targets, intact, views, temp)
        backward("intact", terms, student_loss(terms, config.objective, shares[0]), 1 / num)
        for rank, subnet in enumerate(draws.at(config.train.seed, position)):
            own = to_views(parts[rank][position], trainer, values.masks)
            of_globals, of_locals, of_patches = _rows_of(rank, num_ranks, views)
            own_targets = [HeadTargets(head.cls[of_globals], head.patch[of_patches]) for head in targets]
            heads = [
                HeadRows(head.global_[of_globals], head.local[of_locals], head.patch[of_patches])
                for head in intact.detached().heads
            ]
            seen = BranchOutput(intact.cls.detach()[of_globals], heads)
            terms = student_terms(own_targets, model.student(own, subnet), own, temp, seen)
            backward("elastic", terms, student_loss(terms, config.objective, shares[1]), 1 / (num * num_ranks))
            subnets.append(subnet)

    norms = clip_gradients_(model.student, config.optim.clip_grad)
    trainer.optimizer.step()
    ema_update_(model.teacher, model.student, values.ema_momentum)
    model.targets.update_centers_(keep=True)
    trainer.optimizer.zero_grad(set_to_none=True)
    grad_norms = {name: float(norm) for name, norm in norms.items()}
    return StepRecord(sums.pop("loss"), sums, grad_norms, tuple(subnets), values, is_finite=True)


def _rows_of(rank: int, num_ranks: int, views: Views) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows of global crops, local crops and masked patches are a process's."""
    each = views.masks.shape[0] // 2 // num_ranks
    is_own = torch.arange(2 * each * num_ranks) // each % num_ranks == rank
    is_own_local = torch.arange(views.local_crops.shape[0]) // each % num_ranks == rank
    return is_own, is_own_local, is_own[views.masked // views.masks.shape[1]]


# The functions that processes compute together.


def objective_differences(ranks: Ranks) -> dict[str, float]:
    """How far targets and KoLeo of all processes' rows lie from those of one process that has all rows."""
    rng = torch.Generator().manual_seed(0)
    return {
        **{
            f"{name}, rows {'/'.join(map(str, counts))}": compare(
                torch.randn(sum(counts), 7, generator=rng, dtype=torch.float64), counts, ranks
            )
            for counts in _row_counts(ranks.num_ranks)
            for name, compare in (("sinkhorn", _compare_sinkhorn), ("centering", _compare_centering))
        },
        "koleo": _compare_koleo(torch.randn(4 * ranks.num_ranks, 5, generator=rng, dtype=torch.float64), ranks),
    }


def _row_counts(num_ranks: int) -> list[tuple[int, ...]]:
    rising = tuple(range(2, 2 + num_ranks))
    return [(3,) * num_ranks, rising, (0, *rising[1:]), (*rising[:-1], 0), (0,) * num_ranks]


def _own_rows(x: Tensor, counts: tuple[int, ...], ranks: Ranks) -> Tensor:
    return x.split(counts)[ranks.rank]


def _alone(compute: Any) -> Any:
    """What one process computes: the group is not looked at."""
    from poa.distributed import collectives

    is_started, collectives.is_started = collectives.is_started, lambda: False
    try:
        return compute()
    finally:
        collectives.is_started = is_started


def _gap(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max()) if ours.numel() else 0.0


def _compare_sinkhorn(x: Tensor, counts: tuple[int, ...], ranks: Ranks) -> float:
    expected = _alone(lambda: sinkhorn_knopp(x, 0.05))
    return _gap(sinkhorn_knopp(_own_rows(x, counts, ranks), 0.05), _own_rows(expected, counts, ranks))


def _compare_centering(x: Tensor, counts: tuple[int, ...], ranks: Ranks) -> float:
    def targets(rows: Tensor, module: CenteredTargets) -> Tensor:
        found = []
        for scale in (1.0, 2.0):
            found.append(module(scale * rows, 0.05))
            module.update_center_(keep=True)
        return torch.cat([*found, module.center])

    ours = targets(_own_rows(x, counts, ranks), CenteredTargets(x.shape[1], 0.9).double())
    theirs = _alone(lambda: targets(x, CenteredTargets(x.shape[1], 0.9).double()))
    first, second, center = theirs.split([len(x), len(x), 1])
    return _gap(ours, torch.cat([_own_rows(first, counts, ranks), _own_rows(second, counts, ranks), center]))


def _compare_koleo(x: Tensor, ranks: Ranks) -> float:
    counts = (len(x) // ranks.num_ranks,) * ranks.num_ranks
    everything = x.clone().requires_grad_()
    expected = _alone(lambda: koleo_loss(everything))
    expected.backward()
    own = _own_rows(x, counts, ranks).clone().requires_grad_()
    loss = koleo_loss(own)
    (loss / ranks.num_ranks).backward()
    total = loss.detach().clone()
    torch.distributed.all_reduce(total)
    return max(
        _gap(total / ranks.num_ranks, expected.detach()),
        _gap(own.grad, _own_rows(everything.grad, counts, ranks)),
    )
