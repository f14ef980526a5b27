"""ONNX, run by ONNX Runtime."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from poa.deploy.export.base import Exported, Inference
from poa.deploy.export.graph import GraphExporter, normalised, quiet
from poa.deploy.export.torch_export import traced
from poa.deploy.profile.kit.script import open_onnx
from poa.errors import ConfigError

OPSET = 18
"""Version of ONNX's operators; ONNX Runtime 1.14 (2023) and newer read it."""
MAX_BYTES = 2_000_000_000
"""Of weights in one file: a protocol buffer holds less than 2 GiB."""


@dataclass(frozen=True)
class Onnx(GraphExporter):
    """One file with the operations and the weights; the batch size is free.

    The input is `images`, the output `features` or `logits`. The file's metadata hold `poa.preprocessing` (the content
    of `preprocessing.json`) and `poa.subnet`.
    """

    name: ClassVar[str] = "onnx"
    summary: ClassVar[str] = "ONNX, any batch size; run by ONNX Runtime and many others"
    extra: ClassVar[str | None] = "onnx"
    libraries: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnxruntime")
    weights_file: ClassVar[str] = "model.onnx"
    hub_library: ClassVar[str] = "onnx"
    usage: ClassVar[str] = (
        "import onnxruntime\n\n"
        'session = onnxruntime.InferenceSession("{directory}/model.onnx")\n'
        'found = session.run(None, {{"images": images}})[0]'
    )

    def write(self, what: Exported, directory: Path) -> None:
        """See `Exporter.write`."""
        num_bytes = 4 * what.family.card.num_params(what.subnet)
        if num_bytes > MAX_BYTES:
            raise ConfigError(
                f"the weights of {what.subnet} take {num_bytes / 1e9:.1f} GB; one ONNX file holds less than 2 GB. "
                f"Export a smaller sub-network, or to openvino or timm."
            )
        self.describe(what, directory)
        with quiet():
            program = torch.onnx.export(
                traced(self, what),
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=[what.output_name],
                verbose=False,
            )
        assert program is not None  # noqa: S101 (so it is with dynamo=True)
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()
        described = what.preprocessing(is_normalised_inside=self.normalise_inside)
        program.model.metadata_props["poa.preprocessing"] = json.dumps(described, ensure_ascii=False)
        program.model.metadata_props["poa.subnet"] = str(what.subnet)
        program.save(directory / self.weights_file, external_data=False)

    def open(self, directory: Path, num_threads: int | None = None) -> Inference:
        """See `Exporter.open`."""
        return normalised(directory, open_onnx(directory / self.weights_file, num_threads))
