"""`poa evaluate PROTOCOL`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import import_module

from poa.errors import ConfigError

PROTOCOLS = {
    "knn": "weighted k-nearest neighbours",
    "linear": "linear probe, a grid of learning rates in one pass (DINOv2)",
    "logistic": "logistic regression, for small sets",
    "fewshot": "few images per class, or a share of the labels: mean and deviation over draws",
    "retrieval": "mean average precision, recall among the first k",
    "clustering": "k-means against the labels: NMI, ARI, FMI, accuracy",
    "health": "RankMe, alignment, uniformity, agreement with the intact network; needs no labels",
    "robustness": "accuracy under corruptions, dropped and shuffled patches, other backgrounds",
}
"""The protocols on frozen features: the registered evaluators."""

COMMANDS = {
    "sweep": "several protocols over many networks, resumable, into one table",
    "segment": "semantic segmentation: a linear head or UPerNet on every network",
    "detect": "detection and instance segmentation: Faster, Mask or Cascade R-CNN on every network",
    "pictures": "attention, parts in colour, correspondence, prototypes, map of images: sizes side by side",
}
"""The rest, each a module of this package."""


def run(arguments: Sequence[str]) -> int:
    """Runs the command."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    name, rest = arguments[0], list(arguments[1:])
    if name in COMMANDS:
        status: int = import_module(f"poa.cli.evaluate.{name}").run(rest)
        return status
    if name in PROTOCOLS:
        from poa.cli.evaluate import frozen

        return frozen.run(name, rest)
    known = [*PROTOCOLS, *COMMANDS]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ConfigError(f"there is no protocol {name!r}.{hint} Protocols: {', '.join(known)}.")


def _help() -> str:
    listed = {**PROTOCOLS, **COMMANDS}
    width = max(map(len, listed)) + 2
    lines = "\n".join(f"  {name:<{width}}{text}" for name, text in listed.items())
    return (
        "usage: poa evaluate PROTOCOL NETWORKS... [OPTIONS]\n\n"
        "NETWORKS are runs or families of poa, directories in timm's format, or timm:NAME.\n\n"
        f"protocols:\n{lines}\n\n`poa evaluate PROTOCOL --help` explains one."
    )
