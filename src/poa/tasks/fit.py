"""The loop of everything that is trained on labels."""

from __future__ import annotations

import copy
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from poa.config import FitConfig
from poa.errors import CheckpointError, PoaError
from poa.randomness import derived_seed
from poa.runtime import Runtime
from poa.tasks.parameters import parameter_groups

STATE_FILE = "fit.pt"

OnStep = Callable[[int, int, float], None]
"""Called with (steps done, steps of the whole run, loss)."""


class Task(ABC):
    """What is learnt: a model, its training batches, its loss, and how it is measured.

    Attributes:
        model: what is trained. `model.backbone` is a timm network, or a super-network of poa: the layer-wise decay
            is for it, and freezing.
        metric: the figure of `evaluate` whose largest value marks the best epoch.
        identity: what tells this task from another; a run goes on only with the same.
    """

    model: nn.Module
    metric: str
    identity: str = ""

    @abstractmethod
    def num_steps(self) -> int:
        """Steps per epoch."""

    @abstractmethod
    def batches(self, epoch: int) -> Iterator[Any]:
        """The training batches of that epoch (0, 1, …): a function of the seed and the epoch alone."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any, device: torch.device) -> dict[str, Tensor]:  # noqa: ANN401
        """The losses by name; their sum is minimised."""

    @abstractmethod
    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """The figures on the validation images; `model` is in evaluation mode."""


@dataclass(frozen=True)
class FitResult:
    """How the training went.

    Attributes:
        best: the figures of the best epoch, whose weights the task's model has now.
        best_epoch: counted from 1.
        history: for each evaluated epoch its number, mean losses and figures.
    """

    best: dict[str, float]
    best_epoch: int
    history: tuple[dict[str, float], ...]


class NotFiniteError(PoaError):
    """The loss is no finite number."""


def fit(
    task: Task, config: FitConfig, runtime: Runtime, *, out: Path | None = None, on_step: OnStep | None = None
) -> FitResult:
    """Trains the task's model and leaves it with the weights of its best epoch.

    With `out`, the state is written there after every epoch, and a run that is there goes on: it ends as one that
    never stopped.

    Args:
        task: what is learnt.
        config: the numbers.
        runtime: where it computes.
        out: directory of the state.
        on_step: told of every step.

    Raises:
        NotFiniteError: the loss is no longer a finite number.
        CheckpointError: `out` holds the state of a run with other numbers.
    """
    run = _Run(task, config, runtime)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        run.resume(out / STATE_FILE)
    for epoch in range(run.epoch, config.epochs):
        run.train_epoch(epoch, on_step)
        if (epoch + 1) % config.evaluate_every == 0 or epoch + 1 == config.epochs:
            run.look(epoch)
        run.epoch = epoch + 1
        if out is not None:
            run.save(out / STATE_FILE)
    task.model.load_state_dict(run.best_state)
    task.model.eval()
    return FitResult(run.best, run.best_epoch, tuple(run.history))


class _Run:
    """The state of a training run."""

    def __init__(self, task: Task, config: FitConfig, runtime: Runtime) -> None:
        self.task, self.config, self.runtime = task, config, runtime
        self.model = task.model.to(runtime.device)
        groups = parameter_groups(self.model, config)
        self.scales = [group.pop("lr_scale") for group in groups]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr)
        self.average = copy.deepcopy(self.model).requires_grad_(False) if config.ema_decay else None
        self.epoch = 0
        self.best: dict[str, float] = {}
        self.best_epoch = 0
        self.best_state: dict[str, Tensor] = {}
        self.losses: dict[str, float] = {}
        self.history: list[dict[str, float]] = []

    def train_epoch(self, epoch: int, on_step: OnStep | None) -> None:
        """One pass; dropout and stochastic depth are a function of the seed and the epoch."""
        config, num_steps = self.config, self.task.num_steps()
        self.model.train()
        if config.freeze:
            self.model.backbone.eval()  # type: ignore[union-attr]
        sums: dict[str, Tensor] = {}
        devices = [self.runtime.device] if self.runtime.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(derived_seed(config.seed, "fit", epoch))
            for number, batch in enumerate(self.task.batches(epoch), start=epoch * num_steps):
                losses = self._step(batch, number, num_steps)
                for name, value in losses.items():
                    sums[name] = sums.get(name, torch.zeros_like(value)) + value
                if on_step is not None:
                    on_step(number + 1, config.epochs * num_steps, sum(float(value) for value in losses.values()))
        self.losses = {f"loss/{name}": float(value) / num_steps for name, value in sums.items()}

    def _step(self, batch: Any, number: int, steps_per_epoch: int) -> dict[str, Tensor]:  # noqa: ANN401
        config, device = self.config, self.runtime.device
        lr = lr_schedule(number, steps_per_epoch, config)
        for group, scale in zip(self.optimizer.param_groups, self.scales, strict=True):
            group["lr"] = lr * scale
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.runtime.precision == "bfloat16"):
            losses = self.task.loss(self.model, batch, device)
        total = torch.stack(list(losses.values())).sum()
        if not bool(total.isfinite()):
            raise NotFiniteError(
                f"the loss of step {number + 1} is {float(total)}; a lower --fit.lr (now {config.lr:g}) or a longer "
                "--fit.warmup-epochs may help."
            )
        total.backward()
        if config.clip_grad:
            trained = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
            nn.utils.clip_grad_norm_(trained, config.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            _average_(self.average, self.model, min(config.ema_decay, (1 + number) / (10 + number)))
        return {name: value.detach() for name, value in losses.items()}

    def look(self, epoch: int) -> None:
        """Evaluates, and keeps the weights if they are the best so far."""
        model = (self.average if self.average is not None else self.model).eval()
        with torch.inference_mode():
            figures = self.task.evaluate(model, self.runtime.device)
        self.history.append({"epoch": float(epoch + 1), **self.losses, **figures})
        if not self.best or figures[self.task.metric] > self.best[self.task.metric]:
            self.best, self.best_epoch = figures, epoch + 1
            self.best_state = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}

    def save(self, file: Path) -> None:
        """Writes the state; what was there is replaced only by a whole one."""
        state = {
            "config": self._numbers(),
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "best_state": self.best_state,
            "history": self.history,
        }
        scratch = file.with_suffix(".tmp")
        torch.save(state, scratch)
        os.replace(scratch, file)  # noqa: PTH105

    def _numbers(self) -> dict[str, Any]:
        return {**asdict(self.config), "task": self.task.identity}

    def resume(self, file: Path) -> None:
        """Goes on from the state, if there is one."""
        if not file.exists():
            return
        state: Mapping[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        mine = self._numbers()
        other = sorted(name for name in mine if state["config"].get(name) != mine[name])
        if other:
            raise CheckpointError(
                f"{file} is of a run with another {', '.join(other)}. Give the same options to go on, or another --out."
            )
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.best, self.best_epoch = state["epoch"], state["best"], state["best_epoch"]
        self.best_state, self.history = state["best_state"], state["history"]


def lr_schedule(step: int, steps_per_epoch: int, config: FitConfig) -> float:
    """The learning rate of a step: linear warm-up from 0, then a cosine to `config.min_lr`."""
    total = config.epochs * steps_per_epoch
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total - 1)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    share = (step - warmup) / max(1, total - 1 - warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * share))


@torch.no_grad()
def _average_(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Moves the average towards the model; counters and masks (integers) are copied."""
    for mine, theirs in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if mine.is_floating_point():
            mine.lerp_(theirs, 1.0 - decay)
        else:
            mine.copy_(theirs)
