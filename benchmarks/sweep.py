"""What a sweep over all sub-networks costs beyond their forward passes, and whether memory grows with the images.

    python benchmarks/sweep.py FAMILY TRAIN TEST --json result.json

FAMILY is a run or family directory, TRAIN and TEST are labelled images (a folder of class folders, or Parquet). Three
things are timed in turn in one process, on decoded batches of the same size and with the same threads: (1) the forward
passes alone of every sub-network, (2) one pass that only decodes, (3) the features of a sweep, from files to vectors.
The figure is (3) / ((1) + (2)). Then the whole sweep with k-NN and linear probes runs once on a quarter of the training
images and once on all, each in a process of its own; the largest anonymous memory of both is compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import AnonymousMemory, describe_machine

import poa.evaluate.features as features_module
from poa.config import DataConfig
from poa.data import ImageSource, eval_transform, normalize, open_source
from poa.evaluate import Loading, extract_features, split, sweep
from poa.evaluate.registry import EVALUATORS
from poa.models import Candidate, open_models

NUM_BLOCKS = 4


def decoded(source: ImageSource, network: Candidate, batch_size: int) -> Iterator[np.ndarray]:
    """The network's inputs in batches, as the sweep makes them."""
    how = network.preprocessing
    shape = (how.image_size, how.crop_pct, how.interpolation)
    for start in range(0, len(source), batch_size):
        stop = min(start + batch_size, len(source))
        yield np.stack([eval_transform(source.load(index), *shape) for index in range(start, stop)])


def forward_seconds(networks: list[Candidate], batches: list[np.ndarray]) -> float:
    """Seconds of all forward passes of all networks, nothing else."""
    how, seconds = networks[0].preprocessing, 0.0
    with torch.inference_mode():
        for batch in batches:
            images = normalize(torch.from_numpy(batch), how.mean, how.std)
            start = time.perf_counter()
            for network in networks:
                network.last_blocks(images, NUM_BLOCKS)
            seconds += time.perf_counter() - start
    return seconds


def feature_seconds(networks: list[Candidate], source: ImageSource, batch_size: int) -> float:
    """Seconds from the source to the vectors on disk."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        loading = Loading(batch_size=batch_size)
        with extract_features(networks, source, num_blocks=NUM_BLOCKS, loading=loading, store=Path(folder)):
            return time.perf_counter() - start


def overhead(networks: list[Candidate], source: ImageSource, batch_size: int, repeats: int) -> dict[str, Any]:
    """The cost of the features over that of their parts, repeated in turn."""
    batches = list(decoded(source, networks[0], batch_size))
    forward_seconds(networks, batches[:1])
    rounds = []
    for _ in range(repeats):
        forward = forward_seconds(networks, batches)
        start = time.perf_counter()
        for _batch in decoded(source, networks[0], batch_size):
            pass
        decode = time.perf_counter() - start
        whole = feature_seconds(networks, source, batch_size)
        rounds.append({"forward_s": forward, "decode_s": decode, "features_s": whole})
        rounds[-1]["ratio"] = whole / (forward + decode)
        print("  ".join(f"{name} {value:.3f}" for name, value in rounds[-1].items()), flush=True)
    ratios = [each["ratio"] for each in rounds]
    spread = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return {"num_images": len(source), "num_networks": len(networks), "ratio": spread, "rounds": rounds}


def whole_sweep(arguments: argparse.Namespace, share: float) -> dict[str, float]:
    """One sweep with k-NN and linear probes on a share of the training images: seconds and peak memory."""
    features_module.MEMORY_BUDGET = 0
    networks = open_models([arguments.family], arguments.subnets)
    channels = networks[0].preprocessing.num_channels
    train, test = (open_source(spec, DataConfig(), channels) for spec in (arguments.train, arguments.test))
    protocols = [EVALUATORS["knn"](), EVALUATORS["linear"]()]
    data = split(train, test, protocols)
    chosen = np.arange(int(share * len(train)))
    data = type(data)(train, test, chosen, data.test_indices)
    with tempfile.TemporaryDirectory() as folder, AnonymousMemory() as memory:
        start = time.perf_counter()
        sweep(protocols, networks, data, Path(folder), loading=Loading(batch_size=arguments.batch_size))
        seconds = time.perf_counter() - start
    return {"num_train": float(len(chosen)), "seconds": seconds, "peak_anonymous_mib": memory.peak}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family")
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--subnets", nargs="+", default=["all"])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--share", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.share:
        print(json.dumps(whole_sweep(arguments, arguments.share)))
        return 0
    networks = open_models([arguments.family], arguments.subnets)
    source = open_source(arguments.test, DataConfig(), networks[0].preprocessing.num_channels)
    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {**describe_machine(), "threads": torch.get_num_threads()},
        "features": overhead(networks, source, arguments.batch_size, arguments.repeats),
    }
    command = [sys.executable, *sys.argv]
    runs = []
    for share in (0.25, 1.0):
        out = subprocess.run([*command, "--share", str(share)], check=True, capture_output=True, text=True)
        runs.append(json.loads(out.stdout.splitlines()[-1]))
        print("  ".join(f"{name} {value:.1f}" for name, value in runs[-1].items()), flush=True)
    found["sweep"] = runs
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
