"""A page of figures in one HTML file: no script, nothing from elsewhere, light or dark as the reader has it."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from poa.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE_FILE = "index.html"

DOTS = 144
"""Of a figure, to the inch."""
QUALITY = 90
"""Of the embedded figures."""
NARROWEST = 84
"""Pixels of the page to an inch of a figure at least: its letters stay legible, narrow screens scroll it sideways."""
WIDEST = 132
PAPER, INK = {"light": "#ffffff", "dark": "#1d2025"}, {"light": "#1d2129", "dark": "#e8eaed"}

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --soft: #555d6b; --paper: #f6f7f8; --card: #ffffff; --line: #dfe2e6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --soft: #a9b1bd; --paper: #15171a; --card: #1d2025; --line: #363b43; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 80rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .75rem; }
h2 { font-size: 1.15rem; margin: 0 0 .5rem; }
p { max-width: 46rem; margin: 0 0 .75rem; overflow-wrap: anywhere; }
nav { margin: 1.25rem 0; display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; }
a { color: inherit; text-underline-offset: .2em; }
section { margin-top: 2.25rem; }
section p, nav { color: var(--soft); }
.wide { margin: 0; overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
img { display: block; width: 100%; height: auto; }
.wide + p { margin-top: 1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .8rem; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 600; vertical-align: bottom; }
tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
@media (max-width: 40rem) { body { padding: 1.25rem .75rem 3rem; } th, td { padding: .4rem .5rem; font-size: .9rem; } }
""".strip()


@dataclass(frozen=True)
class Drawn:
    """A figure for a light and for a dark page."""

    light: Image.Image
    dark: Image.Image
    inches: tuple[float, float]
    """Width and height."""


def drawn(figure: Figure) -> Drawn:
    """The figure, drawn twice; it is left as it is for a light page."""
    dark = _drawn(figure, "dark")
    width, height = figure.get_size_inches()
    return Drawn(_drawn(figure, "light"), dark, (float(width), float(height)))


def _drawn(figure: Figure, theme: str) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    figure.set_facecolor(PAPER[theme])
    for axis in figure.axes:
        axis.set_facecolor("none")
    for text in figure.findobj(Text):
        text.set_color(INK[theme])
    figure.set_dpi(DOTS)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    heading: str
    text: str
    """A paragraph over the figure; it is the figure's alternative text too."""
    figure: Drawn


@dataclass(frozen=True)
class Table:
    """Cells by row; the first column is the rows' names."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def write_page(path: Path, title: str, notes: Sequence[str], table: Table, sections: Sequence[Section]) -> None:
    """Writes the page: title, paragraphs, the table, then the figures one below the other."""
    links = " ".join(f'<a href="#part-{number}">{escape(each.heading)}</a>' for number, each in enumerate(sections))
    page = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>\n{_STYLE}\n</style>",
        "</head>",
        "<body>",
        f"<h1>{escape(title)}</h1>",
        _table(table),
        *(f"<p>{escape(note)}</p>" for note in notes),
        f"<nav>{links}</nav>",
        *(_section(f"part-{number}", each) for number, each in enumerate(sections)),
        "</body>",
        "</html>",
    ]
    write_text(path, "\n".join(page) + "\n")


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.columns)
    rows = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in table.rows)
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    table_html = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
    return f'<div class="wide" tabindex="0" role="region" aria-label="The networks">\n{table_html}\n</div>'


def _section(anchor: str, part: Section) -> str:
    width, height = part.figure.inches
    size = f'width="{round(width * DOTS)}" height="{round(height * DOTS)}"'
    style = f"min-width:{round(width * NARROWEST)}px;max-width:{round(width * WIDEST)}px"
    name, alt = escape(part.heading), escape(f"{part.heading}. {part.text}", quote=True)
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{data_uri(part.figure.dark)}">'
    image = f'<picture>{dark}<img src="{data_uri(part.figure.light)}" {size} style="{style}" alt="{alt}"></picture>'
    frame = f'<figure class="wide" tabindex="0" role="region" aria-label="{name}">\n{image}\n</figure>'
    return f'<section id="{anchor}">\n<h2>{name}</h2>\n<p>{escape(part.text)}</p>\n{frame}\n</section>'


def data_uri(image: Image.Image, *, lossless: bool = False) -> str:
    """The image as WebP inside a URI, for a page that needs no other file."""
    file = io.BytesIO()
    image.save(file, "WEBP", quality=QUALITY, lossless=lossless)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
