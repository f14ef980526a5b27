"""The elastic Vision Transformer, with timm's names and packed crops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from poa.backbones.base import Backbone, Features
from poa.backbones.vit_layout import block_cuts, vit_layout, vit_space
from poa.config import ViTConfig
from poa.elastic import Cut, Subnet, cut_state, kept_blocks
from poa.elastic.layers import ElasticLayerNorm, ElasticLayerScale, ElasticLinear
from poa.errors import ConfigError

Shapes = tuple[tuple[int, int], ...]
"""For each batch of crops (rows, tokens per row): how the packed token matrix falls apart."""


class KeptRows(NamedTuple):
    """The rows of each batch of crops that a residual branch computes under stochastic depth."""

    rows: tuple[Int[Tensor, "K"], ...]
    """Their numbers in the batch."""
    scales: tuple[float, ...]
    """All rows over kept rows."""
    shapes: Shapes
    """The shapes of what is kept."""


class Attention(nn.Module):
    """Self-attention with heads of a fixed size; a narrower network has fewer heads."""

    def __init__(self, cuts: dict[str, Cut], head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = ElasticLinear(cuts["attn.qkv.weight"], cuts["attn.qkv.bias"])
        self.proj = ElasticLinear(cuts["attn.proj.weight"], cuts["attn.proj.bias"])

    def forward(self, x: Float[Tensor, "T C"], shapes: Shapes, width: int) -> Float[Tensor, "T C"]:
        """Attention within each row of each batch of crops."""
        mixed = []
        sizes = [rows * tokens for rows, tokens in shapes]
        for part, (rows, tokens) in zip(self.qkv(x, width).split(sizes), shapes, strict=True):
            q, k, v = part.view(rows, tokens, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
            y = F.scaled_dot_product_attention(q, k, v)
            mixed.append(y.transpose(1, 2).reshape(rows * tokens, -1))
        out: Tensor = self.proj(torch.cat(mixed) if len(mixed) > 1 else mixed[0], width)
        return out


class Mlp(nn.Module):
    """The two-layer perceptron of a block."""

    def __init__(self, cuts: dict[str, Cut]) -> None:
        super().__init__()
        self.fc1 = ElasticLinear(cuts["mlp.fc1.weight"], cuts["mlp.fc1.bias"])
        self.fc2 = ElasticLinear(cuts["mlp.fc2.weight"], cuts["mlp.fc2.bias"])

    def forward(self, x: Float[Tensor, "T C"], width: int) -> Float[Tensor, "T C"]:
        """fc2(GELU(fc1(x)))."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x, width)), width)
        return out


class Block(nn.Module):
    """A pre-norm transformer block on packed tokens."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        cuts = block_cuts(config.widths[-1], config.mlp_ratio, config.init_values is not None)
        self.norm1 = ElasticLayerNorm(cuts["norm1.weight"], eps=1e-6)
        self.attn = Attention(cuts, config.head_dim)
        self.norm2 = ElasticLayerNorm(cuts["norm2.weight"], eps=1e-6)
        self.mlp = Mlp(cuts)
        scaled = config.init_values is not None
        self.ls1 = ElasticLayerScale(cuts["ls1.gamma"]) if scaled else None
        self.ls2 = ElasticLayerScale(cuts["ls2.gamma"]) if scaled else None

    def forward(
        self, x: Float[Tensor, "T C"], shapes: Shapes, width: int, kept: tuple[KeptRows, KeptRows] | None
    ) -> Float[Tensor, "T C"]:
        """The block's output; with `kept`, each branch is computed for the kept rows only."""
        if kept is None:
            x = x + self._attn_branch(x, shapes, width)
            return x + self._mlp_branch(x, width)
        attn, mlp = kept
        x = _add_rows(x, self._attn_branch(_select_rows(x, shapes, attn), attn.shapes, width), shapes, attn)
        return _add_rows(x, self._mlp_branch(_select_rows(x, shapes, mlp), width), shapes, mlp)

    def _attn_branch(self, x: Tensor, shapes: Shapes, width: int) -> Tensor:
        y: Tensor = self.attn(self.norm1(x, width), shapes, width)
        return y if self.ls1 is None else self.ls1(y, width)

    def _mlp_branch(self, x: Tensor, width: int) -> Tensor:
        y: Tensor = self.mlp(self.norm2(x, width), width)
        return y if self.ls2 is None else self.ls2(y, width)


class PatchEmbed(nn.Module):
    """The patch embedding: a fixed fan-in, so no factor; narrower networks own the leading channels."""

    def __init__(self, weight: Cut, bias: Cut) -> None:
        super().__init__()
        self.weight_cut = weight
        self.bias_cut = bias
        channels, inputs, patch, _ = weight.full_shape
        self.proj = nn.Conv2d(inputs, channels, patch, stride=patch)

    def forward(self, image: Float[Tensor, "B c h w"], width: int) -> Float[Tensor, "B N C"]:
        """One vector per patch, row by row."""
        weight = self.weight_cut.apply(self.proj.weight, width)
        bias = None if self.proj.bias is None else self.bias_cut.apply(self.proj.bias, width)
        return F.conv2d(image, weight, bias, stride=self.proj.stride).flatten(2).transpose(1, 2)


class ElasticViT(Backbone):
    """The super-network: a ViT that runs any of its sub-networks (POA §3.2).

    Its class vector is the class token after the final norm. All crops of a call travel through the blocks as
    one token matrix; only attention runs once for each crop size.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.layout = vit_layout(config)
        self.space = vit_space(config)
        cuts = self.layout.cuts
        self.cls_token = nn.Parameter(torch.empty(cuts["cls_token"].full_shape))
        if config.num_reg_tokens:
            self.reg_token = nn.Parameter(torch.empty(cuts["reg_token"].full_shape))
        self.pos_embed = nn.Parameter(torch.empty(cuts["pos_embed"].full_shape))
        self.mask_token = nn.Parameter(torch.empty(cuts["mask_token"].full_shape))
        self.patch_embed = PatchEmbed(cuts["patch_embed.proj.weight"], cuts["patch_embed.proj.bias"])
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depths[-1]))
        self.norm = ElasticLayerNorm(cuts["norm.weight"], eps=1e-6)

    @property
    def num_prefix_tokens(self) -> int:
        """The class token and the registers."""
        return 1 + self.config.num_reg_tokens

    def forward(
        self,
        crops: Sequence[Float[Tensor, "_ c _ _"]],
        subnet: Subnet,
        masks: Sequence[Bool[Tensor, "_ _"] | None] | None = None,
        rows_rng: torch.Generator | None = None,
    ) -> list[Features]:
        """See `Backbone.forward`."""
        tokens = [
            self._embed(crop, mask, subnet.width)
            for crop, mask in zip(crops, masks or [None] * len(crops), strict=True)
        ]
        shapes = tuple((part.shape[0], part.shape[1]) for part in tokens)
        x = torch.cat([part.flatten(0, 1) for part in tokens])
        blocks = kept_blocks(len(self.blocks), subnet.depths[0])
        kept = self._draw_rows(shapes, len(blocks), rows_rng, x.device)
        for block, rows in zip(blocks, kept, strict=True):
            x = self.blocks[block](x, shapes, subnet.width, rows)
        x = self.norm(x, subnet.width)
        return [Features(part[:, 0], part[:, self.num_prefix_tokens :]) for part in _batches(x, shapes)]

    def forward_intermediates(self, image: Float[Tensor, "B c h w"], subnet: Subnet) -> list[Float[Tensor, "B N C"]]:
        """See `Backbone.forward_intermediates`."""
        x = self._embed(image, None, subnet.width)
        shape = (x.shape[0], x.shape[1])
        x = x.flatten(0, 1)
        found = []
        for block in kept_blocks(len(self.blocks), subnet.depths[0]):
            x = self.blocks[block](x, (shape,), subnet.width, None)
            found.append(x.unflatten(0, shape)[:, self.num_prefix_tokens :])
        return found

    def _embed(self, image: Tensor, mask: Tensor | None, width: int) -> Float[Tensor, "B N C"]:
        """The tokens before the first block; under autocast the residual stream stays float32, as the parameters."""
        patch = self.config.patch_size
        height, breadth = image.shape[-2:]
        if height % patch or breadth % patch:
            nearest = tuple(max(patch, round(side / patch) * patch) for side in (height, breadth))
            raise ConfigError(
                f"the image size must be a multiple of the patch size {patch}; got {height}×{breadth}, "
                f"the nearest is {nearest[0]}×{nearest[1]}."
            )
        x = self.patch_embed(image, width)
        cuts = self.layout.cuts
        if mask is not None:
            token = cuts["mask_token"].apply(self.mask_token, width)
            x = torch.where(mask.unsqueeze(-1), token, x)
        prefix = [cuts["cls_token"].apply(self.cls_token, width)]
        if self.config.num_reg_tokens:
            prefix.append(cuts["reg_token"].apply(self.reg_token, width))
        prefix = [token.expand(x.shape[0], -1, -1) for token in prefix]
        position = self._positions(width, (height // patch, breadth // patch))
        if self.config.no_embed_class:
            return torch.cat([*prefix, x + position], dim=1)
        return torch.cat([*prefix, x], dim=1) + position

    def _positions(self, width: int, grid: tuple[int, int]) -> Float[Tensor, "1 N C"]:
        position = self.layout.cuts["pos_embed"].apply(self.pos_embed, width)
        side = self.config.image_size // self.config.patch_size
        num_prefix = 0 if self.config.no_embed_class else self.num_prefix_tokens
        return resize_positions(position, (side, side), grid, num_prefix)

    def _draw_rows(
        self, shapes: Shapes, depth: int, rng: torch.Generator | None, device: torch.device
    ) -> list[tuple[KeptRows, KeptRows] | None]:
        if rng is None or self.config.drop_path == 0.0:
            return [None] * depth
        draws = [_draw_kept(rows, self.config.drop_path, 2 * depth, rng).to(device) for rows, _ in shapes]
        scales = tuple(rows / kept.shape[1] for (rows, _), kept in zip(shapes, draws, strict=True))
        kept_shapes = tuple((kept.shape[1], length) for (_, length), kept in zip(shapes, draws, strict=True))
        each = [KeptRows(rows, scales, kept_shapes) for rows in zip(*draws, strict=True)]
        return list(zip(each[::2], each[1::2], strict=True))

    def num_layers(self) -> int:
        """See `Backbone.num_layers`."""
        return len(self.blocks) + 2

    def layer_of(self, name: str) -> int:
        """See `Backbone.layer_of`."""
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        return len(self.blocks) + 1 if name.startswith("norm.") else 0

    def timm_model(self, subnet: Subnet, image_size: int) -> tuple[str, dict[str, Any]]:
        """See `Backbone.timm_model`."""
        config = self.config
        return "vit_tiny_patch16_224", {
            "img_size": image_size,
            "patch_size": config.patch_size,
            "in_chans": config.num_channels,
            "embed_dim": subnet.width,
            "depth": subnet.depths[0],
            "num_heads": subnet.width // config.head_dim,
            "mlp_ratio": config.mlp_ratio,
            "init_values": config.init_values,
            "reg_tokens": config.num_reg_tokens,
            "no_embed_class": config.no_embed_class,
        }

    def timm_state(self, subnet: Subnet, image_size: int) -> dict[str, Tensor]:
        """See `Backbone.timm_state`."""
        state = cut_state(self.layout, self.state_dict(), subnet)
        side, new = (size // self.config.patch_size for size in (self.config.image_size, image_size))
        num_prefix = 0 if self.config.no_embed_class else self.num_prefix_tokens
        resized = resize_positions(state["pos_embed"], (side, side), (new, new), num_prefix)
        return {**state, "pos_embed": resized.contiguous()}

    def init_weights_(self, generator: torch.Generator) -> None:
        """Draws fresh weights: the reference's (DINOv2's), each parameter in the order of the table."""
        std = self.config.init_std
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name == "patch_embed.proj.weight":
                    bound = parameter[0].numel() ** -0.5
                    parameter.uniform_(-bound, bound, generator=generator)
                elif name in ("cls_token", "reg_token"):
                    parameter.normal_(std=1e-6, generator=generator)
                elif name == "mask_token" or name.endswith("bias"):
                    parameter.zero_()
                elif name.endswith("gamma"):
                    parameter.fill_(self.config.init_values or 1.0)
                elif "norm" in name:
                    parameter.fill_(1.0)
                else:
                    nn.init.trunc_normal_(parameter, std=std, generator=generator)

    def compile_blocks_(self) -> None:
        """See `Backbone.compile_blocks_`."""
        torch._dynamo.config.recompile_limit = max(64, 8 * len(self.config.widths))
        for block in self.blocks:
            block.compile(dynamic=False)


def resize_positions(
    position: Float[Tensor, "1 N C"], old: tuple[int, int], new: tuple[int, int], num_prefix: int
) -> Float[Tensor, "1 M C"]:
    """The position embedding of a grid of patches of another size, by bicubic interpolation.

    Args:
        position: for `num_prefix` prefix tokens, which are passed through, and the patches row by row.
        old: rows and columns of the grid that it was made for.
        new: rows and columns of the grid wanted.
        num_prefix: prefix tokens that have an embedding.
    """
    if old == new:
        return position
    prefix, grid = position[:, :num_prefix], position[:, num_prefix:]
    grid = grid.unflatten(1, old).permute(0, 3, 1, 2)
    factor = tuple((side + 0.1) / base for side, base in zip(new, old, strict=True))
    grid = F.interpolate(grid.float(), scale_factor=factor, mode="bicubic").to(position.dtype)
    return torch.cat([prefix, grid.flatten(2).transpose(1, 2)], dim=1)


def _batches(x: Tensor, shapes: Shapes) -> list[Float[Tensor, "B N C"]]:
    parts = x.split([rows * length for rows, length in shapes])
    return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]


def _select_rows(x: Float[Tensor, "T C"], shapes: Shapes, kept: KeptRows) -> Float[Tensor, "S C"]:
    """The packed tokens of the kept rows."""
    parts = [part.index_select(0, rows) for part, rows in zip(_batches(x, shapes), kept.rows, strict=True)]
    return torch.cat([part.flatten(0, 1) for part in parts])


def _add_rows(x: Float[Tensor, "T C"], y: Float[Tensor, "S C"], shapes: Shapes, kept: KeptRows) -> Float[Tensor, "T C"]:
    """`x` with the scaled `y` added to its kept rows."""
    whole = zip(_batches(x, shapes), _batches(y, kept.shapes), kept.rows, kept.scales, strict=True)
    return torch.cat(
        [part.index_add(0, rows, add.to(part.dtype), alpha=scale).flatten(0, 1) for part, add, rows, scale in whole]
    )


def _draw_kept(rows: int, rate: float, num_draws: int, rng: torch.Generator) -> Int[Tensor, "D K"]:
    """For each draw the rows kept: max(⌊rows · (1 − rate)⌋, 1) of them, without replacement, in rising order."""
    num_kept = max(int(rows * (1.0 - rate)), 1)
    order = torch.rand(num_draws, rows, generator=rng).argsort(dim=1)
    return order[:, :num_kept].sort(dim=1).values
