"""Images in shards that do not fit the disk: an index, a bounded cache, and downloads that are tried again."""

from poa.data.shards.build import build_index
from poa.data.shards.cache import CachedShard, ShardCache
from poa.data.shards.index import Shard, ShardIndex, open_index
from poa.data.shards.location import INDEX_NAME, Location, is_url, locate
from poa.data.shards.source import ShardSource

__all__ = [
    "INDEX_NAME",
    "CachedShard",
    "Location",
    "Shard",
    "ShardCache",
    "ShardIndex",
    "ShardSource",
    "build_index",
    "is_url",
    "locate",
    "open_index",
]
