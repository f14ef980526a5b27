"""One row for each sub-network: from the family's card, a table of a device, and tables of results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from poa.deploy.profile.table import ProfileRow, Setting, family_key, read_profile
from poa.deploy.select.results import Quality, quality_of
from poa.deploy.select.row import Row
from poa.elastic import num_params
from poa.errors import ConfigError, DataError
from poa.family import FamilyCard

STAND_IN = "params"
"""`--quality params`: the number of parameters stands for quality, so the largest that fits is picked."""


@dataclass(frozen=True)
class SettingFilter:
    """Which setting of a profile is meant, where it has several; what is None may be anything."""

    device: str | None = None
    """Its name or a part of it, in any case of letters."""
    runtime: str | None = None
    """torch, onnx, openvino, …"""
    precision: str | None = None
    """float32 or int8."""
    num_threads: int | None = None
    """Of the runtime."""
    batch_size: int | None = None
    """Images per forward pass."""
    image_size: int | None = None
    """Side of the images."""

    @property
    def given(self) -> dict[str, str | int]:
        """What is asked for."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def keep(self, settings: Sequence[Setting]) -> list[Setting]:
        """The settings that are meant. A device of exactly that name goes before those that have it as a part."""
        wanted = self.given
        part = str(wanted.pop("device", "")).casefold()
        found = [each for each in settings if all(getattr(each, name) == value for name, value in wanted.items())]
        exact = [each for each in found if each.device.casefold() == part]
        return exact or [each for each in found if part in each.device.casefold()]


@dataclass(frozen=True)
class Joined:
    """What is known of a family's sub-networks."""

    rows: tuple[Row, ...]
    """All sub-networks, in the order of the space."""
    quality: str
    """The column of the results, PROTOCOL/FIGURE; `params` where it is a stand-in."""
    setting: Setting | None
    """Where latency, memory and file size are from; None without a profile."""
    notes: tuple[str, ...]
    """What people should know of it."""

    @property
    def is_stand_in(self) -> bool:
        """Whether the number of parameters stands for quality."""
        return self.quality == STAND_IN


def join(
    card: FamilyCard,
    profiles: Sequence[Path],
    results: Sequence[Path],
    quality: str | None,
    wanted: SettingFilter | None = None,
) -> Joined:
    """Puts together the family's card, the tables of devices and the tables of results.

    Args:
        card: the family's; parameters and operations are from it.
        profiles: tables of `poa profile`.
        results: tables of `poa evaluate`.
        quality: a figure of the results (see `quality_of`), or `params`.
        wanted: which setting of the profiles.

    Raises:
        ConfigError: the profiles hold several settings that are meant, or none; no figure has that name; a table is
            given that nothing would look at.
        DataError: a table cannot be read, or has nothing of this family.
    """
    wanted = wanted or SettingFilter()
    if not profiles and wanted.given:
        raise ConfigError(f"{_options(wanted.given)} chooses among the settings of a profile; --profile is not given.")
    setting, on_device, notes = None, {}, []
    if profiles:
        mine, others = _of_family(card, profiles)
        notes += [f"rows of other families in the profile were left out: {', '.join(others)}."] if others else []
        setting = choose_setting(list(dict.fromkeys(row.setting for row in mine)), wanted)
        on_device = _by_subnet(row for row in mine if row.setting == setting)
    layout = card.architecture.layout(card.config)
    sizes = {str(subnet): num_params(layout, subnet) for subnet in card.space.subnets}
    found = _quality(card, sizes, results, quality)
    notes += _notes(card, setting, found)
    size = card.preprocessing.image_size if setting is None else setting.image_size
    rows = [
        _row(place, str(subnet), sizes[str(subnet)], card.architecture.flops(card.config, subnet, size), on_device)
        for place, subnet in enumerate(card.space.subnets)
    ]
    values = {row.subnet: float(row.num_params) for row in rows} if found is None else found.values
    return Joined(
        rows=tuple(replace(row, quality=values.get(row.subnet)) for row in rows),
        quality=STAND_IN if found is None else found.column,
        setting=setting,
        notes=tuple(notes),
    )


def choose_setting(settings: Sequence[Setting], wanted: SettingFilter) -> Setting:
    """The one setting that is meant.

    Raises:
        ConfigError: there are several, or none; those that there are, and the options that tell them apart, are named.
    """
    found = wanted.keep(settings)
    if len(found) == 1:
        return found[0]
    if not found:
        raise ConfigError(f"the profile has no setting with {_options(wanted.given)}. It has:{_listed(settings)}")
    apart = [name for name in vars(wanted) if len({getattr(each, name) for each in found}) > 1]
    options = " or ".join(f"--{name.replace('_', '-')}" for name in apart)
    raise ConfigError(f"the profile has {len(found)} settings; choose one with {options}:{_listed(found)}")


def described(setting: Setting) -> str:
    """A setting for people."""
    threads = "1 thread" if setting.num_threads == 1 else f"{setting.num_threads} threads"
    return (
        f"{setting.device}, {setting.runtime} {setting.precision}, {threads}, batch {setting.batch_size}, "
        f"{setting.image_size} px"
    )


def _listed(settings: Sequence[Setting]) -> str:
    return "".join(f"\n  {described(each)}" for each in settings)


def _options(given: dict[str, str | int]) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in given.items())


def _of_family(card: FamilyCard, profiles: Sequence[Path]) -> tuple[list[ProfileRow], list[str]]:
    """The rows of this family, and the keys of the other families that the tables have."""
    key, rows = family_key(card), [row for path in profiles for row in read_profile(path)]
    others = list(dict.fromkeys(row.family for row in rows if row.family != key))
    mine = [row for row in rows if row.family == key]
    if not mine:
        raise DataError(
            f"{', '.join(map(str, profiles))}: no row of this family ({key})"
            f"{', only of ' + ', '.join(others) if others else ''}. `poa profile` on this family writes them."
        )
    return mine, others


def _by_subnet(rows: Iterable[ProfileRow]) -> dict[str, ProfileRow]:
    found: dict[str, ProfileRow] = {}
    for row in rows:
        if found.setdefault(row.subnet, row) != row:
            raise DataError(
                f"two profiles have {row.subnet} on {described(row.setting)}, with other figures. Give one."
            )
    return found


def _quality(
    card: FamilyCard, sizes: Mapping[str, int], results: Sequence[Path], quality: str | None
) -> Quality | None:
    if quality == STAND_IN:
        if results:
            raise ConfigError("--quality params looks at no results; leave --results out, or name a figure of them.")
        return None
    if not results:
        what = "no quality is named" if quality is None else f"--quality {quality} needs --results"
        raise ConfigError(
            f"{what}. Give the table of `poa evaluate sweep` with --results, or take the largest sub-network that fits "
            "with --quality params."
        )
    return quality_of(card, sizes, results, quality)


def _notes(card: FamilyCard, setting: Setting | None, quality: Quality | None) -> list[str]:
    notes = []
    if quality is None:
        notes.append(
            "nobody evaluated: the number of parameters stands for quality, so the largest that fits is picked."
        )
    if quality is not None and quality.others:
        notes.append(f"networks of the results that are not this family's were left out: {named(quality.others)}.")
    if quality is not None and setting is not None:
        own = card.preprocessing.image_size
        if setting.image_size != own:
            notes.append(
                f"the profile is at {setting.image_size} px, the family is for {own} px: quality may differ there."
            )
        if setting.precision != "float32":
            notes.append(f"quality was measured in float32; {setting.precision} lowers it, see the card of the export.")
    return notes


def named(names: Sequence[str], num_shown: int = 5) -> str:
    """The names, the first few of them where there are many."""
    rest = f" and {len(names) - num_shown} more" if len(names) > num_shown else ""
    return ", ".join(names[:num_shown]) + rest


def _row(place: int, subnet: str, num_params: int, flops: int, on_device: dict[str, ProfileRow]) -> Row:
    row = on_device.get(subnet)
    if row is None:
        return Row(subnet, place, num_params, flops)
    return Row(
        subnet=subnet,
        place=place,
        num_params=num_params,
        flops=flops,
        latency_ms=row.latency_ms,
        latency_p95_ms=row.latency_p95_ms,
        throughput=row.throughput,
        peak_memory_mb=row.peak_memory_mb,
        file_size_mb=row.file_size_mb,
        is_measured=row.is_measured,
        fit_error=row.fit_error,
    )
