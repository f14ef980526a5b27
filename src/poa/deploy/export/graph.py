"""What formats that hold a traced graph have in common: normalisation inside, and the description beside."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from poa.deploy.export.base import PREPROCESSING_FILE, Exported, Exporter, Inference
from poa.files import read_json, write_json

NOISY = (
    "torch.onnx",
    "torch.export",
    "torch.utils._pytree",
    "torch.utils.cpp_extension",
    "onnxscript",
    "onnx_ir",
    "executorch",
    "root",
)
"""Loggers of the libraries that trace and convert."""


@dataclass(frozen=True)
class GraphExporter(Exporter):
    """A format that holds the operations as well as the weights; no code of the network is needed to run it."""

    normalise_inside: bool = False
    """The written network takes values of 0–1 and normalises them itself."""

    def network(self, what: Exported) -> nn.Module:
        """What is traced: images → class vectors or logits."""
        model = what.model()
        if not self.normalise_inside:
            return model
        how = what.family.card.preprocessing
        return Normalising(model, how.per_channel(how.mean), how.per_channel(how.std)).eval()

    def describe(self, what: Exported, directory: Path) -> None:
        """Writes `preprocessing.json`."""
        found = what.preprocessing(is_normalised_inside=self.normalise_inside)
        write_json(directory / PREPROCESSING_FILE, found)


class Normalising(nn.Module):
    """A network behind the normalisation of its input."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Float[Tensor, "B c h w"]) -> Float[Tensor, "B _"]:
        """The network's output for images of 0–1."""
        found: Tensor = self.model((images - self.mean) / self.std)
        return found


def normalised(directory: Path, run: Inference) -> Inference:
    """An opened graph that takes normalised images, whether or not it normalises itself."""
    described = read_json(directory / PREPROCESSING_FILE)
    if not described["normalised_inside"]:
        return run
    mean = np.array(described["mean"], dtype=np.float32).reshape(-1, 1, 1)
    std = np.array(described["std"], dtype=np.float32).reshape(-1, 1, 1)
    return lambda images: run(images * std + mean)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and log lines of the exporters' libraries; errors are raised as ever."""
    levels = {name: logging.getLogger(name).level for name in NOISY}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in NOISY:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


@contextmanager
def quiet_native() -> Iterator[None]:
    """Without what libraries in C++ write to standard error; where an error is raised within, all of it is shown."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        except BaseException:
            os.dup2(kept, 2)
            written.seek(0)
            os.write(2, written.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)
