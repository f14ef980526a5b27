"""The metrics of a run: JSON lines and TensorBoard."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from poa.files import write_text
from poa.patient_file import PatientFile
from poa.train.curves import Curves
from poa.train.step import StepRecord

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Writes `metrics.jsonl` and TensorBoard events; each line holds the means since the line before.

    On opening, lines after `first_step` are dropped: they belong to steps that will run again. Apart from the keys
    `images_per_second`, `seconds` and `data_wait`, a resumed run writes the same lines as one that never stopped.

    What a full disk does not take is written later.

    Args:
        out: the run directory.
        first_step: steps done before.
        window: what `window_state` gave when those steps were saved.
        writes: whether this process writes; the others keep count.
    """

    def __init__(
        self, out: Path, first_step: int, window: dict[str, list[float]] | None = None, *, writes: bool = True
    ) -> None:
        self.path = out / METRICS_FILE
        self._file: PatientFile | None = None
        self._curves: Curves | None = None
        if writes:
            self._open(out, first_step)
        self._window: dict[str, list[float]] = defaultdict(list, window or {})
        self._num_images = 0
        self._waited = 0.0
        self._since = time.perf_counter()

    def add(self, record: StepRecord, num_images: int) -> None:
        """Takes one step in. A step that was not finite is counted, its losses are left out."""
        self._num_images += num_images
        self._window["skipped_steps"].append(0.0 if record.is_finite else 1.0)
        if record.is_finite:
            self._window["loss"].append(record.loss)
            for name, value in record.terms.items():
                self._window[f"loss/{name}"].append(value)
            for name, value in record.grad_norms.items():
                self._window[f"grad_norm/{name}"].append(value)

    def write(self, step: int, record: StepRecord, waited_seconds: float = 0.0) -> dict[str, Any]:
        """Writes the means since the last line, as of `step` steps done; gives the line back.

        Args:
            step: steps done.
            record: the last of them.
            waited_seconds: how long training has waited for data since the beginning; the line has `data_wait`, the
                share of the time since the last line.
        """
        seconds = time.perf_counter() - self._since
        line: dict[str, Any] = {"step": step}
        line |= {name: sum(values) / len(values) for name, values in self._window.items() if name != "skipped_steps"}
        line["skipped_steps"] = int(sum(self._window["skipped_steps"]))
        line |= {name: value for name, value in record.values._asdict().items() if name != "masks"}
        line["subnets"] = [str(subnet) for subnet in record.subnets if subnet is not None]
        line |= {"images_per_second": self._num_images / max(seconds, 1e-9), "seconds": seconds}
        line["data_wait"] = min(1.0, (waited_seconds - self._waited) / max(seconds, 1e-9))
        self._append(line)
        self._draw({name: value for name, value in line.items() if isinstance(value, int | float)}, step)
        self._window.clear()
        self._num_images, self._since, self._waited = 0, time.perf_counter(), waited_seconds
        return line

    def write_monitor(self, step: int, found: dict[str, dict[str, float]]) -> None:
        """Writes what the monitor saw after `step` steps: for each sub-network its figures."""
        self._append({"step": step, "monitor": found})
        for subnet, figures in found.items():
            self._draw({f"monitor/{name}/{subnet}": value for name, value in figures.items()}, step)

    def window_state(self) -> dict[str, list[float]]:
        """What was taken in and not yet written; it goes into the checkpoint."""
        return {name: list(values) for name, values in self._window.items()}

    def _open(self, out: Path, first_step: int) -> None:
        if self.path.exists():
            lines = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step(line) <= first_step]
            write_text(self.path, "".join(f"{line}\n" for line in lines))
        self._file = PatientFile(self.path)
        self._curves = Curves(out / "tensorboard", first_step)

    def _append(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(f"{json.dumps(line)}\n".encode())

    def _draw(self, values: Mapping[str, float], step: int) -> None:
        """Adds points to TensorBoard's curves."""
        if self._curves is not None:
            self._curves.add({name: value for name, value in values.items() if name != "step"}, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._file, self._curves):
            if file is not None:
                file.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (run / METRICS_FILE).read_text(encoding="utf-8").splitlines()]


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
