"""What the formats of 8 bits have in common: the images that their scales are chosen on."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from poa.deploy.export.base import Exported
from poa.deploy.export.graph import GraphExporter
from poa.errors import ConfigError


def calibration_images(exporter: GraphExporter, what: Exported) -> Float[np.ndarray, "B c h w"]:
    """The calibration images as the written network takes them: normalised, unless it does that itself.

    Raises:
        ConfigError: there are none, or they are of another size than the network's.
    """
    how, size = what.family.card.preprocessing, what.image_size
    images = what.calibration
    if images is None or not len(images):
        raise ConfigError(
            f"{exporter.name} chooses its scales on images: give some hundred of the kind that it is for."
        )
    if tuple(images.shape[1:]) != (how.num_channels, size, size):
        raise ConfigError(
            f"{exporter.name} needs calibration images [B, {how.num_channels}, {size}, {size}]; got "
            f"{list(images.shape)}."
        )
    found = images.detach().cpu().float().numpy()
    if exporter.normalise_inside:
        mean, std = (
            np.array(how.per_channel(each), dtype=np.float32).reshape(-1, 1, 1) for each in (how.mean, how.std)
        )
        found = found * std + mean
    return found
