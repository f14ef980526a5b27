"""`poa subnets`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from poa.family import read_card


@dataclass(frozen=True)
class Subnets:
    """List the sub-networks of a family with their parameters and operations."""

    path: Annotated[Path, tyro.conf.Positional]
    """A run directory or a family directory."""
    json: bool = False
    """Print JSON."""


def run(arguments: Sequence[str]) -> int:
    """Runs the command."""
    command = tyro.cli(Subnets, prog="poa subnets", args=list(arguments), config=(tyro.conf.FlagCreatePairsOff,))
    card = read_card(command.path)
    costs = [(str(subnet), card.num_params(subnet), card.flops(subnet)) for subnet in card.space.subnets]
    if command.json:
        print(json.dumps([dict(zip(("subnet", "num_params", "flops"), row, strict=True)) for row in costs], indent=2))
        return 0
    size = card.preprocessing.image_size
    table = Table(title=f"{len(costs)} sub-networks, {size}×{size} px")
    for name, justify in (("sub-network", "left"), ("parameters", "right"), ("size", "right"), ("MFLOPs", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name, num_params, flops in costs:
        table.add_row(name, f"{num_params:,}", f"{num_params * 4 / 1e6:.1f} MB", f"{flops / 1e6:,.1f}")
    Console().print(table)
    return 0
