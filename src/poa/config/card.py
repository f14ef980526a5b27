"""What poa's JSON files hold: the schemas of `family.json`, `head.json` and `environment.json`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from poa.config.checks import require

MAX_NESTING = 16
"""How deep the objects and lists of the provenance may be nested."""


@dataclass(frozen=True)
class WeightsEntry:
    """The file of the weights."""

    file: str
    """Its name, in the card's directory."""
    sha256: str
    """The SHA-256 of its bytes, in hexadecimal."""

    def __post_init__(self) -> None:
        require(re.fullmatch("[0-9a-f]{64}", self.sha256) is not None, "weights.sha256", self.sha256, "64 hex digits")


@dataclass(frozen=True)
class CardFile:
    """`family.json`, its parts not yet understood."""

    format: str
    version: int
    architecture: str
    config: dict[str, Any]
    preprocessing: dict[str, Any]
    weights: WeightsEntry
    provenance: dict[str, Any]
    """Where the family came from. What poa itself looks into, `init`, `finetuned` and `data`, are objects."""

    def __post_init__(self) -> None:
        for name in ("init", "finetuned", "data"):
            part = self.provenance.get(name, {})
            require(isinstance(part, Mapping), f"provenance.{name}", part, "an object")
        depth = _nesting(self.provenance)
        require(depth <= MAX_NESTING, "provenance", f"{depth} levels", f"nested at most {MAX_NESTING} deep")


@dataclass(frozen=True)
class HeadFile:
    """`head.json`, which describes a family's classifier."""

    format: str
    version: int
    class_names: tuple[str, ...]
    multi_label: bool
    weights: WeightsEntry


@dataclass(frozen=True)
class ImagesEntry:
    """The images that a run began with."""

    source: str
    num_images: int
    num_skipped_when_listing: int
    fingerprint: str


@dataclass(frozen=True)
class EnvironmentFile:
    """`environment.json` of a run: its images, and what each of its starts ran on."""

    data: ImagesEntry
    starts: list[dict[str, Any]]


def _nesting(value: object) -> int:
    """How deep the value is nested, counted no further than `MAX_NESTING` + 1."""
    level, depth = [value], 0
    while level and depth <= MAX_NESTING:
        inner: list[object] = []
        for each in level:
            if isinstance(each, Mapping):
                inner += each.values()
            elif isinstance(each, list):
                inner += each
        level, depth = inner, depth + bool(inner)
    return depth
