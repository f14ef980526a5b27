"""The run around the steps: set up, resume, step, watch, save, finish."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from poa.config import PretrainConfig
from poa.data import (
    BadImageLog,
    Batch,
    BatchStream,
    EpochPlan,
    ImageSource,
    MultiCropBatches,
    SkippedImage,
    open_source,
)
from poa.distributed import agreed, gathered_values, lost_processes_told, process_group, ranks_of_environment
from poa.errors import CheckpointError, TrainingError
from poa.runtime import resolve_runtime
from poa.train.checkpoint import CheckpointStore, pack_state, unpack_state_
from poa.train.interrupt import Interrupt
from poa.train.lock import RunLock
from poa.train.metrics import MetricsLog
from poa.train.monitor import Monitor
from poa.train.report import Reporter
from poa.train.run_directory import RunDirectory
from poa.train.setup import build_trainer, save_family
from poa.train.step import StepRecord, Trainer, train_step
from poa.train.watchdog import Watchdog
from poa.version import __version__

WAIT_SHARE = 0.3
"""Share of the time spent waiting for images from which on the run says so."""


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
    augmentation and loss curve, bit for bit on one CPU. Started by `torchrun`, the processes train one run together;
    it may go on with another number of them.

    Raises:
        ConfigError: the configuration does not fit the data, the machine, or the run that is there.
        DataError: the images cannot be used.
        CheckpointError: the run directory cannot be used, or the end of the run cannot be saved.
        TrainingError: losses or gradients stopped being finite, or another process is gone.
    """
    ranks = ranks_of_environment()
    runtime = resolve_runtime(config.runtime, ranks)
    run = RunDirectory(Path(out))
    reporter = reporter if reporter is not None and ranks.is_main else Reporter()
    with process_group(ranks, runtime.device), ExitStack() as stack:
        watchdog = stack.enter_context(Watchdog(config.runtime.watchdog_minutes, run.path, ranks))
        with agreed(ranks):
            run.check_continuation(config)
            stack.enter_context(RunLock(run.path, ranks))
            source = open_source(config.data.source, config.data, config.model.num_channels)
            plan = EpochPlan.of(source, config, ranks)
            store = CheckpointStore(run.checkpoints, config.train.keep_checkpoints, config.train.keep_every, ranks)
            stack.callback(store.close)
        with agreed(ranks):
            trainer = build_trainer(config, plan.steps_per_epoch, runtime, None if store.steps() else source)
        with agreed(ranks):
            if ranks.is_main:
                run.begin(config, source, runtime, trainer.start)
        with agreed(ranks):
            run.check_is_shared()
            loop = Loop(trainer, run, store, source, plan, reporter)
        with Interrupt() as interrupt, lost_processes_told(ranks):
            done = loop.run(interrupt, watchdog)
        num_steps = trainer.schedules.num_steps
        if done < num_steps:
            return RunResult(done, num_steps, None, interrupt.signal or signal.SIGTERM)
        with agreed(ranks):
            if not run.family.exists():
                save_family(trainer, source, run)
    return RunResult(done, num_steps, run.family, None)


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
        self.ranks = trainer.runtime.ranks
        self.source = source
        self.reporter = reporter
        self.out = run.path
        self.num_steps = trainer.schedules.num_steps
        self.num_bad_steps = 0
        self.has_logged = self.has_told_of_waiting = False
        self.batches = MultiCropBatches(source, plan, config)
        self.store = store
        self.monitor = Monitor(config, source, trainer.model.student.backbone.space, speaks=self.ranks.is_main)
        self.bad_images: BadImageLog | None = None
        if self.ranks.is_main:
            num_images = len(source) + len(source.skipped)
            self.bad_images = BadImageLog(run.skipped, num_images, config.data.max_bad_share, source.skipped)

    def run(self, interrupt: Interrupt, watchdog: Watchdog) -> int:
        """Runs from the newest checkpoint to the end, or until interrupted; gives back the steps done."""
        first, window = self._restore()
        with ExitStack() as stack:
            metrics = stack.enter_context(MetricsLog(self.out, first, window, writes=self.ranks.is_main))
            self.reporter.start(self._overview(), first, self.num_steps)
            stack.callback(self.reporter.stop)
            if self.trainer.start is not None:
                init = self.trainer.config.init.source
                self.reporter.message(f"Started from {init}: {self.trainer.start.tensors}.")
            done = saved = first
            watchdog.beat("the first batch", first)
            stream = stack.enter_context(self._stream(first))
            if self.ranks.num_ranks == 1:
                interrupt.on_signal = stream.stop  # the others would wait for this process
            for batches in self._micro_batches(stream):
                watchdog.beat("a step", done)
                record = train_step(self.trainer, batches, done, is_interrupted=lambda: interrupt.signal is not None)
                done += 1
                self._after_step(done, record, batches, metrics, stream.waited_seconds)
                # Steps that were not finite are not saved: the newest checkpoint stays the last good state.
                if done % self.trainer.config.train.checkpoint_every == 0 and done < self.num_steps:
                    watchdog.beat("a checkpoint", done)
                    saved = self._save(done, metrics) or saved
                if record.is_interrupted:
                    break
                watchdog.beat("the next batch", done)
            watchdog.beat("the last checkpoint", done)
            self._save_last(done, saved, metrics)
        return done

    def _after_step(
        self, done: int, record: StepRecord, batches: list[Batch], metrics: MetricsLog, waited_seconds: float
    ) -> None:
        if record.num_skipped_images:
            self._record_bad_images([bad for batch in batches for bad in batch.skipped])
        self._check_finite(done, record)
        metrics.add(record, self.trainer.config.train.batch_size)
        speed = None
        if done % self.trainer.config.train.log_every == 0 or done == self.num_steps:
            line = metrics.write(done, record, waited_seconds)
            speed = line["images_per_second"]
            self._tell_of_waiting(done, line["data_wait"])
        self.reporter.step(done, record.loss, speed)
        if (problem := self.store.poll()) is not None:
            self.reporter.message(f"warning: {problem}")
        if self.monitor.is_due(done, self.num_steps):
            has_learnt = done > self.trainer.schedules.num_warmup_steps
            found = self.monitor.look(self.trainer.model.teacher.backbone, warn=has_learnt)
            metrics.write_monitor(done, found)
            self.reporter.monitor(done, found)

    def _record_bad_images(self, own: list[SkippedImage]) -> None:
        """Records the unreadable images of all processes; raises `DataError` on all where they are too many."""
        found = [bad for each in gathered_values(own) for bad in each]
        with agreed(self.ranks):
            if self.bad_images is not None:
                self.bad_images.add(found)

    def _check_finite(self, done: int, record: StepRecord) -> None:
        self.num_bad_steps = 0 if record.is_finite else self.num_bad_steps + 1
        if not record.is_finite:
            self.reporter.message(f"Step {done} was skipped: its loss or gradient was not finite.")
        if self.num_bad_steps <= self.trainer.config.train.max_skipped_steps:
            return
        self.store.wait()
        steps = self.store.steps()
        good = f"The last good state is {self.store.path(steps[-1])}." if steps else "There is no checkpoint yet."
        with agreed(self.ranks):
            raise TrainingError(
                f"{self.num_bad_steps} steps in a row were not finite, the last was step {done}. {good} "
                "A lower --optim.base-lr or a longer --optim.warmup-epochs may help (in a new run)."
            )

    def _tell_of_waiting(self, done: int, share: float) -> None:
        """Says once that training waits for data; its start, when everything is slow, does not count."""
        if share > WAIT_SHARE and self.has_logged and not self.has_told_of_waiting:
            self.has_told_of_waiting = True
            self.reporter.message(
                f"Training waited for images {share:.0%} of the time before step {done}. More --runtime.num-workers "
                f"(now {self.trainer.runtime.num_workers}), a faster source or smaller images may help; `data_wait` in "
                "metrics.jsonl goes on counting."
            )
        self.has_logged = True

    def _stream(self, first: int) -> BatchStream:
        num, runtime = self.trainer.config.optim.accumulate, self.trainer.runtime
        last = max(first, self.num_steps) * num
        return BatchStream(self.batches, first * num, last, runtime.num_workers, runtime.device.type == "cuda")

    def _micro_batches(self, stream: BatchStream) -> Iterator[list[Batch]]:
        """The micro-batches of each step; a step that the stream does not have whole is left out."""
        num = self.trainer.config.optim.accumulate
        while len(batches := list(islice(stream, num))) == num:
            yield batches

    def _save(self, done: int, metrics: MetricsLog, *, wait: bool = False) -> int | None:
        """Begins to save, or saves; gives back the step, or None where the state is not one to go on from."""
        if self.num_bad_steps:
            return None
        tensors = pack_state(self.trainer.model, self.trainer.optimizer)
        state = {"window": metrics.window_state(), "num_bad_steps": self.num_bad_steps, "poa": __version__}
        self.store.save(done, tensors, state, wait=wait)
        return done

    def _save_last(self, done: int, saved: int, metrics: MetricsLog) -> None:
        """Saves what is not saved yet and waits for it.

        Raises:
            CheckpointError: it cannot be written.
        """
        if done > saved:
            self._save(done, metrics, wait=True)
        problem = self.store.wait()
        with agreed(self.ranks):
            if problem is not None:
                raise CheckpointError(problem)

    def _restore(self) -> tuple[int, dict[str, list[float]] | None]:
        checkpoint = self.store.newest()
        if checkpoint is None:
            return 0, None
        unpack_state_(checkpoint, self.trainer.model, self.trainer.optimizer)
        self.num_bad_steps = checkpoint.state["num_bad_steps"]
        return checkpoint.step, checkpoint.state["window"]

    def _overview(self) -> dict[str, str]:
        config, space = self.trainer.config, self.trainer.model.student.backbone.space
        runtime = self.trainer.runtime.describe()
        bad = f", {len(self.source.skipped)} unusable (see skipped.jsonl)" if self.source.skipped else ""
        where = f"{runtime['device']}, {runtime['precision']}, {runtime['num_workers']} data workers"
        if self.ranks.num_ranks > 1:
            mode = "fsdp" if config.parallel.mode == "fsdp" else "ddp"
            where = f"{self.ranks.num_ranks} processes ({mode}), each: {where}"
        return {
            "images": f"{len(self.source):,} from {self.source.spec}{bad}",
            "family": f"{len(space)} sub-networks, {space.smallest} to {space.intact}",
            "steps": f"{self.num_steps:,} of {config.train.batch_size} images ({config.train.epochs:g} epochs)",
            "on": where,
            "run": str(self.out),
        }
