"""Configuration of where the images come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from poa.config.checks import require, require_non_negative, require_positive, require_probability


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from and what happens to those that cannot be read."""

    source: Annotated[str, tyro.conf.arg(aliases=("--data",))] = ""
    """A folder of images (any depth), .parquet files with an image column, .tar files, shards anywhere
    (https://host/shards-{0000..0199}.tar, s3://…, gs://…), or "digits" (built in)."""
    image_column: str = "image"
    """Parquet: the column with the encoded images (bytes, or a struct with a field `bytes`)."""
    label_column: str = "label"
    """Parquet: the column with integer labels, used for monitoring only; it may be absent."""
    max_bad_share: float = 0.01
    """Stop when more than this share of the images cannot be read; below, they are skipped and reported."""
    max_pixels: int = 100_000_000
    """Images with more pixels than this are refused unread (they are reported like unreadable ones)."""
    max_bytes: int = 256 * 2**20
    """Images with more encoded bytes than this are refused unread (they are reported like unreadable ones)."""
    index: str = ""
    """Shards: the file or URL of their index, which `poa data index` makes; by default poa-index.safetensors beside
    them."""
    window: int = 16
    """Shards: how many are shuffled together. The cache holds those of two windows in every lane."""
    lanes: int = 1
    """Shards: every batch takes equally many images from this many lanes, each with shards of its own. With the number
    of machines each of them fetches its own shards only; with 1 each fetches all."""
    cache_dir: str = "~/.cache/poa/shards"
    """Shards: where fetched ones are kept, for all processes of this machine."""
    cache_gb: float = 50.0
    """Shards: the most space that fetched ones take, in units of 10⁹ bytes; the least recently used give way."""
    downloads: int = 4
    """Shards: how many are fetched at the same time, ahead of the training."""
    retries: int = 5
    """Shards: how often a failed download is tried again."""
    retry_seconds: float = 1.0
    """Shards: the wait before the first new try; it doubles each time, up to a minute, and varies by half of it."""
    stall_seconds: float = 60.0
    """Shards: a download that brings nothing for this long has failed."""

    def __post_init__(self) -> None:
        require_probability("data.max_bad_share", self.max_bad_share)
        for name in ("max_pixels", "max_bytes", "cache_gb", "stall_seconds"):
            require_positive(f"data.{name}", getattr(self, name))
        for name in ("window", "lanes", "downloads"):
            require(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "1 or more")
        require_non_negative("data.retries", self.retries)
        require_non_negative("data.retry_seconds", self.retry_seconds)
        require(bool(self.cache_dir), "data.cache_dir", self.cache_dir, "a directory")
