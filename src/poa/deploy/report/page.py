"""One self-contained HTML file about a family: no network, light and dark, readable without JavaScript."""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, NamedTuple

from poa.deploy.report.curves import charts_of
from poa.deploy.report.health import heat_map
from poa.deploy.report.pictures import Pictures
from poa.deploy.report.points import Column, Device, Points
from poa.deploy.report.provenance import Group, provenance_of
from poa.deploy.report.scale import Frame, number, scale_of
from poa.evaluate.pictures.reading import size_text
from poa.family import FamilyCard
from poa.figures import COLOURS
from poa.files import write_text
from poa.version import __version__

ARCHITECTURE_NAMES = {"vit": "ViT", "swin": "Swin", "resnet": "ResNet", "convnext": "ConvNeXt"}
MIN_PLACES = 9
"""Of a network's last map: with fewer the page says how to get a finer one."""

PARTS = {
    "choose": "Choose a size",
    "networks": "All sub-networks",
    "health": "Widths and depths",
    "pictures": "What they see",
    "training": "Training",
    "provenance": "Provenance",
}


@dataclass(frozen=True)
class Subject:
    """What a page is about."""

    path: Path
    """As the user named it: the commands on the page say so."""
    card: FamilyCard
    points: Points
    metrics: tuple[Mapping[str, Any], ...] = ()
    """The lines of the run's metrics."""
    environment: Mapping[str, Any] | None = None
    """What the run recorded of the machine."""
    config: str | None = None
    """The run's configuration in YAML."""
    results: tuple[Path, ...] = ()
    profiles: tuple[Path, ...] = ()
    pictures: Pictures | None = None
    command: str = ""
    """That wrote the page."""


class Note(NamedTuple):
    """What is missing, and the command that gives it."""

    text: str
    command: str = ""


class _Front(NamedTuple):
    """The chart as it stands without JavaScript."""

    title: str
    frame: Frame
    points: list[tuple[str, float, float]]
    x_title: str
    y_title: str


def write_page(path: Path, subject: Subject) -> None:
    """Writes the page, all or nothing."""
    write_text(path, render(subject))


def render(subject: Subject) -> str:
    """The page's HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    folder = Path(__file__).parent
    page = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters["number"] = number
    page.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    style = _palette() + (folder / "page.css").read_text(encoding="utf-8")
    script = (folder / "page.js").read_text(encoding="utf-8")
    return page.get_template("page.html").render(
        **_content(subject),
        style=Markup(style),  # noqa: S704 (this package's own files)
        script=Markup(script),  # noqa: S704
        policy=f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'",
        version=__version__,
        date=_words(datetime.now(UTC).date()),
    )


def _hash(text: str) -> str:
    """How a content security policy names a style or a script."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _palette() -> str:
    """Poa's colours, darker on light pages and lighter on dark ones: 3:1 against either."""
    mixed = (
        f"--c{place}:light-dark(color-mix(in oklab,{colour} 82%,#000),color-mix(in oklab,{colour} 80%,#fff))"
        for place, colour in enumerate(COLOURS)
    )
    return f":root{{{';'.join(mixed)}}}\n"


def _content(subject: Subject) -> dict[str, Any]:
    points, charts = subject.points, charts_of(subject.metrics)
    qualities = points.qualities or (stand_in(points),)
    parts = [(anchor, name) for anchor, name in PARTS.items() if anchor != "pictures" or subject.pictures]
    return {
        "head": _head(subject),
        "parts": parts,
        "points": points,
        "notes": _notes(subject),
        "front": _front(points, points.qualities[0] if points.qualities else points.sizes[1]),
        "networks": _networks(points),
        "maps": [heat_map(subject.card.space, column) for column in points.qualities if column.is_main],
        "pictures": subject.pictures,
        "charts": charts,
        "provenance": [*provenance_of(subject.card, subject.environment), _of_page(subject)],
        "config": subject.config,
        "data": {
            "run": shlex.quote(str(subject.path)),
            "tables": _table_options(subject),
            "names": points.names,
            "sizes": [column.described() for column in points.sizes],
            "devices": [device.described() for device in points.devices],
            "qualities": [column.described() for column in qualities],
            "hasQuality": bool(points.qualities),
            "charts": [chart.described() for chart in charts],
        },
    }


def stand_in(points: Points) -> Column:
    """What stands for quality where no results are given, as in `poa select`: the number of parameters."""
    return replace(points.sizes[0], limit="")


def _head(subject: Subject) -> dict[str, Any]:
    card = subject.card
    kind = ARCHITECTURE_NAMES.get(card.architecture.name, card.architecture.name)
    told, sizes = card.provenance, [value for value in subject.points.sizes[0].values if value is not None]
    data, how = told.get("data", {}), card.preprocessing
    images = f"{how.image_size} px, " + ("1 channel" if how.num_channels == 1 else f"{how.num_channels} channels")
    facts = [
        ("Sub-networks", f"{len(sizes):,}"),
        ("Parameters", f"{_short(min(sizes))} to {_short(max(sizes))}"),
        ("Widths", _span(card.space.widths)),
        ("Depths", ", ".join(_span(depths) for depths in card.space.depths)),
        ("Input", images),
        ("Trained on", _data_words(data)),
        ("Finished", _day(told.get("finished", ""))),
    ]
    return {
        "kind": f"{kind} family",
        "smallest": str(card.space.smallest),
        "intact": str(card.space.intact),
        "facts": [(term, value) for term, value in facts if value],
    }


def _short(num_params: float) -> str:
    return size_text(int(num_params)).removesuffix(" parameters").replace(" ", "\N{NO-BREAK SPACE}")


def _span(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} – {values[-1]}"


def _data_words(data: Mapping[str, Any]) -> str:
    if "num_images" not in data:
        return ""
    return f"{data['num_images']:,} images of {Path(data.get('source', '?')).name}"


def _day(moment: str) -> str:
    try:
        return _words(datetime.fromisoformat(moment).date())
    except ValueError:
        return moment


def _words(day: date) -> str:
    return f"{day.day} {day:%B %Y}"


def _front(points: Points, quality: Column) -> _Front:
    cost = points.sizes[0]
    frame = Frame(
        scale_of(cost.known, may_log=True),
        scale_of(quality.known),
        640.0,
        380.0,
        left=54.0,
        right=16.0,
        top=30.0,
        bottom=44.0,
    )
    pairs = zip(points.names, cost.values, quality.values, strict=True)
    dots = [
        (name, *frame.place(x / cost.factor, y / quality.factor))
        for name, x, y in pairs
        if x is not None and y is not None
    ]
    return _Front(f"{quality.title} against {cost.title}", frame, dots, cost.title, quality.title)


def _networks(points: Points) -> list[dict[str, Any]]:
    """The tables of all sub-networks: sizes and qualities, then one for each device."""
    main = [*points.sizes, *(column for column in points.qualities if column.is_main)]
    tables = [_table("Sizes and quality" if points.qualities else "Sizes", points, main)]
    for device in points.devices:
        table = _table(device.label, points, device.columns)
        table["columns"].append("source")
        for row, source in zip(table["rows"], device.sources, strict=True):
            row.append(source)
        tables.append(table | {"note": _fit_words(device)})
    return tables


def _table(label: str, points: Points, columns: Sequence[Column]) -> dict[str, Any]:
    titles = ["sub-network", *(column.title for column in columns)]
    return {"label": label, "columns": titles, "rows": _rows(points, columns), "note": ""}


def _rows(points: Points, columns: Sequence[Column]) -> list[list[str]]:
    return [[name, *(column.text(row) for column in columns)] for row, name in enumerate(points.names)]


def _fit_words(device: Device) -> str:
    if device.fit_error is None:
        return ""
    return f"Interpolated rows are predicted by a fit whose error on held-out rows is {device.fit_error:.1%}."


def _notes(subject: Subject) -> dict[str, list[Note]]:
    run, points = shlex.quote(str(subject.path)), subject.points
    sweep = Note(
        "No quality is known of these sub-networks: the largest stands for the best. To measure it:",
        f"poa evaluate sweep {run} --data IMAGES --protocols knn health --out SWEEP\n"
        f"poa report {run} --results SWEEP/results.csv --out PAGE.html",
    )
    profile = Note(
        "No latency is known. To measure it:",
        f"poa profile {run} --out profile.csv\npoa report {run} --profile profile.csv --out PAGE.html",
    )
    choose = [*([] if points.qualities else [sweep]), *([] if points.devices else [profile])]
    if points.left_out:
        choose.append(Note(f"Left out, as they are of other networks: {', '.join(points.left_out)}."))
    health = [] if points.qualities else [Note("A table of results gives these maps.", sweep.command)]
    pictures = []
    if subject.pictures is not None and subject.pictures.num_places < MIN_PLACES:
        count = subject.pictures.num_places
        places = "one place" if count == 1 else f"{count} places"
        pictures.append(Note(f"The last map of the largest network has {places}: --image-size 224 gives a finer one."))
    training = [] if subject.metrics else [Note("The run directory has the curves; here is the family alone.")]
    return {"choose": choose, "health": health, "pictures": pictures, "training": training}


def _of_page(subject: Subject) -> Group:
    files = [("results", str(file)) for file in subject.results] + [("profile", str(file)) for file in subject.profiles]
    return Group("This page", (("command", subject.command), *files))


def _table_options(subject: Subject) -> str:
    """The options of `poa select` that name a quality's tables; without results parameters stand in for it."""
    return _files("--results", subject.results) + _files("--profile", subject.profiles)


def _files(option: str, files: Sequence[Path]) -> str:
    return f" {option} {shlex.join(map(str, files))}" if files else ""
