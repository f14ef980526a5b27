"""Putting channels into another order, without changing what the intact network computes.

What runs along an axis is named in the table (`Axis.channels`). All axes of one name are permuted together: the
attention heads of a block, the hidden channels of its MLP, the channels of the residual stream. Norms run over all
channels, so they do not mind; the features come out in the stream's new order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from poa.elastic.slicing import Axis, Layout
from poa.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ChannelGroup:
    """Axes that are permuted together.

    Attributes:
        name: as in `Axis.channels`.
        num_units: how many units there are to put into an order.
    """

    name: str
    num_units: int


def channel_groups(layout: Layout) -> dict[str, ChannelGroup]:
    """The groups of a table by their names, in the order of the table.

    Raises:
        ConfigError: two axes of one name have different numbers of units: the table is wrong.
    """
    found: dict[str, ChannelGroup] = {}
    for name, cut in layout.cuts.items():
        for axis in cut.axes:
            if axis.channels is None:
                continue
            group = ChannelGroup(axis.channels, num_units(axis))
            if found.setdefault(axis.channels, group) != group:
                raise ConfigError(f"{name}: {axis.channels} has {group.num_units} units here and others elsewhere.")
    return found


def num_units(axis: Axis) -> int:
    """How many units each of the axis' equal blocks consists of."""
    return axis.size // axis.num_groups // axis.unit


def reordered(layout: Layout, state: Mapping[str, Tensor], orders: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The intact network's state dict with the channels of each named group in a new order.

    Args:
        layout: the super-network's table.
        state: its state dict; every tensor of the table.
        orders: for each group's name the old positions of its units in their new order, a permutation.
    """
    result = dict(state)
    for name, cut in layout.cuts.items():
        for dim, axis in enumerate(cut.axes):
            if axis.channels is not None and axis.channels in orders:
                index = _positions(axis, orders[axis.channels])
                result[name] = result[name].index_select(dim, index.to(result[name].device))
    return result


def feature_order(layout: Layout, orders: Mapping[str, Tensor]) -> Tensor | None:
    """Where each channel of the reordered network's features stood before; None if they kept their order."""
    order = orders.get(layout.features.channels or "")
    return None if order is None else _positions(layout.features, order)


def _positions(axis: Axis, order: Tensor) -> Tensor:
    """The old position of every element along the axis, in the new order."""
    import torch

    one = (order.view(-1, 1) * axis.unit + torch.arange(axis.unit, device=order.device)).flatten()
    length = axis.size // axis.num_groups
    return torch.cat([one + block * length for block in range(axis.num_groups)])
