"""The parts of a Vision Transformer's blocks: attention, the MLPs, the rotary position embedding, the patch embedding.

All run on packed tokens: the rows of all batches of crops, one after the other, as one matrix.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from poa.elastic import Cut
from poa.elastic.layers import ElasticLinear

Shapes = tuple[tuple[int, int], ...]
"""For each batch of crops (rows, tokens per row): how the packed token matrix falls apart."""


class Rotation(NamedTuple):
    """The angles by which one head's queries and keys are turned, the same for every head and every block."""

    cos: Float[Tensor, "N D"]
    """Their cosines."""
    sin: Float[Tensor, "N D"]
    """Their sines."""


@lru_cache(maxsize=64)
def rotation(
    grid: tuple[int, int], num_prefix: int, head_dim: int, temperature: float, device: torch.device
) -> Rotation:
    """DINOv3's rotary position embedding (Siméoni et al. 2025), always in float32.

    The patches' centres are scaled to −1…1, rows and columns each by their own number; period j of head_dim / 4 is
    temperature^(4j / head_dim). The first half of the angles is the rows', the second the columns'; channel i turns
    with channel i + head_dim / 2.

    Args:
        grid: rows and columns of the grid of patches.
        num_prefix: tokens before the patches, which are not turned.
        head_dim: channels of a head, a multiple of 4.
        temperature: see above.
        device: where it is wanted.
    """
    with torch.inference_mode(mode=False):
        centres = [(torch.arange(side, device="cpu") + 0.5) / side * 2 - 1 for side in grid]
        places = torch.cartesian_prod(*centres)
        periods = temperature ** (4 * torch.arange(head_dim // 4, device="cpu") / head_dim)
        angles = (2 * math.pi * places.unsqueeze(-1) / periods).flatten(1)
        angles = F.pad(angles, (0, 0, num_prefix, 0)).repeat(1, 2)
        return Rotation(angles.cos().to(device), angles.sin().to(device))


def rotate(x: Float[Tensor, "B H N D"], by: Rotation) -> Float[Tensor, "B H N D"]:
    """`x` with the pairs of channels of each head turned."""
    first, second = x.chunk(2, dim=-1)
    turned = x * by.cos + torch.cat([-second, first], dim=-1) * by.sin
    return turned.to(x.dtype)


class Attention(nn.Module):
    """Self-attention with heads of a fixed size; a narrower network has fewer heads."""

    def __init__(self, cuts: dict[str, Cut], head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = ElasticLinear(cuts["attn.qkv.weight"], cuts.get("attn.qkv.bias"))
        self.proj = ElasticLinear(cuts["attn.proj.weight"], cuts["attn.proj.bias"])

    def forward(
        self, x: Float[Tensor, "T C"], shapes: Shapes, width: int, rotations: tuple[Rotation, ...] | None = None
    ) -> Float[Tensor, "T C"]:
        """Attention within each row of each batch of crops; `rotations` has one entry per batch."""
        mixed = []
        parts = self._qkv(x, width).split([rows * tokens for rows, tokens in shapes])
        for index, (part, (rows, tokens)) in enumerate(zip(parts, shapes, strict=True)):
            q, k, v = part.view(rows, tokens, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
            if rotations is not None:
                q, k = rotate(q, rotations[index]), rotate(k, rotations[index])
            y = F.scaled_dot_product_attention(q, k, v)
            mixed.append(y.transpose(1, 2).reshape(rows * tokens, -1))
        out: Tensor = self.proj(torch.cat(mixed) if len(mixed) > 1 else mixed[0], width)
        return out

    def _qkv(self, x: Float[Tensor, "T C"], width: int) -> Float[Tensor, "T 3*C"]:
        out: Tensor = self.qkv(x, width)
        return out


class EvaAttention(Attention):
    """The same with the biases of timm's Eva: separate ones for queries and values, none for keys."""

    def __init__(self, cuts: dict[str, Cut], head_dim: int) -> None:
        super().__init__(cuts, head_dim)
        self.bias_cut = cuts.get("attn.q_bias")
        if self.bias_cut is not None:
            self.q_bias = nn.Parameter(torch.empty(self.bias_cut.full_shape))
            self.v_bias = nn.Parameter(torch.empty(self.bias_cut.full_shape))

    def _qkv(self, x: Float[Tensor, "T C"], width: int) -> Float[Tensor, "T 3*C"]:
        if self.bias_cut is None:
            return super()._qkv(x, width)
        q, v = (self.bias_cut.apply(bias, width) for bias in (self.q_bias, self.v_bias))
        out: Tensor = self.qkv(x, width, torch.cat([q, torch.zeros_like(q), v]))
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


class PackedSwiGLU(Mlp):
    """SwiGLU (Shazeer 2020) with gate and value, in this order, from one matrix."""

    def forward(self, x: Float[Tensor, "T C"], width: int) -> Float[Tensor, "T C"]:
        """fc2(SiLU(gate) · value), where (gate, value) = fc1(x)."""
        gate, value = self.fc1(x, width).chunk(2, dim=-1)
        out: Tensor = self.fc2(F.silu(gate) * value, width)
        return out


class SwiGLU(nn.Module):
    """SwiGLU with a matrix for the gate and one for the value."""

    def __init__(self, cuts: dict[str, Cut]) -> None:
        super().__init__()
        self.fc1_g = ElasticLinear(cuts["mlp.fc1_g.weight"], cuts["mlp.fc1_g.bias"])
        self.fc1_x = ElasticLinear(cuts["mlp.fc1_x.weight"], cuts["mlp.fc1_x.bias"])
        self.fc2 = ElasticLinear(cuts["mlp.fc2.weight"], cuts["mlp.fc2.bias"])

    def forward(self, x: Float[Tensor, "T C"], width: int) -> Float[Tensor, "T C"]:
        """fc2(SiLU(fc1_g(x)) · fc1_x(x))."""
        out: Tensor = self.fc2(F.silu(self.fc1_g(x, width)) * self.fc1_x(x, width), width)
        return out


MLPS = {"gelu": Mlp, "swiglu_packed": PackedSwiGLU, "swiglu": SwiGLU}
"""The classes by `ViTConfig.mlp`."""


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
