"""What is done to an image before a network sees it: on the decoded image, or on the batch with the network at hand."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from poa.backbones.base import Features
from poa.config import AugmentConfig
from poa.data import ImageSource, ViewRecipe, apply_view, draw_view, eval_transform
from poa.errors import ConfigError
from poa.family import Preprocessing
from poa.randomness import generator


class Shown:
    """One decoded image, for all looks at it.

    Attributes:
        image: as the source gives it.
        index: its position in the source, for what is random.
        source: where it is from.
        pool: positions of all images of the extraction.
    """

    def __init__(self, image: Image.Image, index: int, source: ImageSource, pool: np.ndarray) -> None:
        self.image, self.index, self.source, self.pool = image, index, source, pool
        self._squares: dict[tuple[int, float, str], np.ndarray] = {}

    def square(self, how: Preprocessing) -> UInt8[np.ndarray, "c s s"]:
        """The network's input before it is normalised; computed once, not to be written to."""
        key = (how.image_size, how.crop_pct, how.interpolation)
        if key not in self._squares:
            self._squares[key] = eval_transform(self.image, *key)
        return self._squares[key]


@dataclass(frozen=True)
class Look:
    """The image as the network's preprocessing has it; subclasses show something else. Works in other processes too."""

    @property
    def name(self) -> str:
        """For files and tables: different for looks that differ in anything."""
        return "plain"

    def check(self, how: Preprocessing) -> None:
        """Refuses images that this cannot be done to, before work starts.

        Raises:
            ConfigError: what is wrong and how to mend it.
        """

    def __call__(self, shown: Shown, how: Preprocessing) -> UInt8[np.ndarray, "c s s"]:
        """The network's input, before it is normalised.

        Args:
            shown: the image.
            how: the network's preprocessing.

        Raises:
            BadImage: another file that this needs cannot be read.
        """
        return shown.square(how)


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

    def __call__(self, shown: Shown, how: Preprocessing) -> UInt8[np.ndarray, "c s s"]:
        """See `Look.__call__`."""
        recipe = ViewRecipe(_CROP_AND_FLIP, how.image_size, (0.3, 1.0), blur_prob=0.0, solarize_prob=0.0)
        return apply_view(shown.image, draw_view(shown.image, recipe, generator(self.seed, "view", shown.index)))


@dataclass(frozen=True)
class BatchLook(ABC):
    """A change of the plain images after they are normalised, on the network's device.

    Attributes:
        needs_salience: whether it looks at where the network looks; if not, all networks see the same.
    """

    @property
    def name(self) -> str:
        """See `Look.name`."""
        return repr(self)

    @property
    def needs_salience(self) -> bool:
        """See the class."""
        return False

    def check(self, how: Preprocessing) -> None:  # noqa: B027
        """See `Look.check`."""

    @abstractmethod
    def __call__(
        self, images: Float[Tensor, "B c s s"], indices: tuple[int, ...], salience: Float[Tensor, "B h w"] | None
    ) -> Float[Tensor, "B c s s"]:
        """The images changed.

        Args:
            images: normalised; left as they are.
            indices: their positions in the source, for what is random.
            salience: of every patch of the plain images (see `salience`), if `needs_salience`.
        """


AnyLook = Look | BatchLook


def salience(features: Features) -> Float[Tensor, "B h w"]:
    """How much every patch speaks for the whole: the cosine of its vector with the class vector.

    Where a network's class vector has other channels than its patch vectors, their mean takes its place.

    Raises:
        ConfigError: the patches are no square.
    """
    patches = features.patches
    side = math.isqrt(patches.shape[1])
    if side * side != patches.shape[1]:
        raise ConfigError(f"salience needs a square of patches; the network has {patches.shape[1]} of them.")
    whole = features.cls if features.cls.shape[-1] == patches.shape[-1] else patches.mean(dim=1)
    found: Tensor = F.cosine_similarity(patches.float(), whole.float().unsqueeze(1), dim=2).unflatten(1, (side, side))
    return found
