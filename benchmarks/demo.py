"""The demo's figures for several seeds: how much of them is chance.

    python benchmarks/demo.py --seeds 0 1 2 --json result.json

For each seed the recipe `digits` is pre-trained into a temporary directory and every sub-network classifies the
held-out digits by k-NN; printed and written are, for each sub-network, the median, smallest and largest accuracy.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from machine import describe_machine

from poa.config import load_recipe
from poa.data import open_source
from poa.demo import raw_pixel_accuracy
from poa.evaluate import Knn, evaluate, split
from poa.family import load
from poa.models import family_members
from poa.train import ConsoleReporter, pretrain


def accuracies(seed: int) -> dict[str, float]:
    """The best k-NN accuracy of every sub-network trained with that seed."""
    recipe = load_recipe("digits")
    config = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, seed=seed))
    train, test = (open_source(f"digits:{part}", config.data, config.model.num_channels) for part in ("train", "test"))
    with tempfile.TemporaryDirectory() as folder:
        pretrain(config, Path(folder) / "run", ConsoleReporter())
        family = load(Path(folder) / "run")
        report = evaluate([Knn()], family_members(family), split(train, test, [Knn()]))
    return {result.network: result.value for result in report.results}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    found = [accuracies(seed) for seed in arguments.seeds]
    data = load_recipe("digits").data
    raw = raw_pixel_accuracy(open_source("digits:train", data, 1), open_source("digits:test", data, 1))
    subnets = {}
    for name in found[0]:
        values = [by_name[name] for by_name in found]
        subnets[name] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
        print(f"{name:<8} {subnets[name]['median']:.1%}   ({min(values):.1%} … {max(values):.1%})")
    print(f"raw pixels {raw:.1%}")
    if arguments.json:
        result = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": "python benchmarks/demo.py " + " ".join(sys.argv[1:]),
            "machine": describe_machine(),
            "seeds": arguments.seeds,
            "raw_pixels": raw,
            "knn": subnets,
            "knn_by_seed": {str(seed): by_name for seed, by_name in zip(arguments.seeds, found, strict=True)},
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
