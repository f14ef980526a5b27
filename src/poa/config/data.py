"""Configuration of where the images come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from poa.config.checks import require_positive, require_probability


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from and what happens to those that cannot be read."""

    source: Annotated[str, tyro.conf.arg(aliases=("--data",))] = ""
    """A folder of images (any depth), .parquet files with an image column, .tar files, or "digits" (built in)."""
    image_column: str = "image"
    """Parquet: the column with the encoded images (bytes, or a struct with a field `bytes`)."""
    label_column: str = "label"
    """Parquet: the column with integer labels, used for monitoring only; it may be absent."""
    max_bad_share: float = 0.01
    """Stop when more than this share of the images cannot be read; below, they are skipped and reported."""
    max_pixels: int = 100_000_000
    """Images with more pixels than this are refused unread (they are reported like unreadable ones)."""

    def __post_init__(self) -> None:
        require_probability("data.max_bad_share", self.max_bad_share)
        require_positive("data.max_pixels", self.max_pixels)
