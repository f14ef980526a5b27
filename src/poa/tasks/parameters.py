"""Groups of parameters for training on labels: layer-wise decay of the learning rate, and who has weight decay."""

from __future__ import annotations

from typing import Any

from torch import nn

from poa.backbones.base import Backbone
from poa.config import FitConfig

_PREFIX = "backbone."
_SPARED = {"cls_token", "reg_token", "mask_token", "pos_embed", "relative_position_bias_table"}


def parameter_groups(model: nn.Module, config: FitConfig) -> list[dict[str, Any]]:
    """AdamW's groups, each with `params`, `weight_decay` and `lr_scale`.

    The parameters of `model.backbone` learn at layer_decay^(layers above them), the rest at 1 (BEiT; Bao et al., 2021).
    One-dimensional parameters, tokens and position embeddings have no weight decay, as with timm. With
    `config.freeze` the backbone's parameters stop asking for gradients.
    """
    backbone: Any = model.backbone
    backbone.requires_grad_(not config.freeze)
    depths = {f"{_PREFIX}{name}": depth for name, depth in _layers(backbone).items()}
    top = max(depths.values()) + 1
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = config.layer_decay ** (top - depths.get(name, top))
        decay = 0.0 if parameter.ndim <= 1 or name.split(".")[-1] in _SPARED else config.weight_decay
        group = groups.setdefault((scale, decay), {"params": [], "weight_decay": decay, "lr_scale": scale})
        group["params"].append(parameter)
    return list(groups.values())


def _layers(backbone: nn.Module) -> dict[str, int]:
    """For each parameter its layer, 0 at the input."""
    if isinstance(backbone, Backbone):
        return {name: backbone.layer_of(name) for name, _ in backbone.named_parameters()}
    from timm.models import group_parameters

    timm_model: Any = backbone
    layers: dict[str, int] = group_parameters(timm_model, timm_model.group_matcher(coarse=False), reverse=True)
    return layers
