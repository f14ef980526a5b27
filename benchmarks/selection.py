"""Holds `poa select` against brute force: random budgets on random tables of the ResNet-152 space (465 rows).

python benchmarks/selection.py --json benchmarks/results/DATE-select.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from machine import describe_machine

sys.path.insert(0, str(Path(__file__).parent.parent))

from poa.backbones import architecture
from poa.config import ResNetConfig
from poa.deploy.select import FIGURES, Constraint, Row, select
from poa.errors import DataError
from poa.randomness import generator
from tests import select_by_hand as by_hand


def compare(table: list[dict[str, Any]], budget: dict[str, float]) -> dict[str, Any]:
    """Whether pick, front and relaxations are those of brute force, and the seconds that `select` took."""
    rows = [Row(**row) for row in table]
    constraints = [Constraint(FIGURES[name], limit) for name, limit in budget.items()]
    start = time.perf_counter()
    found = select(rows, constraints)
    seconds = time.perf_counter() - start
    expected = by_hand.pick(table, budget)
    picked = None if found.pick is None else found.pick.subnet
    relaxed = [({each.figure.name: each.limit for each in one.limits}, one.row.subnet) for one in found.relaxations]
    return {
        "seconds": seconds,
        "fits": expected is not None,
        "left_out": bool(found.left_out),
        "pick": picked == (None if expected is None else expected["subnet"]),
        "front": [row.subnet for row in found.front] == by_hand.front(table, budget),
        "relaxations": relaxed == ([] if expected is not None else by_hand.relaxations(table, budget)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-draws", type=int, default=1000)
    parser.add_argument("--num-tables", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    kind = architecture("resnet")
    subnets = [str(subnet) for subnet in kind.space(ResNetConfig()).subnets]
    tables = [
        by_hand.draw_table(generator(arguments.seed, "table", index), subnets) for index in range(arguments.num_tables)
    ]
    draws, unusable = [], 0
    for index in range(arguments.num_draws):
        table = tables[index % len(tables)]
        budget = by_hand.draw_budget(generator(arguments.seed, "budget", index), table)
        try:
            draws.append(compare(table, budget))
        except DataError:
            unusable += 1
    seconds = [1e3 * each["seconds"] for each in draws]
    found = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "num_rows": len(subnets),
        "num_draws": len(draws),
        "num_refused": unusable,
        "num_nothing_fits": sum(not each["fits"] for each in draws),
        "num_with_rows_left_out": sum(each["left_out"] for each in draws),
        **{f"num_equal_{name}": sum(each[name] for each in draws) for name in ("pick", "front", "relaxations")},
        "select_ms": {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)},
    }
    print(json.dumps(found, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0 if all(each[name] for each in draws for name in ("pick", "front", "relaxations")) else 1


if __name__ == "__main__":
    sys.exit(main())
