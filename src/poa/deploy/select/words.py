"""A selection in sentences, and as a value for scripts."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from poa.deploy.select.budget import FIGURES, Constraint, amount
from poa.deploy.select.join import Joined, named
from poa.deploy.select.pick import Relaxation, RunnerUp, Selection
from poa.deploy.select.row import Row
from poa.family import FamilyCard

TIMED = ("latency_ms", "latency_p95_ms", "throughput")
"""Figures that a fit predicts where a sub-network was not measured."""
SHOWN = ("quality", "latency_ms", "file_size_mb", "num_params")
"""Figures that people see even where they are not bounded."""
FORMATS = {"torch": "timm"}
"""The export format for a runtime, where its name is another."""
CALIBRATED = ("onnx-int8", "openvino-int8")
"""Formats that need images to choose their scales."""


@dataclass(frozen=True)
class Choice:
    """A selection with what it was made from."""

    path: Path
    """Of the family, as the user named it."""
    card: FamilyCard
    joined: Joined
    constraints: tuple[Constraint, ...]
    selection: Selection
    notes: tuple[str, ...] = field(init=False)
    """What people should know of it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "notes", (*self.joined.notes, *_notes(self)))


def verdict(choice: Choice) -> str:
    """The pick in a sentence with why, or that nothing fits."""
    selection, pick = choice.selection, choice.selection.pick
    if pick is None:
        budget = ", ".join(map(str, choice.constraints))
        return f"Nothing fits: none of {len(selection.usable)} sub-networks meets {budget}."
    what = "most parameters" if choice.joined.is_stand_in else f"best {choice.joined.quality}"
    budget = " within the budget" if choice.constraints else ""
    others = [each for each in choice.constraints if each.figure.name != "quality"]
    values = [f"{each.figure.label} {value_text(pick, each.figure.name)} ({limit(each)})" for each in others]
    return (
        f"{pick.subnet}: {what}{budget}, {quality_text(choice, pick)}; {'; '.join([*values, ''])}"
        f"{len(selection.fitting)} of {len(selection.usable)} sub-networks fit."
    )


def quality_text(choice: Choice, row: Row) -> str:
    """The row's quality for people."""
    return shown("num_params", row.quality) if choice.joined.is_stand_in else shown("quality", row.quality)


def limit(constraint: Constraint) -> str:
    """A limit in words: at most 8 ms."""
    figure = constraint.figure
    return f"at {'least' if figure.is_minimum else 'most'} {figure.show(constraint.limit)}"


def shown(name: str, value: float | None) -> str:
    """A figure's value for people; empty where it is not known."""
    return "" if value is None else FIGURES[name].show(value)


def value_text(row: Row, name: str) -> str:
    """The same of a row's figure; ~ before latencies that were predicted."""
    text = shown(name, row.value(FIGURES[name]))
    return f"~{text}" if text and name in TIMED and row.is_measured is False else text


def runner_up_line(choice: Choice, runner_up: RunnerUp) -> str:
    """A runner-up: what is gained and lost against the pick."""

    def listed(by: dict[str, float], *, is_better: bool) -> str:
        signs = {name: "+" if FIGURES[name].is_minimum == is_better else "−" for name in names if name in by}
        return ", ".join(f"{label(choice, name)} {signs[name]}{shown(name, by[name])}" for name in signs)

    names = shown_figures(choice)
    parts = {"lost": listed(runner_up.lost, is_better=False), "gained": listed(runner_up.gained, is_better=True)}
    return f"{runner_up.row.subnet}: " + "; ".join(f"{name} {part}" for name, part in parts.items() if part)


def label(choice: Choice, name: str) -> str:
    """What a figure is called: quality is what it was measured as."""
    return choice.joined.quality if name == "quality" else FIGURES[name].label


def shown_figures(choice: Choice) -> list[str]:
    """The names of the figures that people see: those that are bounded, and of `SHOWN` those that some row has."""
    bounded = {each.figure.name for each in choice.constraints}
    known = {name for name in SHOWN if any(row.value(FIGURES[name]) is not None for row in choice.selection.usable)}
    hidden = {"quality"} if choice.joined.is_stand_in else set()
    return [name for name in FIGURES if name in (bounded | known) - hidden]


def relaxation_line(choice: Choice, relaxation: Relaxation) -> str:
    """What would have to give, as options, and what is picked then."""
    options = " ".join(each.option() for each in relaxation.limits)
    row = relaxation.row
    return f"{options}: then {row.subnet} fits, {choice.joined.quality} {quality_text(choice, row)}"


def beyond_line(choice: Choice, row: Row) -> str:
    """The nearest better sub-network, and by how much it is beyond the budget."""
    over = []
    for each in choice.constraints:
        share = each.excess(row.known(each.figure))
        if share:
            over.append(f"{each.figure.label} {value_text(row, each.figure.name)}, {amount(100 * share, 2)} % over")
    better = f"{choice.joined.quality} {quality_text(choice, row)}"
    return f"Nearest above the budget: {row.subnet}, {better} ({'; '.join(over)})."


def export_command(choice: Choice, subnet: str) -> str:
    """The command that writes the sub-network for the runtime of the profile."""
    setting = choice.joined.setting
    kind = "timm" if setting is None else FORMATS.get(setting.runtime, setting.runtime)
    parts = ["poa", "export", str(choice.path), subnet, "--to", kind, "--out", "exports"]
    if setting is not None and setting.image_size != choice.card.preprocessing.image_size:
        parts += ["--image-size", str(setting.image_size)]
    if setting is not None and setting.num_threads != 1:
        parts += ["--num-threads", str(setting.num_threads)]
    if kind in CALIBRATED:
        parts += ["--images", "IMAGES"]
    return shlex.join(parts)


def record(choice: Choice) -> dict[str, Any]:
    """Everything, for scripts: JSON. `pick` and `command` are null where nothing fits."""
    selection, pick = choice.selection, choice.selection.pick
    setting = choice.joined.setting
    return {
        "family": str(choice.path),
        "family_key": choice.card.weights_sha256[:12],
        "quality": choice.joined.quality,
        "setting": None if setting is None else setting._asdict(),
        "budget": _limits(choice.constraints),
        "pick": None if pick is None else asdict(pick),
        "command": None if pick is None else export_command(choice, pick.subnet),
        "num_usable": len(selection.usable),
        "num_fitting": len(selection.fitting),
        "runner_ups": [asdict(each) for each in selection.runner_ups],
        "beyond": None if selection.beyond is None else _with_excess(selection.beyond, choice.constraints),
        "relaxations": [
            {
                "limits": _limits(each.limits),
                "options": [limit.option() for limit in each.limits],
                "row": asdict(each.row),
            }
            for each in selection.relaxations
        ],
        "compared": [figure.name for figure in selection.compared],
        "front": [row.subnet for row in selection.front],
        "fitting": [row.subnet for row in selection.fitting],
        "left_out": {name: list(lacks) for name, lacks in selection.left_out.items()},
        "rows": [asdict(row) for row in choice.joined.rows],
        "notes": list(choice.notes),
    }


def _limits(constraints: Sequence[Constraint]) -> list[dict[str, Any]]:
    return [
        {"figure": each.figure.name, "limit": each.limit, "is_minimum": each.figure.is_minimum} for each in constraints
    ]


def _with_excess(row: Row, constraints: Sequence[Constraint]) -> dict[str, Any]:
    return {"row": asdict(row), "excess": sum(each.excess(row.known(each.figure)) for each in constraints)}


def _notes(choice: Choice) -> list[str]:
    selection, pick = choice.selection, choice.selection.pick
    notes = []
    if selection.left_out:
        lacks = dict.fromkeys(FIGURES[name].label for names in selection.left_out.values() for name in names)
        notes.append(
            f"{len(selection.left_out)} of {len(choice.joined.rows)} sub-networks were left out, for want of "
            f"{' or '.join(lacks)}: {named(tuple(selection.left_out))}."
        )
    predicted = [row for row in selection.usable if row.is_measured is False and row.fit_error is not None]
    if predicted:
        worst = max(row.fit_error or 0.0 for row in predicted)
        notes.append(
            f"~ marks latencies that were predicted, {len(predicted)} of {len(selection.usable)}; the fit's relative "
            f"error on networks left out of it is {100 * worst:.2g} %."
        )
    if pick is not None:
        notes += [_near(pick, each) for each in choice.constraints if is_within_error(pick, each)]
    return notes


def is_within_error(row: Row, constraint: Constraint) -> bool:
    """Whether the row meets the limit by less than the error of its prediction."""
    if row.is_measured is not False or row.fit_error is None or constraint.figure.name not in TIMED:
        return False
    value, factor = row.known(constraint.figure), 1.0 + row.fit_error
    return not constraint.is_met(value / factor if constraint.figure.is_minimum else value * factor)


def _near(row: Row, constraint: Constraint) -> str:
    return (
        f"the {constraint.figure.label} of {row.subnet} ({value_text(row, constraint.figure.name)}) was predicted, and "
        f"is within the fit's error ({100 * (row.fit_error or 0.0):.2g} %) of the limit: measure it before you rely on "
        f"it (`poa profile … --subnets {row.subnet}`)."
    )
