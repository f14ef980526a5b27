"""Where a network looks: the attention of its class token, or what stands in for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from timm.layers import NormMlpClassifierHead
from torch import Tensor, nn
from torch.nn import functional as F

from poa.errors import ConfigError


@dataclass(frozen=True)
class Maps:
    """What a timm model makes of a batch of images, in places.

    Attributes:
        cls: its class vectors.
        patches: its last map after the final norm.
        attention: how the class token spreads its attention in the last block, for each head: the T tokens with those
            before the patches (class token, registers) first; each row sums to 1. None where there is no class token,
            or where timm's attention does not lay its probabilities open.
    """

    cls: Float[Tensor, "B C"]
    patches: Float[Tensor, "B D h w"]
    attention: Float[Tensor, "B H T"] | None

    @property
    def heads(self) -> Float[Tensor, "B H h w"] | None:
        """The attention of each head to the patches alone; None where `attention` is."""
        if self.attention is None:
            return None
        height, width = self.patches.shape[-2:]
        patches = self.attention[:, :, -height * width :]
        return patches.reshape(*patches.shape[:2], height, width)

    @property
    def saliency(self) -> Float[Tensor, "B h w"]:
        """The mean of `heads` (Caron et al., 2021, DINO); without a class token the cosine of every patch vector.

        The cosine is with the class vector, or with the mean patch vector where the class vector has other channels.
        """
        if self.heads is not None:
            return self.heads.mean(dim=1)
        return F.cosine_similarity(self.patches, self._target[:, :, None, None], dim=1)

    @property
    def saliency_name(self) -> str:
        """What `saliency` is, for the reader of a picture."""
        if self.attention is not None:
            return "attention"
        return "cosine with class vector" if self._has_class_channels else "cosine with mean patch"

    @property
    def _target(self) -> Float[Tensor, "B D"]:
        return self.cls if self._has_class_channels else self.patches.mean(dim=(2, 3))

    @property
    def _has_class_channels(self) -> bool:
        return self.cls.shape[1] == self.patches.shape[1]


@torch.no_grad()
def compute_maps(network: nn.Module, images: Float[Tensor, "B c h w"]) -> Maps:
    """One forward pass of a timm model in evaluation mode, without gradients.

    The attention of all tokens of the last block is in memory for a moment: B × heads × T × T numbers.

    Raises:
        ConfigError: the network is in training mode, or is none of timm's with `forward_intermediates`.
    """
    made: Any = network
    if network.training:
        raise ConfigError(f"{type(network).__name__} is in training mode: its maps would be random. Call eval() first.")
    if not hasattr(network, "forward_intermediates"):
        raise ConfigError(f"timm's {type(network).__name__} gives no maps, so no picture can be made of it.")
    with _last_attention(network) as found:
        last, (patches,) = made.forward_intermediates(images, indices=1, norm=True)
    cls = made.forward_head(last, pre_logits=True).flatten(1)
    if isinstance(getattr(made, "head", None), NormMlpClassifierHead):
        patches = made.head.norm(patches)
    rows = found[-1][:, :, 0].float() if found else None
    return Maps(cls.float(), patches.float(), rows)


@contextmanager
def _last_attention(network: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the attention probabilities [B, H, T, T] of the last block; none if there is no class token.

    timm's attention hands them to its dropout when the fused kernel, which never forms them, is off.
    """
    made: Any = network
    found: list[Tensor] = []
    has_token = getattr(made, "cls_token", None) is not None and getattr(made, "num_prefix_tokens", 0) > 0
    attention: Any = getattr(made.blocks[-1], "attn", None) if has_token and hasattr(made, "blocks") else None
    if not hasattr(attention, "fused_attn") or not isinstance(getattr(attention, "attn_drop", None), nn.Module):
        yield found
        return
    handle = attention.attn_drop.register_forward_hook(lambda _module, given, _result: found.append(given[0]))
    fused, attention.fused_attn = attention.fused_attn, False
    try:
        yield found
    finally:
        attention.fused_attn = fused
        handle.remove()
