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

    def forward(self, x: Float[Tensor, "... inputs"], width: int) -> Float[Tensor, "... outputs"]:
        """The layer's output at that width."""
        bias = None if self.bias is None or self.bias_cut is None else self.bias_cut.apply(self.bias, width)
        return F.linear(x, self.weight_cut.apply(self.weight, width), bias)


class ElasticLayerNorm(nn.Module):
    """Layer normalisation over the active channels."""

    def __init__(self, cut: Cut, eps: float) -> None:
        super().__init__()
        self.cut = cut
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(cut.full_shape))
        self.bias = nn.Parameter(torch.empty(cut.full_shape))

    def forward(self, x: Float[Tensor, "... channels"], width: int) -> Float[Tensor, "... channels"]:
        """`x` normalised over its last axis."""
        weight = self.cut.apply(self.weight, width)
        return F.layer_norm(x, weight.shape, weight, self.cut.apply(self.bias, width), self.eps)


class ElasticLayerScale(nn.Module):
    """A learned factor for each channel of a residual branch (Touvron et al., CaiT)."""

    def __init__(self, cut: Cut) -> None:
        super().__init__()
        self.cut = cut
        self.gamma = nn.Parameter(torch.empty(cut.full_shape))

    def forward(self, x: Float[Tensor, "... channels"], width: int) -> Float[Tensor, "... channels"]:
        """`x` times the factors of its channels."""
        return x * self.cut.apply(self.gamma, width)
