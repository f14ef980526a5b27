"""What backbones have in common that end in a map of 1/32 of the image's resolution (Swin, ResNet, ConvNeXt)."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from poa.backbones.base import Backbone, Features
from poa.elastic import Subnet


class HierarchicalBackbone(Backbone):
    """A backbone with four stages.

    Its class vector is the mean of its last map. Its patch vectors are the last map, repeated `patch_scale` times along
    both sides, so that masks have a finer grid than the map (POA's iBOT path for Swin and ResNet).
    """

    patch_scale: int

    @abstractmethod
    def stage_maps(
        self,
        image: Float[Tensor, "B c h w"],
        subnet: Subnet,
        mask: Bool[Tensor, "B N"] | None = None,
        rows_rng: torch.Generator | None = None,
    ) -> list[Float[Tensor, "B _ _ _"]]:
        """The maps [B, C, h, w] that timm's `forward_intermediates` gives; the last one is what `read_out` takes."""

    @abstractmethod
    def read_out(
        self, last: Float[Tensor, "B C h w"], width: int
    ) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C h w"]]:
        """The class vector, and the map whose places are the patch vectors, from the last stage's map."""

    @abstractmethod
    def timm_read_out(
        self, model: nn.Module, images: Float[Tensor, "B c H W"]
    ) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C h w"]]:
        """What `read_out` gives, from an extracted timm model."""

    def forward(
        self,
        crops: Sequence[Float[Tensor, "_ c _ _"]],
        subnet: Subnet,
        masks: Sequence[Bool[Tensor, "_ _"] | None] | None = None,
        rows_rng: torch.Generator | None = None,
    ) -> list[Features]:
        """See `Backbone.forward`."""
        found = []
        for crop, mask in zip(crops, masks or [None] * len(crops), strict=True):
            last = self.stage_maps(crop, subnet, mask, rows_rng)[-1]
            found.append(self._features(*self.read_out(last, subnet.width)))
        return found

    def forward_intermediates(self, image: Float[Tensor, "B c h w"], subnet: Subnet) -> list[Float[Tensor, "B _ _ _"]]:
        """See `Backbone.forward_intermediates`."""
        return self.stage_maps(image, subnet)

    def last_blocks(self, image: Float[Tensor, "B c h w"], subnet: Subnet, num_blocks: int) -> list[Features]:
        """See `Backbone.last_blocks`."""
        *below, last = self.stage_maps(image, subnet)[-num_blocks:]
        lower = [Features(part.mean(dim=(2, 3)), part.flatten(2).transpose(1, 2)) for part in below]
        return [*lower, self._features(*self.read_out(last, subnet.width))]

    def timm_features(self, model: nn.Module, images: Float[Tensor, "B c h w"]) -> Features:
        """See `Backbone.timm_features`."""
        return self._features(*self.timm_read_out(model, images))

    def token_features(self, cls: Float[Tensor, "B C"], tokens: Float[Tensor, "B T C"]) -> Features:
        """What `forward` would give, from a model that gives a class vector and the places of a square last map."""
        side = math.isqrt(tokens.shape[1])
        return self._features(cls, tokens.transpose(1, 2).unflatten(2, (side, side)))

    def _features(self, cls: Float[Tensor, "B C"], dense: Float[Tensor, "B C h w"]) -> Features:
        if self.patch_scale > 1:
            dense = F.interpolate(dense, scale_factor=self.patch_scale, mode="nearest")
        return Features(cls, dense.flatten(2).transpose(1, 2))


def hide(
    x: Float[Tensor, "B C h w"], token: Float[Tensor, "1 C"], mask: Bool[Tensor, "B N"] | None, cell: int
) -> Float[Tensor, "B C h w"]:
    """`x` with the token at the masked places.

    Args:
        x: the map after the stem.
        token: the mask token.
        mask: of a grid of n⌈h / 8⌉ × n⌈w / 8⌉ places, row by row, n = 8 / cell: each place of the last map, of which
            8 × 8 places of `x` become one, is n × n places of the grid. What lies beyond `x` is ignored.
        cell: places of `x` along a side of one place of the mask's grid: 1, 2, 4 or 8.
    """
    if mask is None:
        return x
    rows, columns = (8 // cell * -(-side // 8) for side in x.shape[-2:])
    fine = mask.view(-1, rows, columns).repeat_interleave(cell, 1).repeat_interleave(cell, 2)
    return torch.where(fine[:, None, : x.shape[2], : x.shape[3]], token.view(1, -1, 1, 1).to(x.dtype), x)


def draw_kept_rows(
    num_rows: int, rate: float, rng: torch.Generator | None, device: torch.device
) -> Float[Tensor, "rows"] | None:
    """The factor of a residual branch for each row under stochastic depth: 0, or 1 / (1 − rate) for those that keep it.

    None where nothing is dropped.
    """
    if rng is None or rate == 0.0:
        return None
    kept = torch.rand(num_rows, generator=rng) >= rate
    return (kept / (1.0 - rate)).to(device)
