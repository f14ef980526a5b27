"""The "auto" values of the runtime, resolved in one place, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from poa.config import RuntimeConfig
from poa.data import resolve_num_workers
from poa.distributed import ONE, Ranks
from poa.errors import ConfigError


@dataclass(frozen=True)
class Runtime:
    """Where and how a run computes."""

    device: torch.device
    precision: Literal["float32", "bfloat16", "float64"]
    compile: bool
    num_workers: int
    ranks: Ranks = ONE

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, gradients and optimiser."""
        return torch.float64 if self.precision == "float64" else torch.float32

    def describe(self) -> dict[str, str | int | bool]:
        """For the record: device, precision, compilation, workers, threads."""
        cuda = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(self.device) if cuda else self.device.type,
            "precision": self.precision,
            "compile": self.compile,
            "num_workers": self.num_workers,
            "num_threads": torch.get_num_threads(),
            "num_processes": self.ranks.num_ranks,
        }


def resolve_runtime(config: RuntimeConfig, ranks: Ranks = ONE) -> Runtime:
    """The runtime that a configuration asks for on this machine.

    Args:
        config: what is asked for.
        ranks: the place of this process among those that train together; on CUDA each has a GPU of its own.

    Raises:
        ConfigError: the device asked for is not there.
    """
    device = _resolve_device(config.device, ranks)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    # bfloat16 needs no loss scaling and is fast on CUDA since Ampere; on CPUs it is mostly slower than float32.
    precision = config.precision
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" else "float32"
    # Compiling a block takes 10 to 40 seconds; on a GPU that is repaid within minutes, on a CPU often not.
    compiles = config.compile == "on" or (config.compile == "auto" and device.type == "cuda")
    num_workers = resolve_num_workers(config.num_workers, device.type, ranks.num_local_ranks)
    return Runtime(device, precision, compiles, num_workers, ranks)


def _resolve_device(name: str, ranks: Ranks) -> torch.device:
    kind = _resolve_kind(name)
    if kind != "cuda" or ranks.num_ranks == 1:
        return torch.device(kind)
    if ranks.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"each process needs a GPU of its own: {ranks.num_local_ranks} processes were started on a machine with "
            f"{torch.cuda.device_count()}. Start fewer (torchrun --nproc-per-node gpu), or use --runtime.device cpu."
        )
    torch.cuda.set_device(ranks.local_rank)
    return torch.device("cuda", ranks.local_rank)


def _resolve_kind(name: str) -> str:
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return next(kind for kind, there in available.items() if there)
    if not available[name]:
        there = ", ".join(kind for kind, found in available.items() if found)
        raise ConfigError(f"runtime.device is {name!r}, but this machine has none that torch can use. There: {there}.")
    return name
