"""ExecuTorch: torch's runtime for phones and boards, with XNNPACK's kernels for their processors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from poa.deploy.export.base import Exported, Inference
from poa.deploy.export.graph import GraphExporter, normalised, quiet, quiet_native
from poa.deploy.export.torch_export import traced

MAX_BATCH = 8
"""Images at once: ExecuTorch plans its memory for the largest batch when the file is written."""


@dataclass(frozen=True)
class ExecuTorch(GraphExporter):
    """One `.pte` file for 1 to 8 images at once. Tracing a Swin takes minutes, one of the others seconds."""

    name: ClassVar[str] = "executorch"
    summary: ClassVar[str] = f"ExecuTorch with XNNPACK, 1 to {MAX_BATCH} images at once; for phones and boards"
    extra: ClassVar[str | None] = "executorch"
    libraries: ClassVar[tuple[str, ...]] = ("executorch",)
    weights_file: ClassVar[str] = "model.pte"
    hub_library: ClassVar[str] = "executorch"
    usage: ClassVar[str] = (
        "from executorch.runtime import Runtime\n\n"
        'method = Runtime.get().load_program("{directory}/model.pte").load_method("forward")\n'
        f"found = method.execute([torch.from_numpy(images)])[0]  # at most {MAX_BATCH} images"
    )

    def write(self, what: Exported, directory: Path) -> None:
        """See `Exporter.write`."""
        self.describe(what, directory)
        with quiet():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower

            lowered = to_edge_transform_and_lower(traced(self, what, MAX_BATCH), partitioner=[XnnpackPartitioner()])
            program = lowered.to_executorch()
        with (directory / self.weights_file).open("wb") as file:
            program.write_to_file(file)

    def open(self, directory: Path, num_threads: int | None = None) -> Inference:
        """See `Exporter.open`; more images than the file takes are run in parts.

        The threads are those of the whole process: the last one opened with a number decides.
        """
        with quiet(), quiet_native():
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime

            if num_threads is not None:
                portable_lib._unsafe_reset_threadpool(num_threads)
            method = Runtime.get().load_program(directory / self.weights_file).load_method("forward")

        def part(images: Tensor) -> Tensor:
            # The runtime gives a view of its own memory, which the next call writes over.
            found: Tensor = method.execute([images.contiguous()])[0]
            return found.clone()

        def run(images: np.ndarray) -> np.ndarray:
            return torch.cat([part(images) for images in torch.from_numpy(images).split(MAX_BATCH)]).numpy()

        return normalised(directory, run)
