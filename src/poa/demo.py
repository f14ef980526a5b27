"""The demo: the whole of poa on 1,437 handwritten digits, in minutes on a laptop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from poa.config import load_recipe
from poa.data import ImageSource, open_source
from poa.evaluate import Knn, Result, evaluate, knn_accuracies, split
from poa.evaluate.plots import draw_curves, draw_front
from poa.family import Family, FamilyCard, Verification, load
from poa.figures import new_figure, save_figure
from poa.files import write_json
from poa.models import family_members
from poa.runtime import resolve_runtime
from poa.timm_directory import open_timm_directory
from poa.train import Reporter, pretrain
from poa.train.metrics import read_metrics
from poa.train.setup import build_trainer

RECIPE = "digits"


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Attributes:
        results: k-NN of every sub-network on the held-out digits.
        untrained: k-NN of every sub-network before training.
        raw_pixels: best k-NN accuracy on the pixels themselves.
        picture: accuracy against parameters, and the training curves.
        extracted: the timm directory of the middle sub-network.
        verification: how far it is from the sub-network.
        num_test: held-out digits.
    """

    results: tuple[Result, ...]
    untrained: tuple[Result, ...]
    raw_pixels: float
    picture: Path
    extracted: Path
    verification: Verification
    num_test: int


def run_demo(out: Path, reporter: Reporter, say: Callable[[str], None]) -> DemoResult | None:
    """Pre-trains on the digits, evaluates every sub-network, draws, extracts one; None if it was stopped.

    Args:
        out: the directory for everything that is written; a run that is there goes on.
        reporter: watches the training.
        say: is told what happens next.

    Raises:
        PoaError: as `poa.train.pretrain` and `Family.save_subnet`.
    """
    config = load_recipe(RECIPE)
    train = open_source("digits:train", config.data, config.model.num_channels, require_labels=True)
    test = open_source("digits:test", config.data, config.model.num_channels, require_labels=True)
    say(f"1. Pre-training one family on {len(train):,} handwritten digits, labels unseen")
    run = out / "run"
    if pretrain(config, run, reporter).family is None:
        return None
    family = load(run)
    say(f"2. k-NN of all {len(family.subnets)} sub-networks on {len(test)} held-out digits")
    data = split(train, test, [Knn()])
    results = evaluate([Knn()], family_members(family), data).results
    untrained = evaluate([Knn()], family_members(_untrained(family.card)), data).results
    raw = raw_pixel_accuracy(train, test)
    picture = out / "demo.png"
    _draw(results, untrained, raw, run, picture)
    member = family.space.middle
    say(f"3. Cutting {member} out, opening it with timm, comparing")
    directory = out / str(member)
    verification = family.save_subnet(member, directory, overwrite=True)
    open_timm_directory(directory)
    found = DemoResult(results, untrained, raw, picture, directory, verification, len(test))
    _record(found, out / "demo.json")
    return found


def raw_pixel_accuracy(train: ImageSource, test: ImageSource) -> float:
    """The best k-NN accuracy on the pixels themselves: no network at all."""
    pixels, labels = zip(_pixels(train), _pixels(test), strict=True)
    return max(knn_accuracies(pixels[0], labels[0], pixels[1], labels[1]).values())


def _pixels(source: ImageSource) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = np.stack([np.asarray(source.load(index), np.float32).ravel() for index in range(len(source))])
    return torch.from_numpy(pixels), torch.from_numpy(np.asarray(source.labels))


def _untrained(card: FamilyCard) -> Family:
    config = load_recipe(RECIPE)
    trainer = build_trainer(config, 1, resolve_runtime(config.runtime))
    return Family(card, trainer.model.teacher.backbone.cpu())


def _draw(results: tuple[Result, ...], untrained: tuple[Result, ...], raw: float, run: Path, picture: Path) -> None:
    figure, (front, loss, knn) = new_figure(13, 4, 3)
    best_untrained = max(result.value for result in untrained)
    draw_front(front, results, {"raw pixels": raw, "best untrained": best_untrained})
    draw_curves(loss, knn, read_metrics(run))
    save_figure(figure, picture)


def _record(found: DemoResult, path: Path) -> None:
    write_json(
        path,
        {
            "num_test": found.num_test,
            "raw_pixels": found.raw_pixels,
            "subnets": [
                {
                    "subnet": result.network,
                    "num_params": result.num_params,
                    "knn": result.value,
                    "untrained": before.value,
                }
                for result, before in zip(found.results, found.untrained, strict=True)
            ],
            "extracted": {
                "subnet": found.verification.subnet,
                "relative_difference": found.verification.relative_difference,
            },
        },
    )
