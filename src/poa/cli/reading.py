"""The options of how images are read, the same in every command that takes a source of images."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from poa.config import DataConfig


@dataclass(frozen=True)
class ColumnOptions:
    """What of Parquet files is read."""

    image_column: str = "image"
    """Parquet: the column with the encoded images."""
    label_column: str = "label"
    """Parquet: the column with the labels."""


@dataclass(frozen=True)
class SourceOptions(ColumnOptions):
    """Where images are found."""

    index: str = ""
    """Shards: the file or URL of their index; by default poa-index.safetensors beside them."""
    cache_dir: str = DataConfig.cache_dir
    """Shards: where fetched ones are kept, for all processes of this machine."""
    cache_gb: float = DataConfig.cache_gb
    """Shards: the most space that fetched ones take, in units of 10⁹ bytes."""

    def config(self) -> DataConfig:
        """The same for `open_source`."""
        return DataConfig(**asdict(self))


@dataclass(frozen=True)
class ReadingOptions(SourceOptions):
    """How images are read."""

    max_bad_share: float = DataConfig.max_bad_share
    """Refuse when more than this share of the images cannot be read; below, they are left out and reported."""
