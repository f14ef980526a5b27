"""Fuzzing of everything that reads what a user names: no error but a `PoaError`, no hang, bounded memory.

    nice python -m benchmarks.fuzz --num-cases 50000 --out benchmarks/results/DATE-fuzz.json

Cases run in a process of their own with bounded memory; where one ends or hangs, that is a finding, and another goes on
behind it. A case is a pure function of the seed, its target and its number: `--target NAME --case N` runs it again.
"""

from __future__ import annotations

import argparse
import json
import queue
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from poa.files import write_json
from tests.fuzzing.run import CASE_SECONDS, Outcome, plan, run_case
from tests.fuzzing.targets import Target, targets

MEMORY = 2 * 2**30
"""Bytes that the cases may take, beside the libraries."""
PATIENCE = 3 * CASE_SECONDS
"""Seconds after which a process that says nothing has hung where no alarm reaches it."""


def work(name: str, seed: int, first: int, end: int) -> None:
    """Runs cases of one target and prints each outcome as a line of JSON."""
    with tempfile.TemporaryDirectory() as scratch:
        target = _target(name, Path(scratch))
        run_case(target, seed, first, _folder(scratch, "warm"))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        folder = _folder(scratch, "case")
        for index in range(first, end):
            found = run_case(target, seed, index, folder)
            print(json.dumps([found.index, found.result, found.seconds]), flush=True)


def outcomes(name: str, seed: int, num_cases: int) -> list[Outcome]:
    """Of all cases of one target; a process that ends or hangs is the finding of the case that it was at."""
    found: list[Outcome] = []
    while len(found) < num_cases:
        begun = time.monotonic()
        told = _process(name, seed, len(found), num_cases)
        found += told
        if len(found) < num_cases:
            what = "hang" if time.monotonic() - begun > PATIENCE else "end of the process"
            found.append(Outcome(name, len(found), what, PATIENCE))
    return found


def summary(found: list[Outcome]) -> dict[str, Any]:
    """Counts, the slowest case and the findings of one target."""
    counts = Counter("finding" if each.is_finding else each.result for each in found)
    slowest = max(found, key=lambda each: each.seconds)
    return {
        "cases": len(found),
        **{name: counts[name] for name in ("works", "refused", "finding")},
        "seconds": round(sum(each.seconds for each in found), 1),
        "slowest": {"case": slowest.index, "seconds": round(slowest.seconds, 2)},
        "findings": [{"case": each.index, "what": each.result} for each in found if each.is_finding],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-cases", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", help="only this one")
    parser.add_argument("--case", type=int, help="only this case of the target, in this process")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        work(options.target, options.seed, *options.work)
        return
    with tempfile.TemporaryDirectory() as scratch:
        if options.case is not None:
            target = _target(options.target, Path(scratch))
            content = target.case(options.seed, options.case)
            print(repr(content)[:2000])
            target.run(content, _folder(scratch, "case"))
            return
        planned = [(target.name, count) for target, count in plan(targets(Path(scratch)), options.num_cases)]
    started, found = time.monotonic(), {}
    for name, count in planned:
        if options.target in (None, name):
            found[name] = summary(outcomes(name, options.seed, count))
            print(f"{name:<20}", json.dumps(found[name]), flush=True)
    result = {
        "date": date.today().isoformat(),
        "command": "python -m benchmarks.fuzz " + " ".join(sys.argv[1:]),
        "machine": describe_machine(),
        "seed": options.seed,
        "memory_limit_mib": MEMORY // 2**20,
        "cases": sum(each["cases"] for each in found.values()),
        "findings": sum(each["finding"] for each in found.values()),
        "slowest_seconds": max(each["slowest"]["seconds"] for each in found.values()),
        "seconds": round(time.monotonic() - started),
        "targets": found,
    }
    if options.out is not None:
        write_json(options.out, result)
    print(f"{result['cases']} cases, {result['findings']} findings, the slowest took {result['slowest_seconds']} s")


def _process(name: str, seed: int, first: int, end: int) -> list[Outcome]:
    """What one process tells until it is done, ends or hangs."""
    command = [sys.executable, "-m", "benchmarks.fuzz", "--target", name, "--seed", str(seed)]
    command += ["--work", str(first), str(end)]
    lines: queue.Queue[str | None] = queue.Queue()
    found: list[Outcome] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        threading.Thread(target=_pump, args=(process, lines), daemon=True).start()
        wait = 60 + PATIENCE  # the libraries are imported first
        while len(found) < end - first:
            try:
                line = lines.get(timeout=wait)
            except queue.Empty:
                break
            if line is None:
                break
            index, result, seconds = json.loads(line)
            found.append(Outcome(name, index, result, seconds))
            wait = PATIENCE
        process.kill()
    return found


def _pump(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    for line in process.stdout or ():
        lines.put(line)
    lines.put(None)


def _target(name: str, scratch: Path) -> Target:
    return next(target for target in targets(scratch) if target.name == name)


def _folder(scratch: str, name: str) -> Path:
    folder = Path(scratch) / f"{name}-files"
    folder.mkdir(exist_ok=True)
    return folder


if __name__ == "__main__":
    main()
