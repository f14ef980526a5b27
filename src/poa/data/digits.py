"""The handwritten digits that scikit-learn ships: 1,797 grey images of 8 by 8 pixels."""

from __future__ import annotations

import hashlib
from functools import cached_property

import numpy as np
from PIL import Image

from poa.config import DataConfig
from poa.data.base import ImageSource, checked_index, png_of
from poa.data.decode import mode_of_channels
from poa.randomness import generator

NUM_TRAIN = 1437
"""Images of the training split; the other 360 are the test split."""

SPECS = ("digits", "digits:train", "digits:test")
"""The specs of this source; "digits" is the training split."""


class DigitsSource(ImageSource):
    """The training or the test split of the digits, a fixed random division."""

    def __init__(self, spec: str, config: DataConfig, num_channels: int) -> None:
        from sklearn.datasets import load_digits

        del config
        self.spec = spec
        self.mode = mode_of_channels(num_channels)
        self.skipped = ()
        data = load_digits()
        order = generator(0, "digits split").permutation(len(data.images))
        self._rows = np.sort(order[NUM_TRAIN:] if spec == "digits:test" else order[:NUM_TRAIN])
        self._pixels = np.rint(data.images[self._rows] * (255.0 / 16.0)).astype(np.uint8)
        self.labels = data.target[self._rows].astype(np.int64)
        self.class_names = tuple(str(name) for name in data.target_names)

    @classmethod
    def accepts(cls, spec: str) -> bool:
        """Whether it is one of `SPECS`."""
        return spec in SPECS

    def __len__(self) -> int:
        return len(self._pixels)

    def load(self, index: int) -> Image.Image:
        """See `ImageSource.load`."""
        grey = self._grey(index)
        return grey if self.mode == "L" else grey.convert(self.mode)

    def encoded(self, index: int) -> bytes:
        """A grey PNG, for any number of channels."""
        return png_of(self._grey(index))

    def image_name(self, index: int) -> str:
        """The digit's place among scikit-learn's 1,797."""
        return f"digit-{self._rows[checked_index(index, len(self))]:04d}"

    @cached_property
    def fingerprint(self) -> str:
        """Over the pixels and the labels."""
        digest = hashlib.sha256(self._pixels.tobytes())
        digest.update(np.asarray(self.labels).tobytes())
        return digest.hexdigest()

    def _grey(self, index: int) -> Image.Image:
        return Image.fromarray(self._pixels[checked_index(index, len(self))])
