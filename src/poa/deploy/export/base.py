"""What every format of an exported sub-network offers."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from poa.config import to_dict
from poa.elastic import Subnet
from poa.errors import ConfigError, ExtractionError
from poa.family import Family
from poa.randomness import generator

PREPROCESSING_FILE = "preprocessing.json"

Inference = Callable[[np.ndarray], np.ndarray]
"""Normalised images [B, c, h, w] → class vectors [B, C], or logits [B, K]; all float32."""


@dataclass(frozen=True)
class Exported:
    """What is exported: a sub-network for images of one size, with the family's classifier where it has one."""

    family: Family
    subnet: Subnet
    image_size: int
    """Side of the images, in pixels."""
    calibration: Float[Tensor, "B c h w"] | None = None
    """Normalised images, where a format needs them to choose its scales."""

    @property
    def output_name(self) -> str:
        """What calling it gives: `features` (class vectors), or `logits` where the family has a classifier."""
        return "features" if self.family.head is None else "logits"

    def model(self) -> nn.Module:
        """The sub-network as a timm model with its own weights, in evaluation mode, with the classifier inside.

        Raises:
            ExtractionError: timm's class has no linear classifier on its class vector.
        """
        model: Any = self.family.extract(self.subnet, self.image_size)
        head = self.family.head
        if head is None:
            return model.requires_grad_(False)  # type: ignore[no-any-return]
        with torch.random.fork_rng(devices=[]):
            model.reset_classifier(head.num_classes)
        layer = model.get_classifier()
        if not isinstance(layer, nn.Linear):
            raise ExtractionError(f"timm's {type(model).__name__} has no linear classifier on its class vector.")
        layer.load_state_dict(head.state(self.family.supernet.layout.features, self.subnet.width), strict=True)
        return model.eval().requires_grad_(False)  # type: ignore[no-any-return]

    def expected(self, images: Float[Tensor, "B c h w"]) -> Float[Tensor, "B _"]:
        """What the family itself computes for normalised images, inside the super-network."""
        compute = self.family.features if self.family.head is None else self.family.logits
        with torch.inference_mode():
            return compute(images, self.subnet)

    def probe_images(self, num_images: int) -> Float[Tensor, "B c h w"]:
        """Images of normally distributed noise, always the same."""
        channels = self.family.card.preprocessing.num_channels
        shape = (num_images, channels, self.image_size, self.image_size)
        noise = generator(0, "export probe").standard_normal(shape, dtype=np.float32)
        return torch.from_numpy(noise)

    def preprocessing(self, *, is_normalised_inside: bool = False) -> dict[str, Any]:
        """How an image becomes the input, and what the output is: `preprocessing.json`.

        Args:
            is_normalised_inside: the exported network takes values of 0–1 and normalises them itself.
        """
        how = self.family.card.preprocessing
        head = self.family.head
        size = self.image_size
        return {
            **to_dict(how),
            "image_size": size,
            "mean": list(how.per_channel(how.mean)),
            "std": list(how.per_channel(how.std)),
            "steps": [
                f"resize: the shorter side to {int(size / how.crop_pct)} pixels, {how.interpolation}",
                f"crop: the central {size} × {size} pixels",
                "scale: to 0–1",
                *([] if is_normalised_inside else ["normalise: subtract the mean, divide by the deviation"]),
            ],
            "normalised_inside": is_normalised_inside,
            "input": {"name": "images", "shape": ["batch", how.num_channels, size, size], "type": "float32"},
            "output": {"name": self.output_name, "type": "float32"},
            **({} if head is None else {"classes": list(head.class_names), "multi_label": head.multi_label}),
        }


@dataclass(frozen=True)
class Exporter(ABC):
    """A format: how a sub-network is written, and how its own runtime runs what was written.

    `EXPORTERS` lists them; `tests/contract/test_exporters.py` holds what all of them do.
    """

    name: ClassVar[str]
    """Of the format, on the command line and of its directory."""
    summary: ClassVar[str]
    """In one line, what opens it."""
    extra: ClassVar[str | None] = None
    """The extra of poa that it needs: `onnx` of `pip install "poa[onnx]"`."""
    libraries: ClassVar[tuple[str, ...]] = ()
    """The modules that must be there."""
    precision: ClassVar[str] = "float32"
    """Of the weights: `float32` or `int8`."""
    needs_calibration: ClassVar[bool] = False
    """Whether it needs images to choose its scales."""
    weights_file: ClassVar[str]
    """The file whose size counts as the size of the export."""
    hub_library: ClassVar[str]
    """What Hugging Face's Hub calls the library: `library_name` of a model card."""
    usage: ClassVar[str]
    """Lines of Python that run it on normalised `images`, {directory} standing for its place."""

    def require(self) -> None:
        """Makes sure that its libraries are installed, before work starts.

        Raises:
            ConfigError: one is missing.
        """
        missing = [name for name in self.libraries if importlib.util.find_spec(name) is None]
        if missing:
            raise ConfigError(
                f"the format {self.name} needs {' and '.join(missing)}, not installed here. "
                f"Install it with: pip install 'poa[{self.extra}]'"
            )

    @abstractmethod
    def write(self, what: Exported, directory: Path) -> None:
        """Writes the sub-network into a directory that is there.

        Raises:
            ConfigError: this format cannot hold that sub-network.
        """

    @abstractmethod
    def open(self, directory: Path, num_threads: int | None = None) -> Inference:
        """What was written, run by its own runtime on the CPU.

        Args:
            directory: what `write` wrote into.
            num_threads: threads that compute; None: the runtime chooses.
        """

    def size(self, directory: Path) -> int:
        """Bytes of the weights on disk."""
        return (directory / self.weights_file).stat().st_size


def in_torch(model: Callable[[Tensor], Tensor], num_threads: int | None) -> Inference:
    """A network of torch as `Exporter.open` gives it."""

    def run(images: np.ndarray) -> np.ndarray:
        with _threads(num_threads), torch.inference_mode():
            return model(torch.from_numpy(images)).numpy()

    return run


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """Torch's threads within; as before afterwards."""
    if number is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
