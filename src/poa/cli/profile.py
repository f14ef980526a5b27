"""`poa profile`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from poa.cli.evaluate.options import formatted
from poa.cli.progress import bars
from poa.errors import ConfigError

if TYPE_CHECKING:
    from poa.deploy.profile import ProfileRow, Setting
    from poa.deploy.profile.fit import HeldOut
    from poa.deploy.profile.run import Profile, ProfileOptions

OF_BUNDLE = {"bundle", "subnets", "num_measured", "runtime", "image_size", "overwrite"}
OF_COMPLETE = {"complete", "out", "json"}
OUT = Path("profile.csv")


@dataclass(frozen=True)
class ProfileCommand:
    """Measure latency, memory and size of sub-networks into a table. Stopped, the same command goes on.

    Of a large family some are measured and the others predicted; the table says which, and how far predictions are off.
    With --bundle a kit is written that fills the same table on another machine, without poa and torch; with --complete
    the sub-networks that were not measured are added to such a table.
    """

    path: Annotated[Path, tyro.conf.Positional]
    """A run directory or a family directory."""
    subnets: tuple[str, ...] = ("all",)
    """Names like w384-d12; all, smallest, middle, intact."""
    num_measured: int | None = None
    """Measure so many of them, spread over widths and depths, and predict the others; all of up to 60, else 40."""
    runtime: str | None = None
    """torch (the default), or an export format: onnx, openvino, …; of a kit onnx."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where they run; cuda: with torch."""
    device_name: str | None = None
    """How the table calls this machine; by default as its processor or GPU is called."""
    num_threads: int | None = None
    """Of the runtime; by default as many as there are processors."""
    batch_size: int = 1
    """Images per forward pass."""
    image_size: int | None = None
    """Side of the images; the family's own by default."""
    num_runs: int = 60
    """Timed forward passes of each network."""
    max_seconds: float = 15.0
    """Time for each network: of slow ones fewer passes are timed, but at least twelve."""
    skip_memory: bool = False
    """Leave peak memory out: on a CPU each network needs a process of its own for it."""
    out: Path | None = None
    """The table, CSV; profile.csv by default. What is in it stays."""
    overwrite: bool = False
    """Measure again what is in the table already; with --bundle: replace the directory."""
    bundle: Path | None = None
    """Write a kit into this directory instead of measuring."""
    complete: Path | None = None
    """Add predictions to this table instead of measuring."""
    json: bool = False
    """Print JSON instead of a table."""


def run(arguments: Sequence[str]) -> int:
    """Runs the command."""
    command = tyro.cli(ProfileCommand, prog="poa profile", args=list(arguments), config=(tyro.conf.FlagCreatePairsOff,))
    if command.bundle is not None:
        _require_used(command, "bundle", OF_BUNDLE)
        return _bundle(command, command.bundle)
    if command.complete is not None:
        _require_used(command, "complete", OF_COMPLETE)
        return _complete(command, command.complete)
    return _measure(command)


def _require_used(command: ProfileCommand, mode: str, used: set[str]) -> None:
    """Refuses options that would do nothing.

    Raises:
        ConfigError: there are some.
    """
    given = [
        each.name for each in fields(command) if each.name != "path" and getattr(command, each.name) != each.default
    ]
    unused = [f"--{name.replace('_', '-')}" for name in given if name not in used]
    if unused:
        raise ConfigError(f"{', '.join(unused)} would do nothing with --{mode}. Leave it out.")


def _measure(command: ProfileCommand) -> int:
    from poa.deploy.profile.run import profile_family
    from poa.family import load

    family, options = load(command.path), _options(command)
    out = command.out or OUT
    with bars() as shown:
        found = profile_family(
            family,
            options,
            out,
            overwrite=command.overwrite,
            on_progress=lambda done, total: shown.show("measuring", done, total),
        )
    if found.num_known and not command.json:
        print(f"{found.num_known} were measured already.")
    _show(found, command, out)
    return 0


def _options(command: ProfileCommand) -> ProfileOptions:
    from poa.deploy.profile.kit.timing import Timing
    from poa.deploy.profile.run import ProfileOptions

    if command.num_runs < 1 or not command.max_seconds > 0:
        raise ConfigError("--num-runs is at least 1 and --max-seconds above 0.")
    return ProfileOptions(
        subnets=command.subnets,
        num_measured=command.num_measured,
        runtime=command.runtime or "torch",
        device=command.device,
        device_name=command.device_name,
        num_threads=command.num_threads,
        batch_size=command.batch_size,
        image_size=command.image_size,
        measures_memory=not command.skip_memory,
        timing=Timing(num_runs=command.num_runs, max_seconds=command.max_seconds),
    )


def _bundle(command: ProfileCommand, directory: Path) -> int:
    from poa.deploy.profile.bundle import write_kit
    from poa.deploy.profile.kit.script import SCRIPT
    from poa.deploy.profile.run import planned
    from poa.family import load

    family = load(command.path)
    subnets = planned(family.space.parse_all(command.subnets), command.num_measured)
    with bars() as shown:
        write_kit(
            family,
            subnets,
            directory,
            runtime=command.runtime or "onnx",
            image_size=command.image_size,
            overwrite=command.overwrite,
            on_progress=lambda done, total: shown.show("writing", done, total),
        )
    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()) / 1e6
    print(f"A kit of {len(subnets)} networks, {size:,.1f} MB: {directory}")
    print(f'Copy it to the other machine and run there: python {SCRIPT} --device-name "NAME"')
    print(f"Then here: poa profile {command.path} --complete profile.csv")
    return 0


def _complete(command: ProfileCommand, table: Path) -> int:
    from poa.deploy.profile.run import complete_profile
    from poa.family import load

    _show(complete_profile(load(command.path), table, command.out), command, command.out or table)
    return 0


def _show(found: Profile, command: ProfileCommand, out: Path) -> None:
    settings = list(dict.fromkeys(row.setting for row in found.rows))
    if command.json:
        held_out = [_described(error) for error in found.held_out]
        rows = [asdict(row) for row in found.rows]
        print(json.dumps({"table": str(out), "held_out": held_out, "rows": rows}, indent=2))
        return
    console = Console()
    for setting in settings:
        console.print(_table([row for row in found.rows if row.setting == setting], setting))
    for error in found.held_out:
        console.print(
            f"~ predicted from {error.num_measured} measured networks. Held out one at a time, {len(error.errors)} of "
            f"them were predicted with an error of {error.median:.1%} (median), at worst {error.worst:.1%}.",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"The table: {out}", highlight=False, soft_wrap=True)


def _described(error: HeldOut) -> dict[str, Any]:
    figures = {"root_mean_square": error.root_mean_square, "median": error.median, "worst": error.worst}
    return {"setting": error.setting._asdict(), "num_measured": error.num_measured, **figures}


def _table(rows: Sequence[ProfileRow], setting: Setting) -> Table:
    threads = f"{setting.num_threads} thread" + ("s" if setting.num_threads > 1 else "")
    how = f"{setting.runtime}, {setting.precision}, {threads}, batch {setting.batch_size}"
    table = Table(title=f"{setting.device}: {how}, {setting.image_size}×{setting.image_size} px")
    table.add_column("sub-network", no_wrap=True)
    for name in ("params, M", "MFLOPs", "file, MB", "ms", "p95, ms", "images/s", "memory, MB"):
        table.add_column(name, justify="right")
    for row in rows:
        about = "" if row.is_measured else "~"
        table.add_row(
            row.subnet,
            f"{row.num_params / 1e6:,.2f}",
            f"{row.flops / 1e6:,.1f}",
            f"{row.file_size_mb:,.2f}",
            f"{about}{formatted(row.latency_ms)}",
            f"{about}{formatted(row.latency_p95_ms)}",
            f"{about}{formatted(row.throughput)}",
            "" if row.peak_memory_mb is None else f"{about}{row.peak_memory_mb:,.1f}",
        )
    return table
