"""Looks that damage an image: corruptions, dropped and shuffled patches, another background."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from poa.config.checks import require, require_probability
from poa.data import BadImage, ImageSource, eval_transform
from poa.data.decode import FORMATS
from poa.errors import ConfigError, DataError
from poa.evaluate.corruptions import CORRUPTIONS, MIN_SIDE, NUM_SEVERITIES, corrupt
from poa.evaluate.looks import BatchLook, Look, Shown
from poa.family import Preprocessing
from poa.randomness import generator

MAX_GRID = 14
"""Patches a side that are dropped from, for images of 224 pixels (Naseer et al., 2021)."""
_MAX_DONORS = 16


@dataclass(frozen=True)
class Corruption(Look):
    """A common corruption of ImageNet-C (Hendrycks & Dietterich, 2019), after the image is resized and cropped."""

    kind: str
    severity: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in CORRUPTIONS:
            close = difflib.get_close_matches(self.kind, CORRUPTIONS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"there is no corruption {self.kind!r}.{hint} Corruptions: {', '.join(CORRUPTIONS)}.")
        require(1 <= self.severity <= NUM_SEVERITIES, "severities", self.severity, f"1 to {NUM_SEVERITIES}")

    @property
    def name(self) -> str:
        """See `Look.name`."""
        return repr(self)

    def check(self, how: Preprocessing) -> None:
        """See `Look.check`."""
        if how.image_size < MIN_SIDE or how.num_channels not in (1, 3, 4):
            raise ConfigError(
                f"corruptions are for images of {MIN_SIDE} pixels a side or more and 1, 3 or 4 channels; got "
                f"{how.image_size} pixels, {how.num_channels} channels."
            )

    def __call__(self, shown: Shown, how: Preprocessing) -> UInt8[np.ndarray, "c s s"]:
        """See `Look.__call__`."""
        rng = generator(self.seed, f"corrupt {self.kind}", shown.index, self.severity)
        return corrupt(shown.square(how), self.kind, self.severity, rng)


@dataclass(frozen=True)
class PatchDrop(BatchLook):
    """A share of the patches of a grid set to the mean, 0 after normalisation (Naseer et al., NeurIPS 2021).

    Dropped are patches at random, or those with the most or the least salience for the network; where salience is
    equal, at random. What a smaller share drops, a larger share drops too.
    """

    share: float
    by: Literal["random", "most", "least"] = "random"
    grid: int = 0
    """Patches a side; 0: `patch_grid`."""
    seed: int = 0

    def __post_init__(self) -> None:
        require_probability("drops", self.share)
        require(self.grid >= 0, "grid", self.grid, "0 or more")

    @property
    def needs_salience(self) -> bool:
        """See `BatchLook`."""
        return self.by != "random"

    def check(self, how: Preprocessing) -> None:
        """See `Look.check`."""
        _check_grid("grid", self.grid, how)

    def __call__(
        self, images: Float[Tensor, "B c s s"], indices: tuple[int, ...], salience: Float[Tensor, "B h w"] | None
    ) -> Float[Tensor, "B c s s"]:
        """See `BatchLook.__call__`."""
        side = images.shape[-1]
        grid = self.grid or patch_grid(side)
        order = random_orders(self.seed, indices, grid * grid).to(images.device)
        if salience is not None:
            values = resampled(salience, grid).flatten(1).gather(1, order)
            order = order.gather(1, values.argsort(dim=1, descending=self.by == "most", stable=True))
        keep = torch.ones_like(order, dtype=images.dtype)
        keep.scatter_(1, order[:, : round(self.share * grid * grid)], 0.0)
        cell = torch.arange(side, device=images.device) * grid // side
        kept: Tensor = images * keep.unflatten(1, (grid, grid))[:, None, cell[:, None], cell]
        return kept


@dataclass(frozen=True)
class PatchShuffle(BatchLook):
    """The image cut into grid × grid tiles that change places (Naseer et al., NeurIPS 2021).

    Where the side is no multiple of `grid`, a margin of less than `grid` pixels stays as it is.
    """

    grid: int
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.grid >= 2, "shuffles", self.grid, "2 or more")

    def check(self, how: Preprocessing) -> None:
        """See `Look.check`."""
        _check_grid("shuffles", self.grid, how)

    def __call__(
        self, images: Float[Tensor, "B c s s"], indices: tuple[int, ...], salience: Float[Tensor, "B h w"] | None
    ) -> Float[Tensor, "B c s s"]:
        """See `BatchLook.__call__`."""
        del salience
        grid, tile = self.grid, images.shape[-1] // self.grid
        first = (images.shape[-1] - grid * tile) // 2
        inner = slice(first, first + grid * tile)
        tiles = images[..., inner, inner].unflatten(3, (grid, tile)).unflatten(2, (grid, tile))
        tiles = tiles.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        order = random_orders(self.seed, indices, grid * grid).to(images.device)
        moved = tiles[torch.arange(len(tiles), device=images.device)[:, None], order]
        found = images.clone()
        found[..., inner, inner] = (
            moved.unflatten(1, (grid, grid)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        )
        return found


@dataclass(frozen=True)
class BackgroundSwap(Look):
    """The image's foreground over the background of an image of another class (Xiao et al., ICLR 2021: mixed-rand).

    The other image is drawn among those of the extraction; what its own foreground covers is filled in from around it
    (Telea, 2004). It is decoded anew: this look reads two images.
    """

    masks: str
    """A folder with a mask for every image, of the same relative name with any image ending; foreground: not 0."""
    seed: int = 0

    @property
    def name(self) -> str:
        """See `Look.name`."""
        return repr(self)

    def __call__(self, shown: Shown, how: Preprocessing) -> UInt8[np.ndarray, "c s s"]:
        """See `Look.__call__`."""
        source = shown.source
        foreground = _mask_square(self.masks, source.image_name(shown.index), how)
        donor, image = self._donor(shown)
        behind = eval_transform(image, how.image_size, how.crop_pct, how.interpolation)
        behind = _filled(behind, _mask_square(self.masks, source.image_name(donor), how))
        return np.where(foreground, shown.square(how), behind)

    def _donor(self, shown: Shown) -> tuple[int, Image.Image]:
        """Position and image of the first that can be read."""
        labels = np.asarray(shown.source.labels)
        others = shown.pool[labels[shown.pool] != labels[shown.index]]
        rng = generator(self.seed, "background", shown.index)
        for donor in rng.choice(others, min(_MAX_DONORS, len(others)), replace=False).tolist():
            try:
                return donor, shown.source.load(donor)
            except BadImage:
                continue
        raise BadImage("no image for its background can be read")


def patch_grid(side: int) -> int:
    """Patches a side that are dropped from: of about 4 pixels, at least 4 and at most 14."""
    return min(MAX_GRID, max(4, side // 4))


@lru_cache(maxsize=8)
def random_orders(seed: int, indices: tuple[int, ...], num_items: int) -> Int[Tensor, "B n"]:
    """An order of the items for each image: a function of seed, image and number."""
    drawn = [generator(seed, "patches", index, num_items).permutation(num_items) for index in indices]
    return torch.from_numpy(np.stack(drawn))


def resampled(salience: Float[Tensor, "B h w"], grid: int) -> Float[Tensor, "B grid grid"]:
    """A map at another number of places a side: averaged, or bilinear where there are more."""
    maps = salience.unsqueeze(1)
    if grid <= salience.shape[-1]:
        return F.adaptive_avg_pool2d(maps, grid).squeeze(1)
    found: Tensor = F.interpolate(maps, (grid, grid), mode="bilinear", align_corners=False).squeeze(1)
    return found


def check_masks(masks: str, source: ImageSource, indices: np.ndarray) -> None:
    """Refuses masks that do not fit the images, before work starts; reads every mask and the head of every image.

    Images that cannot be read are passed over here; they are counted when they are decoded.

    Raises:
        DataError: the folder, or the mask of an image, is missing, of another size, empty, or cannot be read.
    """
    if not Path(masks).is_dir():
        raise DataError(f"there is no folder {masks!r} with masks (--masks).")
    _mask_files.cache_clear()
    wrong = [text for index in indices.tolist() if (text := _wrong_mask(masks, source, index))]
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise DataError(
            f"{len(wrong)} of the {len(indices)} test images of {source.spec} have no usable mask in {masks}: "
            f"{'; '.join(wrong[:5])}{more}. Every test image needs one of its size, with the same relative name, not 0 "
            "where the object is."
        )


def _wrong_mask(masks: str, source: ImageSource, index: int) -> str:
    """What is wrong with the mask of that image; empty if nothing is."""
    name = source.image_name(index)
    try:
        size = _size(source, index)
    except (BadImage, OSError):
        return ""
    try:
        mask = _mask(masks, name)
    except BadImage as error:
        return f"{name}: {error.reason}"
    if size != mask.shape[::-1]:
        return f"{name}: the mask is {mask.shape[1]}×{mask.shape[0]}, the image {size[0]}×{size[1]}"
    return "" if mask.any() else f"{name}: the mask is empty"


def _size(source: ImageSource, index: int) -> tuple[int, int]:
    """Width and height of an image, upright; of a file without decoding it."""
    file = Path(source.spec).expanduser() / source.image_name(index)
    if not file.is_file():
        return source.load(index).size
    with Image.open(file, formats=FORMATS) as image:
        width, height = image.size
        return (height, width) if image.getexif().get(0x0112, 1) in (5, 6, 7, 8) else (width, height)


@lru_cache(maxsize=4)
def _mask_files(masks: str) -> dict[str, Path]:
    """By the relative name, with and without its ending."""
    root = Path(masks)
    files = sorted(file for file in root.rglob("*") if file.is_file())
    return {name: file for file in reversed(files) for name in _names(file.relative_to(root))}


def _names(name: Path) -> Iterator[str]:
    yield name.as_posix()
    yield name.with_suffix("").as_posix()


def _mask(masks: str, name: str) -> Bool[np.ndarray, "h w"]:
    """True where the object is."""
    files = _mask_files(masks)
    file = next((files[key] for key in _names(Path(name)) if key in files), None)
    if file is None:
        raise BadImage("no mask")
    try:
        with Image.open(file, formats=FORMATS) as image:
            pixels = np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadImage("the mask cannot be read") from error
    return np.asarray(pixels if pixels.ndim == 2 else pixels[..., :3].any(axis=2)).astype(bool)


def _mask_square(masks: str, name: str, how: Preprocessing) -> Bool[np.ndarray, "1 s s"]:
    """True where the object is."""
    mask = Image.fromarray(_mask(masks, name).astype(np.uint8))
    return eval_transform(mask, how.image_size, how.crop_pct, "nearest") > 0


def _filled(pixels: UInt8[np.ndarray, "c s s"], hole: Bool[np.ndarray, "1 s s"]) -> UInt8[np.ndarray, "c s s"]:
    """The image without what is in the hole."""
    if hole.all():
        return np.zeros_like(pixels)
    planes = [cv2.inpaint(plane, hole[0].astype(np.uint8), 3, cv2.INPAINT_TELEA) for plane in pixels]
    return np.stack(planes)


def _check_grid(name: str, grid: int, how: Preprocessing) -> None:
    require(grid <= how.image_size, name, grid, f"at most the side of the images, {how.image_size}")
