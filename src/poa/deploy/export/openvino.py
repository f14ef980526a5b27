"""OpenVINO: Intel's runtime for processors, graphics and NPUs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from poa.deploy.export.base import Exported, Inference
from poa.deploy.export.graph import GraphExporter, normalised, quiet
from poa.deploy.export.torch_export import traced


@dataclass(frozen=True)
class OpenVino(GraphExporter):
    """`model.xml` with the operations and `model.bin` with the weights in 32 bits; the batch size is free."""

    name: ClassVar[str] = "openvino"
    summary: ClassVar[str] = "OpenVINO, any batch size; for Intel's processors, graphics and NPUs"
    extra: ClassVar[str | None] = "openvino"
    libraries: ClassVar[tuple[str, ...]] = ("openvino",)
    weights_file: ClassVar[str] = "model.bin"
    hub_library: ClassVar[str] = "openvino"
    usage: ClassVar[str] = (
        "import openvino\n\n"
        'exact = {{"INFERENCE_PRECISION_HINT": "f32"}}\n'
        'model = openvino.compile_model("{directory}/model.xml", "CPU", exact)\n'
        "found = model(images)[0]"
    )

    def write(self, what: Exported, directory: Path) -> None:
        """See `Exporter.write`."""
        import openvino

        self.describe(what, directory)
        openvino.save_model(openvino_model(self, what), directory / "model.xml", compress_to_fp16=False)

    def open(self, directory: Path, num_threads: int | None = None) -> Inference:
        """See `Exporter.open`."""
        return normalised(directory, open_openvino(directory / "model.xml", num_threads))


def openvino_model(exporter: GraphExporter, what: Exported) -> Any:  # noqa: ANN401 (openvino is untyped here)
    """The sub-network as an `openvino.Model` whose input is `images` and whose output is named as `what` says."""
    import openvino

    with quiet():
        model = openvino.convert_model(traced(exporter, what))
    shape = openvino.PartialShape([-1, *what.probe_images(1).shape[1:]])
    model.reshape({model.input(0): shape})
    model.input(0).get_tensor().set_names({"images"})
    model.output(0).get_tensor().set_names({what.output_name})
    return model


def open_openvino(path: Path, num_threads: int | None = None) -> Inference:
    """A model of OpenVINO with one input and one output, run on the CPU in 32 bits where its weights have them."""
    import openvino

    # Processors with bfloat16 units would compute float32 models in bfloat16.
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
    if num_threads is not None:
        options["INFERENCE_NUM_THREADS"] = num_threads
    model = openvino.Core().compile_model(str(path), "CPU", options)

    def run(images: np.ndarray) -> np.ndarray:
        return np.array(model(images)[0])

    return run
