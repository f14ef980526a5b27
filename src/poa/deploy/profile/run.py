"""Profiles of families: what is measured, what is predicted, and the checks before work starts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from poa.deploy.profile.fit import MIN_MEASURED, HeldOut, predicted_rows
from poa.deploy.profile.kit.machine import num_processors, processor_name
from poa.deploy.profile.kit.rows import text_of
from poa.deploy.profile.kit.timing import BUSY, MAX_WAITED, OnProgress, Timing, no_progress, profile
from poa.deploy.profile.measure import TORCH, Place, exporter_of, networks_of
from poa.deploy.profile.plan import DEFAULT_MEASURED, MAX_ALL, design
from poa.deploy.profile.table import ProfileRow, Setting, family_key, read_profile, write_profile
from poa.errors import ConfigError, DataError, PoaWarning
from poa.files import check_writable
from poa.version import __version__

if TYPE_CHECKING:
    from poa.elastic import Subnet
    from poa.family import Family


@dataclass(frozen=True)
class ProfileOptions:
    """What is measured, where and how."""

    subnets: tuple[str, ...] = ("all",)
    num_measured: int | None = None
    """How many of them are measured, the others predicted; None: all of up to 60, else 40."""
    runtime: str = TORCH
    device: Literal["cpu", "cuda"] = "cpu"
    device_name: str | None = None
    """None: the name of the processor or of the GPU."""
    num_threads: int | None = None
    """None: as many as there are processors."""
    batch_size: int = 1
    image_size: int | None = None
    """None: the family's."""
    measures_memory: bool = True
    timing: Timing = field(default_factory=Timing)


@dataclass(frozen=True)
class Profile:
    """The rows of the sub-networks asked for."""

    rows: tuple[ProfileRow, ...]
    num_known: int
    """How many were measured already."""
    held_out: tuple[HeldOut, ...]
    """The error of what is predicted, for each setting that has such rows."""


def profile_family(
    family: Family,
    options: ProfileOptions,
    out: Path,
    *,
    overwrite: bool = False,
    on_progress: OnProgress = no_progress,
) -> Profile:
    """Measures sub-networks into a table; stopped, the same call goes on where it was.

    Args:
        family: on the CPU.
        options: what is measured, where and how.
        out: the table; its other rows stay.
        overwrite: measure again what is measured there already.
        on_progress: called with the steps that are done and those there are.

    Raises:
        ConfigError: the device or the runtime is not there, or an option is out of range.
        DataError: the table is none, is of another family, or too little was measured for a fit.
        SubnetError: the family has no such sub-network.
    """
    place, setting = _resolved(family, options)
    subnets = family.space.parse_all(options.subnets)
    chosen = planned(subnets, options.num_measured)
    check_writable(out)
    found = rows_of_family(family, out) if out.exists() else ()
    known = {row.subnet for row in found if row.setting == setting and row.is_measured}
    due = [each for each in chosen if overwrite or str(each) not in known]
    if due:
        described = {**setting._asdict(), "poa_version": __version__}
        texts = {name: text_of(value) for name, value in described.items()}
        waited = profile(networks_of(family, due, place), texts, out, options.timing, on_progress)
        if waited > MAX_WAITED:
            warnings.warn(BUSY.format(waited), PoaWarning, stacklevel=2)
    rows, error = _completed(family, out, setting, subnets)
    return Profile(rows, len(chosen) - len(due), () if error is None else (error,))


def complete_profile(family: Family, table: Path, out: Path | None = None) -> Profile:
    """Adds predicted rows of all sub-networks that were not measured, in every setting of the table.

    Args:
        family: the one that was measured.
        table: what `poa profile` or a kit wrote.
        out: where all rows are written; the table itself by default.

    Raises:
        DataError: the table is none, is of another family, or too little was measured for a fit.
    """
    target = out or table
    check_writable(target)
    rows = rows_of_family(family, table)
    if not rows:
        raise DataError(f"{table} has no rows: nothing was measured. Run the kit, or `poa profile`, first.")
    settings = dict.fromkeys(row.setting for row in rows)
    if target != table:
        if target.exists():
            rows_of_family(family, target)
        write_profile(target, rows)
    done = [_completed(family, target, setting, family.subnets) for setting in settings]
    errors = tuple(error for _, error in done if error is not None)
    return Profile(tuple(row for found, _ in done for row in found), sum(row.is_measured for row in rows), errors)


def planned(subnets: Sequence[Subnet], num_measured: int | None) -> tuple[Subnet, ...]:
    """Those of the sub-networks that are measured.

    Raises:
        ConfigError: there are fewer than `num_measured`, or the others could not be predicted from so few.
    """
    if num_measured is None:
        return tuple(subnets) if len(subnets) <= MAX_ALL else design(subnets, DEFAULT_MEASURED)
    if num_measured > len(subnets) or (num_measured < len(subnets) and num_measured < MIN_MEASURED):
        raise ConfigError(
            f"--num-measured {num_measured}: there are {len(subnets)} sub-networks to choose from, and predicting the "
            f"others needs at least {MIN_MEASURED} measured. Leave it out to measure "
            + ("all." if len(subnets) <= MAX_ALL else f"{DEFAULT_MEASURED}.")
        )
    return design(subnets, num_measured)


def rows_of_family(family: Family, table: Path) -> tuple[ProfileRow, ...]:
    """The rows of the table.

    Raises:
        DataError: it is none, or has rows of another family.
    """
    rows = read_profile(table)
    ours = family_key(family.card)
    others = sorted({row.family for row in rows} - {ours})
    if others:
        raise DataError(
            f"{table} has rows of another family ({others[0]}, this one is {ours}; the first digits of weights_sha256 "
            "in family.json). Name another file: each family has its own table."
        )
    return rows


def _resolved(family: Family, options: ProfileOptions) -> tuple[Place, Setting]:
    for name in ("batch_size", "num_threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it is at least 1.")
    if options.device_name is not None and not options.device_name.strip():
        raise ConfigError("--device-name is empty. Leave it out for the name that the system tells.")
    if options.device == "cuda" and options.runtime != TORCH:
        raise ConfigError(f"--device cuda runs {TORCH} only; --runtime is {options.runtime}. Leave one of them out.")
    exporter = exporter_of(options.runtime)
    name = _device_name(options)
    threads = options.num_threads or num_processors()
    size = family.checked_image_size(options.image_size)
    place = Place(
        options.runtime,
        options.device,
        threads,
        options.batch_size,
        family.card.preprocessing.num_channels,
        size,
        options.measures_memory,
    )
    key = family_key(family.card)
    return place, Setting(name, options.runtime, exporter.precision, threads, options.batch_size, size, key)


def _device_name(options: ProfileOptions) -> str:
    name = options.device_name
    if options.device == "cuda":
        import torch

        from poa.config import RuntimeConfig
        from poa.runtime import resolve_runtime

        device = resolve_runtime(RuntimeConfig(device="cuda")).device
        name = name or torch.cuda.get_device_name(device)
    return name or processor_name()


def _completed(
    family: Family, table: Path, setting: Setting, subnets: Sequence[Subnet]
) -> tuple[tuple[ProfileRow, ...], HeldOut | None]:
    """The rows of those sub-networks in that setting, after the missing ones were predicted and written."""
    rows = [row for row in read_profile(table) if row.setting == setting]
    measured = {row.subnet for row in rows if row.is_measured}
    missing = [each for each in subnets if str(each) not in measured]
    error = None
    if missing:
        sizes = None
        if setting.runtime == TORCH:
            from poa.deploy.profile.sizes import timm_file_sizes

            sizes = timm_file_sizes(family, missing, setting.image_size)
        predicted, error = predicted_rows(family.card, rows, missing, sizes)
        rows = [row for row in write_profile(table, predicted) if row.setting == setting]
    by_name = {row.subnet: row for row in rows}
    return tuple(by_name[str(each)] for each in subnets), error
