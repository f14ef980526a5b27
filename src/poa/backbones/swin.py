"""The elastic Swin Transformer, with timm's names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from poa.backbones.base import ResidualBlock, TimmModel
from poa.backbones.hierarchical import HierarchicalBackbone, draw_kept_rows, hide
from poa.backbones.swin_layout import axis_windows, block_cuts, merging_cuts, stage_depths, swin_layout, swin_space
from poa.backbones.vit_blocks import Mlp, PatchEmbed
from poa.config import SwinConfig
from poa.elastic import Cut, Subnet, Window
from poa.elastic.layers import ElasticLayerNorm, ElasticLinear

EPS = 1e-5
Factors = Float[Tensor, "rows"] | None
"""What stochastic depth multiplies each row of a residual branch by; None: nothing is dropped."""
MASKED = -100.0
"""Added to the attention between regions that the shift has made neighbours; timm's and the POA reference's number."""


class Windows(NamedTuple):
    """How a map is cut into attention windows of T places each."""

    size: tuple[int, int]
    """Rows and columns of a window."""
    padded: tuple[int, int]
    """Rows and columns of the map after padding to whole windows."""
    shift: tuple[int, int]
    """By how much the padded map is moved up and left before it is cut."""
    offsets: Int[Tensor, "T T"]
    """For each pair of places of a window the row of the table of relative positions."""
    mask: Float[Tensor, "G T T"] | None
    """For each window of the padded map what is added to attention; None where nothing is shifted."""


class WindowAttention(nn.Module):
    """Self-attention within windows, with a learned bias for each head and relative position."""

    def __init__(self, cuts: dict[str, Cut], head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.table_cut = cuts["attn.relative_position_bias_table"]
        self.relative_position_bias_table = nn.Parameter(torch.empty(self.table_cut.full_shape))
        self.qkv = ElasticLinear(cuts["attn.qkv.weight"], cuts["attn.qkv.bias"])
        self.proj = ElasticLinear(cuts["attn.proj.weight"], cuts["attn.proj.bias"])

    def forward(self, x: Float[Tensor, "N T C"], windows: Windows, width: int) -> Float[Tensor, "N T C"]:
        """Attention within each of the windows, which stand image by image."""
        table = self.table_cut.apply(self.relative_position_bias_table, width)
        bias = table[windows.offsets].permute(2, 0, 1).unsqueeze(0)
        if windows.mask is not None:
            bias = bias + windows.mask.unsqueeze(1)
        groups, heads, places = bias.shape[:3]
        qkv = self.qkv(x, width).view(-1, groups, places, 3, heads, self.head_dim)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).flatten(2, 3).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.flatten(0, 1).unsqueeze(0).to(q.dtype))
        out: Tensor = self.proj(y.unflatten(1, (groups, heads)).transpose(2, 3).reshape(x.shape), width)
        return out


class Block(ResidualBlock):
    """A pre-norm transformer block with attention in windows, on a map."""

    def __init__(self, config: SwinConfig, stage: int, index: int) -> None:
        super().__init__()
        cuts = block_cuts(config, stage, index)
        self.norm1 = ElasticLayerNorm(cuts["norm1.weight"], eps=EPS)
        self.attn = WindowAttention(cuts, config.head_dim)
        self.norm2 = ElasticLayerNorm(cuts["norm2.weight"], eps=EPS)
        self.mlp = Mlp(cuts)

    def forward(
        self,
        x: Float[Tensor, "B H W C"],
        windows: Windows,
        width: int,
        factors: tuple[Factors, Factors],
    ) -> Float[Tensor, "B H W C"]:
        """The block's output; `factors` are those of the attention branch and of the MLP branch."""
        x = x + _times(self._attn_branch(x, windows, width), factors[0])
        y = self.mlp(self.norm2(x, width).flatten(0, 2), width).view(x.shape)
        return x + _times(y, factors[1])

    def _attn_branch(self, x: Tensor, windows: Windows, width: int) -> Tensor:
        height, breadth = x.shape[1:3]
        down, right = windows.shift
        y = self.norm1(x, width)
        if windows.padded != (height, breadth):
            y = F.pad(y, (0, 0, 0, windows.padded[1] - breadth, 0, windows.padded[0] - height))
        if any(windows.shift):
            y = y.roll((-down, -right), (1, 2))
        y = unpartition(self.attn(partition(y, windows.size), windows, width), windows.size, windows.padded)
        if any(windows.shift):
            y = y.roll((down, right), (1, 2))
        return y[:, :height, :breadth]


class SwinPatchEmbed(PatchEmbed):
    """The patch embedding and its norm, which runs over the active channels."""

    def __init__(self, weight: Cut, bias: Cut, norm: Cut) -> None:
        super().__init__(weight, bias)
        self.norm = ElasticLayerNorm(norm, eps=EPS)

    def forward(self, image: Float[Tensor, "B c h w"], width: int) -> Float[Tensor, "B H W C"]:
        """The map of stage 1, in the parameters' type under autocast too; images are padded to whole patches."""
        patch = self.weight_cut.full_shape[-1]
        rows, columns = (-(-side // patch) for side in image.shape[-2:])
        image = F.pad(image, (0, columns * patch - image.shape[-1], 0, rows * patch - image.shape[-2]))
        x = super().forward(image, width).to(self.proj.weight.dtype)
        found: Tensor = self.norm(x.unflatten(1, (rows, columns)), width)
        return found


class PatchMerging(nn.Module):
    """Halves a map's sides and doubles its channels."""

    def __init__(self, cuts: dict[str, Cut]) -> None:
        super().__init__()
        self.norm = ElasticLayerNorm(cuts["norm.weight"], eps=EPS)
        self.reduction = ElasticLinear(cuts["reduction.weight"])

    def forward(self, x: Float[Tensor, "B H W C"], width: int) -> Float[Tensor, "B h w D"]:
        """The map of the next stage, in the type of `x`; odd sides are padded."""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        neighbours = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        merged: Tensor = self.reduction(self.norm(torch.cat(neighbours, dim=-1), width), width)
        return merged.to(x.dtype)


class SwinStage(nn.Module):
    """The blocks of one resolution, and the merging that leads to it."""

    def __init__(self, config: SwinConfig, stage: int) -> None:
        super().__init__()
        self.window = config.windows[stage]
        self.always_partition = config.always_partition
        self.downsample = PatchMerging(merging_cuts(config, stage)) if stage > 0 else None
        self.blocks = nn.ModuleList(Block(config, stage, index) for index in range(stage_depths(config)[stage]))

    def forward(
        self, x: Float[Tensor, "B H W C"], kept: Mapping[int, tuple[Factors, Factors]], width: int
    ) -> Float[Tensor, "B h w D"]:
        """The stage's map; `kept` has the blocks that run, each with the factors of its two branches."""
        if self.downsample is not None:
            x = self.downsample(x, width)
        plain, shifted = (
            windows_of((x.shape[1], x.shape[2]), self.window, self.always_partition, shifted, x.device)
            for shifted in (False, True)
        )
        for block, factors in kept.items():
            x = self.blocks[block](x, shifted if block % 2 else plain, width, factors)
        return x


class ElasticSwin(HierarchicalBackbone):
    """The super-network: a Swin Transformer that runs any of its sub-networks (POA §3.2).

    Width is elastic everywhere, depth in stage 3. Inside, maps are [B, H, W, C].
    """

    config: SwinConfig
    embedding = "patch_embed."

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_scale = config.patch_scale
        self.layout = swin_layout(config)
        self.space = swin_space(config)
        cuts = self.layout.cuts
        self.mask_token = nn.Parameter(torch.empty(cuts["mask_token"].full_shape))
        self.patch_embed = SwinPatchEmbed(
            cuts["patch_embed.proj.weight"], cuts["patch_embed.proj.bias"], cuts["patch_embed.norm.weight"]
        )
        self.layers = nn.ModuleList(SwinStage(config, stage) for stage in range(4))
        self.norm = ElasticLayerNorm(cuts["norm.weight"], eps=EPS)

    def stage_maps(
        self,
        image: Float[Tensor, "B c h w"],
        subnet: Subnet,
        mask: Bool[Tensor, "B N"] | None = None,
        rows_rng: torch.Generator | None = None,
    ) -> list[Float[Tensor, "B _ _ _"]]:
        """See `HierarchicalBackbone.stage_maps`: the maps after each stage, before the final norm."""
        width = subnet.width
        token = self.layout.cuts["mask_token"].apply(self.mask_token, width)
        x = self.patch_embed(image, width).permute(0, 3, 1, 2)
        x = hide(x, token, mask, 8 // self.patch_scale).permute(0, 2, 3, 1)
        found = []
        for stage, layer in enumerate(self.layers):
            kept = {}
            for block in self._kept(subnet)[stage]:
                draw = (x.shape[0], self._drop_rate(stage, block), rows_rng, x.device)
                kept[block] = (draw_kept_rows(*draw), draw_kept_rows(*draw))
            x = layer(x, kept, width)
            found.append(x.permute(0, 3, 1, 2))
        return found

    def read_out(
        self, last: Float[Tensor, "B C h w"], width: int
    ) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C h w"]]:
        """See `HierarchicalBackbone.read_out`: both after the final norm."""
        x = self.norm(last.permute(0, 2, 3, 1), width)
        return x.mean((1, 2)), x.permute(0, 3, 1, 2)

    def timm_read_out(
        self, model: nn.Module, images: Float[Tensor, "B c H W"]
    ) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C h w"]]:
        """See `HierarchicalBackbone.timm_read_out`."""
        last = model.forward_features(images)  # type: ignore[operator]
        return model.forward_head(last, pre_logits=True), last.permute(0, 3, 1, 2)  # type: ignore[operator]

    def _kept(self, subnet: Subnet) -> list[tuple[int, ...]]:
        """For each stage the blocks that the sub-network runs."""
        kept = [tuple(range(depth)) for depth in stage_depths(self.config)]
        kept[2] = self.layout.stages[0].kept(subnet.depths[0])
        return kept

    def _drop_rate(self, stage: int, block: int) -> float:
        num_blocks = sum(stage_depths(self.config))
        return self.config.drop_path * (self._position(stage) + block) / (num_blocks - 1)

    def _position(self, stage: int) -> int:
        """The number of blocks before that stage."""
        return sum(stage_depths(self.config)[:stage])

    def num_layers(self) -> int:
        """See `Backbone.num_layers`."""
        return sum(stage_depths(self.config)) + 2

    def layer_of(self, name: str) -> int:
        """See `Backbone.layer_of`; the merging before a stage belongs to the stage's first block."""
        if not name.startswith("layers."):
            return self.num_layers() - 1 if name.startswith("norm.") else 0
        _, stage, part, block = name.split(".")[:4]
        return self._position(int(stage)) + (int(block) if part == "blocks" else 0) + 1

    def timm_model(self, subnet: Subnet, image_size: int) -> TimmModel:
        """See `Backbone.timm_model`."""
        config = self.config
        arguments = {
            "img_size": image_size,
            "patch_size": config.patch_size,
            "in_chans": config.num_channels,
            "window_size": config.window_size,
            "embed_dim": subnet.width,
            "depths": [len(blocks) for blocks in self._kept(subnet)],
            "num_heads": [(subnet.width << stage) // config.head_dim for stage in range(4)],
            "mlp_ratio": config.mlp_ratio,
            **({"always_partition": True} if config.always_partition else {}),
        }
        side = config.map_sides(image_size)[-1]
        described = {"pool_size": [side, side], "first_conv": "patch_embed.proj", "classifier": "head.fc"}
        return TimmModel("swin_tiny_patch4_window7_224", arguments, described, "avg")

    def for_image_size(self, name: str, window: Window, image_size: int) -> Window:
        """See `Backbone.for_image_size`: smaller windows take the inner part of the table of relative positions."""
        if not name.endswith("relative_position_bias_table"):
            return window
        stage = int(name.split(".")[1])
        whole = self.config.windows[stage]
        side = self.config.map_sides(image_size)[stage]
        axis = axis_windows(side, whole, always_partition=self.config.always_partition)
        inner = slice(whole - axis.window, whole + axis.window - 1)
        table = window.view.unflatten(0, (2 * whole - 1, 2 * whole - 1))
        return Window(table[inner, inner].flatten(0, 1))

    def adapted(self, name: str, tensor: Tensor) -> Tensor | None:
        """See `Backbone.adapted`; also the position table of another window, as timm resizes it."""
        ours = self.layout.cuts[name].full_shape
        if not name.endswith("relative_position_bias_table") or tensor.shape[1:] != ours[1:]:
            return super().adapted(name, tensor)
        from timm.layers import resize_rel_pos_bias_table

        side = (math.isqrt(ours[0]) + 1) // 2
        resized: Tensor = resize_rel_pos_bias_table(tensor, new_window_size=(side, side), new_bias_shape=ours)
        return resized

    def init_weights_(self, generator: torch.Generator) -> None:
        """Draws fresh weights: truncated normal as in the ViT, tables of relative positions and mask token 0."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name == "patch_embed.proj.weight":
                    bound = parameter[0].numel() ** -0.5
                    parameter.uniform_(-bound, bound, generator=generator)
                elif name.endswith(("bias", "bias_table")) or name == "mask_token":
                    parameter.zero_()
                elif "norm" in name:
                    parameter.fill_(1.0)
                else:
                    nn.init.trunc_normal_(parameter, std=self.config.init_std, generator=generator)


@lru_cache(maxsize=256)
def windows_of(
    sides: tuple[int, int], window: int, always_partition: bool, shifted: bool, device: torch.device
) -> Windows:
    """The windows of a map.

    Args:
        sides: rows and columns of the map.
        window: the side of the window that the table of relative positions is made for; a map that is smaller along
            one axis takes the inner part of the table.
        always_partition: windows keep their size on maps that they cover, and are shifted there too.
        shifted: whether the block shifts its windows.
        device: where the tensors lie.
    """
    rows, columns = (axis_windows(side, window, always_partition=always_partition) for side in sides)
    size = (rows.window, columns.window)
    padded = (rows.padded, columns.padded)
    shift = (rows.shift, columns.shift) if shifted else (0, 0)
    with torch.inference_mode(False):
        y, x = (place.flatten() for place in torch.meshgrid(*(torch.arange(side) for side in size), indexing="ij"))
        down, right = (place[:, None] - place[None, :] + window - 1 for place in (y, x))
        offsets = (down * (2 * window - 1) + right).to(device)
        mask = region_mask(size, padded, shift).to(device) if any(shift) else None
    return Windows(size, padded, shift, offsets, mask)


def region_mask(size: tuple[int, int], padded: tuple[int, int], shift: tuple[int, int]) -> Float[Tensor, "G T T"]:
    """For each window of a shifted map 0 between places that were neighbours before the shift, else `MASKED`."""
    rows, columns = (
        (place >= side - window).long() + (place >= side - move).long()
        for place, side, window, move in zip(map(torch.arange, padded), padded, size, shift, strict=True)
    )
    region = partition((3 * rows[:, None] + columns)[None, :, :, None], size)
    return torch.where(region == region.transpose(1, 2), 0.0, MASKED)


def partition(x: Shaped[Tensor, "B H W C"], size: tuple[int, int]) -> Shaped[Tensor, "N T C"]:
    """The windows of a map, image by image and row by row."""
    found: Tensor = x.unflatten(1, (-1, size[0])).unflatten(3, (-1, size[1]))
    return found.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def unpartition(
    windows: Float[Tensor, "N T C"], size: tuple[int, int], sides: tuple[int, int]
) -> Float[Tensor, "B H W C"]:
    """The map of those sides that `partition` has cut into windows."""
    counts = (sides[0] // size[0], sides[1] // size[1])
    found: Tensor = windows.unflatten(0, (-1, *counts)).unflatten(3, size)
    return found.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _times(branch: Tensor, factors: Factors) -> Tensor:
    return branch if factors is None else branch * factors.view(-1, 1, 1, 1)
