"""Parts of labelled images, drawn class by class, and what protocols ask of labels."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from poa.data.split import stratified_split
from poa.errors import DataError
from poa.randomness import generator


def stratified_holdout(
    labels: Int[Tensor, "N"], share: float, seed: int
) -> tuple[Int[Tensor, "kept"], Int[Tensor, "held"]]:
    """Positions of the images that stay and of those held out, both in rising order; see `stratified_split`.

    Raises:
        DataError: a class has one image only.
    """
    kept, held = stratified_split(labels.numpy(), share, seed)
    return torch.from_numpy(kept), torch.from_numpy(held)


def stratified_draw(labels: Int[Tensor, "N"], counts: dict[int, int], seed: int, draw: int) -> Int[Tensor, "drawn"]:
    """Positions, in rising order, of `counts[label]` images of each class; independent for each `draw`."""
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    rng = generator(seed, "draw", draw)
    for label, count in sorted(counts.items()):
        members = (labels == label).nonzero().squeeze(1).numpy()
        chosen[rng.permutation(members)[:count]] = True
    return chosen.nonzero().squeeze(1)


def require_labels(protocol: str, labels: Int[Tensor, "N"] | None) -> Int[Tensor, "N"]:
    """The labels.

    Raises:
        DataError: there are none, or all are of one class.
    """
    if labels is None:
        raise DataError(f"{protocol} needs labelled images. Give one folder for each class, or a label column.")
    if len(labels.unique()) < 2:
        raise DataError(f"{protocol} needs two or more classes; all {len(labels)} images are of one.")
    return labels


def require_classes(
    protocol: str, train: Int[Tensor, "N"] | None, test: Int[Tensor, "M"] | None, least: int = 1
) -> None:
    """Refuses labels that nothing can be learnt from.

    Args:
        protocol: its name.
        train: classes of the training images.
        test: classes of the test images; None: not looked at.
        least: training images that every class needs.

    Raises:
        DataError: labels are missing, all training images are of one class, a class has too few, or test images are of
            a class that no training image is of.
    """
    classes, counts = require_labels(protocol, train).unique(return_counts=True)
    if int(counts.min()) < least:
        label = int(classes[counts.argmin()])
        raise DataError(
            f"{protocol} needs {least} or more training images of every class; class {label} has {int(counts.min())}."
        )
    if test is not None:
        unknown = sorted(set(test.unique().tolist()) - set(classes.tolist()))
        if unknown:
            listed = ", ".join(map(str, unknown[:5]))
            raise DataError(f"{protocol}: there are test images of classes without a training image ({listed}).")
