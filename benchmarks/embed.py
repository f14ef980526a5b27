"""What `poa embed` costs beyond the forward passes, and whether its memory grows with the images.

    python benchmarks/embed.py FAMILY IMAGES --subnet intact --json result.json

FAMILY is a run or family directory, IMAGES a .parquet file with an image column. In one process, in turn and with the
same threads: (1) the forward passes alone on decoded batches in memory, (2) decoding alone, (3) `embed` from the file
to the file of vectors without workers, (4) the same with workers that decode. The figures are images a second, the
time of (3) over that of (1) + (2), also in CPU time, which other programs on the machine change little, and the time of
(4) over (1). Then `embed` runs on few and on many of the images, in Parquet
and in a tar archive, each time in a process of its own; the largest anonymous memory of each is compared.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from machine import AnonymousMemory, describe_machine

from poa.config import DataConfig
from poa.data import eval_transform, normalize, open_source
from poa.embed import EmbedOptions, embed
from poa.models import Candidate, open_models


def write_images(images: Path, num_images: int, kind: str, folder: Path) -> str:
    """The first images of a Parquet file in a file of their own, one after the other if they do not suffice."""
    table = pq.read_table(images, columns=["image"]).slice(0, num_images)
    if kind == "parquet":
        file = folder / f"{num_images}.parquet"
        pq.write_table(table, file, row_group_size=1000)
        return str(file)
    file = folder / f"{num_images}.tar"
    with tarfile.open(file, "w") as archive:
        for number, cell in enumerate(table.column("image").to_pylist()):
            content = cell["bytes"] if isinstance(cell, dict) else cell
            member = tarfile.TarInfo(f"{number:08d}.jpg")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(file)


def rates(network: Candidate, spec: str, options: EmbedOptions, num_workers: int, repeats: int) -> dict[str, Any]:
    """Images a second of forward passes, of decoding and of everything, repeated in turn."""
    source, how = open_source(spec, DataConfig(), network.preprocessing.num_channels), network.preprocessing
    shape, size = (how.image_size, how.crop_pct, how.interpolation), options.batch_size

    def decoded() -> list[np.ndarray]:
        starts = range(0, len(source), size)
        return [
            np.stack([eval_transform(source.load(i), *shape) for i in range(s, min(s + size, len(source)))])
            for s in starts
        ]

    def forward() -> None:
        with torch.inference_mode():
            for batch in batches:
                network.features(normalize(torch.from_numpy(batch).to(network.device), how.mean, how.std))

    def whole(num_workers: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            in_order = open_source(spec, DataConfig(), how.num_channels, in_order=True)
            embed(network, in_order, Path(folder) / "v.parquet", options, num_workers=num_workers)

    batches = decoded()
    forward()
    rounds = []
    for _ in range(repeats):
        seconds, cpu = {}, {}
        parts = {"forward": forward, "decode": decoded, "embed": partial(whole, 0)}
        for name, work in {**parts, "embed_with_workers": partial(whole, num_workers)}.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            work()
            if network.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name], cpu[name] = time.perf_counter() - start, time.process_time() - cpu_start
        rounds.append({f"{name}_images_per_s": len(source) / each for name, each in seconds.items()})
        rounds[-1]["embed_over_parts"] = seconds["embed"] / (seconds["forward"] + seconds["decode"])
        rounds[-1]["embed_over_parts_cpu_time"] = cpu["embed"] / (cpu["forward"] + cpu["decode"])
        rounds[-1]["embed_with_workers_over_forward"] = seconds["embed_with_workers"] / seconds["forward"]
        print("  ".join(f"{name} {value:.3g}" for name, value in rounds[-1].items()), flush=True)
    medians = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    return {"num_images": len(source), "num_workers": num_workers, "median": medians, "rounds": rounds}


def one_run(network: Candidate, spec: str, options: EmbedOptions) -> dict[str, float]:
    """Peak memory of this process during one run."""
    with tempfile.TemporaryDirectory() as folder, AnonymousMemory() as memory:
        start = time.perf_counter()
        source = open_source(spec, DataConfig(), network.preprocessing.num_channels, in_order=True)
        found = embed(network, source, Path(folder) / "v.parquet", options)
        seconds = time.perf_counter() - start
        size = (Path(folder) / "v.parquet").stat().st_size
    return {
        "num_images": found.num_images,
        "seconds": seconds,
        "file_mib": size / 2**20,
        "peak_anonymous_mib": memory.peak,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family")
    parser.add_argument("images", type=Path)
    parser.add_argument("--subnet", default="intact")
    parser.add_argument("--memory-subnet", default="intact")
    parser.add_argument("--num-images", type=int, nargs=2, default=(5000, 40000))
    parser.add_argument("--num-timed", type=int, default=4000)
    parser.add_argument("--num-workers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--once", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    options = EmbedOptions()
    if arguments.once:
        network = open_models([arguments.family], [arguments.memory_subnet])[0]
        network.to(torch.device(arguments.device))
        print(json.dumps(one_run(network, arguments.once, options)))
        return 0
    network = open_models([arguments.family], [arguments.subnet])[0]
    network.to(torch.device(arguments.device))
    device = torch.cuda.get_device_name() if network.device.type == "cuda" else network.device.type
    shown = ["result.json" if each == str(arguments.json) else each for each in sys.argv[3:]]
    with tempfile.TemporaryDirectory() as folder:
        spec = write_images(arguments.images, arguments.num_timed, "parquet", Path(folder))
        found = {
            "command": " ".join(["python", "benchmarks/embed.py", "FAMILY", "IMAGES", *shown]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": {**describe_machine(), "threads": torch.get_num_threads(), "device": device},
            "network": {"num_params": network.num_params, "num_features": network.num_features, "flops": network.flops},
            "load_average": os.getloadavg()[0],
            "speed": rates(network, spec, options, arguments.num_workers, arguments.repeats),
        }
        memory: dict[str, list[dict[str, float]]] = {}
        for kind in ("parquet", "tar"):
            for num_images in arguments.num_images:
                spec = write_images(arguments.images, num_images, kind, Path(folder))
                command = [sys.executable, *sys.argv, "--once", spec]
                out = subprocess.run(command, check=True, capture_output=True, text=True)
                memory.setdefault(kind, []).append(json.loads(out.stdout.splitlines()[-1]))
                print(kind, "  ".join(f"{name} {value:.1f}" for name, value in memory[kind][-1].items()), flush=True)
        found["memory"] = memory
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
