"""Elastic layers: ordinary layers that cut their own parameters to the width they are called with.

No layer remembers a width. Each is made from the cuts of its parameters, so the table of shapes and the layers
cannot disagree.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from poa.elastic.slicing import Cut


class ElasticLinear(nn.Module):
    """A linear layer whose inputs and outputs shrink with the width (POA §3.2).

    The factor for fewer inputs is part of the weight's cut; the bias has none.
    """

    def __init__(self, weight: Cut, bias: Cut | None = None) -> None:
        super().__init__()
        self.weight_cut = weight
        self.bias_cut = bias
        self.weight = nn.Parameter(torch.empty(weight.full_shape))
        self.bias = None if bias is None else nn.Parameter(torch.empty(bias.full_shape))

    def forward(
        self, x: Float[Tensor, "... inputs"], width: int, bias: Float[Tensor, "outputs"] | None = None
    ) -> Float[Tensor, "... outputs"]:
        """The layer's output at that width; `bias` stands in for a bias of its own, and is cut already."""
        if self.bias is not None and self.bias_cut is not None:
            bias = self.bias_cut.apply(self.bias, width)
        return F.linear(x, self.weight_cut.apply(self.weight, width), bias)


class ElasticConv2d(nn.Module):
    """A two-dimensional convolution whose inputs and outputs shrink with the width.

    The factor for fewer inputs is part of the weight's cut. A depthwise one has as many groups as active channels.
    """

    def __init__(
        self, weight: Cut, bias: Cut | None = None, *, stride: int = 1, padding: int = 0, depthwise: bool = False
    ) -> None:
        super().__init__()
        self.weight_cut = weight
        self.bias_cut = bias
        self.stride = stride
        self.padding = padding
        self.depthwise = depthwise
        self.weight = nn.Parameter(torch.empty(weight.full_shape))
        self.bias = None if bias is None else nn.Parameter(torch.empty(bias.full_shape))

    def forward(self, x: Float[Tensor, "B inputs _ _"], width: int) -> Float[Tensor, "B outputs _ _"]:
        """The layer's output at that width."""
        weight = self.weight_cut.apply(self.weight, width)
        bias = None if self.bias is None or self.bias_cut is None else self.bias_cut.apply(self.bias, width)
        groups = weight.shape[0] if self.depthwise else 1
        # A map of one place has one output at any stride. oneDNN's bfloat16 gradient of the weights is undefined there
        # for strides above 1 (seen in torch 2.14 on CPUs with AVX-512 BF16).
        stride = 1 if x.shape[-2:] == (1, 1) and weight.shape[-1] == 2 * self.padding + 1 else self.stride
        return F.conv2d(x, weight, bias, stride=stride, padding=self.padding, groups=groups)


class ElasticLayerNorm(nn.Module):
    """Layer normalisation over the active channels."""

    def __init__(self, cut: Cut, eps: float = 1e-6) -> None:
        super().__init__()
        self.cut = cut
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(cut.full_shape))
        self.bias = nn.Parameter(torch.empty(cut.full_shape))

    def forward(self, x: Float[Tensor, "... channels"], width: int) -> Float[Tensor, "... channels"]:
        """`x` normalised over its last axis."""
        weight = self.cut.apply(self.weight, width)
        return F.layer_norm(x, weight.shape, weight, self.cut.apply(self.bias, width), self.eps)


class ElasticLayerNorm2d(ElasticLayerNorm):
    """Layer normalisation over the active channels of each place of a map."""

    def forward(self, x: Float[Tensor, "B channels h w"], width: int) -> Float[Tensor, "B channels h w"]:
        """`x` normalised over its second axis."""
        return super().forward(x.permute(0, 2, 3, 1), width).permute(0, 3, 1, 2)


class ElasticGroupNorm(nn.Module):
    """Group normalisation over the active channels, in the same number of groups at every width."""

    def __init__(self, cut: Cut, num_groups: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.cut = cut
        self.num_groups = num_groups
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(cut.full_shape))
        self.bias = nn.Parameter(torch.empty(cut.full_shape))

    def forward(self, x: Float[Tensor, "B channels h w"], width: int) -> Float[Tensor, "B channels h w"]:
        """`x` normalised within each group of channels."""
        weight, bias = self.cut.apply(self.weight, width), self.cut.apply(self.bias, width)
        return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class ElasticLayerScale(nn.Module):
    """A learned factor for each channel of a residual branch (Touvron et al., CaiT)."""

    def __init__(self, cut: Cut) -> None:
        super().__init__()
        self.cut = cut
        self.gamma = nn.Parameter(torch.empty(cut.full_shape))

    def forward(self, x: Float[Tensor, "... channels"], width: int) -> Float[Tensor, "... channels"]:
        """`x` times the factors of its channels."""
        return x * self.cut.apply(self.gamma, width)
