"""The optimiser: AdamW with layer-wise learning rates."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from poa.config import OptimConfig
from poa.distributed import whole
from poa.objective.poa import Branch
from poa.train.schedules import StepValues


class Multipliers(NamedTuple):
    """How one parameter's learning rate and weight decay differ from the schedules'."""

    lr: float
    weight_decay: float
    rate: Literal["lr", "last_layer_lr", "backbone_lr"]
    """Which of the schedules' learning rates it follows."""


def parameter_multipliers(student: Branch, optim: OptimConfig) -> dict[str, Multipliers]:
    """The multipliers of every parameter of the student.

    A backbone parameter of layer i (`Backbone.layer_of`) learns at layer_decay^(top − i), the patch embedding at a
    further `patch_embed_lr_scale`; heads at 1. Parameters of one axis (biases, norms, LayerScale) have no weight decay.
    The heads' last layers and, when it starts from public weights, the backbone are frozen at first.
    """
    backbone = student.backbone
    top = backbone.num_layers() - 1
    found = {}
    for name, parameter in student.named_parameters():
        lr = 1.0
        rate: Literal["lr", "last_layer_lr", "backbone_lr"] = "last_layer_lr" if ".last_layer." in name else "lr"
        if name.startswith("backbone."):
            rate = "backbone_lr"
            inner = name.removeprefix("backbone.")
            lr = optim.layer_decay ** (top - backbone.layer_of(inner))
            if backbone.embedding is not None and inner.startswith(backbone.embedding):
                lr *= optim.patch_embed_lr_scale
        decays = parameter.ndim > 1
        found[name] = Multipliers(lr, float(decays), rate)
    return found


def make_optimizer(student: Branch, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the student's parameters, grouped by their multipliers; `set_step_values_` gives it its rates."""
    groups: dict[Multipliers, list[Tensor]] = {}
    multipliers = parameter_multipliers(student, optim)
    for name, parameter in student.named_parameters():
        groups.setdefault(multipliers[name], []).append(parameter)
    settings: list[dict[str, Any]] = [
        {"params": members, "multipliers": key, "lr": 0.0, "weight_decay": 0.0} for key, members in groups.items()
    ]
    return torch.optim.AdamW(settings, betas=(optim.beta1, optim.beta2), eps=1e-8, fused=True)


def set_step_values_(optimizer: torch.optim.Optimizer, values: StepValues) -> None:
    """Gives every group of the optimiser the step's learning rate and weight decay, in place."""
    for group in optimizer.param_groups:
        key: Multipliers = group["multipliers"]
        group["lr"] = getattr(values, key.rate) * key.lr
        group["weight_decay"] = values.weight_decay * key.weight_decay


def clip_gradients_(student: Branch, max_norm: float) -> dict[str, Tensor]:
    """Clips the gradient norms of backbone and heads, each, in place; gives back the norms before clipping.

    With `max_norm` 0 the gradients are left as they are.
    """
    norms = {}
    for name, module in (("backbone", student.backbone), ("heads", student.heads)):
        norms[name] = _clip(module, max_norm)
    return norms


def _clip(module: nn.Module, max_norm: float) -> Tensor:
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(gradients))
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(module.parameters(), max_norm, norm)
    return norm
