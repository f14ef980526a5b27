"""The teacher: an exponential moving average of the student."""

from __future__ import annotations

import torch
from torch import nn

from poa.distributed import own_part


@torch.no_grad()
def ema_update_(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Teacher ← momentum · teacher + (1 − momentum) · student, in place, for every parameter."""
    torch._foreach_lerp_(
        [own_part(parameter.data) for parameter in teacher.parameters()],
        [own_part(parameter.data) for parameter in student.parameters()],
        1.0 - momentum,
    )
