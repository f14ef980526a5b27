"""Pictures of results."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poa.elastic import Subnet
from poa.errors import SubnetError
from poa.evaluate.report import Result
from poa.figures import COLOURS, new_figure, repeating, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_front(
    axis: Axes,
    results: Sequence[Result],
    references: Mapping[str, float],
    label: str = "k-NN accuracy, %",
    scale: float = 100.0,
) -> None:
    """The protocol's main figure against parameters: a line for each width, a dashed line for each reference.

    Untrained networks have open circles and dashed lines in their width's colour; networks that are no sub-networks of
    a family are single points with their names.

    Args:
        axis: where to draw.
        results: of one protocol.
        references: figures to compare with, by name.
        label: what the figure is, with its unit.
        scale: what the figure is multiplied with; 100 draws a share in per cent.
    """
    series: dict[tuple[str, bool], list[Result]] = defaultdict(list)
    for result in results:
        name, is_untrained, _ = _parts(result)
        series[name, is_untrained].append(result)
    alone = [*series.pop(("", False), []), *series.pop(("", True), [])]
    colours = {name: colour for colour, name in repeating(COLOURS, dict.fromkeys(name for name, _ in series))}
    for (name, is_untrained), members in series.items():
        look: dict[str, Any] = {"color": colours[name], "label": f"{name} untrained" if is_untrained else name}
        look |= {"linestyle": "--", "markerfacecolor": "white"} if is_untrained else {}
        sizes = [member.num_params for member in members]
        axis.plot(sizes, [scale * member.value for member in members], marker="o", **look)
        for member, size in zip(members, sizes, strict=True):
            _annotate(axis, _parts(member)[2], size, scale * member.value)
    for member in alone:
        axis.plot(member.num_params, scale * member.value, "D", color="0.2")
        _annotate(axis, member.network, member.num_params, scale * member.value)
    for style, (name, value) in repeating(("--", ":", "-."), references.items()):
        text = f"{name} {value:.1%}" if scale == 100 else f"{name} {scale * value:.3g}"
        axis.axhline(scale * value, color="0.4", linestyle=style, linewidth=1, label=text)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(_thousands)
    axis.xaxis.set_minor_formatter(_thousands)
    axis.set_xlabel("parameters")
    axis.set_ylabel(label)
    axis.set_title("Every sub-network of one run")
    if series or references:
        axis.legend(fontsize=8, frameon=False)


def save_front(path: Path, results: Sequence[Result], label: str, scale: float = 100.0, title: str = "") -> None:
    """Writes a PNG file with the main figure against the parameters; see `draw_front`."""
    figure, axes = new_figure(7.0, 4.5, 1)
    draw_front(axes[0], results, {}, label, scale)
    axes[0].set_title(title)
    save_figure(figure, path)


def _parts(result: Result) -> tuple[str, bool, str]:
    """Of a sub-network's name family and width, whether it is untrained, depth; no family and width for others."""
    name = result.network.removesuffix(" untrained")
    is_untrained = name != result.network
    family, _, member = name.rpartition("/")
    try:
        subnet = Subnet.parse(member)
    except SubnetError:
        return "", is_untrained, result.network
    return f"{family} width {subnet.width}".strip(), is_untrained, str(subnet).split("-", 1)[1]


def _thousands(size: float, _position: object = None) -> str:
    """A number of parameters for an axis; empty where the first digit is no 1, 2 or 5, lest numbers overlap."""
    if f"{size:e}"[0] not in "125":
        return ""
    return f"{size / 1e6:g} M" if size >= 1e6 else f"{size / 1e3:g} k"


def _annotate(axis: Axes, text: str, size: int, height: float) -> None:
    axis.annotate(text, (size, height), (0, 6), textcoords="offset points", ha="center", fontsize=7)


def draw_curves(loss_axis: Axes, knn_axis: Axes, metrics: Sequence[Mapping[str, Any]]) -> None:
    """The loss, and the monitor's k-NN of three sub-networks, over the steps of a run."""
    losses = [(line["step"], line["loss"]) for line in metrics if "loss" in line]
    loss_axis.plot(*zip(*losses, strict=True), color=COLOURS[0])
    loss_axis.set_xlabel("step")
    loss_axis.set_title("Loss")
    looks = [(line["step"], line["monitor"]) for line in metrics if "monitor" in line]
    for colour, subnet in repeating(COLOURS, looks[0][1] if looks else ()):
        values = [100 * found[subnet].get("knn", float("nan")) for _, found in looks]
        knn_axis.plot([step for step, _ in looks], values, "o-", markersize=3, color=colour, label=subnet)
    knn_axis.set_xlabel("step")
    knn_axis.set_ylabel("k-NN accuracy on training images, %")
    knn_axis.set_title("While training")
    if looks:
        knn_axis.legend(fontsize=8, frameon=False)


def draw_damage(axis: Axes, results: Sequence[Result], names: Sequence[str]) -> None:
    """The accuracy on clean images and under every damage as a map, in per cent: a row for each network."""
    columns = ["accuracy_clean", *names]
    shares = [[100 * result.figures.get(name, float("nan")) for name in columns] for result in results]
    axis.grid(visible=False)
    image = axis.imshow(shares, aspect="auto", cmap="viridis", vmin=0.0, vmax=100.0)
    labels = [name.removeprefix("accuracy_").removeprefix("corrupt_").replace("_", " ") for name in columns]
    axis.set_xticks(range(len(columns)), labels, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    axis.set_yticks(range(len(results)), [result.network for result in results], fontsize=8)
    for row, line in enumerate(shares):
        for column, share in enumerate(line):
            colour = "black" if share > 60 else "white"
            axis.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axis.axvline(0.5, color="white", linewidth=3)
    axis.set_title("Accuracy on damaged images, %", fontsize=10)
    axis.figure.colorbar(image, ax=axis, pad=0.01)
