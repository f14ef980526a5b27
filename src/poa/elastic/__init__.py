"""The elastic core: sub-networks as values, and the one rule that cuts them out of a super-network."""

from poa.elastic.draws import DrawMode, SubnetDraws
from poa.elastic.reorder import ChannelGroup, channel_groups, feature_order, num_units, reordered
from poa.elastic.slicing import (
    Axis,
    Cut,
    Layout,
    Stage,
    Window,
    cut_state,
    elastic,
    fixed,
    kept_blocks,
    num_params,
    windows,
)
from poa.elastic.subnet import SearchSpace, Subnet

__all__ = [
    "Axis",
    "ChannelGroup",
    "Cut",
    "DrawMode",
    "Layout",
    "SearchSpace",
    "Stage",
    "Subnet",
    "SubnetDraws",
    "Window",
    "channel_groups",
    "cut_state",
    "elastic",
    "feature_order",
    "fixed",
    "kept_blocks",
    "num_params",
    "num_units",
    "reordered",
    "windows",
]
