"""OpenVINO with weights and activations of 8 bits, quantised by NNCF."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import ClassVar

from poa.deploy.export.base import Exported
from poa.deploy.export.graph import quiet
from poa.deploy.export.int8 import calibration_images
from poa.deploy.export.openvino import OpenVino, openvino_model


@dataclass(frozen=True)
class OpenVinoInt8(OpenVino):
    """`model.xml` and `model.bin` of a network of which products with weights, and what lies between, have 8 bits.

    NNCF chooses the scales on calibration images, by its scheme for transformers: scales are moved from activations
    to weights (SmoothQuant, Xiao et al., 2023) and softmax, normalisation and what feeds them stay in floats. It is
    better than the scheme for convolutional networks for all architectures of poa, ResNet included.
    """

    name: ClassVar[str] = "openvino-int8"
    summary: ClassVar[str] = "OpenVINO with weights and activations of 8 bits; calibrated on images"
    libraries: ClassVar[tuple[str, ...]] = ("openvino", "nncf")
    precision: ClassVar[str] = "int8"
    needs_calibration: ClassVar[bool] = True

    def write(self, what: Exported, directory: Path) -> None:
        """See `Exporter.write`."""
        images = calibration_images(self, what)
        with _quiet():
            import nncf
            import openvino

            model = nncf.quantize(
                openvino_model(self, what),
                nncf.Dataset([images[index : index + 1] for index in range(len(images))]),
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(images),
            )
            openvino.save_model(model, directory / "model.xml", compress_to_fp16=False)
        self.describe(what, directory)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without NNCF's log lines and progress bars, and without what torch says of CUDA while NNCF is imported."""
    with quiet(), redirect_stdout(StringIO()), _errors_only("torch.utils.cpp_extension"):
        import nncf  # noqa: F401 (it sets its log level when it is imported)

        with _errors_only("nncf"):
            yield


@contextmanager
def _errors_only(name: str) -> Iterator[None]:
    """Without the logger's lines below errors; as before afterwards."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
