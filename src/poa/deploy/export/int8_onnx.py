"""ONNX with weights of 8 bits, quantised and run by ONNX Runtime.

What is quantised are the products with weights: convolutions, matrix products, the classifier. Softmax, normalisation,
GELU and the two products of attention, of which no factor is a weight, stay in float32: they hold no bytes and cost
accuracy.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import numpy as np
from torch import nn

from poa.deploy.export.base import Exported
from poa.deploy.export.graph import quiet
from poa.deploy.export.int8 import calibration_images
from poa.deploy.export.onnx import Onnx
from poa.errors import ConfigError

BATCH_SIZE = 16
"""Calibration images per pass."""


@dataclass(frozen=True)
class QuantisedOnnx(Onnx):
    """A file of `Onnx`, quantised: the same input and output."""

    precision: ClassVar[str] = "int8"

    reduce_range: bool = False
    """Weights of 7 bits, for x86 processors without VNNI, whose sums of 8-bit products overflow."""

    def write(self, what: Exported, directory: Path) -> None:
        """See `Exporter.write`."""
        self.check(what)
        with TemporaryDirectory(prefix="poa-int8-") as folder, quiet():
            from onnxruntime.quantization import quant_pre_process

            scratch = Path(folder)
            super().write(what, scratch)
            prepared = scratch / "prepared.onnx"
            quant_pre_process(scratch / self.weights_file, prepared)
            self.quantise(what, prepared, directory / self.weights_file)
        self.describe(what, directory)

    def check(self, what: Exported) -> None:
        """Refuses what this format cannot hold.

        Raises:
            ConfigError: what is missing.
        """

    @abstractmethod
    def quantise(self, what: Exported, source: Path, target: Path) -> None:
        """Writes the quantised file of a prepared one."""


@dataclass(frozen=True)
class OnnxInt8(QuantisedOnnx):
    """Weights and activations of 8 bits, the scales of activations chosen on calibration images.

    Weights have a scale for each output channel, activations one for each tensor, from its least to its greatest value
    on the calibration images. What matrix products give stays in float32; what convolutions give does not: ONNX
    Runtime has no kernel for that.
    """

    name: ClassVar[str] = "onnx-int8"
    summary: ClassVar[str] = "ONNX with weights and activations of 8 bits; calibrated on images"
    needs_calibration: ClassVar[bool] = True

    def check(self, what: Exported) -> None:
        """See `QuantisedOnnx.check`."""
        calibration_images(self, what)

    def quantise(self, what: Exported, source: Path, target: Path) -> None:
        """See `QuantisedOnnx.quantise`."""
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

        quantize_static(
            source,
            target,
            _Batches(calibration_images(self, what)),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "MatMul", "Gemm"],
            nodes_to_exclude=_products_without_weights(source),
            per_channel=True,
            reduce_range=self.reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
        )


@dataclass(frozen=True)
class OnnxInt8Dynamic(QuantisedOnnx):
    """Weights of matrix products of 8 bits; the scales of their inputs are found anew for every batch.

    Needs no images. Convolutions stay in float32: ONNX Runtime's integer convolution is far slower than its float one.
    """

    name: ClassVar[str] = "onnx-int8-dynamic"
    summary: ClassVar[str] = "ONNX with the weights of matrix products of 8 bits; needs no images"

    def check(self, what: Exported) -> None:
        """See `QuantisedOnnx.check`.

        Raises:
            ConfigError: the network has no matrix product with weights but its classifier.
        """
        network = what.family.extract(what.subnet, what.image_size)
        if not any(isinstance(part, nn.Linear) for part in network.modules()):
            raise ConfigError(
                f"{self.name} quantises matrix products, and {what.subnet} is made of convolutions alone. "
                f"Export it to {OnnxInt8.name}, with calibration images."
            )

    def quantise(self, what: Exported, source: Path, target: Path) -> None:
        """See `QuantisedOnnx.quantise`."""
        del what
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            reduce_range=self.reduce_range,
            weight_type=QuantType.QInt8,
        )


class _Batches:
    """Images as ONNX Runtime asks for them."""

    def __init__(self, images: np.ndarray) -> None:
        starts = range(0, len(images), BATCH_SIZE)
        self.rest = iter([images[start : start + BATCH_SIZE] for start in starts])

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch; None after the last."""
        batch = next(self.rest, None)
        return None if batch is None else {"images": batch}


def _products_without_weights(path: Path) -> list[str]:
    """The names of the matrix products of attention."""
    import onnx

    graph = onnx.load(path).graph
    weights = {tensor.name for tensor in graph.initializer}
    return [node.name for node in graph.node if node.op_type == "MatMul" and weights.isdisjoint(node.input)]
