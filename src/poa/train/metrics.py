"""The metrics of a run: JSON lines and TensorBoard."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from poa.files import write_text
from poa.train.step import StepRecord

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Writes `metrics.jsonl` and TensorBoard events; each line holds the means since the line before.

    On opening, lines after `first_step` are dropped: they belong to steps that will run again. Apart from the keys
    `images_per_second` and `seconds`, a resumed run writes the same lines as one that never stopped.

    Args:
        out: the run directory.
        first_step: steps done before.
        window: what `window_state` gave when those steps were saved.
    """

    def __init__(self, out: Path, first_step: int, window: dict[str, list[float]] | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = out / METRICS_FILE
        if self.path.exists():
            lines = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step(line) <= first_step]
            write_text(self.path, "".join(f"{line}\n" for line in lines))
        self._file = self.path.open("a", encoding="utf-8")
        self._board: SummaryWriter = SummaryWriter(str(out / "tensorboard"), purge_step=first_step + 1)
        self._window: dict[str, list[float]] = defaultdict(list, window or {})
        self._num_images = 0
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

    def write(self, step: int, record: StepRecord) -> dict[str, Any]:
        """Writes the means since the last line, as of `step` steps done; gives the line back."""
        seconds = time.perf_counter() - self._since
        line: dict[str, Any] = {"step": step}
        line |= {name: sum(values) / len(values) for name, values in self._window.items() if name != "skipped_steps"}
        line["skipped_steps"] = int(sum(self._window["skipped_steps"]))
        line |= {name: value for name, value in record.values._asdict().items() if name != "masks"}
        line["subnets"] = [str(subnet) for subnet in record.subnets if subnet is not None]
        line |= {"images_per_second": self._num_images / max(seconds, 1e-9), "seconds": seconds}
        self._append(line)
        for name, value in line.items():
            if isinstance(value, int | float) and name != "step":
                self._board.add_scalar(name, value, step)
        self._window.clear()
        self._num_images, self._since = 0, time.perf_counter()
        return line

    def write_monitor(self, step: int, found: dict[str, dict[str, float]]) -> None:
        """Writes what the monitor saw after `step` steps: for each sub-network its figures."""
        self._append({"step": step, "monitor": found})
        for subnet, figures in found.items():
            for name, value in figures.items():
                self._board.add_scalar(f"monitor/{name}/{subnet}", value, step)

    def window_state(self) -> dict[str, list[float]]:
        """What was taken in and not yet written; it goes into the checkpoint."""
        return {name: list(values) for name, values in self._window.items()}

    def _append(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._board.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (run / METRICS_FILE).read_text(encoding="utf-8").splitlines()]


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return float("inf")
