"""How fast all sub-networks of a large space are written as timm directories, against the disk's sequential writing.

    python benchmarks/extract_all.py --scratch DIR                       # the 143 of ViT-L, 67 GB in turn
    python benchmarks/extract_all.py --scratch DIR --json result.json    # and writes the figures
    python benchmarks/extract_all.py --scratch DIR --every 12            # every twelfth only

The family is the recipe vit-l16's with fresh weights. For each sub-network, in an order that changes each time: as many
bytes as its file has are written from memory in pieces of 16 MiB and flushed (fsync), and its timm directory is
written and flushed. The directory is then read back, every tensor compared bit for bit with the sub-network's, and
removed before the next one is begun, so the disk holds one at a time; none of this is timed. Of some sub-networks
`save_subnet` is timed too, which opens the written model with timm and compares it with the sub-network on images.
Memory is what the process holds at most while it writes, above what it held before.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from machine import describe_machine
from safetensors import safe_open
from speed import fresh_family, spread

from poa.config import load_recipe
from poa.elastic import Subnet
from poa.family import Family
from poa.files import replace_directory

PIECE = os.urandom(1 << 20) * 16


def write_plain(path: Path, num_bytes: int) -> None:
    with path.open("wb", buffering=0) as file:
        for start in range(0, num_bytes, len(PIECE)):
            file.write(PIECE[: min(len(PIECE), num_bytes - start)])
        os.fsync(file.fileno())


def write_directory(family: Family, subnet: Subnet, path: Path) -> None:
    with replace_directory(path) as scratch:
        family.write_timm(subnet, scratch, family.card.preprocessing.image_size)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def resident(field: str) -> int:
    """Bytes of this process's memory, VmRSS or VmHWM, as Linux tells them."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def with_peak(work: Callable[[], object]) -> tuple[float, int]:
    """The work's seconds, and the bytes of memory that it needed at most."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = resident("VmRSS")
    taken = seconds(work)
    return taken, resident("VmHWM") - before


def check(family: Family, subnet: Subnet, directory: Path) -> None:
    expected = family.supernet.timm_windows(subnet, family.card.preprocessing.image_size)
    with safe_open(directory / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(expected)  # noqa: S101 (a benchmark's check)
        for name, window in expected.items():
            assert torch.equal(file.get_tensor(name), window.part()), name  # noqa: S101


def measure_one(family: Family, subnet: Subnet, scratch: Path, *, is_first: bool) -> dict[str, object]:
    num_bytes = 4 * family.card.num_params(subnet)
    plain, directory = scratch / "plain.bin", scratch / "network"
    found: dict[str, object] = {"subnet": str(subnet), "bytes": num_bytes}
    for kind in ("plain_s", "extract_s") if is_first else ("extract_s", "plain_s"):
        if kind == "plain_s":
            found[kind] = seconds(lambda: write_plain(plain, num_bytes))
            plain.unlink()
        else:
            found[kind], found["peak_bytes"] = with_peak(lambda: write_directory(family, subnet, directory))
            check(family, subnet, directory)
            shutil.rmtree(directory)
    return found


def verified(family: Family, names: list[str], scratch: Path) -> list[dict[str, object]]:
    found = []
    for subnet in family.space.parse_all(names):
        taken = seconds(lambda subnet=subnet: family.save_subnet(subnet, scratch / "network"))  # type: ignore[misc]
        found.append({"subnet": str(subnet), "bytes": 4 * family.card.num_params(subnet), "save_subnet_s": taken})
        shutil.rmtree(scratch / "network")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, required=True, help="a folder on the disk; 3 GB are needed at a time")
    parser.add_argument("--every", type=int, default=1, help="measure every so many sub-networks only")
    parser.add_argument("--verify", nargs="*", default=["smallest", "middle", "intact"], help="with save_subnet")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    family = fresh_family(load_recipe("vit-l16").model)
    chosen = family.subnets[:: -arguments.every]
    rows = []
    for position, subnet in enumerate(chosen):
        rows.append(measure_one(family, subnet, arguments.scratch, is_first=position % 2 == 0))
        if position % 13 == 0:
            print(f"{position + 1}/{len(chosen)} {rows[-1]}", flush=True)
    total = {key: sum(float(row[key]) for row in rows) for key in ("bytes", "plain_s", "extract_s")}  # type: ignore[arg-type]
    checked = verified(family, arguments.verify, arguments.scratch)
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"python benchmarks/extract_all.py --scratch DIR --every {arguments.every}",
        "machine": {**describe_machine(), "threads": torch.get_num_threads()},
        "num_networks": len(rows),
        "gigabytes": total["bytes"] / 1e9,
        "plain_mb_per_s": total["bytes"] / 1e6 / total["plain_s"],
        "extract_mb_per_s": total["bytes"] / 1e6 / total["extract_s"],
        "ratio_of_totals": total["plain_s"] / total["extract_s"],
        "ratio": spread([row["plain_s"] / row["extract_s"] for row in rows]),  # type: ignore[operator]
        "largest_network_mb": max(row["bytes"] for row in rows) / 1e6,  # type: ignore[type-var, operator]
        "peak_memory_mb": max(row["peak_bytes"] for row in rows) / 1e6,  # type: ignore[type-var, operator]
        "median_peak_memory_mb": statistics.median(row["peak_bytes"] for row in rows) / 1e6,  # type: ignore[type-var, operator]
        "verified": checked,
        "networks": rows,
    }
    for name in ("gigabytes", "plain_mb_per_s", "extract_mb_per_s", "ratio_of_totals", "ratio", "peak_memory_mb"):
        print(f"{name:<24}{result[name]}")
    for row in checked:
        print(f"verified: {row}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
