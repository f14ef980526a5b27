"""The elastic core: sub-networks as values, and the one rule that cuts them out of a super-network."""

from poa.elastic.slicing import Axis, Cut, Layout, Stage, cut_state, elastic, fixed, kept_blocks, num_params
from poa.elastic.subnet import SearchSpace, Subnet

__all__ = [
    "Axis",
    "Cut",
    "Layout",
    "SearchSpace",
    "Stage",
    "Subnet",
    "cut_state",
    "elastic",
    "fixed",
    "kept_blocks",
    "num_params",
]
