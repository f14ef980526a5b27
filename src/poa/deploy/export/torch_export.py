"""`torch.export`: torch's own graph, run by torch without the code of the network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch.export import ExportedProgram

from poa.deploy.export.base import Exported, Inference, in_torch
from poa.deploy.export.graph import GraphExporter, normalised, quiet


@dataclass(frozen=True)
class TorchExport(GraphExporter):
    """One file that `torch.export.load` opens; the batch size is free."""

    name: ClassVar[str] = "torch-export"
    summary: ClassVar[str] = "torch.export's program, any batch size; run by torch alone"
    weights_file: ClassVar[str] = "model.pt2"
    hub_library: ClassVar[str] = "pytorch"
    usage: ClassVar[str] = (
        'model = torch.export.load("{directory}/model.pt2").module()\nfound = model(torch.from_numpy(images))'
    )

    def write(self, what: Exported, directory: Path) -> None:
        """See `Exporter.write`."""
        self.describe(what, directory)
        with quiet():
            torch.export.save(traced(self, what), directory / self.weights_file)

    def open(self, directory: Path, num_threads: int | None = None) -> Inference:
        """See `Exporter.open`."""
        with quiet():
            model = torch.export.load(directory / self.weights_file).module()
        return normalised(directory, in_torch(model, num_threads))


def traced(exporter: GraphExporter, what: Exported, max_batch: int | None = None) -> ExportedProgram:
    """The sub-network as torch's graph with a free batch size, from 1 to `max_batch` where that is given.

    It does not tell where the code lay that was traced.
    """
    batch = torch.export.Dim("batch", min=1, max=max_batch)
    with quiet():
        found = torch.export.export(exporter.network(what), (what.probe_images(2),), dynamic_shapes=({0: batch},))
    for node in found.graph.nodes:
        node.meta.pop("stack_trace", None)
    return found
