"""The class vectors of many sub-networks on one set of images, every image decoded once."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from poa.backbones.base import Backbone
from poa.config.checks import require, require_probability
from poa.data import BadImage, ImageSource, SkippedImage, eval_transform, normalize
from poa.elastic import Subnet
from poa.errors import DataError
from poa.family import Preprocessing

MEMORY_BUDGET = 2 << 30
"""Bytes of features that are kept in memory; beyond, they go to temporary files."""


@dataclass(frozen=True)
class Features:
    """Class vectors of every sub-network, for the images that could be read."""

    by_subnet: dict[Subnet, Float[np.ndarray, "N C"]]
    indices: np.ndarray
    """The images' positions in the source."""
    skipped: tuple[SkippedImage, ...]
    """The images that could not be read."""

    def of(self, subnet: Subnet) -> Float[Tensor, "N C"]:
        """One sub-network's features."""
        return torch.from_numpy(np.asarray(self.by_subnet[subnet]))


@dataclass(frozen=True)
class Loading:
    """How images are read for an evaluation."""

    batch_size: int = 64
    """Images per forward pass."""
    num_workers: int = 0
    """Processes that decode; 0 decodes in the evaluating process."""
    max_bad_share: float = 0.01
    """Refuse when more than this share of the images cannot be read; below, they are left out and reported."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        require(self.num_workers >= 0, "num_workers", self.num_workers, "0 or more")
        require_probability("max_bad_share", self.max_bad_share)


DEFAULT_LOADING = Loading()


class _Images(Dataset[tuple[int, "np.ndarray | str"]]):
    """(index, uint8 image [C, S, S]) or (index, reason) of the images at some positions of a source."""

    def __init__(self, source: ImageSource, indices: np.ndarray, how: Preprocessing) -> None:
        self.source = source
        self.indices = indices
        self.how = how

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[int, np.ndarray | str]:
        index = int(self.indices[position])
        try:
            image = self.source.load(index)
        except BadImage as error:
            return index, error.reason
        return index, eval_transform(image, self.how.image_size, self.how.crop_pct)


@contextmanager
def extract_features(
    backbone: Backbone,
    source: ImageSource,
    subnets: Sequence[Subnet],
    how: Preprocessing,
    *,
    indices: np.ndarray | None = None,
    loading: Loading = DEFAULT_LOADING,
    on_progress: Callable[[int], None] | None = None,
) -> Iterator[Features]:
    """Computes the class vectors of all `subnets`; while the context is open they can be read.

    Each image is decoded once. Beyond `MEMORY_BUDGET` the features live in temporary files, so memory stays bounded
    for any number of sub-networks and images.

    Args:
        backbone: the super-network; it runs on the device that it is on.
        source: the images.
        subnets: the sub-networks.
        how: preprocessing.
        indices: positions of the images to use; all by default.
        loading: batch size and workers.
        on_progress: called with the number of images done after every batch.

    Raises:
        DataError: more images than allowed could not be read.
    """
    positions = np.arange(len(source)) if indices is None else np.asarray(indices)
    device = next(backbone.parameters()).device
    images_there = _Images(source, positions, how)
    loader = DataLoader(images_there, loading.batch_size, num_workers=loading.num_workers, collate_fn=list)
    with ExitStack() as stack:
        arrays = _allocate(
            stack, len(positions), {each: backbone.layout.features.active(each.width) for each in subnets}
        )
        good: list[int] = []
        skipped: list[SkippedImage] = []
        done = 0
        for batch in loader:
            done += len(batch)
            skipped += [SkippedImage(source.image_name(i), item) for i, item in batch if isinstance(item, str)]
            read = [(i, item) for i, item in batch if not isinstance(item, str)]
            if read:
                images = torch.from_numpy(np.stack([image for _, image in read])).to(device)
                images = normalize(images, how.mean, how.std)
                rows = slice(len(good), len(good) + len(read))
                with torch.inference_mode():
                    for subnet in subnets:
                        arrays[subnet][rows] = backbone([images], subnet)[0].cls.float().cpu().numpy()
                good += [i for i, _ in read]
            if on_progress is not None:
                on_progress(done)
        _check_share(source, skipped, len(positions), loading.max_bad_share)
        found = {subnet: array[: len(good)] for subnet, array in arrays.items()}
        yield Features(found, np.asarray(good), tuple(skipped))


def _check_share(source: ImageSource, skipped: list[SkippedImage], num_images: int, max_share: float) -> None:
    if len(skipped) > max_share * num_images or num_images == len(skipped):
        examples = "; ".join(f"{bad.name}: {bad.reason}" for bad in skipped[:3])
        raise DataError(
            f"{len(skipped)} of the {num_images} images of {source.spec} could not be read ({examples}). "
            f"Mend them, or allow more with --max-bad-share (now {max_share:g})."
        )


def _allocate(stack: ExitStack, num_images: int, num_features: dict[Subnet, int]) -> dict[Subnet, np.ndarray]:
    shapes = {subnet: (num_images, size) for subnet, size in num_features.items()}
    if sum(4 * n * c for n, c in shapes.values()) <= MEMORY_BUDGET:
        return {subnet: np.empty(shape, np.float32) for subnet, shape in shapes.items()}
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="poa-features-")))
    return {
        subnet: np.lib.format.open_memmap(folder / f"{subnet}.npy", "w+", np.float32, shape)
        for subnet, shape in shapes.items()
    }
