"""Which channels matter, seen on images, and the order that puts them first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from poa.backbones.base import Backbone
from poa.elastic import Axis, Cut, channel_groups, num_units


@torch.no_grad()
def channel_orders(
    backbone: Backbone, images: Float[Tensor, "B c h w"], batch_size: int = 32
) -> dict[str, Int[Tensor, "_"]]:
    """For each group of channels the old positions of its units, the most important first.

    What a channel contributes to a layer that reads it is the mean of its square over all places, times the squared
    norm of its weights there; its share is that over the sum for all channels. A unit's importance is its share,
    summed over all layers that read it. (This is the squared error that dropping it alone would make in the layer's
    output, were channels uncorrelated; compare Molchanov et al., *Importance Estimation for Neural Network Pruning*,
    2019.) Ties keep their order.

    Args:
        backbone: the super-network, with the weights to judge.
        images: normalised images.
        batch_size: images per forward pass.
    """
    groups = channel_groups(backbone.layout)
    device = next(backbone.parameters()).device
    totals = {name: torch.zeros(group.num_units, dtype=torch.float64) for name, group in groups.items()}
    training = backbone.training
    backbone.eval()
    with _watched(backbone) as energies:
        for part in images.split(batch_size):
            backbone([part.to(device)], backbone.space.intact)
    backbone.train(training)
    for module, energy in energies.items():
        axis, weight = _read_axis(module)
        if axis is not None and axis.channels is not None:
            contribution = energy.cpu().double() * weight.detach().cpu().double()
            totals[axis.channels] += _by_unit(contribution / contribution.sum().clamp_min(1e-300), axis)
    return {name: total.argsort(descending=True, stable=True) for name, total in totals.items()}


@contextmanager
def _watched(backbone: Backbone) -> Iterator[dict[nn.Module, Tensor]]:
    """While open, sums up for every elastic layer the mean squares of its input channels."""
    energies: dict[nn.Module, Tensor] = {}

    def watch(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x: Tensor = inputs[0].detach().float()
        if module.get_parameter("weight").ndim == 4:
            x = x.movedim(1, -1)
        energy = x.flatten(0, -2).square().mean(dim=0)
        energies[module] = energies[module] + energy if module in energies else energy

    handles = [
        module.register_forward_pre_hook(watch) for module in backbone.modules() if _read_axis(module)[0] is not None
    ]
    try:
        yield energies
    finally:
        for handle in handles:
            handle.remove()


def _read_axis(module: nn.Module) -> tuple[Axis | None, Tensor]:
    """The axis of the layer's input channels, and the squared norm of the weights that read each channel."""
    cut = getattr(module, "weight_cut", None)
    weight = getattr(module, "weight", None)
    if not isinstance(cut, Cut) or not isinstance(weight, Tensor) or cut.fan_in is None:
        return None, torch.empty(0)
    others = [dim for dim in range(weight.ndim) if dim != cut.fan_in]
    return cut.axes[cut.fan_in], weight.detach().float().square().sum(dim=others)


def _by_unit(values: Float[Tensor, "C"], axis: Axis) -> Float[Tensor, "U"]:
    """The sums over each unit of the axis, its equal blocks added up."""
    return values.view(axis.num_groups, num_units(axis), axis.unit).sum(dim=(0, 2))
