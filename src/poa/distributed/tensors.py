"""Tensors that are divided among processes."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory: all of it, or its part of a divided one."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor in one piece; of a divided one a copy, for which all processes must ask together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
