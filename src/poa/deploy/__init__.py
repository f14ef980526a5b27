"""Extracted networks in the formats of other libraries."""

from poa.deploy.transformers import open_transformers_directory, save_transformers, transformers_model

__all__ = ["open_transformers_directory", "save_transformers", "transformers_model"]
