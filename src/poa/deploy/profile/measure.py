"""The networks that are measured here: sub-networks exported and opened by a runtime on the CPU, or torch on CUDA."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from poa.deploy.profile.kit.machine import memory_of_process, peak_memory
from poa.deploy.profile.kit.timing import Network, Opened, noise
from poa.errors import ConfigError, DataError

if TYPE_CHECKING:
    from poa.deploy.export.base import Exported, Exporter
    from poa.elastic import Subnet
    from poa.family import Family

TORCH = "torch"
"""The runtime of the timm model in eager PyTorch; the others are called like their export formats."""


@dataclass(frozen=True)
class Place:
    """Where and how networks run."""

    runtime: str
    device: Literal["cpu", "cuda"]
    num_threads: int
    batch_size: int
    num_channels: int
    image_size: int
    measures_memory: bool = True


def exporter_of(runtime: str) -> Exporter:
    """The format whose files the runtime opens.

    Raises:
        ConfigError: there is no such runtime, or its libraries are not installed.
    """
    from poa.deploy.export.registry import EXPORTERS

    known = {TORCH: "timm", **{name: name for name in EXPORTERS if name != "timm"}}
    if runtime not in known:
        raise ConfigError(f"there is no runtime {runtime!r}. Runtimes: {', '.join(known)}.")
    exporter = EXPORTERS[known[runtime]]()
    exporter.require()
    return exporter


def networks_of(family: Family, subnets: Sequence[Subnet], place: Place) -> list[Network]:
    """The sub-networks, to be measured there."""
    opened = _on_cuda if place.device == "cuda" else _on_cpu
    card = family.card
    return [
        Network(
            str(subnet),
            card.num_params(subnet),
            card.architecture.flops(card.config, subnet, place.image_size),
            partial(opened, family, subnet, place),
        )
        for subnet in subnets
    ]


@contextmanager
def _on_cpu(family: Family, subnet: Subnet, place: Place) -> Iterator[Opened]:
    """Exported into a directory that vanishes, and opened by the real runtime."""
    exporter = exporter_of(place.runtime)
    with tempfile.TemporaryDirectory(prefix="poa-profile-") as scratch:
        directory = Path(scratch)
        exporter.write(exported(family, subnet, place.image_size, exporter), directory)
        memory = partial(_memory_on_cpu, directory, place) if place.measures_memory else _unknown
        yield Opened(_load(directory, place), exporter.size(directory), memory)


def exported(family: Family, subnet: Subnet, image_size: int, exporter: Exporter) -> Exported:
    """What is exported; a static int8 format is calibrated on noise, which does not change what it costs."""
    import torch

    from poa.deploy.export.base import Exported

    images = torch.from_numpy(noise(8, family.card.preprocessing.num_channels, image_size))
    return Exported(family, subnet, image_size, images if exporter.needs_calibration else None)


def _load(directory: Path, place: Place) -> Callable[[], object]:
    images = noise(place.batch_size, place.num_channels, place.image_size)
    return partial(exporter_of(place.runtime).open(directory, place.num_threads), images)


def _memory_on_cpu(directory: Path, place: Place) -> float | None:
    """The peak of a process of its own."""
    numbers = (place.num_threads, place.batch_size, place.num_channels, place.image_size)
    command = [sys.executable, "-m", __name__, place.runtime, str(directory), *map(str, numbers)]
    try:
        return memory_of_process(command)
    except RuntimeError as error:
        raise DataError(f"{error}. Leave memory out with --skip-memory.") from error


def _unknown() -> None:
    return None


@contextmanager
def _on_cuda(family: Family, subnet: Subnet, place: Place) -> Iterator[Opened]:
    """The timm model in eager PyTorch; its images are on the device already."""
    import torch

    from poa.deploy.export.base import Exported
    from poa.deploy.profile.sizes import timm_file_sizes

    model = Exported(family, subnet, place.image_size).model().to("cuda")
    images = torch.from_numpy(noise(place.batch_size, place.num_channels, place.image_size)).to("cuda")

    def run() -> None:
        with torch.inference_mode():
            model(images)
        torch.cuda.synchronize()

    def memory() -> float:
        run()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        weights = sum(part.nbytes for part in (*model.parameters(), *model.buffers()))
        return float(torch.cuda.max_memory_allocated() - before + weights)

    num_bytes = round(1e6 * timm_file_sizes(family, [subnet], place.image_size)[0])
    yield Opened(run, num_bytes, memory if place.measures_memory else _unknown)


def main(arguments: Sequence[str]) -> None:
    """Prints the peak memory of a network in this process: RUNTIME DIRECTORY THREADS BATCH CHANNELS SIDE."""
    runtime, directory = arguments[:2]
    num_threads, batch_size, num_channels, image_size = map(int, arguments[2:])
    place = Place(runtime, "cpu", num_threads, batch_size, num_channels, image_size)
    for library in ("timm", *exporter_of(runtime).libraries):
        import_module(library)
    print(json.dumps(peak_memory(partial(_load, Path(directory), place))))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
