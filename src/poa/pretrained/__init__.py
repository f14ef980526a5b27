"""Starting from public weights: reading them, filling the intact network, putting the channels that matter first."""

from poa.pretrained.fill import FillReport, fill_
from poa.pretrained.importance import channel_orders
from poa.pretrained.sources import Grown, PublicWeights, grown_from, open_weights
from poa.pretrained.start import StartReport, start_from_

__all__ = [
    "FillReport",
    "Grown",
    "PublicWeights",
    "StartReport",
    "channel_orders",
    "fill_",
    "grown_from",
    "open_weights",
    "start_from_",
]
