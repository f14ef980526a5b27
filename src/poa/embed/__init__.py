"""The vectors of any number of images, in a Parquet file."""

from poa.embed.parts import read_vectors
from poa.embed.run import Embedded, EmbedOptions, Share, embed

__all__ = ["EmbedOptions", "Embedded", "Share", "embed", "read_vectors"]
