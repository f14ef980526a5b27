"""How ranks should draw their sub-networks: what they lose by waiting, and how many networks a step trains.

    python benchmarks/draws.py --json benchmarks/results/DATE-draws.json

For each space and number of ranks the draws of many steps are made. efficiency: the mean cost of a draw over the mean
of each step's largest, which is the share of the elastic branch's time in which a rank computes. step efficiency: the
same for a whole step, where a sub-network's cost comes on top of what all ranks do alike (teacher and intact student).
distinct: different sub-networks in a step. worst: the largest deviation of a sub-network's draws from its share of the
list, relative to it. Costs are floating-point operations of one forward pass; backward is taken as two.

Compared with poa's modes: `neighbours`, where a step is the next ranks' worth of the list sorted by cost, and
`weighted`, where the distinct sub-networks sorted by cost are cut into buckets, a step draws one of them by its weight,
and each rank draws within it by weight.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from machine import describe_machine

from poa.backbones import architecture
from poa.config import load_recipe
from poa.elastic import SearchSpace, Subnet, SubnetDraws
from poa.elastic.draws import NUM_BUCKETS
from poa.randomness import generator

RECIPES = ("vit-l16", "swin-b", "resnet152", "digits")
RANKS = (2, 4, 8, 64)
COMMON_COST = 3.0 + 0.6
"""What all ranks do alike in a step, in forward passes of the intact network on all crops: the intact student forward
and backward, and the teacher on the two global crops, which hold 392 of all 680 patches (2×224 and 8×96 px)."""

Draws = Iterator[tuple[Subnet, ...]]


def ours(space: SearchSpace, costs: dict[Subnet, float], mode: str, ranks: int, steps: int) -> Draws:
    draws = SubnetDraws(space, costs, mode, ranks)  # type: ignore[arg-type]
    for position in range(steps):
        yield draws.at(0, position)  # type: ignore[misc]


def neighbours(space: SearchSpace, costs: dict[Subnet, float], ranks: int, steps: int) -> Draws:
    entries = sorted(space.draw_list, key=lambda subnet: (costs[subnet], subnet))
    entries = [subnet for subnet in entries for _ in range(-(-ranks // len(entries)))]
    for start in range(0, steps, len(entries) // ranks):
        rng = generator(0, "neighbours", start)
        left_out = rng.permutation(len(entries))[: len(entries) % ranks]
        kept = np.delete(np.arange(len(entries)), left_out).reshape(-1, ranks)
        for step in rng.permutation(kept)[: steps - start]:
            yield tuple(entries[index] for index in step)


def weighted(space: SearchSpace, costs: dict[Subnet, float], ranks: int, steps: int) -> Draws:
    subnets = sorted(set(space.draw_list), key=lambda subnet: (costs[subnet], subnet))
    buckets = np.array_split(np.arange(len(subnets)), NUM_BUCKETS)
    weights = np.array([space.multiplicities[subnet] for subnet in subnets], dtype=float)
    shares = np.array([weights[bucket].sum() for bucket in buckets])
    for step in range(steps):
        rng = generator(0, "weighted", step)
        bucket = buckets[rng.choice(len(buckets), p=shares / shares.sum())]
        own = weights[bucket] / weights[bucket].sum()
        yield tuple(subnets[index] for index in rng.choice(bucket, size=ranks, p=own))


def modes(space: SearchSpace, costs: dict[Subnet, float]) -> dict[str, Callable[[int, int], Draws]]:
    return {
        **{
            mode: lambda ranks, steps, mode=mode: ours(space, costs, mode, ranks, steps)  # type: ignore[misc]
            for mode in ("cost-bucket", "independent", "shared")
        },
        "neighbours": lambda ranks, steps: neighbours(space, costs, ranks, steps),
        "weighted": lambda ranks, steps: weighted(space, costs, ranks, steps),
    }


def measure(space: SearchSpace, costs: dict[Subnet, float], draws: Draws) -> dict[str, float]:
    taken = list(draws)
    cost = np.array([[costs[subnet] for subnet in step] for step in taken])
    counts = Counter(subnet for step in taken for subnet in step)
    share = cost.size / len(space.draw_list)
    listed = Counter(space.draw_list)
    whole = COMMON_COST * costs[space.intact]
    return {
        "efficiency": float(cost.mean() / cost.max(axis=1).mean()),
        "step_efficiency": float((whole + 3 * cost.mean()) / (whole + 3 * cost.max(axis=1).mean())),
        "distinct": float(np.mean([len(set(step)) for step in taken])),
        "worst": max(abs(counts[subnet] / (number * share) - 1.0) for subnet, number in listed.items()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--walks", type=int, default=20, help="how often the list is walked, at least")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    results = []
    print(f"{'space':<12}{'ranks':>6}  {'draws':<14}{'efficiency':>11}{'of a step':>11}{'distinct':>10}{'worst':>8}")
    for recipe in RECIPES:
        model = load_recipe(recipe).model
        space = architecture(model).space(model)
        costs = {subnet: float(architecture(model).flops(model, subnet, None)) for subnet in space.subnets}
        for ranks in RANKS:
            steps = max(arguments.walks * len(space.draw_list) // ranks, 10 * NUM_BUCKETS)
            for name, make in modes(space, costs).items():
                found = measure(space, costs, make(ranks, steps))
                results.append({"space": recipe, "ranks": ranks, "draws": name, "steps": steps, **found})
                print(
                    f"{recipe:<12}{ranks:>6}  {name:<14}{found['efficiency']:>11.3f}{found['step_efficiency']:>11.3f}"
                    f"{found['distinct']:>10.1f}{found['worst']:>8.2f}"
                )
    if arguments.json:
        command = "python benchmarks/draws.py " + " ".join(sys.argv[1:])
        date = datetime.now(UTC).isoformat(timespec="seconds")
        record = {"command": command, "date": date, "machine": describe_machine(), "num_buckets": NUM_BUCKETS}
        arguments.json.write_text(json.dumps({**record, "results": results}, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
