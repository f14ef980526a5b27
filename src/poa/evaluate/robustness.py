"""How much accuracy a frozen network keeps when the test images are damaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from poa.config.checks import require, require_non_negative, require_positive
from poa.data import ImageSource
from poa.errors import ConfigError, DataError
from poa.evaluate.base import Evaluator, Vectors, with_labels
from poa.evaluate.corruptions import CORRUPTIONS
from poa.evaluate.damage import BackgroundSwap, Corruption, PatchDrop, PatchShuffle, check_masks
from poa.evaluate.knn import knn_accuracies
from poa.evaluate.logistic import predicted
from poa.evaluate.looks import AnyLook
from poa.evaluate.report import Result
from poa.evaluate.splits import require_classes, stratified_draw

KINDS = ("corrupt", "drop_random", "drop_most", "drop_least", "shuffle", "background")
"""Kinds of damage; every figure of a look begins with one of them."""


@dataclass(frozen=True)
class Robustness(Evaluator):
    """Accuracy on damaged test images, with a classifier learnt from the vectors of the clean training images.

    Damage is the ImageNet-C corruptions (Hendrycks & Dietterich, 2019), patches dropped at random or by their salience
    for the network, tiles shuffled (Naseer et al., 2021), and, with masks, the background of another class (Xiao et
    al., 2021). Every one costs a forward pass over the test images: 23 with the numbers below, and one of the clean.
    """

    name: ClassVar[str] = "robustness"
    summary: ClassVar[str] = "accuracy under corruptions, dropped and shuffled patches, other backgrounds"
    headline: ClassVar[str] = "accuracy_damaged"

    corruptions: tuple[str, ...] = tuple(CORRUPTIONS)
    """Names of corruptions; none: leave them out."""
    severities: tuple[int, ...] = (3,)
    """Of the corruptions: 1 (light) to 5."""
    drops: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Shares of the patches that are dropped; none: leave it out."""
    drop_by: tuple[Literal["random", "most", "least"], ...] = ("random", "most")
    """Which: at random, or those with the most or the least salience for the network."""
    grid: int = 0
    """Patches a side that are dropped from; 0: of about 4 pixels, at least 4 and at most 14."""
    shuffles: tuple[int, ...] = (2, 4)
    """Tiles a side that are shuffled; none: leave it out."""
    masks: str | None = None
    """A folder with a mask of every test image, of the same relative name: swaps the backgrounds."""
    max_images: int | None = None
    """Damage that many test images, of every class in proportion; all by default."""
    classifier: Literal["knn", "logistic"] = "knn"
    """k-NN as DINO has it, or logistic regression."""
    k: int = 20
    """k-NN: neighbours."""
    temp: float = 0.07
    """k-NN: temperature of the votes."""
    strength: float = 0.1
    """Logistic regression: scikit-learn's C."""
    seed: int = 0
    """Of all that is random."""

    def __post_init__(self) -> None:
        require(self.k >= 1, "k", self.k, "1 or more")
        require(self.max_images is None or self.max_images >= 1, "max_images", self.max_images, "1 or more")
        require_positive("temp", self.temp)
        require_positive("strength", self.strength)
        require_non_negative("seed", self.seed)
        if not self.test_looks:
            raise ConfigError(
                "robustness has nothing to do: give --corruptions with --severities, --drops with --drop-by, "
                "--shuffles, or --masks."
            )

    @property
    def test_looks(self) -> Mapping[str, AnyLook]:
        """See `Evaluator.test_looks`; `corrupt_fog_3`, `drop_random_50` (per cent), `shuffle_4`, `background`."""
        looks: dict[str, AnyLook] = {}
        for kind in self.corruptions:
            for severity in self.severities:
                looks[f"corrupt_{kind}_{severity}"] = Corruption(kind, severity, self.seed)
        for by in self.drop_by:
            for share in self.drops:
                looks[f"drop_{by}_{100 * share:g}"] = PatchDrop(share, by, self.grid, self.seed)
        for grid in self.shuffles:
            looks[f"shuffle_{grid}"] = PatchShuffle(grid, self.seed)
        if self.masks is not None:
            looks["background"] = BackgroundSwap(self.masks, self.seed)
        return looks

    def test_sample(self, labels: Int[Tensor, "M"]) -> Int[Tensor, "m"] | None:
        """See `Evaluator.test_sample`."""
        if self.max_images is None or self.max_images >= len(labels):
            return None
        classes, counts = labels.unique(return_counts=True)
        shares = counts.double() * self.max_images / len(labels)
        wanted = shares.long()
        wanted[(shares - wanted).argsort(descending=True, stable=True)[: self.max_images - int(wanted.sum())]] += 1
        return stratified_draw(labels, dict(zip(classes.tolist(), wanted.tolist(), strict=True)), self.seed, 0)

    def check(self, train: Int[Tensor, "N"] | None, test: Int[Tensor, "M"] | None, num_classes: int) -> None:
        """See `Evaluator.check`."""
        del num_classes
        require_classes(self.name, train, test)
        if self.classifier == "knn" and train is not None and len(train) < self.k:
            raise DataError(f"k-NN needs at least {self.k} training images for k = {self.k}; got {len(train)}.")
        if self.masks is not None and test is not None and len(test.unique()) < 2:
            raise DataError("backgrounds come from other classes, and all test images are of one. Leave out --masks.")

    def check_images(self, test: ImageSource, indices: np.ndarray) -> None:
        """See `Evaluator.check_images`."""
        if self.masks is not None:
            check_masks(self.masks, test, indices)

    def evaluate(self, train: Vectors, test: Vectors | None, reference: Vectors | None = None) -> dict[str, float]:
        """The accuracy on the clean and on the damaged images.

        `accuracy_damaged` is the mean of the kinds of damage, each the mean of its looks: it does not depend on how
        many looks of each there are. `retained` is `accuracy_damaged` over `accuracy_clean` (1 at chance too, which is
        why it is not the headline); `accuracy_corrupt`, `accuracy_drop_random` and so on are the kinds; the rest is
        every look's. All of the same images: those of `test_sample`.
        """
        del reference
        vectors, labels = with_labels(test)
        if test is None or not test.under:
            raise DataError("robustness needs the vectors of the damaged test images.")
        rows = slice(None) if test.under_rows is None else test.under_rows
        found = self._accuracies(train, {"clean": vectors[rows], **test.under}, labels[rows])
        kinds = {}
        for kind in KINDS:
            members = [value for name, value in found.items() if name == kind or name.startswith(f"{kind}_")]
            if members:
                kinds[f"accuracy_{kind}"] = sum(members) / len(members)
        clean, damaged = found.pop("clean"), sum(kinds.values()) / len(kinds)
        retained = damaged / clean if clean > 0 else 0.0
        return {"accuracy_damaged": damaged, "accuracy_clean": clean, "retained": retained, **kinds, **found}

    def _accuracies(
        self, train: Vectors, seen: Mapping[str, Float[Tensor, "M C"]], truth: Int[Tensor, "M"]
    ) -> dict[str, float]:
        features, labels = with_labels(train)
        if self.classifier == "knn":
            return {
                name: knn_accuracies(
                    features, labels, vectors, truth, ks=[self.k], temp=self.temp, device=train.device
                )[self.k]
                for name, vectors in seen.items()
            }
        classes = predicted(features, labels, torch.cat(list(seen.values())), self.strength)
        parts = classes.unflatten(0, (len(seen), len(truth)))
        return {name: float((part == truth).double().mean()) for name, part in zip(seen, parts, strict=True)}

    @classmethod
    def draw(cls, path: Path, results: Sequence[Result]) -> bool:
        """See `Evaluator.draw`: the accuracy under every look, a row for each network."""
        from poa.evaluate.plots import draw_damage
        from poa.figures import new_figure, save_figure

        names = [name for name in results[0].figures if name.startswith(KINDS)]
        figure, axes = new_figure(3 + 0.42 * (1 + len(names)), 1.8 + 0.34 * len(results), 1)
        draw_damage(axes[0], results, names)
        save_figure(figure, path)
        return True
