"""Plain layers of one width whose weights are windows into a super-network's: nothing is copied to make them.

The factor for fewer inputs (POA's elastic layers) is not folded into the weights, which others share, but given to the
matrix product, where it costs nothing.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class SharedLinear(nn.Module):
    """A linear layer on a window of another layer's weight.

    Args:
        weight: rows and columns of the window; any strides.
        bias: as long as the window has rows.
        scale: the factor on the weight.
    """

    def __init__(self, weight: Float[Tensor, "n c"], bias: Float[Tensor, "n"] | None, scale: float) -> None:
        super().__init__()
        self.weight = frozen(weight)
        self.bias = None if bias is None else frozen(bias)
        self.scale = scale

    def forward(self, x: Float[Tensor, "... c"]) -> Float[Tensor, "... n"]:
        """The product x Wᵀ times the factor, plus the bias."""
        start, share = (x.new_zeros(()), 0) if self.bias is None else (self.bias, 1)
        y = torch.addmm(start, x.reshape(-1, x.shape[-1]), self.weight.t(), beta=share, alpha=self.scale)
        return y.view(*x.shape[:-1], y.shape[-1])


class SharedStackedLinear(nn.Module):
    """Several linear layers of one input, each a window into one block of a stacked weight (queries, keys, values).

    The windows lie apart, so no single matrix covers them; they are one batched product.

    Args:
        weight: the window of each block.
        bias: the same of the bias.
        scale: the factor on the weight.
        is_flat: whether the outputs stand side by side in one axis, which takes a copy of them; else they have an axis
            of their own, which timm's attention reads as well.
    """

    def __init__(
        self, weight: Float[Tensor, "g n c"], bias: Float[Tensor, "g n"] | None, scale: float, *, is_flat: bool
    ) -> None:
        super().__init__()
        self.weight = frozen(weight)
        self.bias = None if bias is None else frozen(bias)
        self.scale = scale
        self.is_flat = is_flat

    def forward(self, x: Float[Tensor, "*batch c"]) -> Float[Tensor, "*batch _"] | Float[Tensor, "*batch _ _"]:
        """The blocks' outputs: [..., g, n], or [..., g · n] if flat."""
        rows = x.reshape(-1, x.shape[-1]).expand(self.weight.shape[0], -1, -1)
        bias = self.stacked_bias()
        start, share = (x.new_zeros(()), 0) if bias is None else (bias.unsqueeze(1), 1)
        y = torch.baddbmm(start, rows, self.weight.transpose(1, 2), beta=share, alpha=self.scale)
        y = y.transpose(0, 1)
        y = y.flatten(1) if self.is_flat else y
        found: Tensor = y.unflatten(0, x.shape[:-1])
        return found

    def stacked_bias(self) -> Float[Tensor, "g n"] | None:
        """The bias of each block."""
        return self.bias


class SharedMergingLinear(nn.Module):
    """A linear layer whose inputs come in blocks, each meeting a window into one block of the weight's columns.

    The windows lie apart, so the output is the sum of one product for each.

    Args:
        weight: the window of each block of columns.
        bias: as long as the weight has rows.
        scale: the factor on the weight.
    """

    def __init__(self, weight: Float[Tensor, "n g c"], bias: Float[Tensor, "n"] | None, scale: float) -> None:
        super().__init__()
        self.weight = frozen(weight)
        self.bias = None if bias is None else frozen(bias)
        self.scale = scale

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch n"]:
        """The sum of the products x_g W_gᵀ times the factor, plus the bias."""
        blocks = x.reshape(-1, *self.weight.shape[1:]).unbind(1)
        y, share = (x.new_zeros(()), 0) if self.bias is None else (self.bias, 1)
        for block, weight in zip(blocks, self.weight.unbind(1), strict=True):
            y, share = torch.addmm(y, block, weight.t(), beta=share, alpha=self.scale), 1
        return y.view(*x.shape[:-1], y.shape[-1])


class SharedLayerNorm(nn.Module):
    """Layer normalisation whose factors are windows into blocks of another one's: the short vectors are joined anew.

    Args:
        weight: the window of each block.
        bias: the same of the bias.
        eps: added to the variance.
    """

    def __init__(self, weight: Float[Tensor, "g n"], bias: Float[Tensor, "g n"], eps: float) -> None:
        super().__init__()
        self.weight = frozen(weight)
        self.bias = frozen(bias)
        self.eps = eps

    def forward(self, x: Float[Tensor, "*batch channels"]) -> Float[Tensor, "*batch channels"]:
        """`x` normalised over its last axis."""
        return F.layer_norm(x, (self.weight.numel(),), self.weight.flatten(), self.bias.flatten(), self.eps)


class SharedConv2d(nn.Module):
    """A convolution on a window of another one's weight.

    Convolutions take dense weights: the window, times its factor, is copied for each call and freed after it.

    Args:
        like: gives stride, padding, dilation and groups.
        weight: the window.
        bias: as long as the window has output channels.
        scale: the factor on the weight.
    """

    def __init__(
        self, like: nn.Conv2d, weight: Float[Tensor, "n c k l"], bias: Float[Tensor, "n"] | None, scale: float
    ) -> None:
        super().__init__()
        self.weight = frozen(weight)
        self.bias = None if bias is None else frozen(bias)
        self.scale = scale
        self.how = (like.stride, like.padding, like.dilation, like.groups)

    def forward(self, x: Float[Tensor, "B c _ _"]) -> Float[Tensor, "B n _ _"]:
        """The convolution's output."""
        return F.conv2d(x, self.weight * self.scale, self.bias, *self.how)  # type: ignore[arg-type]


def frozen(window: Tensor) -> nn.Parameter:
    """The window as a parameter that shares its memory and does not learn."""
    return nn.Parameter(window.detach(), requires_grad=False)
