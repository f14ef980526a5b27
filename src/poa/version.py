"""The version of poa, as installed."""

from importlib.metadata import version

__version__ = version("poa")
