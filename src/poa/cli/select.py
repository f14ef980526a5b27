"""`poa select`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import OmitArgPrefixes

from poa.deploy.select import FIGURES, Constraint, SettingFilter, constraint, join, select
from poa.deploy.select.join import described
from poa.deploy.select.pick import QUALITY
from poa.deploy.select.words import (
    Choice,
    beyond_line,
    export_command,
    record,
    relaxation_line,
    runner_up_line,
    shown_figures,
    value_text,
    verdict,
)
from poa.errors import ConfigError
from poa.family import read_card

NOTHING_FITS = 3
"""The exit status where no sub-network is within the budget."""
MAX_SHOWN = 16
"""Rows of the front in the table."""


@dataclass(frozen=True)
class Budget:
    """The limits; a value equal to its limit is allowed. Without any the best sub-network is picked."""

    max_latency: str | None = None
    """Median latency of one batch: 8ms, 0.5s."""
    max_latency_p95: str | None = None
    """95th percentile of the latency of one batch: 12ms."""
    min_throughput: str | None = None
    """Images per second: 200."""
    max_memory: str | None = None
    """Peak memory: 300MB, 0.5GiB."""
    max_size: str | None = None
    """Size of the exported weights: 30MB (10⁶ bytes), 30MiB (2²⁰)."""
    max_params: str | None = None
    """Parameters: 25M."""
    max_flops: str | None = None
    """Operations of one forward pass on one image: 1.2G."""
    min_quality: str | None = None
    """The least quality: 0.85, 85%."""

    def constraints(self, *, has_profile: bool) -> tuple[Constraint, ...]:
        """The limits that are given.

        Raises:
            ConfigError: one cannot be read, or needs a profile and there is none.
        """
        found = []
        for figure in FIGURES.values():
            text = getattr(self, figure.option.removeprefix("--").replace("-", "_"))
            if text is None:
                continue
            found.append(constraint(figure.name, text))
            if figure.source == "profile" and not has_profile:
                raise ConfigError(
                    f"{figure.option} needs a table of the device: give what `poa profile` wrote with --profile."
                )
        return tuple(found)


@dataclass(frozen=True)
class Select:
    """Choose the best sub-network for a budget, from a table of costs and a table of quality.

    The exit status is 0 where something fits and 3 where nothing does; then the nearest limits that would let something
    in are named. No weights are opened.
    """

    path: Annotated[Path, tyro.conf.Positional]
    """A run directory or a family directory."""
    budget: OmitArgPrefixes[Budget]
    setting: OmitArgPrefixes[SettingFilter]
    profile: tuple[Path, ...] = ()
    """Tables of `poa profile`."""
    results: tuple[Path, ...] = ()
    """Tables of `poa evaluate sweep`, segment, detect or `poa finetune --elastic`: results.csv."""
    quality: str | None = None
    """What is to be best: a protocol (knn, linear, …), a figure (rankme, miou) or PROTOCOL/FIGURE of the results;
    params: the largest that fits, where nobody evaluated."""
    num_runner_ups: int = 3
    """How many other choices are named."""
    json: bool = False
    """Print JSON with everything instead."""
    plot: Path | None = None
    """Draw quality against cost into this PNG file."""


def run(arguments: Sequence[str]) -> int:
    """Runs the command: 0, or 3 where nothing fits."""
    command = tyro.cli(Select, prog="poa select", args=list(arguments), config=(tyro.conf.FlagCreatePairsOff,))
    choice = chosen(command)
    if command.plot is not None:
        from poa.deploy.select.picture import save_selection

        save_selection(command.plot, choice)
    if command.json:
        print(json.dumps(record(choice), indent=2, allow_nan=False))
    else:
        show(choice)
    return NOTHING_FITS if choice.selection.pick is None else 0


def chosen(command: Select) -> Choice:
    """What the command chooses."""
    from poa.files import check_writable

    if command.num_runner_ups < 0:
        raise ConfigError(f"--num-runner-ups must be 0 or more; got {command.num_runner_ups}.")
    constraints = command.budget.constraints(has_profile=bool(command.profile))
    if command.plot is not None:
        check_writable(command.plot)
    card = read_card(command.path)
    joined = join(card, command.profile, command.results, command.quality, command.setting)
    selection = select(joined.rows, constraints, num_runner_ups=command.num_runner_ups, is_stand_in=joined.is_stand_in)
    return Choice(command.path, card, joined, constraints, selection)


def show(choice: Choice) -> None:
    """Prints the front, the pick and why, the runner-ups, and the command that gets it."""
    selection, console = choice.selection, Console()
    console.print(front_table(choice))

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    say(verdict(choice))
    if selection.runner_ups:
        say("\nInstead of it:")
        for each in selection.runner_ups:
            say(f"  {runner_up_line(choice, each)}")
    if selection.beyond is not None:
        say(beyond_line(choice, selection.beyond))
    if selection.relaxations:
        say("Nearest limits under which something fits:")
        for relaxation in selection.relaxations:
            say(f"  {relaxation_line(choice, relaxation)}")
    for note in choice.notes:
        say(f"note: {note}")
    if selection.pick is not None:
        say(f"\nGet it with:\n  {export_command(choice, selection.pick.subnet)}")


def front_table(choice: Choice) -> Table:
    """The front around the pick (where nothing fits: what comes nearest), the best quality first."""
    selection, pick = choice.selection, choice.selection.pick
    focus = selection.relaxations[0].row if pick is None else pick
    front = sorted({*selection.front, focus}, key=lambda row: (-row.known(QUALITY), row.place))
    first = max(0, min(front.index(focus) - MAX_SHOWN // 2, len(front) - MAX_SHOWN))
    listed = front[first : first + MAX_SHOWN]
    hidden = f", {len(listed)} shown" if len(listed) < len(front) else ""
    where = "" if choice.joined.setting is None else f"\n{described(choice.joined.setting)}"
    table = Table(title=f"{len(front)} of {len(selection.usable)} sub-networks on the front{hidden}{where}")
    names = shown_figures(choice)
    table.add_column("sub-network", no_wrap=True)
    for name in names:
        table.add_column(choice.joined.quality if name == "quality" else FIGURES[name].label, justify="right")
    table.add_column("beyond" if choice.constraints else "")
    for row in listed:
        over = [each.figure.label for each in choice.constraints if not each.is_met(row.known(each.figure))]
        cells = [f"{'→' if row == pick else ' '} {row.subnet}", *(value_text(row, name) for name in names)]
        table.add_row(*cells, "pick" if row == pick else ", ".join(over), style="bold" if row == pick else None)
    return table
