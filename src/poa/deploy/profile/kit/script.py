"""The command of a kit: `python measure.py --device-name "Pixel 8"`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .machine import memory_of_process, num_processors, peak_memory, processor_name
from .rows import Row, measured_subnets, read_rows, text_of
from .timing import BUSY, MAX_WAITED, Network, Opened, Timing, noise, profile


def open_onnx(path: Path, num_threads: int | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """The network in an ONNX file with one input and one output, run by ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    if num_threads is not None:
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()

    def run(images: np.ndarray) -> np.ndarray:
        found: np.ndarray = session.run(None, {entry.name: images})[0]
        return found

    return run


SCRIPT = "measure.py"
"""What is run; it calls `main`."""
KIT_FILE = "kit.json"
KIT_FORMAT = "poa-kit"
KIT_VERSION = 1


@dataclass(frozen=True)
class Kit:
    """The networks that a kit holds, and the machine's setting."""

    directory: Path
    described: dict[str, Any]
    batch_size: int
    num_threads: int

    @classmethod
    def read(cls, directory: Path, batch_size: int, num_threads: int) -> Kit:
        """The kit in a directory.

        Raises:
            ValueError: there is none, or it is from a newer version of poa.
        """
        try:
            described = json.loads((directory / KIT_FILE).read_text(encoding="utf-8"))
            is_known = described["format"] == KIT_FORMAT and described["version"] <= KIT_VERSION
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{directory / KIT_FILE} is missing or damaged ({error}). Copy the kit anew.") from error
        if not is_known:
            raise ValueError(f"{directory / KIT_FILE} is not of this script. Copy the kit whole.")
        missing = [each["file"] for each in described["networks"] if not (directory / each["file"]).is_file()]
        if missing:
            raise ValueError(f"the kit lacks {', '.join(missing[:3])}. Copy it whole.")
        return cls(directory, described, batch_size, num_threads)

    def load(self, file: str) -> Callable[[], object]:
        """One forward pass of a network."""
        images = noise(self.batch_size, self.described["num_channels"], self.described["image_size"])
        return partial(open_onnx(self.directory / file, self.num_threads), images)

    @contextmanager
    def opened(self, file: str) -> Iterator[Opened]:
        """A network, ready to run."""
        command = [sys.executable, str(self.directory / SCRIPT), "--memory-of", file]
        command += ["--batch-size", str(self.batch_size), "--num-threads", str(self.num_threads)]
        path = self.directory / file
        yield Opened(self.load(file), path.stat().st_size, partial(memory_of_process, command))

    def networks(self) -> list[Network]:
        """All of them."""
        return [
            Network(each["subnet"], each["num_params"], each["flops"], partial(self.opened, each["file"]))
            for each in self.described["networks"]
        ]

    def setting(self, device: str) -> Row:
        """The columns of the setting, and the version of poa that wrote the kit."""
        known = {name: self.described[name] for name in ("runtime", "precision", "image_size", "family", "poa_version")}
        here = {"device": device, "num_threads": self.num_threads, "batch_size": self.batch_size}
        return {name: text_of(value) for name, value in {**known, **here}.items()}


def main(directory: Path, arguments: Sequence[str] | None = None) -> int:
    """Measures the networks of the kit in that directory."""
    parser = argparse.ArgumentParser(description="Measures the networks of this kit on this machine.")
    parser.add_argument("--device-name", default=processor_name(), help="how the table calls this machine")
    parser.add_argument("--batch-size", type=int, default=1, help="images per forward pass")
    parser.add_argument("--num-threads", type=int, default=num_processors(), help="threads of onnxruntime")
    parser.add_argument("--num-runs", type=int, default=Timing.num_runs, help="timed passes of each network")
    parser.add_argument("--max-seconds", type=float, default=Timing.max_seconds, help="for each network")
    parser.add_argument("--out", type=Path, default=Path("profile.csv"), help="the table; what is in it stays")
    parser.add_argument("--overwrite", action="store_true", help="measure again what is in the table already")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if min(given.batch_size, given.num_threads, given.num_runs) < 1 or not given.max_seconds > 0:
        parser.error("--batch-size, --num-threads and --num-runs are at least 1, --max-seconds is above 0.")
    try:
        import onnxruntime  # noqa: F401 (only whether it is there)
    except ImportError:
        parser.error("this needs onnxruntime: pip install onnxruntime")
    try:
        kit = Kit.read(directory, given.batch_size, given.num_threads)
        rows = read_rows(given.out)
    except ValueError as error:
        parser.error(str(error))
    if given.memory_of:
        print(json.dumps(peak_memory(partial(kit.load, given.memory_of))))  # noqa: T201
        return 0
    setting = kit.setting(given.device_name)
    known = set() if given.overwrite else measured_subnets(rows, setting)
    networks = [each for each in kit.networks() if each.subnet not in known]
    print(f"{len(known)} networks are in the table already, {len(networks)} are measured now.")  # noqa: T201

    def show(done: int, total: int) -> None:
        print(f"\r{100 * done // total} %", end="\n" if done == total else "", flush=True)  # noqa: T201

    timing = Timing(num_runs=given.num_runs, max_seconds=given.max_seconds)
    waited = profile(networks, setting, given.out, timing, show)
    if waited > MAX_WAITED:
        print(f"warning: {BUSY.format(waited)}", file=sys.stderr)  # noqa: T201
    print(f"The table: {given.out}. Take it back; `poa profile FAMILY --complete TABLE` adds the rest.")  # noqa: T201
    return 0
