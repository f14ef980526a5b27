"""What several networks make of the same few images: computed once, drawn in many ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from poa.data import eval_transform, normalize
from poa.data.decode import mode_of_channels
from poa.errors import ConfigError, DataError
from poa.evaluate.pictures.attention import Maps, compute_maps
from poa.family import Preprocessing
from poa.models import Candidate, FamilyMember

MAX_NETWORKS = 8
"""More do not fit side by side."""


@dataclass(frozen=True)
class Reading:
    """One network's maps of some images, on the CPU.

    Attributes:
        name: the network's.
        num_params: the network's.
        pixels: the images as the network saw them, before they were normalised.
        maps: what it made of them.
    """

    name: str
    num_params: int
    pixels: UInt8[np.ndarray, "N c s s"]
    maps: Maps

    def of(self, images: slice) -> Reading:
        """The reading of some of the images."""
        maps = self.maps
        attention = None if maps.attention is None else maps.attention[images]
        return replace(self, pixels=self.pixels[images], maps=Maps(maps.cls[images], maps.patches[images], attention))


def size_text(num_params: int) -> str:
    """A number of parameters with three digits: `22.1 M parameters`."""
    for unit, name in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if num_params >= unit:
            value = num_params / unit
            return f"{value:.{max(0, 2 - int(np.log10(value)))}f}{name} parameters"
    return f"{num_params} parameters"


def heading_of(network: Reading | Candidate) -> str:
    """Name and size, on two lines."""
    return f"{network.name}\n{size_text(network.num_params)}"


def reference_of(networks: Sequence[Reading] | Sequence[Candidate]) -> int:
    """The position of the largest network, which the others are compared with."""
    return max(range(len(networks)), key=lambda position: networks[position].num_params)


def read(
    candidates: Sequence[Candidate],
    images: Sequence[Image.Image | UInt8[np.ndarray, "_ _ _"]],
    *,
    image_size: int | None = None,
) -> list[Reading]:
    """Each network's maps of the images, computed on the device that it is on, one image after the other.

    Args:
        candidates: networks, at most `MAX_NETWORKS`.
        images: PIL images of any size and mode, which each network's preprocessing is applied to, or arrays
            [c, s, s] that have been through it.
        image_size: side at which the networks see the images, for finer maps; each network's own by default.
            Position embeddings are interpolated.

    Raises:
        ConfigError: there are no networks or too many, or one gives no maps or none at that size.
        DataError: there are no images, or an array does not have a network's number of channels and size.
    """
    check_networks(candidates, image_size)
    pixels = [as_pixels(images, preprocessing_at(candidate, image_size)) for candidate in candidates]
    return [_read_one(candidate, seen, image_size) for candidate, seen in zip(candidates, pixels, strict=True)]


def check_networks(candidates: Sequence[Candidate], image_size: int | None = None) -> None:
    """Refuses what does not fit side by side.

    Raises:
        ConfigError: there are no networks or too many, or one takes no images of that size.
    """
    if not 1 <= len(candidates) <= MAX_NETWORKS:
        raise ConfigError(
            f"pictures show 1 to {MAX_NETWORKS} networks side by side; got {len(candidates)}. "
            f"Name some with --subnets, for example smallest, middle and intact."
        )
    if image_size is not None:
        for candidate in candidates:
            model_at(candidate, image_size)


def model_at(candidate: Candidate, image_size: int | None) -> nn.Module:
    """A copy of the network as a timm model in evaluation mode for images of that side; its own by default.

    A sub-network's is the super-network's function at that side; other models are resized as timm does it.

    Raises:
        ConfigError: the network takes no images of that size.
    """
    if isinstance(candidate, FamilyMember):
        return candidate.family.extract(candidate.subnet, image_size)
    return candidate.network(image_size).eval()


def preprocessing_at(candidate: Candidate, image_size: int | None) -> Preprocessing:
    """The network's preprocessing for images of that side; its own by default."""
    how = candidate.preprocessing
    return how if image_size is None else replace(how, image_size=image_size)


def as_pixels(
    images: Sequence[Image.Image | UInt8[np.ndarray, "_ _ _"]], how: Preprocessing
) -> UInt8[np.ndarray, "N c s s"]:
    """The images as a network sees them, before they are normalised; see `read`.

    Raises:
        DataError: there are none, or an array has another shape.
    """
    if not images:
        raise DataError("a picture needs one image or more; got none.")
    return np.stack([_square(image, how) for image in images])


def _square(image: Image.Image | np.ndarray, how: Preprocessing) -> np.ndarray:
    if isinstance(image, Image.Image):
        mode = mode_of_channels(how.num_channels)
        ready = image if image.mode == mode else image.convert(mode)
        return eval_transform(ready, how.image_size, how.crop_pct, how.interpolation)
    wanted = (how.num_channels, how.image_size, how.image_size)
    if image.shape != wanted or image.dtype != np.uint8:
        raise DataError(
            f"an image given as an array must be uint8 of shape {wanted} for this network; got {image.dtype} of shape "
            f"{image.shape}. Give it as a PIL image to have it resized."
        )
    return image


def _read_one(candidate: Candidate, pixels: UInt8[np.ndarray, "N c s s"], image_size: int | None) -> Reading:
    how = candidate.preprocessing
    network = model_at(candidate, image_size).to(candidate.device)
    found = [
        compute_maps(network, normalize(image.to(candidate.device), how.mean, how.std))
        for image in torch.from_numpy(pixels).split(1)
    ]
    attention = [part.attention.cpu() for part in found if part.attention is not None]
    maps = Maps(
        _joined([part.cls for part in found]),
        _joined([part.patches for part in found]),
        torch.cat(attention) if attention else None,
    )
    return Reading(candidate.name, candidate.num_params, pixels, maps)


def _joined(parts: list[Float[Tensor, "..."]]) -> Float[Tensor, "..."]:
    return torch.cat([part.cpu() for part in parts])
