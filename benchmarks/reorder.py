"""Does putting the channels that matter first help narrow sub-networks? Digits, a few minutes for each seed.

    python benchmarks/reorder.py --out benchmarks/results/DATE-reorder.json

For each seed a plain ViT is pre-trained on the digits and written as a timm network. Then a family grows from it, with
and without `init.reorder`; as a control also with the channels that matter least first. On the held-out digits two
measures of every sub-network are taken, at the start and after some epochs of elastic training: k-NN accuracy, and the
agreement of its features with the intact network's (linear CKA, Kornblith et al., *Similarity of Neural Network
Representations Revisited*, 2019).
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from machine import describe_machine
from torch import Tensor

from poa.config import InitConfig, PretrainConfig, RuntimeConfig, load_recipe
from poa.data import open_source
from poa.elastic import reordered
from poa.evaluate import Knn, evaluate, extract_features, split
from poa.family import Family, load
from poa.figures import COLOURS, new_figure, save_figure
from poa.models import family_members
from poa.pretrained import channel_orders
from poa.pretrained.start import sample_images
from poa.runtime import resolve_runtime
from poa.train import pretrain
from poa.train.setup import build_trainer

WIDTHS = (16, 32, 48, 64, 80)
DEPTHS = (2, 3, 4)
ARMS = {
    "start": (
        ("least first", False, "start, least first"),
        ("as it came", False, "start"),
        ("reordered", True, "start"),
    ),
    "after": (("as it came", False, "after"), ("reordered", True, "after")),
}
"""For each time the ways compared: (name, whether reordered, where its figures are)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--source-epochs", type=float, default=40.0)
    parser.add_argument("--epochs", type=float, default=5.0)
    arguments = parser.parse_args()
    runs = []
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            source = make_source(Path(folder), seed, arguments.source_epochs)
            for reorder in (False, True):
                found = grow(Path(folder), source, seed, arguments.epochs, reorder=reorder)
                runs.append({"seed": seed, "reorder": reorder, **found})
                print(json.dumps(runs[-1]), flush=True)
    table = summary(runs)
    for row in table:
        print(row)
    if arguments.out:
        result = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "what": "k-NN (best k) and agreement with the intact network (linear CKA) on 360 held-out digits, of "
            "sub-networks grown from a pre-trained plain ViT; percent, mean and standard deviation over the seeds",
            "command": "python benchmarks/reorder.py",
            "settings": {key: value for key, value in vars(arguments).items() if key not in ("out", "picture")},
            "machine": describe_machine(),
            "table": table,
            "runs": runs,
        }
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.picture:
        draw(table, arguments.picture)


def config_of(seed: int, epochs: float, widths: Sequence[int], depths: Sequence[int]) -> PretrainConfig:
    base = load_recipe("digits")
    return replace(
        base,
        model=replace(base.model, widths=tuple(widths), depths=tuple(depths)),
        train=replace(base.train, seed=seed, epochs=epochs),
        monitor=replace(base.monitor, every=0),
        runtime=RuntimeConfig(device="cpu", num_workers=0),
    )


def make_source(folder: Path, seed: int, epochs: float) -> Path:
    """A plain ViT, pre-trained alone, as a timm directory."""
    pretrain(config_of(seed, epochs, WIDTHS[-1:], DEPTHS[-1:]), folder / "source")
    family = load(folder / "source")
    family.save_subnet(family.space.intact, folder / "net")
    return folder / "net"


def grow(folder: Path, source: Path, seed: int, epochs: float, *, reorder: bool) -> dict[str, Any]:
    """k-NN of every sub-network at the start and after `epochs`."""
    config = replace(config_of(seed, epochs, WIDTHS, DEPTHS), init=InitConfig(source=str(source), reorder=reorder))
    out = folder / f"grown-{reorder}"
    images = open_source(config.data.source, config.data, config.model.num_channels)
    pretrain(config, out)
    after = load(out)
    backbone = build_trainer(config, 22, resolve_runtime(config.runtime), images).model.student.backbone
    found = {"start": measured(Family(after.card, backbone), config), "after": measured(after, config)}
    if not reorder:
        orders = channel_orders(backbone, sample_images(config, images))
        worst = {name: order.flip(0) for name, order in orders.items()}
        backbone.load_state_dict(reordered(backbone.layout, backbone.state_dict(), worst))
        found["start, least first"] = measured(Family(after.card, backbone), config)
    return found


def measured(family: Family, config: PretrainConfig) -> dict[str, dict[str, float]]:
    """k-NN accuracy and agreement with the intact network, of every sub-network on the held-out digits."""
    train, test = (
        open_source(f"digits:{part}", config.data, config.model.num_channels, require_labels=True)
        for part in ("train", "test")
    )
    results = evaluate([Knn()], family_members(family), split(train, test, [Knn()])).results
    with extract_features(family_members(family), test) as features:
        intact = features.of(str(family.space.intact)).cls
        agreement = {str(subnet): linear_cka(features.of(str(subnet)).cls, intact) for subnet in family.subnets}
    return {"knn": {result.network: result.value for result in results}, "cka": agreement}


def linear_cka(a: Tensor, b: Tensor) -> float:
    """Linear centred kernel alignment of two sets of features of the same images, 0 to 1."""
    a, b = (part.double() - part.double().mean(dim=0) for part in (a, b))
    return float((a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm()))


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each measure, time and width the mean over its depths: mean and standard deviation over seeds, in percent."""
    rows = []
    for what, when, width in itertools.product(("knn", "cka"), ("start", "after"), WIDTHS):
        row: dict[str, Any] = {"measure": what, "when": when, "width": width}
        each = {name: by_seed(runs, reorder, key, what, width) for name, reorder, key in ARMS[when]}
        row |= {name: with_spread(values) for name, values in each.items()}
        gains = [new - old for new, old in zip(each["reordered"], each["as it came"], strict=True)]
        row["gain"] = with_spread(gains)
        rows.append(row)
    return rows


def by_seed(runs: Sequence[dict[str, Any]], reorder: bool, when: str, what: str, width: int) -> list[float]:
    """For each seed the mean over the depths of that width, in percent."""
    return [
        100 * mean(value for subnet, value in run[when][what].items() if subnet.startswith(f"w{width}-"))
        for run in runs
        if run["reorder"] == reorder
    ]


def with_spread(values: Sequence[float]) -> list[float]:
    return [round(mean(values), 1), round(stdev(values), 1) if len(values) > 1 else 0.0]


def draw(table: Sequence[dict[str, Any]], file: Path) -> None:
    """Both measures at the start against width, with and without the order, shaded by the spread over seeds."""
    figure, axes = new_figure(9.0, 3.6, num_columns=2)
    for axis, what, title in zip(
        axes, ("knn", "cka"), ("k-NN accuracy, %", "agreement with the intact network (CKA), %"), strict=True
    ):
        rows = [row for row in table if row["measure"] == what and row["when"] == "start"]
        for colour, name in zip((COLOURS[3], COLOURS[0], COLOURS[1]), (arm[0] for arm in ARMS["start"]), strict=True):
            middle, spread = (np.array([row[name][part] for row in rows]) for part in (0, 1))
            axis.plot(WIDTHS, middle, "o-", color=colour, label=name)
            axis.fill_between(WIDTHS, middle - spread, middle + spread, alpha=0.2, color=colour, linewidth=0)
        axis.set(xlabel="width of the sub-network", title=title, xticks=WIDTHS)
        axis.legend(fontsize=8, frameon=False)
    save_figure(figure, file)


if __name__ == "__main__":
    main()
