"""The loop of everything that is trained on labels."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
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
from poa.tasks.state import load_optimizer_, of_prefix, optimizer_tensors, read_state, with_prefix, write_state

STATE_FOLDER = "state"
_CUDA_REPORT_EVERY = 20
"""Steps from one look at the loss to the next on a GPU, where looking waits for the device."""

OnStep = Callable[[int, int, float], None]
"""Called with (steps done, steps of the whole run, loss): after every step, on a GPU after every 20."""


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

    def passes(self, model: nn.Module, batch: Any, device: torch.device) -> Iterator[dict[str, Tensor]]:  # noqa: ANN401
        """The losses of a step in parts, each of which goes backward before the next is asked for; one by default."""
        yield self.loss(model, batch, device)

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
    """Trains the task's model and leaves it with the weights of its best epoch, on the runtime's device.

    With `out`, the state is written there after every epoch, and a run that is there goes on: it ends as one that
    never stopped, bit for bit on one CPU.

    Args:
        task: what is learnt.
        config: the numbers.
        runtime: where it computes.
        out: directory of the state.
        on_step: told how far it is.

    Raises:
        NotFiniteError: the loss is no longer a finite number; the state is that of the epoch before.
        CheckpointError: `out` holds the state of a run with other numbers, or a damaged one.
    """
    run = _Run(task, config, runtime)
    if out is not None:
        run.resume(out / STATE_FOLDER)
    while not run.is_over:
        run.train_epoch(on_step)
        if out is not None:
            run.save(out / STATE_FOLDER)
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
        self.history: list[dict[str, float]] = []

    @property
    def is_over(self) -> bool:
        """Whether the last epoch is done, or `config.patience` epochs went by without a better one."""
        waited = self.history[-1]["epoch"] - self.best_epoch if self.history else 0
        return self.epoch >= self.config.epochs or bool(self.config.patience and waited >= self.config.patience)

    def train_epoch(self, on_step: OnStep | None) -> None:
        """One pass, and a look where one is due; what torch draws is a function of the seed and the epoch."""
        config, num_steps = self.config, self.task.num_steps()
        self.model.train()
        if config.freeze:
            self.model.backbone.eval()  # type: ignore[union-attr]
        meter = _Meter(config, num_steps * self.epoch, num_steps, self.runtime.device, on_step)
        devices = [self.runtime.device] if self.runtime.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(derived_seed(config.seed, "fit", self.epoch))
            for batch in self.task.batches(self.epoch):
                meter.add(self._step(batch, meter.num_done, num_steps))
        losses = meter.means()
        self.epoch += 1
        if self.epoch % config.evaluate_every == 0 or self.epoch == config.epochs:
            self._look(losses)

    def _step(self, batch: Any, number: int, steps_per_epoch: int) -> dict[str, Tensor]:  # noqa: ANN401
        config = self.config
        lr = lr_schedule(number, steps_per_epoch, config)
        for group, scale in zip(self.optimizer.param_groups, self.scales, strict=True):
            group["lr"] = lr * scale
        losses: dict[str, Tensor] = {}
        passes = self.task.passes(self.model, batch, self.runtime.device)
        while True:
            with self._autocast():
                part = next(passes, None)
            if part is None:
                break
            torch.stack(list(part.values())).sum().backward()
            losses.update((name, value.detach()) for name, value in part.items())
        if config.clip_grad:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            average_(self.average, self.model, min(config.ema_decay, (1 + number) / (10 + number)))
        return losses

    def _look(self, losses: Mapping[str, float]) -> None:
        """Evaluates, and keeps the weights on the CPU if they are the best so far."""
        model = (self.average if self.average is not None else self.model).eval()
        with torch.inference_mode(), self._autocast():
            figures = self.task.evaluate(model, self.runtime.device)
        self.history.append({"epoch": float(self.epoch), **losses, **figures})
        metric = self.task.metric
        if not self.best or figures[metric] > self.best[metric] or math.isnan(self.best[metric]):
            self.best, self.best_epoch = figures, self.epoch
            self.best_state = {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}

    def _autocast(self) -> AbstractContextManager[object]:
        runtime = self.runtime
        return torch.autocast(runtime.device.type, dtype=torch.bfloat16, enabled=runtime.precision == "bfloat16")

    def save(self, folder: Path) -> None:
        """Writes the state; what was there is replaced only by a whole one."""
        tensors = with_prefix("model", self.model.state_dict())
        tensors |= with_prefix("optimizer", optimizer_tensors(self.optimizer, self.model))
        tensors |= with_prefix("best", self.best_state)
        if self.average is not None:
            tensors |= with_prefix("average", self.average.state_dict())
        numbers = {name: getattr(self, name) for name in ("epoch", "best", "best_epoch", "history")}
        write_state(folder, tensors, {"config": self._config(), **numbers})

    def resume(self, folder: Path) -> None:
        """Goes on from the state, if there is one."""
        found = read_state(folder)
        if found is None:
            return
        tensors, numbers = found
        mine, theirs = self._config(), numbers["config"]
        other = sorted(name for name in mine if name not in theirs or theirs[name] != mine[name])
        if other:
            raise CheckpointError(
                f"{folder} is of a run with another {', '.join(other)}. Give the same options to go on, or another "
                "--out."
            )
        self.model.load_state_dict(of_prefix("model", tensors))
        load_optimizer_(self.optimizer, self.model, of_prefix("optimizer", tensors))
        if self.average is not None:
            self.average.load_state_dict(of_prefix("average", tensors))
        self.best_state = of_prefix("best", tensors)
        self.epoch, self.best_epoch = numbers["epoch"], numbers["best_epoch"]
        self.best, self.history = _floats(numbers["best"]), [_floats(line) for line in numbers["history"]]

    def _config(self) -> dict[str, Any]:
        return {**asdict(self.config), "task": self.task.identity}


class _Meter:
    """The mean losses of an epoch; looks whether they are finite, and tells how far the run is."""

    def __init__(
        self, config: FitConfig, num_done: int, num_steps: int, device: torch.device, on_step: OnStep | None
    ) -> None:
        self.config, self.num_done, self.num_steps, self.on_step = config, num_done, num_steps, on_step
        self.every = _CUDA_REPORT_EVERY if device.type == "cuda" else 1
        self.first = num_done
        self.sums: dict[str, Tensor] = {}

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Takes in a step's losses.

        Raises:
            NotFiniteError: they, or those of steps not looked at yet, are not finite.
        """
        self.num_done += 1
        for name, value in losses.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        done = self.num_done - self.first
        if done % self.every and done != self.num_steps:
            return
        if not all(math.isfinite(float(value)) for value in self.sums.values()):
            raise NotFiniteError(
                f"the loss is no finite number any more by step {self.num_done}; a lower learning rate (now "
                f"{self.config.lr:g}) or a longer warm-up (now {self.config.warmup_epochs:g} epochs) may help."
            )
        if self.on_step is not None:
            loss = sum(float(value) for value in losses.values())
            self.on_step(self.num_done, self.config.epochs * self.num_steps, loss)

    def means(self) -> dict[str, float]:
        """The mean of each loss over the epoch so far, named loss/NAME."""
        steps = max(1, self.num_done - self.first)
        return {f"loss/{name}": float(value) / steps for name, value in self.sums.items()}


def lr_schedule(step: int, steps_per_epoch: int, config: FitConfig) -> float:
    """The learning rate of a step: linear warm-up from 0, then a cosine to `config.min_lr`."""
    total = config.epochs * steps_per_epoch
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total - 1)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    share = (step - warmup) / max(1, total - 1 - warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * share))


@torch.no_grad()
def average_(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Average ← decay · average + (1 − decay) · model, in place; counters and masks (no floats) are copied."""
    pairs = list(zip(average.state_dict().values(), model.state_dict().values(), strict=True))
    floating = [(mine, theirs) for mine, theirs in pairs if mine.is_floating_point()]
    torch._foreach_lerp_([mine for mine, _ in floating], [theirs for _, theirs in floating], 1.0 - decay)
    for mine, theirs in pairs:
        if not mine.is_floating_point():
            mine.copy_(theirs)


def _floats(values: Mapping[str, float | None]) -> dict[str, float]:
    """What was read from JSON: null is not a number."""
    return {name: math.nan if value is None else float(value) for name, value in values.items()}
