"""The directories that timm and transformers open: weights and a description, the code being theirs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from poa.deploy.export.base import Exported, Exporter, Inference, in_torch
from poa.deploy.export.transformers import open_transformers_directory, write_transformers
from poa.timm_directory import open_timm_directory


@dataclass(frozen=True)
class Timm(Exporter):
    """What `poa extract` writes: a directory of timm's, with the classifier inside where the family has one."""

    name: ClassVar[str] = "timm"
    summary: ClassVar[str] = "timm's directory, which transformers opens too"
    weights_file: ClassVar[str] = "model.safetensors"
    hub_library: ClassVar[str] = "timm"
    usage: ClassVar[str] = (
        "import timm\n\n"
        'model = timm.create_model("local-dir:{directory}", pretrained=True).eval()\n'
        "found = model(torch.from_numpy(images))"
    )

    def write(self, what: Exported, directory: Path) -> None:
        """See `Exporter.write`."""
        what.family.write_timm(what.subnet, directory, what.image_size)

    def open(self, directory: Path, num_threads: int | None = None) -> Inference:
        """See `Exporter.open`."""
        return in_torch(open_timm_directory(directory), num_threads)


@dataclass(frozen=True)
class Transformers(Exporter):
    """A directory of transformers: its own class where it has one that computes the same, else its timm wrapper."""

    name: ClassVar[str] = "transformers"
    summary: ClassVar[str] = "transformers' directory, with its image processor"
    extra: ClassVar[str | None] = "transformers"
    libraries: ClassVar[tuple[str, ...]] = ("transformers",)
    weights_file: ClassVar[str] = "model.safetensors"
    hub_library: ClassVar[str] = "transformers"
    usage: ClassVar[str] = (
        "from transformers import {auto_class}\n\n"
        'model = {auto_class}.from_pretrained("{directory}").eval()\n'
        "found = model(pixel_values=torch.from_numpy(images)).{output}"
    )

    def write(self, what: Exported, directory: Path) -> None:
        """See `Exporter.write`."""
        write_transformers(what.family, what.subnet, directory, what.image_size)

    def open(self, directory: Path, num_threads: int | None = None) -> Inference:
        """See `Exporter.open`."""
        model = open_transformers_directory(directory)

        def run(images: Tensor) -> Tensor:
            out = model(pixel_values=images)
            found: Tensor = out.logits if "logits" in out else out.pooler_output
            return found

        return in_torch(run, num_threads)
