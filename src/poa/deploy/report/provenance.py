"""What a family came from, as short lists of terms and values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from poa.family import FamilyCard


class Group(NamedTuple):
    """Terms and values that belong together."""

    heading: str
    rows: tuple[tuple[str, str], ...]


def provenance_of(card: FamilyCard, environment: Mapping[str, Any] | None) -> list[Group]:
    """What the family's card and its run tell: training, data, weights, and each start of the run."""
    told = dict(card.provenance)
    data = told.pop("data", {})
    found = [
        Group("Training", tuple(_rows(told))),
        Group("Data", tuple(_rows(data))),
        Group("Weights", (("architecture", card.architecture.name), ("SHA-256", card.weights_sha256))),
    ]
    starts = [] if environment is None else environment.get("starts", [])
    for number, start in enumerate(starts, start=1):
        heading = "Environment" if len(starts) == 1 else f"Environment, start {number}"
        found.append(Group(heading, tuple(_rows(start))))
    return [group for group in found if group.rows]


def _rows(value: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for name, part in value.items():
        term = f"{above}{name.replace('_', ' ')}"
        if isinstance(part, Mapping):
            yield from _rows(part, "" if name in ("packages", "runtime") else f"{term}: ")
        elif isinstance(part, list):
            yield term, ", ".join(map(str, part))
        else:
            yield term, str(part)
