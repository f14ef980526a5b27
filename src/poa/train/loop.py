"""The run around the steps: set up, resume, step, watch, save, finish."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from poa.backbones import architecture
from poa.config import PretrainConfig
from poa.data import BadImageLog, Batch, EpochPlan, ImageSource, MultiCropBatches, make_loader, open_source
from poa.errors import TrainingError
from poa.family import Family, FamilyCard
from poa.objective import PoaModel
from poa.pretrained import start_from_
from poa.randomness import derived_seed
from poa.runtime import Runtime, resolve_runtime
from poa.train.checkpoint import CheckpointStore, pack_state, unpack_state_
from poa.train.interrupt import Interrupt
from poa.train.metrics import MetricsLog
from poa.train.monitor import Monitor, preprocessing_of
from poa.train.optim import make_optimizer
from poa.train.report import Reporter
from poa.train.run_directory import RunDirectory
from poa.train.schedules import make_schedules
from poa.train.step import StepRecord, Trainer, train_step
from poa.version import __version__


@dataclass(frozen=True)
class RunResult:
    """How a run ended in this process.

    Attributes:
        step: steps done.
        num_steps: steps of the whole run.
        family: the finished family's directory, or None if the run was stopped before its end.
        signal: the signal that stopped it, or None.
    """

    step: int
    num_steps: int
    family: Path | None
    signal: int | None


def pretrain(config: PretrainConfig, out: str | Path, reporter: Reporter | None = None) -> RunResult:
    """Pre-trains a family into the run directory `out`; goes on with the run that is there.

    A resumed run equals one that never stopped: weights, optimiser, teacher, sub-networks, data order,
    augmentation and loss curve, bit for bit on one CPU.

    Raises:
        ConfigError: the configuration does not fit the data, the machine, or the run that is there.
        DataError: the images cannot be used.
        CheckpointError: the run directory cannot be used.
        TrainingError: losses or gradients stopped being finite.
    """
    run = RunDirectory(Path(out))
    run.check_continuation(config)
    runtime = resolve_runtime(config.runtime)
    source = open_source(config.data.source, config.data, config.model.num_channels)
    plan = EpochPlan(len(source), config.train.batch_size, config.optim.accumulate, config.train.seed)
    store = CheckpointStore(run.checkpoints, config.train.keep_checkpoints, config.train.keep_every)
    trainer = build_trainer(config, plan.steps_per_epoch, runtime, None if store.steps() else source)
    run.begin(config, source, runtime)
    if trainer.start is not None:
        run.record_start(trainer.start)
        (reporter or Reporter()).message(f"Started from {config.init.source}: {trainer.start.tensors}.")
    with Interrupt() as interrupt:
        done = Loop(trainer, run, store, source, plan, reporter or Reporter()).run(interrupt)
    num_steps = trainer.schedules.num_steps
    if done < num_steps:
        return RunResult(done, num_steps, None, interrupt.signal)
    if not run.family.exists():
        _finished_family(trainer, source, run).save(run.family)
    return RunResult(done, num_steps, run.family, None)


def build_trainer(
    config: PretrainConfig, steps_per_epoch: int, runtime: Runtime, images: ImageSource | None = None
) -> Trainer:
    """A trainer with fresh weights, a pure function of the configuration's seed; or with those of `config.init`.

    Args:
        config: the run.
        steps_per_epoch: optimiser steps per epoch.
        runtime: where it computes.
        images: where the run starts from public weights, the images that say which of their channels matter. Without
            them the weights are fresh: for a run that goes on from a checkpoint.

    Raises:
        ConfigError: no stock network could be cut from such a family; or as `start_from_`.
        CheckpointError, DataError: as `start_from_`.
    """
    backbone = architecture(config.model).build(config.model)
    backbone.timm_model(backbone.space.intact, config.model.image_size)  # refuses what could be trained but not cut
    model = PoaModel(backbone, config.heads, config.objective)
    model.init_weights_(torch.Generator().manual_seed(derived_seed(config.train.seed, "weights")))
    model.to(runtime.device)
    start = None
    if config.init.source and images is not None:
        start = start_from_(model.student.backbone, config, images)
        model.restart_teacher_()
    if runtime.compile:
        model.student.backbone.compile_blocks_()
        model.teacher.backbone.compile_blocks_()
    optimizer = make_optimizer(model.student, config.optim)
    return Trainer(config, model, optimizer, make_schedules(config, steps_per_epoch), runtime, start)


class Loop:
    """The steps of a run with all that goes on beside them."""

    def __init__(
        self,
        trainer: Trainer,
        run: RunDirectory,
        store: CheckpointStore,
        source: ImageSource,
        plan: EpochPlan,
        reporter: Reporter,
    ) -> None:
        config = trainer.config
        self.trainer = trainer
        self.source = source
        self.reporter = reporter
        self.out = run.path
        self.num_steps = trainer.schedules.num_steps
        self.num_bad_steps = 0
        self.batches = MultiCropBatches(source, plan, config)
        self.store = store
        self.monitor = Monitor(config, source, trainer.model.student.backbone.space)
        self.bad_images = BadImageLog(
            run.skipped, len(source) + len(source.skipped), config.data.max_bad_share, source.skipped
        )

    def run(self, interrupt: Interrupt) -> int:
        """Runs from the newest checkpoint to the end, or until interrupted; gives back the steps done."""
        first, window = self._restore()
        with ExitStack() as stack:
            metrics = stack.enter_context(MetricsLog(self.out, first, window))
            self.reporter.start(self._overview(), first, self.num_steps)
            stack.callback(self.reporter.stop)
            done = saved = first
            for batches in self._micro_batches(first):
                record = train_step(self.trainer, batches, done)
                done += 1
                self._after_step(done, record, batches, metrics)
                # Steps that were not finite are not saved: the newest checkpoint stays the last good state.
                if done % self.trainer.config.train.checkpoint_every == 0 or done == self.num_steps:
                    self._save(done, metrics)
                    saved = done
                if interrupt.signal is not None:
                    break
            if done > saved:
                self._save(done, metrics)
        return done

    def _after_step(self, done: int, record: StepRecord, batches: list[Batch], metrics: MetricsLog) -> None:
        self.bad_images.add([bad for batch in batches for bad in batch.skipped])
        self._check_finite(done, record)
        metrics.add(record, self.trainer.config.train.batch_size)
        speed = None
        if done % self.trainer.config.train.log_every == 0 or done == self.num_steps:
            speed = metrics.write(done, record)["images_per_second"]
        self.reporter.step(done, record.loss, speed)
        if self.monitor.is_due(done, self.num_steps):
            has_learnt = done > self.trainer.schedules.num_warmup_steps
            found = self.monitor.look(self.trainer.model.teacher.backbone, warn=has_learnt)
            metrics.write_monitor(done, found)
            self.reporter.monitor(done, found)

    def _check_finite(self, done: int, record: StepRecord) -> None:
        self.num_bad_steps = 0 if record.is_finite else self.num_bad_steps + 1
        if not record.is_finite:
            self.reporter.message(f"Step {done} was skipped: its loss or gradient was not finite.")
        if self.num_bad_steps > self.trainer.config.train.max_skipped_steps:
            steps = self.store.steps()
            good = f"The last good state is {self.store.path(steps[-1])}." if steps else "There is no checkpoint yet."
            raise TrainingError(
                f"{self.num_bad_steps} steps in a row were not finite, the last was step {done}. {good} "
                "A lower --optim.base-lr or a longer --optim.warmup-epochs may help (in a new run)."
            )

    def _micro_batches(self, first: int) -> Iterator[list[Batch]]:
        num = self.trainer.config.optim.accumulate
        runtime = self.trainer.runtime
        if first >= self.num_steps:
            return
        loader = iter(
            make_loader(
                self.batches, first * num, self.num_steps * num, runtime.num_workers, runtime.device.type == "cuda"
            )
        )
        for _ in range(first, self.num_steps):
            yield [next(loader) for _ in range(num)]

    def _save(self, done: int, metrics: MetricsLog) -> None:
        if self.num_bad_steps:
            return
        tensors = pack_state(self.trainer.model, self.trainer.optimizer)
        state = {"window": metrics.window_state(), "num_bad_steps": self.num_bad_steps, "poa": __version__}
        self.store.save(done, tensors, state)

    def _restore(self) -> tuple[int, dict[str, list[float]] | None]:
        found = self.store.load_newest()
        if found is None:
            return 0, None
        tensors, state = found
        unpack_state_(tensors, self.trainer.model, self.trainer.optimizer)
        self.num_bad_steps = state["num_bad_steps"]
        return state["step"], state["window"]

    def _overview(self) -> dict[str, str]:
        config, space = self.trainer.config, self.trainer.model.student.backbone.space
        runtime = self.trainer.runtime.describe()
        bad = f", {len(self.source.skipped)} unusable (see skipped.jsonl)" if self.source.skipped else ""
        return {
            "images": f"{len(self.source):,} from {self.source.spec}{bad}",
            "family": f"{len(space)} sub-networks, {space.smallest} to {space.intact}",
            "steps": f"{self.num_steps:,} of {config.train.batch_size} images ({config.train.epochs:g} epochs)",
            "on": f"{runtime['device']}, {runtime['precision']}, {runtime['num_workers']} data workers",
            "run": str(self.out),
        }


def _finished_family(trainer: Trainer, source: ImageSource, run: RunDirectory) -> Family:
    config = trainer.config
    provenance: dict[str, Any] = {
        "method": "POA (Zhang et al., ECCV 2024), weights of the teacher",
        "poa": __version__,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": {"source": source.spec, "num_images": len(source), "fingerprint": source.fingerprint},
        "epochs": config.train.epochs,
        "steps": trainer.schedules.num_steps,
        "batch_size": config.train.batch_size,
        "seed": config.train.seed,
        "runtime": trainer.runtime.describe(),
        **run.recorded_start(),
    }
    card = FamilyCard(architecture(config.model), config.model, preprocessing_of(config), provenance=provenance)
    return Family(card, trainer.model.teacher.backbone)
