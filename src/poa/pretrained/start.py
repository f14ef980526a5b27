"""The start of a run from public weights: read, check, fill, reorder, report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from poa.backbones import architecture
from poa.backbones.base import Backbone
from poa.config import PretrainConfig
from poa.data import BadImage, ImageSource, eval_transform, normalize
from poa.elastic import feature_order, reordered
from poa.errors import CheckpointError, DataError
from poa.pretrained.fill import FillReport, fill_
from poa.pretrained.importance import channel_orders
from poa.pretrained.sources import PublicWeights, open_weights
from poa.randomness import derived_seed, generator

TOLERANCE = 1e-5
"""Largest relative difference between the source's features and ours."""


@dataclass(frozen=True)
class StartReport:
    """How a run started.

    Attributes:
        provenance: name, licence and origin of the weights.
        tensors: what became of every tensor.
        relative_difference: between the source's features and ours before anything was resized or reordered; None
            where the source is no network of its own (a bare file, a family).
        feature_order: where each channel of our features stood in the source's; empty if the order was kept.
        num_reordered_groups: groups of channels that were put into another order.
    """

    provenance: dict[str, Any]
    tensors: FillReport
    relative_difference: float | None = None
    feature_order: tuple[int, ...] = field(default=())
    num_reordered_groups: int = 0


def start_from_(backbone: Backbone, config: PretrainConfig, images: ImageSource) -> StartReport:
    """Fills the intact network with the weights that `config.init` names, in place.

    The source's own network is compared with ours first. Then, with `config.init.reorder`, all groups of channels are
    put into the order of their importance on a sample of the images.

    Raises:
        ConfigError: poa has no such architecture, or not all of its parts.
        CheckpointError: the weights cannot be read, do not fit, or give other features than their own network.
        DataError: none of the sampled images can be read.
    """
    weights = open_weights(config.init.source)
    difference = None if weights.model is None else check_same_function(weights)
    tensors = fill_(backbone, weights.state, config.init.source)
    if not config.init.reorder:
        return StartReport(weights.provenance, tensors, difference)
    orders = channel_orders(backbone, sample_images(config, images))
    backbone.load_state_dict(reordered(backbone.layout, backbone.state_dict(), orders), strict=True)
    order = feature_order(backbone.layout, orders)
    kept = () if order is None else tuple(order.tolist())
    return StartReport(weights.provenance, tensors, difference, kept, len(orders))


@torch.inference_mode()
def check_same_function(weights: PublicWeights) -> float:
    """The relative difference between the features of timm's network and ours with the same weights.

    Raises:
        CheckpointError: it is above `TOLERANCE`: the network has parts that poa does not have.
    """
    config, model = weights.config, weights.model
    if config is None or model is None:
        raise CheckpointError(f"{weights.spec} is no network that could be compared.")
    ours = architecture(config).build(config).eval()
    ours.init_weights_(torch.Generator().manual_seed(0))
    fill_(ours, weights.state, weights.spec)
    rng = torch.Generator().manual_seed(derived_seed(0, "probe"))
    images = torch.randn(2, config.num_channels, config.image_size, config.image_size, generator=rng)
    found, expected = ours([images], ours.space.intact)[0], ours.timm_features(model, images)
    pairs = [(found.cls, expected.cls), (found.patches, expected.patches)]
    difference = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"with the weights of {weights.spec} our network gives other features than timm's (relative difference "
            f"{difference:.1e}): it has parts that poa does not know. Please report the model's name."
        )
    return difference


def sample_images(config: PretrainConfig, source: ImageSource) -> Float[Tensor, "B c h w"]:
    """`config.init.num_images` images drawn from the source, normalised, without augmentation.

    Raises:
        DataError: none can be read.
    """
    order = generator(config.train.seed, "importance").permutation(len(source))[: config.init.num_images]
    found = []
    for index in order.tolist():
        try:
            found.append(eval_transform(source.load(index), config.model.image_size, 1.0))
        except BadImage:
            continue
    if not found:
        raise DataError(f"none of {len(order)} images sampled from {source.spec} can be read.")
    return normalize(torch.from_numpy(np.stack(found)), config.augment.mean, config.augment.std)
