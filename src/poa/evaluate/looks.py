"""How an image is looked at before a network sees it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from poa.config import AugmentConfig
from poa.data import ViewRecipe, apply_view, draw_view, eval_transform
from poa.family import Preprocessing
from poa.randomness import generator


@dataclass(frozen=True)
class Look:
    """The image as the network's preprocessing has it."""

    @property
    def name(self) -> str:
        """For files and tables, unique among the looks of one extraction."""
        return "plain"

    def __call__(self, image: Image.Image, index: int, how: Preprocessing) -> UInt8[np.ndarray, "c s s"]:
        """The network's input, before it is normalised.

        Args:
            image: as the source gives it.
            index: its position in the source, for what is random.
            how: the network's preprocessing.
        """
        del index
        return eval_transform(image, how.image_size, how.crop_pct, how.interpolation)


PLAIN = Look()

_CROP_AND_FLIP = AugmentConfig(jitter_prob=0.0, grayscale_prob=0.0)


@dataclass(frozen=True)
class RandomView(Look):
    """A random crop of 30 to 100 % of the area, mirrored or not; the same for the same seed."""

    seed: int = 0

    @property
    def name(self) -> str:
        """See `Look.name`."""
        return f"view-{self.seed}"

    def __call__(self, image: Image.Image, index: int, how: Preprocessing) -> UInt8[np.ndarray, "c s s"]:
        """See `Look.__call__`."""
        recipe = ViewRecipe(_CROP_AND_FLIP, how.image_size, (0.3, 1.0), blur_prob=0.0, solarize_prob=0.0)
        return apply_view(image, draw_view(image, recipe, generator(self.seed, "view", index)))
