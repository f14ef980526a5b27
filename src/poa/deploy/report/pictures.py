"""A few images as some sub-networks see them, as small tiles for the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped
from PIL import Image

from poa.config.checks import require, require_non_negative
from poa.data import ImageSource, SkippedImage
from poa.data.decode import BadImage
from poa.data.sources import check_bad_share
from poa.errors import DataError
from poa.evaluate.pictures import colours, read
from poa.evaluate.pictures.page import data_uri
from poa.evaluate.pictures.reading import check_networks, heading_of, reference_of
from poa.evaluate.pictures.sheet import colour_image, overlay
from poa.models import Candidate
from poa.randomness import generator

TILE = 128
"""Side of the largest tile, in pixels."""


@dataclass(frozen=True)
class PicturesConfig:
    """Which images are shown, and how."""

    num_images: int = 4
    """How many images."""
    image_size: int | None = None
    """Side at which the networks see the images, for finer maps; their own by default."""
    seed: int = 0
    """Of the choice of images."""

    def __post_init__(self) -> None:
        require(1 <= self.num_images <= 16, "num_images", self.num_images, "1 to 16")
        require_non_negative("seed", self.seed)


class Seen(NamedTuple):
    """An image as one network sees it: data URIs."""

    saliency: str
    patches: str


@dataclass(frozen=True)
class Pictures:
    """Images by row, networks by column."""

    source: str
    image_size: int | None
    """Side at which the networks see them; None: their own."""
    num_places: int
    """Of the largest network's last map."""
    headings: tuple[tuple[str, str], ...]
    """The name and the size of each network."""
    saliency: str
    """What the maps are: attention, or what stands in for it."""
    names: tuple[str, ...]
    images: tuple[str, ...]
    """Data URIs."""
    seen: tuple[tuple[Seen, ...], ...]
    """For each image what each network sees."""
    skipped: tuple[SkippedImage, ...]


def pictures_of(
    candidates: Sequence[Candidate], source: ImageSource, config: PicturesConfig, max_bad_share: float
) -> Pictures:
    """The pictures of images drawn at random; those that cannot be read are replaced by others and listed.

    Args:
        candidates: the networks.
        source: the images.
        config: how many images, and how the networks see them.
        max_bad_share: the greatest share of images that cannot be read.

    Raises:
        DataError: the source has too few images, or too many of those drawn cannot be read.
        ConfigError: a network gives no maps.
    """
    check_networks(candidates, config.image_size)
    positions, images, skipped = _drawn(source, config)
    check_bad_share(skipped, len(source), max_bad_share, option="--max-bad-share")
    if len(images) < config.num_images:
        raise DataError(
            f"{source.spec} gives {len(images)} images, the page shows {config.num_images}: lower --num-images."
        )
    readings = read(candidates, images, image_size=config.image_size)
    painted = colours([one.maps.patches.numpy() for one in readings], reference_of(readings))
    rows = tuple(
        tuple(
            Seen(_tile(overlay(one.maps.saliency[row].numpy(), one.pixels[row])), _tile(colour[row]))
            for one, colour in zip(readings, painted, strict=True)
        )
        for row in range(len(images))
    )
    largest = readings[reference_of(readings)]
    return Pictures(
        source=source.spec,
        image_size=config.image_size,
        num_places=largest.maps.patches[0, 0].numel(),
        headings=tuple((one.name, heading_of(one).split("\n")[1]) for one in readings),
        saliency=largest.maps.saliency_name,
        names=tuple(source.image_name(position) for position in positions),
        images=tuple(_tile(colour_image(pixels)) for pixels in largest.pixels),
        seen=rows,
        skipped=tuple(skipped),
    )


def _drawn(source: ImageSource, config: PicturesConfig) -> tuple[list[int], list[Image.Image], list[SkippedImage]]:
    positions: list[int] = []
    images: list[Image.Image] = []
    skipped = list(source.skipped)
    for position in generator(config.seed, "report pictures").permutation(len(source)).tolist():
        if len(images) == config.num_images:
            break
        try:
            images.append(source.load(position))
            positions.append(position)
        except BadImage as error:
            skipped.append(SkippedImage(source.image_name(position), str(error)))
    return positions, images, skipped


def _tile(picture: Shaped[np.ndarray, "h w 3"]) -> str:
    """The picture (uint8, or 0-1) as a data URI, at most `TILE` wide; small ones keep their pixels."""
    pixels = picture if picture.dtype == np.uint8 else np.rint(255 * picture).astype(np.uint8)
    image = Image.fromarray(pixels)
    if image.width > TILE:
        image.thumbnail((TILE, TILE))
    return data_uri(image, lossless=image.width <= 32)
