"""poa: pre-train once, deploy every size.

One self-supervised run on unlabelled images gives a family: one set of weights out of which ready backbones of
many widths and depths are cut, exactly.

    import poa

    family = poa.load("RUN")
    family.subnets                      # every sub-network, the smallest first
    model = family.extract("w64-d4")    # an ordinary timm model
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from poa.version import __version__

if TYPE_CHECKING:
    from poa.config import PretrainConfig, load_recipe
    from poa.elastic import SearchSpace, Subnet
    from poa.family import Family, load
    from poa.train import pretrain


_HOMES = {
    "Family": "poa.family",
    "PretrainConfig": "poa.config",
    "SearchSpace": "poa.elastic",
    "Subnet": "poa.elastic",
    "load": "poa.family",
    "load_recipe": "poa.config",
    "pretrain": "poa.train",
}

__all__ = [
    "Family",
    "PretrainConfig",
    "SearchSpace",
    "Subnet",
    "__version__",
    "load",
    "load_recipe",
    "pretrain",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 (whatever the name stands for)
    """The public names, imported when first used: `import poa` stays light."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'poa' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
