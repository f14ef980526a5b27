"""Python that runs an export on an image file, for its model card."""

from __future__ import annotations

from typing import Any

from poa.deploy.export.base import Exported, Exporter

IMAGE_FILE = "image.jpg"
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's names of images by their channels."""


def snippet(exporter: Exporter, what: Exported) -> str:
    """Lines that prepare the image `image.jpg` and run what was written on it, in the directory that it lies in.

    They end with the output in `found`. Of images with a number of channels that no file format has, they begin with
    an array in their place.
    """
    described = what.preprocessing(is_normalised_inside=getattr(exporter, "normalise_inside", False))
    is_classifier = what.family.head is not None
    usage = exporter.usage.format(
        directory=".",
        auto_class="AutoModelForImageClassification" if is_classifier else "AutoModel",
        output="logits" if is_classifier else "pooler_output",
    )
    own = [line for line in usage.splitlines() if line.startswith(("import ", "from "))]
    rest = [line for line in usage.splitlines() if line and line not in own]
    imports = {"import numpy as np", *own}
    if any("torch." in line for line in rest):
        imports.add("import torch")
    prepared = _from_noise(described)
    if described["num_channels"] in MODES:
        imports.add("from PIL import Image")
        prepared = _from_file(described)
    ordered = sorted(imports, key=lambda line: line.split()[1].lower())
    return "\n".join([*ordered, "", *prepared, "", *rest, f"print(found.shape)  # {_shape(what)}"])


def _from_file(described: dict[str, Any]) -> list[str]:
    """The steps of `eval_transform` and of the normalisation, in Pillow and NumPy."""
    size = described["image_size"]
    short = int(size / described["crop_pct"])
    lines = [
        f'image = Image.open("{IMAGE_FILE}").convert("{MODES[described["num_channels"]]}")',
        f"sides = [int({short} * side / min(image.size)) for side in image.size]",
        f"image = image.resize(sides, Image.Resampling.{described['interpolation'].upper()})",
        f"left, top = (round((side - {size}) / 2) for side in sides)",
        f"image = image.crop((left, top, left + {size}, top + {size}))",
        f"values = np.asarray(image, dtype=np.float32).reshape({size}, {size}, -1) / 255",
    ]
    if not described["normalised_inside"]:
        mean, std = described["mean"], described["std"]
        lines.append(f"values = (values - np.float32({mean})) / np.float32({std})")
    return [*lines, "images = np.ascontiguousarray(values.transpose(2, 0, 1)[None])"]


def _from_noise(described: dict[str, Any]) -> list[str]:
    size, channels = described["image_size"], described["num_channels"]
    return [
        "# Put your own images here, prepared as described below.",
        f"images = np.random.default_rng(0).random((1, {channels}, {size}, {size}), dtype=np.float32)",
    ]


def _shape(what: Exported) -> str:
    head = what.family.head
    channels = what.family.supernet.layout.features.active(what.subnet.width)
    return f"[1, {channels if head is None else head.num_classes}]"
