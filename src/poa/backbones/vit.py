"""The elastic Vision Transformer, with timm's names and packed crops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from poa.backbones.base import Backbone, Features, ResidualBlock, TimmModel
from poa.backbones.vit_blocks import MLPS, Attention, EvaAttention, PatchEmbed, Rotation, Shapes, rotation
from poa.backbones.vit_layout import block_cuts, hidden_channels, mlp_ratio_of, vit_layout, vit_space
from poa.config import ViTConfig
from poa.elastic import Cut, Subnet, Window
from poa.elastic.layers import ElasticLayerNorm, ElasticLayerScale
from poa.errors import ConfigError


class KeptRows(NamedTuple):
    """The rows of each batch of crops that a residual branch computes under stochastic depth."""

    rows: tuple[Int[Tensor, "K"], ...]
    """Their numbers in the batch."""
    scales: tuple[float, ...]
    """All rows over kept rows."""
    shapes: Shapes
    """The shapes of what is kept."""


class Block(ResidualBlock):
    """A pre-norm transformer block on packed tokens, with the names of timm's VisionTransformer."""

    attention: ClassVar[type[Attention]] = Attention

    def __init__(self, config: ViTConfig, index: int) -> None:
        super().__init__()
        cuts = block_cuts(config, index)
        self.norm1 = ElasticLayerNorm(cuts["norm1.weight"], eps=config.norm_eps)
        self.attn = self.attention(cuts, config.head_dim)
        self.norm2 = ElasticLayerNorm(cuts["norm2.weight"], eps=config.norm_eps)
        self.mlp = MLPS[config.mlp](cuts)
        self._make_scales(cuts)

    def forward(
        self,
        x: Float[Tensor, "T C"],
        shapes: Shapes,
        width: int,
        kept: tuple[KeptRows, KeptRows] | None,
        rotations: tuple[Rotation, ...] | None = None,
    ) -> Float[Tensor, "T C"]:
        """The block's output.

        Args:
            x: the packed tokens.
            shapes: how they fall apart.
            width: the sub-network's.
            kept: each branch is computed for these rows only; None: for all.
            rotations: the rotary position embedding of each batch of crops; None: there is none.
        """
        if kept is None:
            x = x + self._attn_branch(x, shapes, width, rotations)
            return x + self._mlp_branch(x, width)
        attn, mlp = kept
        y = self._attn_branch(_select_rows(x, shapes, attn), attn.shapes, width, rotations)
        x = _add_rows(x, y, shapes, attn)
        return _add_rows(x, self._mlp_branch(_select_rows(x, shapes, mlp), width), shapes, mlp)

    def _attn_branch(
        self, x: Tensor, shapes: Shapes, width: int, rotations: tuple[Rotation, ...] | None = None
    ) -> Tensor:
        return self._scaled(self.attn(self.norm1(x, width), shapes, width, rotations), 1, width)

    def _mlp_branch(self, x: Tensor, width: int) -> Tensor:
        return self._scaled(self.mlp(self.norm2(x, width), width), 2, width)

    def _make_scales(self, cuts: dict[str, Cut]) -> None:
        scaled = "ls1.gamma" in cuts
        self.ls1 = ElasticLayerScale(cuts["ls1.gamma"]) if scaled else None
        self.ls2 = ElasticLayerScale(cuts["ls2.gamma"]) if scaled else None

    def _scaled(self, y: Tensor, branch: Literal[1, 2], width: int) -> Tensor:
        scale = self.ls1 if branch == 1 else self.ls2
        return y if scale is None else scale(y, width)


class EvaBlock(Block):
    """The same with the names of timm's Eva."""

    attention = EvaAttention

    def _make_scales(self, cuts: dict[str, Cut]) -> None:
        self.scale_cut = cuts.get("gamma_1")
        if self.scale_cut is not None:
            self.gamma_1 = nn.Parameter(torch.empty(self.scale_cut.full_shape))
            self.gamma_2 = nn.Parameter(torch.empty(self.scale_cut.full_shape))

    def _scaled(self, y: Tensor, branch: Literal[1, 2], width: int) -> Tensor:
        if self.scale_cut is None:
            return y
        return y * self.scale_cut.apply(self.gamma_1 if branch == 1 else self.gamma_2, width)


class ElasticViT(Backbone):
    """The super-network: a ViT that runs any of its sub-networks (POA §3.2).

    Its class vector is the class token after the final norm. All crops of a call travel through the blocks as
    one token matrix; only attention runs once for each crop size.
    """

    config: ViTConfig
    embedding = "patch_embed."

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.layout = vit_layout(config)
        self.space = vit_space(config)
        cuts = self.layout.cuts
        self.cls_token = nn.Parameter(torch.empty(cuts["cls_token"].full_shape))
        if config.num_reg_tokens:
            self.reg_token = nn.Parameter(torch.empty(cuts["reg_token"].full_shape))
        if config.position == "learned":
            self.pos_embed = nn.Parameter(torch.empty(cuts["pos_embed"].full_shape))
        self.mask_token = nn.Parameter(torch.empty(cuts["mask_token"].full_shape))
        self.patch_embed = PatchEmbed(cuts["patch_embed.proj.weight"], cuts["patch_embed.proj.bias"])
        block = EvaBlock if config.position == "rope" else Block
        self.blocks = nn.ModuleList(block(config, index) for index in range(config.depths[-1]))
        self.norm = ElasticLayerNorm(cuts["norm.weight"], eps=config.norm_eps)

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
        blocks = self.layout.stages[0].kept(subnet.depths[0])
        kept = self._draw_rows(shapes, len(blocks), rows_rng, x.device)
        rotations = self._rotations(crops)
        for block, rows in zip(blocks, kept, strict=True):
            x = self.blocks[block](x, shapes, subnet.width, rows, rotations)
        x = self.norm(x, subnet.width)
        return [Features(part[:, 0], part[:, self.num_prefix_tokens :]) for part in _batches(x, shapes)]

    def forward_intermediates(self, image: Float[Tensor, "B c h w"], subnet: Subnet) -> list[Float[Tensor, "B _ _ _"]]:
        """See `Backbone.forward_intermediates`: the patch vectors after each kept block, before the final norm."""
        grid = self._grid(image)
        maps = (x[:, self.num_prefix_tokens :].transpose(1, 2) for x in self._block_tokens(image, subnet))
        return [tokens.unflatten(2, grid) for tokens in maps]

    def last_blocks(self, image: Float[Tensor, "B c h w"], subnet: Subnet, num_blocks: int) -> list[Features]:
        """See `Backbone.last_blocks`."""
        tokens = self._block_tokens(image, subnet)[-num_blocks:]
        normed = [self.norm(x, subnet.width) for x in tokens]
        return [Features(x[:, 0], x[:, self.num_prefix_tokens :]) for x in normed]

    def _block_tokens(self, image: Tensor, subnet: Subnet) -> list[Float[Tensor, "B N C"]]:
        """All tokens after each kept block."""
        x = self._embed(image, None, subnet.width)
        rotations = self._rotations([image])
        shape = (x.shape[0], x.shape[1])
        x = x.flatten(0, 1)
        found = []
        for block in self.layout.stages[0].kept(subnet.depths[0]):
            x = self.blocks[block](x, (shape,), subnet.width, None, rotations)
            found.append(x.unflatten(0, shape))
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
        if self.config.position == "rope":
            return torch.cat([*prefix, x], dim=1)
        position = self._positions(width, self._grid(image))
        if self.config.no_embed_class:
            return torch.cat([*prefix, x + position], dim=1)
        return torch.cat([*prefix, x], dim=1) + position

    def _grid(self, image: Tensor) -> tuple[int, int]:
        return image.shape[-2] // self.config.patch_size, image.shape[-1] // self.config.patch_size

    def _rotations(self, crops: Sequence[Tensor]) -> tuple[Rotation, ...] | None:
        config = self.config
        if config.position == "learned":
            return None
        return tuple(
            rotation(self._grid(crop), self.num_prefix_tokens, config.head_dim, config.rope_temperature, crop.device)
            for crop in crops
        )

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

    def timm_model(self, subnet: Subnet, image_size: int) -> TimmModel:
        """See `Backbone.timm_model`."""
        config = self.config
        hidden = hidden_channels(config, subnet.width)
        arguments = {
            "img_size": image_size,
            "patch_size": config.patch_size,
            "in_chans": config.num_channels,
            "embed_dim": subnet.width,
            "depth": subnet.depths[0],
            "num_heads": subnet.width // config.head_dim,
            "mlp_ratio": mlp_ratio_of(hidden, subnet.width),
            "init_values": config.init_values,
            "qkv_bias": config.qkv_bias,
        }
        described = {"pool_size": None, "first_conv": "patch_embed.proj", "classifier": "head"}
        if config.position == "rope":
            stock = "vit_small_patch16_dinov3" if config.norm_eps == 1e-5 else "eva02_tiny_patch14_224"
            return TimmModel(stock, arguments | self._eva_arguments(), described | {"fixed_input_size": False}, "token")
        arguments |= {"reg_tokens": config.num_reg_tokens, "no_embed_class": config.no_embed_class}
        if config.mlp == "gelu":
            return TimmModel("vit_tiny_patch16_224", arguments, described, "token")
        # timm passes over arguments that are None, and this stock model has LayerScale; with 0 it has none.
        arguments |= {"mlp_ratio": mlp_ratio_of(2 * hidden, subnet.width), "init_values": config.init_values or 0.0}
        return TimmModel("vit_giant_patch14_dinov2", arguments, described, "token")

    def _eva_arguments(self) -> dict[str, Any]:
        return {
            "num_reg_tokens": self.config.num_reg_tokens,
            "swiglu_mlp": self.config.mlp != "gelu",
            "swiglu_align_to": 1 if self.config.mlp == "swiglu" else 0,
            "use_abs_pos_emb": False,
            "use_rot_pos_emb": True,
            "rope_type": "dinov3",
            "rope_temperature": self.config.rope_temperature,
            "rope_rotate_half": True,
            "dynamic_img_size": True,
            "use_fc_norm": False,
            "global_pool": "token",
        }

    def timm_features(self, model: nn.Module, images: Float[Tensor, "B c h w"]) -> Features:
        """See `Backbone.timm_features`."""
        tokens = model.forward_features(images)  # type: ignore[operator]
        return Features(tokens[:, 0], tokens[:, self.num_prefix_tokens :])

    def for_image_size(self, name: str, window: Window, image_size: int) -> Window:
        """See `Backbone.for_image_size`: the position embedding is resized."""
        if name != "pos_embed":
            return window
        side, new = (size // self.config.patch_size for size in (self.config.image_size, image_size))
        num_prefix = 0 if self.config.no_embed_class else self.num_prefix_tokens
        return Window(resize_positions(window.view, (side, side), (new, new), num_prefix))

    def adapted(self, name: str, tensor: Tensor) -> Tensor | None:
        """See `Backbone.adapted`; also the position embedding of another square grid of patches."""
        if name != "pos_embed":
            return super().adapted(name, tensor)
        num_prefix = 0 if self.config.no_embed_class else self.num_prefix_tokens
        side = math.isqrt(tensor.shape[1] - num_prefix)
        if side * side != tensor.shape[1] - num_prefix:
            return None
        return resize_positions(tensor, (side, side), (self.config.mask_side, self.config.mask_side), num_prefix)

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
                elif name.split(".")[-1].startswith("gamma"):
                    parameter.fill_(self.config.init_values or 1.0)
                elif "norm" in name:
                    parameter.fill_(1.0)
                else:
                    nn.init.trunc_normal_(parameter, std=std, generator=generator)


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
    grid = grid.to(torch.promote_types(grid.dtype, torch.float32))
    grid = F.interpolate(grid, scale_factor=factor, mode="bicubic").to(position.dtype)
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
