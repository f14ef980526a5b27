"""Maps at several scales out of any timm network: what segmentation and detection are built on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from poa.errors import ConfigError

NUM_SCALES = 4
MIN_STRIDE = 4
"""The finest stride that maps are enlarged to."""
_PROBE_SIDE = 128


class Measured(NamedTuple):
    """All intermediate maps of a network: what is known of them."""

    strides: tuple[int, ...]
    num_channels: tuple[int, ...]
    norm: bool
    """Whether the network norms them when asked to."""


class Scales(nn.Module):
    """Makes maps out of a network's intermediate maps; the network itself is passed in.

    Attributes:
        strides: of the maps, in pixels per place.
        num_channels: of each map.
        indices: the network's intermediate maps that are used, rising.
        sources: for each map which of them it is made of.
        layers: for each map how.
        norm: whether the network norms its intermediate maps.
    """

    def __init__(
        self,
        strides: Sequence[int],
        indices: Sequence[int],
        layers: Sequence[nn.Module],
        found: Measured,
        width: int = 0,
    ) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.num_channels = tuple(width or found.num_channels[index] for index in indices)
        self.indices = tuple(sorted(set(indices)))
        self.sources = tuple(self.indices.index(index) for index in indices)
        self.layers = nn.ModuleList(layers)
        self.norm = found.norm

    def forward(self, network: nn.Module, images: Float[Tensor, "B c h w"]) -> list[Float[Tensor, "B _ _ _"]]:
        """The maps of normalised images."""
        found = _intermediates(network, images, list(self.indices), norm=self.norm)
        return [layer(found[source]) for layer, source in zip(self.layers, self.sources, strict=True)]


class MultiScale(nn.Module):
    """A timm network that gives maps at four scales.

    Attributes:
        backbone: the network.
        strides: of the four maps, in pixels per place, rising, each twice the one before.
        num_channels: of each map.
        scales: how the maps are made; all that is here beside the network.
    """

    def __init__(self, backbone: nn.Module, scales: Scales) -> None:
        super().__init__()
        self.backbone = backbone
        self.scales = scales
        self.strides: tuple[int, ...] = scales.strides
        self.num_channels: tuple[int, ...] = scales.num_channels

    def forward(self, images: Float[Tensor, "B c h w"]) -> list[Float[Tensor, "B _ _ _"]]:
        """The maps of normalised images, the finest first; sides that do not divide are rounded up."""
        maps: list[Tensor] = self.scales(self.backbone, images)
        return maps


def multi_scale(network: nn.Module, *, num_channels: int | None = None, simple: bool = False) -> MultiScale:
    """The network with what makes four maps of it. It takes the images that the network takes.

    Hierarchical networks give the last map of each of their four coarsest strides; where they have fewer, the coarsest
    is max-pooled. Plain networks, of one stride p, give maps after 1/4, 2/4, 3/4 and 4/4 of their blocks, all through
    the last norm, enlarged by transposed convolutions and max-pooled as in BEiT (Bao et al., 2021). Their finest stride
    is p halved at most twice and not below 4; a p below 4 is pooled up to 4. So patches of 4, 8 and 16 give strides 4,
    8, 16, 32, and patches of 14 give 7, 14, 28, 56.

    Args:
        network: a timm model without a head, of any training mode; it is not copied.
        num_channels: project every map to so many channels first; by default they keep the network's.
        simple: make all maps of a plain network of its last block (ViTDet; Li et al., 2022).

    Raises:
        ConfigError: the network gives no intermediate maps, or maps whose strides are not each twice the one before.
    """
    found = _measured(network)
    last_of = {stride: index for index, stride in enumerate(found.strides)}
    if len(last_of) == 1:
        return MultiScale(network, _plain_scales(found, num_channels, simple=simple))
    own = sorted(last_of)[-NUM_SCALES:]
    _require_doubling(network, own)
    strides = [own[0] * 2**level for level in range(NUM_SCALES)]
    indices = [last_of[min(stride, own[-1])] for stride in strides]
    layers = [
        _layer(found.num_channels[index], num_channels, min(stride, own[-1]), stride)
        for index, stride in zip(indices, strides, strict=True)
    ]
    return MultiScale(network, Scales(strides, indices, layers, found, num_channels or 0))


def last_scales(network: nn.Module, num_maps: int) -> Scales:
    """The network's last `num_maps` intermediate maps as they are: of blocks, or of stages where it is hierarchical.

    Args:
        network: a timm model.
        num_maps: how many, or as many as there are.

    Raises:
        ConfigError: the network gives no intermediate maps.
    """
    found = _measured(network)
    indices = range(max(0, len(found.strides) - num_maps), len(found.strides))
    return Scales(found.strides[indices.start :], indices, [nn.Identity() for _ in indices], found)


def _plain_scales(found: Measured, num_channels: int | None, *, simple: bool) -> Scales:
    depth, patch, width = len(found.strides), found.strides[0], found.num_channels[0]
    finest = finest_stride(patch)
    strides = [finest * 2**level for level in range(NUM_SCALES)]
    depths = [depth if simple else -(-depth * (level + 1) // NUM_SCALES) for level in range(NUM_SCALES)]
    layers = [_layer(width, num_channels, patch, stride) for stride in strides]
    return Scales(strides, [end - 1 for end in depths], layers, found, num_channels or 0)


def finest_stride(patch: int) -> int:
    """The patch halved at most twice while the half is whole and 4 or more; one below 4 doubled until it is not."""
    stride = patch
    for _ in range(2):
        if stride % 2 == 0 and stride // 2 >= MIN_STRIDE:
            stride //= 2
    while stride < MIN_STRIDE:
        stride *= 2
    return stride


def _layer(width: int, num_channels: int | None, stride: int, wanted: int) -> nn.Sequential:
    """From one stride to another, projected first: pooled, left as it is, or enlarged by transposed convolutions."""
    parts: list[nn.Module] = [] if num_channels is None else [nn.Conv2d(width, num_channels, kernel_size=1)]
    channels = num_channels or width
    if wanted > stride:
        parts.append(nn.MaxPool2d(wanted // stride, ceil_mode=True))
    for step in range((stride // wanted).bit_length() - 1):
        if step:
            parts += [LayerNorm2d(channels), nn.GELU()]
        parts.append(nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2))
    return nn.Sequential(*parts)


def _intermediates(
    network: nn.Module, images: Float[Tensor, "B _ _ _"], indices: list[int] | None = None, *, norm: bool
) -> list[Float[Tensor, "B _ _ _"]]:
    """The network's intermediate maps, channels first."""
    made: Any = network
    maps: list[Tensor] = made.forward_intermediates(images, indices=indices, norm=norm, intermediates_only=True)
    return maps


@torch.no_grad()
def _measured(network: nn.Module) -> Measured:
    """Measures all intermediate maps of an empty image of the network's size."""
    made: Any = network
    kind = f"timm's {type(made).__name__}"
    if not hasattr(made, "forward_intermediates"):
        raise ConfigError(f"{kind} gives no intermediate maps, which dense tasks are built on.")
    image = _empty_image(network)
    was_training = made.training
    made.eval()
    try:
        for norm in (True, False):
            with suppress(AssertionError):  # how timm says that a network cannot norm them
                maps = _intermediates(network, image, norm=norm)
                return Measured(_strides(maps, image.shape[2:]), tuple(part.shape[1] for part in maps), norm)
    except RuntimeError as error:
        raise ConfigError(f"{kind} gives no intermediate maps of {tuple(image.shape)} images: {error}.") from error
    finally:
        made.train(was_training)
    raise ConfigError(f"{kind} gives no intermediate maps of {tuple(image.shape)} images.")


def _empty_image(network: nn.Module) -> Float[Tensor, "1 c h w"]:
    made: Any = network
    described = (getattr(made, "pretrained_cfg", None) or {}).get("input_size") or (3, _PROBE_SIDE, _PROBE_SIDE)
    sides = getattr(getattr(made, "patch_embed", None), "img_size", None) or described[1:]
    kernels = [parameter for parameter in made.parameters() if parameter.ndim == 4]
    num_channels = kernels[0].shape[1] if kernels else described[0]
    image: Tensor = next(made.parameters()).new_zeros(1, num_channels, *sides)
    return image


def _strides(maps: Sequence[Tensor], sides: Sequence[int]) -> tuple[int, ...]:
    """Of each map. Halving an odd side rounds it, so each is compared with the one before, along the longer side."""
    axis = 0 if sides[0] >= sides[1] else 1
    strides, stride, before = [], 1, sides[axis]
    for part in maps:
        side = part.shape[2 + axis]
        stride *= max(1, round(before / side))
        strides.append(stride)
        before = side
    return tuple(strides)


def _require_doubling(network: nn.Module, strides: Sequence[int]) -> None:
    if any(after != 2 * before for before, after in pairwise(strides)):
        raise ConfigError(
            f"timm's {type(network).__name__} gives maps of strides {', '.join(map(str, strides))}; dense tasks need "
            "each stride to be twice the one before."
        )
