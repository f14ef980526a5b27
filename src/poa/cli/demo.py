"""`poa demo`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from poa.demo import DemoResult


@dataclass(frozen=True)
class Demo:
    """Pre-train on 1,437 handwritten digits, evaluate every sub-network, draw the result, extract one sub-network.

    Needs no data of your own and a few minutes on two CPU cores.
    """

    out: Path = Path("poa-demo")
    """The directory for everything that the demo writes."""


def run(arguments: Sequence[str]) -> int:
    """Runs the command."""
    command = tyro.cli(Demo, prog="poa demo", args=list(arguments))
    from poa.demo import run_demo
    from poa.train import ConsoleReporter

    console = Console()
    found = run_demo(command.out, ConsoleReporter(), lambda text: console.print(f"\n[bold]{text}"))
    if found is None:
        print(f"Stopped; `poa demo --out {command.out}` goes on.", file=sys.stderr)
        return 130
    console.print(
        f"   {found.verification.subnet} in {found.extracted}: relative difference to the family "
        f"{found.verification.relative_difference:.1e} (allowed {found.verification.tolerance:g})",
        soft_wrap=True,
    )
    title = f"k-NN accuracy on {found.num_test} held-out digits (raw pixels: {found.raw_pixels:.1%})"
    console.print(f"\n{title}", highlight=False, soft_wrap=True)
    console.print(_table(found))
    console.print(f"The picture: {found.picture}")
    page = command.out / "report.html"
    console.print(f"On one page: poa report {command.out / 'run'} --out {page}", highlight=False, soft_wrap=True)
    return 0


def _table(found: DemoResult) -> Table:
    table = Table()
    table.add_column("sub-network")
    for name in ("parameters", "k-NN", "untrained"):
        table.add_column(name, justify="right")
    for after, before in zip(found.results, found.untrained, strict=True):
        table.add_row(after.network, f"{after.num_params:,}", f"{after.value:.1%}", f"{before.value:.1%}")
    return table
