"""The images that exports are compared on, and those that formats of 8 bits choose their scales on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from poa.data import BadImage, ImageSource, SkippedImage, eval_transform, normalize
from poa.data.sources import check_bad_share
from poa.errors import DataError
from poa.family import Family
from poa.randomness import generator


@dataclass(frozen=True)
class ExportImages:
    """Normalised images of one source.

    Attributes:
        compared: those that exports and the family are compared on.
        calibration: others, where a format needs them, else None.
        spec: what the user wrote to name the source.
        fingerprint: of the source, and of which images of it were taken.
        skipped: the images that could not be read.
    """

    compared: Float[Tensor, "B c h w"]
    calibration: Float[Tensor, "N c h w"] | None
    spec: str
    fingerprint: str
    skipped: tuple[SkippedImage, ...] = ()


def read_images(
    family: Family,
    source: ImageSource,
    num_images: int,
    *,
    image_size: int | None = None,
    needs_calibration: bool = False,
    max_bad_share: float = 0.01,
) -> ExportImages:
    """A random choice of the images, the same for the same source, prepared as the family wants them.

    Args:
        family: its preprocessing is applied.
        source: the images.
        num_images: to compare on, and as many others to calibrate on; of a small source half each.
        image_size: side of the images; the family's own by default.
        needs_calibration: whether any are needed to calibrate on.
        max_bad_share: refuse when more than this share of those looked at cannot be read.

    Raises:
        DataError: the source has too few images, or too many cannot be read.
    """
    how = replace(family.card.preprocessing, image_size=family.checked_image_size(image_size))
    wanted = num_images * (2 if needs_calibration else 1)
    found: list[np.ndarray] = []
    skipped: list[SkippedImage] = []
    for index in generator(0, "export images").permutation(len(source)).tolist():
        if len(found) == wanted:
            break
        try:
            found.append(eval_transform(source.load(index), how.image_size, how.crop_pct, how.interpolation))
        except BadImage as error:
            skipped.append(SkippedImage(source.image_name(index), error.reason))
    check_bad_share(skipped, len(found) + len(skipped), max_bad_share, option="--max-bad-share")
    num_compared = len(found) // 2 if needs_calibration else len(found)
    if not num_compared:
        raise DataError(f"{source.spec!r} has {len(found)} images that can be read; give at least 2.")
    images = normalize(torch.from_numpy(np.stack(found)), how.mean, how.std)
    return ExportImages(
        images[:num_compared],
        images[num_compared:] if needs_calibration else None,
        source.spec,
        f"{source.fingerprint}/{num_images}",
        tuple(skipped),
    )
