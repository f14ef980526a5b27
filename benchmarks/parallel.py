"""How far the training of several processes lies from that of one, in losses, gradients and weights.

    python benchmarks/parallel.py --json benchmarks/results/DATE-parallel.json

The trainings are those that `tests/integration/test_parallel.py` checks: tiny networks on handwritten digits, gloo.
Each number is the largest difference on any process, relative to the number itself; of a tensor's entries to the
tensor's largest. losses: the loss, its terms and the gradient norms of all steps; gradients: those of the first step;
weights: student, teacher and centres after the last (and of a run that was stopped and went on the optimiser's state).
In float64 all else than another order of summation would show. bfloat16 is compared with float32.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path

from machine import describe_machine


def measure(name: str) -> dict[str, dict[str, float]]:
    from tests.integration.test_parallel import WORK
    from tests.parallel_processes import largest, run_work
    from tests.parallel_runs import Case

    num_ranks, work = WORK[name]
    found = run_work(num_ranks, work)
    rows = {}
    for key, differences in found.differences.items():
        legs = "" if isinstance(key, Case) else ": " + " → ".join(f"{leg.num_ranks} {leg.mode}" for leg in key[1])
        case = key if isinstance(key, Case) else key[0]
        title = f"{num_ranks} processes, {case}, {case.num_steps} steps{legs}"
        rows[title] = largest(differences)
        if case.precision != "float64":
            # AdamW makes steps of full size of gradients that are nothing but rounding.
            del rows[title]["weights"]
    rows |= {f"{num_ranks} processes, {title}": {"value": value} for title, value in largest(found.objective).items()}
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["two", "four", "compiled"], default=["two", "four", "compiled"])
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    results = {}
    for name in arguments.only:
        rows = measure(name)
        results |= rows
        for title, figures in rows.items():
            print(title)
            print("    " + "   ".join(f"{key} {value:.1e}" for key, value in figures.items()), flush=True)
    if arguments.json:
        command = "python benchmarks/parallel.py " + " ".join(sys.argv[1:])
        date = datetime.now(UTC).isoformat(timespec="seconds")
        record = {"command": command, "date": date, "machine": describe_machine(), "results": results}
        arguments.json.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
