"""The contract of an evaluator of frozen features: a value with the protocol's numbers, features in, figures out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from poa.data import ImageSource
from poa.errors import DataError
from poa.evaluate.looks import AnyLook
from poa.evaluate.report import Result

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Vectors:
    """What one frozen network makes of one set of images.

    Attributes:
        cls: class vectors.
        labels: classes, counted from 0; None where there are none.
        num_classes: classes of the data set (there may be some without an image here); 0 without labels.
        blocks: class vectors at the last `Evaluator.num_blocks` depths, or as many as the network has, deepest last
            (it equals `cls`).
        pooled: mean patch vectors at the last depth; given if `Evaluator.num_blocks` is above 1.
        second: class vectors of a randomly cropped and mirrored view of the same images; given if
            `Evaluator.needs_views`.
        under: class vectors of the images under each of `Evaluator.test_looks`, by its name there.
        under_rows: the rows of `cls` that those of `under` are of, in their order; None: all.
        device: where protocols with much to compute (k-NN, linear probes) compute; the vectors themselves are on the
            CPU.
    """

    cls: Float[Tensor, "N C"]
    labels: Int[Tensor, "N"] | None = None
    num_classes: int = 0
    blocks: tuple[Float[Tensor, "N _"], ...] = ()
    pooled: Float[Tensor, "N C"] | None = None
    second: Float[Tensor, "N C"] | None = None
    under: Mapping[str, Float[Tensor, "M C"]] = field(default_factory=dict)
    under_rows: Int[Tensor, "M"] | None = None
    device: torch.device = CPU

    def __len__(self) -> int:
        return len(self.cls)


def with_labels(vectors: Vectors | None) -> tuple[Float[Tensor, "N C"], Int[Tensor, "N"]]:
    """The class vectors and the classes.

    Raises:
        DataError: there are none.
    """
    if vectors is None or vectors.labels is None:
        raise DataError("this protocol needs labelled images to train on and to test on.")
    return vectors.cls, vectors.labels


class Evaluator(ABC):
    """A protocol with its numbers. Subclasses are frozen dataclasses; their fields are the command's options.

    Attributes:
        name: of the protocol, as in `poa evaluate NAME`.
        summary: one line for the list of protocols.
        headline: the figure that stands for the protocol in tables and pictures; larger is better.
        needs_labels: whether it needs labelled images.
        needs_test: whether it needs a second set of images, to test on.
        needs_views: whether it needs a second view of every image of `train`.
        needs_intact: whether it compares with the intact network of the family (`reference` below).
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    headline: ClassVar[str]
    needs_labels: ClassVar[bool] = True
    needs_test: ClassVar[bool] = True
    needs_views: ClassVar[bool] = False
    needs_intact: ClassVar[bool] = False

    @property
    def num_blocks(self) -> int:
        """The number of depths whose class vectors it needs; 1: only the last."""
        return 1

    @property
    def test_looks(self) -> Mapping[str, AnyLook]:
        """Looks at the test images that it needs beside the plain one, by the names of its figures for them."""
        return {}

    def test_sample(self, labels: Int[Tensor, "M"]) -> Int[Tensor, "m"] | None:
        """Rows, in rising order, of the test images that `test_looks` are for, from all their classes; None: all."""
        del labels
        return None

    def check_images(self, test: ImageSource, indices: np.ndarray) -> None:  # noqa: B027
        """Refuses test images that the protocol cannot work on, before features are computed.

        Raises:
            DataError: what is wrong, what was got, and how to mend it.
        """

    def check(self, train: Int[Tensor, "N"] | None, test: Int[Tensor, "M"] | None, num_classes: int) -> None:  # noqa: B027
        """Refuses data that the protocol cannot work on, from the labels alone, before features are computed.

        Raises:
            DataError: what is wrong, what was got, and how to mend it.
        """

    @abstractmethod
    def evaluate(self, train: Vectors, test: Vectors | None, reference: Vectors | None = None) -> dict[str, float]:
        """The protocol's figures by name; shares are 0-1. The same input gives the same figures.

        Args:
            train: the labelled images (all images where `needs_test` is False).
            test: the images to test on, where `needs_test`.
            reference: the intact network's vectors of the images of `train`, where `needs_intact`.
        """

    @classmethod
    def draw(cls, path: Path, results: Sequence[Result]) -> bool:
        """Draws the results into a PNG file; False where the main figure against the parameters is picture enough."""
        del path, results
        return False
