"""How far the costs predicted from a designed subset of sub-networks are from those that are measured.

    python benchmarks/profile_fit.py --recipe vit-s16 --num-measured 12 --json result.json

Every sub-network of the recipe's space is measured, with fresh weights: costs do not depend on them. Then only the rows
of the designed subset are given to the fit, and what it says of the others is compared with what was measured. What the
machine does besides moves the measured times; `repeat` says by how much: some networks are measured a second time.
Where other processes compete for the processor, `--cpu-time` counts the time that the process got.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine
from speed import fresh_family

from poa.config import load_recipe
from poa.deploy.profile import ProfileRow
from poa.deploy.profile.fit import predicted_rows
from poa.deploy.profile.kit.timing import Timing
from poa.deploy.profile.plan import design
from poa.deploy.profile.run import ProfileOptions, profile_family
from poa.elastic import Subnet
from poa.family import Family, load


def saved_family(recipe: str, directory: Path) -> Family:
    """A family of the recipe's space with fresh weights, on disk, where each network's process finds it."""
    fresh_family(load_recipe(recipe).model).save(directory)
    return load(directory)


def compared(family: Family, rows: Sequence[ProfileRow], num_measured: int) -> dict[str, Any]:
    """Errors of the rows that the fit has not seen, and the error that it states."""
    by_name = {row.subnet: row for row in rows}
    chosen = design(family.subnets, num_measured)
    others = [each for each in family.subnets if each not in chosen]
    seen = [by_name[str(each)] for each in chosen]
    found, held_out = predicted_rows(family.card, seen, others)
    truth = [by_name[row.subnet] for row in found]
    return {
        "num_measured": num_measured,
        "num_predicted": len(others),
        "stated_root_mean_square": held_out.root_mean_square,
        "stated_median": held_out.median,
        "latency": errors([row.latency_ms for row in found], [row.latency_ms for row in truth]),
        "peak_memory": errors([row.peak_memory_mb for row in found], [row.peak_memory_mb for row in truth]),
        "file_size": errors([row.file_size_mb for row in found], [row.file_size_mb for row in truth]),
    }


def errors(found: Sequence[float | None], truth: Sequence[float | None]) -> dict[str, float] | None:
    """Median, root mean square and worst of the absolute relative errors; None where nothing was measured."""
    if None in found or None in truth:
        return None
    off = np.abs(np.array(found) / np.array(truth) - 1.0)
    return {"median": float(np.median(off)), "rms": float(np.sqrt(np.mean(off**2))), "worst": float(off.max())}


def repeated(family: Family, rows: Sequence[ProfileRow], again: Sequence[Subnet], options: ProfileOptions) -> Any:  # noqa: ANN401 (JSON)
    """How far a second measurement is from the first."""
    names = tuple(map(str, again))
    with tempfile.TemporaryDirectory() as scratch:
        settings = {**vars(options), "subnets": names, "measures_memory": False, "num_measured": None}
        second = profile_family(family, ProfileOptions(**settings), Path(scratch, "again.csv")).rows
    first = {row.subnet: row for row in rows}
    return errors([row.latency_ms for row in second], [first[row.subnet].latency_ms for row in second])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="vit-s16")
    parser.add_argument("--num-measured", type=int, nargs="+", default=[8, 12, 16])
    parser.add_argument("--runtime", default="torch")
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--max-seconds", type=float, default=15.0)
    parser.add_argument("--cpu-time", action="store_true", help="of a shared machine: the processor's time, one thread")
    parser.add_argument("--skip-memory", action="store_true", help="measure times alone")
    parser.add_argument("--table", type=Path, help="where the measured rows are kept; what is there is not measured")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    options = ProfileOptions(
        runtime=arguments.runtime,
        num_threads=arguments.num_threads,
        measures_memory=not arguments.skip_memory,
        timing=Timing(
            max_seconds=arguments.max_seconds, clock=time.process_time if arguments.cpu_time else time.perf_counter
        ),
    )
    with tempfile.TemporaryDirectory() as scratch:
        family = saved_family(arguments.recipe, Path(scratch, "family"))
        table = arguments.table or Path(scratch, "profile.csv")
        rows = profile_family(
            family, ProfileOptions(**{**vars(options), "num_measured": len(family.subnets)}), table
        ).rows
        repeat = repeated(family, rows, design(family.subnets, 6), options)
        fits = [compared(family, rows, num) for num in arguments.num_measured]
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "options": {name: value for name, value in vars(arguments).items() if name not in ("json", "table")},
        "machine": {**describe_machine(), "threads": arguments.num_threads, "runtime": arguments.runtime},
        "clock": "processor time" if arguments.cpu_time else "wall time",
        "recipe": arguments.recipe,
        "num_networks": len(rows),
        "repeat": repeat,
        "fits": fits,
        "rows": [
            {
                name: getattr(row, name)
                for name in ("subnet", "latency_ms", "latency_p95_ms", "peak_memory_mb", "file_size_mb")
            }
            for row in rows
        ],
    }
    print(json.dumps({**result, "rows": len(rows)}, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
