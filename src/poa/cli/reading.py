"""The options of how images are read, the same in every command that takes a source of images."""

from __future__ import annotations

from dataclasses import dataclass

from poa.config import DataConfig


@dataclass(frozen=True)
class ReadingOptions:
    """How images are read."""

    image_column: str = "image"
    """Parquet: the column with the encoded images."""
    label_column: str = "label"
    """Parquet: the column with the labels."""
    max_bad_share: float = 0.01
    """Refuse when more than this share of the images cannot be read; below, they are left out and reported."""

    def config(self) -> DataConfig:
        """The same for `open_source`."""
        return DataConfig("", self.image_column, self.label_column, self.max_bad_share)
