"""Preparing data: a look at every image, and the conversion of any source into shards."""

from poa.data.tools.check import CheckOptions, Findings, check_images, spread
from poa.data.tools.convert import ShardOptions, Written, with_class_names, write_shards
from poa.data.tools.plot import plot_sizes
from poa.data.tools.verify import ShardFault, ShardFindings, verify_shards

__all__ = [
    "CheckOptions",
    "Findings",
    "ShardFault",
    "ShardFindings",
    "ShardOptions",
    "Written",
    "check_images",
    "plot_sizes",
    "spread",
    "verify_shards",
    "with_class_names",
    "write_shards",
]
