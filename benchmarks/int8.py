"""What 8 bits cost each sub-network of a family in k-NN accuracy, and what they save in bytes and time.

    python benchmarks/int8.py FAMILY TRAIN TEST --json result.json

FAMILY is a run or family directory, TRAIN and TEST are labelled images (a folder of class folders, Parquet, or
digits:train and digits:test). Every sub-network is exported to ONNX and OpenVINO in float32 and to the formats of 8
bits, which are calibrated on a random choice of TRAIN. All are opened by their runtimes and give the class vectors of
the same images; the k of k-NN is the best one for the sub-network in float32. The standard error is that of the paired
difference. Latencies are medians of one image on one thread, the formats of a sub-network timed in turn. Stopped, the
same command goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from machine import describe_machine

from poa.config import DataConfig
from poa.data import open_source
from poa.deploy.export.accuracy import accuracy_drops
from poa.deploy.export.base import Exported
from poa.deploy.export.images import ExportImages, read_images
from poa.deploy.export.registry import find_exporters
from poa.deploy.profile.kit import Timing, time_in_turn
from poa.elastic import Subnet
from poa.evaluate import Knn, Loading, split
from poa.evaluate.run import Splits
from poa.family import Family, load
from poa.files import write_json

FLOAT32_OF = {"onnx-int8": "onnx", "onnx-int8-dynamic": "onnx", "openvino-int8": "openvino"}
"""The formats of 8 bits, each with the one that its size and latency are compared with."""


def chosen(source: Any, count: int | None) -> np.ndarray | None:  # noqa: ANN401 (an ImageSource)
    """The positions of a random choice of the images, the same in every run; None: all."""
    if count is None or count >= len(source):
        return None
    return np.sort(np.random.default_rng(0).permutation(len(source))[:count])


def measured(family: Family, subnet: Subnet, images: ExportImages, data: Splits) -> dict[str, Any]:
    """The figures of one sub-network."""
    what = Exported(family, subnet, family.card.preprocessing.image_size, images.calibration)
    exporters = {each.name: each for each in find_exporters([*dict.fromkeys(FLOAT32_OF.values()), *FLOAT32_OF])}
    with tempfile.TemporaryDirectory() as folder:
        runs, num_bytes = {}, {}
        for name, exporter in exporters.items():
            directory = Path(folder) / name
            directory.mkdir()
            exporter.write(what, directory)
            runs[name], num_bytes[name] = exporter.open(directory, 1), exporter.size(directory)
        drops = accuracy_drops(what, {name: runs[name] for name in FLOAT32_OF}, data, Loading(batch_size=64))
        one = images.compared[:1].numpy()
        seconds = time_in_turn([partial(run, one) for run in runs.values()], Timing(num_runs=120))
        latency = {name: 1e3 * median(times) for name, times in zip(runs, seconds, strict=True)}
        expected = what.expected(images.compared)
        cosines = {
            name: torch.cosine_similarity(torch.from_numpy(runs[name](images.compared.numpy())), expected)
            for name in FLOAT32_OF
        }
    formats = {
        name: {
            **asdict(drops[name]),
            "drop": drops[name].drop,
            "cosine_similarity": float(cosines[name].mean()),
            "min_cosine_similarity": float(cosines[name].min()),
            "num_bytes": num_bytes[name],
            "size_ratio": num_bytes[name] / num_bytes[base],
            "latency_ms": latency[name],
            "latency_ratio": latency[name] / latency[base],
        }
        for name, base in FLOAT32_OF.items()
    }
    float32 = {
        name: {"num_bytes": num_bytes[name], "latency_ms": latency[name]} for name in dict.fromkeys(FLOAT32_OF.values())
    }
    return {
        "subnet": str(subnet),
        "num_params": family.card.num_params(subnet),
        "float32": float32,
        "int8": formats,
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean and the largest drop of each format over the sub-networks, and the medians of the ratios."""
    found = {}
    for name in FLOAT32_OF:
        mine = [row["int8"][name] for row in rows]
        found[name] = {
            "mean_drop": float(np.mean([each["drop"] for each in mine])),
            "largest_drop": max(each["drop"] for each in mine),
            "median_size_ratio": median(each["size_ratio"] for each in mine),
            "median_latency_ratio": median(each["latency_ratio"] for each in mine),
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family")
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--subnets", nargs="+", default=["all"])
    parser.add_argument("--num-train", type=int, help="a random choice of so many; all by default")
    parser.add_argument("--num-test", type=int)
    parser.add_argument("--num-calibration", type=int, default=256)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    family = load(arguments.family)
    channels = family.card.preprocessing.num_channels
    train, test = (open_source(spec, DataConfig(), channels) for spec in (arguments.train, arguments.test))
    data = split(train, test, [Knn()])
    data = replace(
        data, train_indices=chosen(train, arguments.num_train), test_indices=chosen(test, arguments.num_test)
    )
    images = read_images(family, train, arguments.num_calibration, needs_calibration=True)
    described = {
        "family": family.card.weights_sha256[:12],
        "num_train": data.num_train,
        "num_test": data.num_test,
        "num_calibration": 0 if images.calibration is None else len(images.calibration),
    }
    rows = [] if arguments.json is None else known(arguments.json, described)
    for subnet in family.space.parse_all(arguments.subnets):
        if any(row["subnet"] == str(subnet) for row in rows):
            continue
        rows.append(measured(family, subnet, images, data))
        show(rows[-1])
        if arguments.json:
            value = {
                "command": "python benchmarks/int8.py FAMILY TRAIN TEST",
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "machine": {**describe_machine(), **versions(), "threads": 1},
                **described,
                "summary": summary(rows),
                "results": rows,
            }
            write_json(arguments.json, value)
    return 0


def known(path: Path, described: dict[str, Any]) -> list[dict[str, Any]]:
    """The sub-networks that the file has already, if it is of the same family and images."""
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    return list(found["results"]) if all(found[name] == value for name, value in described.items()) else []


def show(row: dict[str, Any]) -> None:
    for name, found in row["int8"].items():
        print(
            f"{row['subnet']:<10} {name:<18} {found['subnet']:.2%} → {found['export']:.2%}, lost "
            f"{100 * found['drop']:+.2f} ± {100 * found['standard_error']:.2f} points, size × "
            f"{found['size_ratio']:.2f}, latency × {found['latency_ratio']:.2f} ({found['latency_ms']:.3f} ms), "
            f"cosine {found['cosine_similarity']:.5f}",
            flush=True,
        )


def versions() -> dict[str, str]:
    """Of the runtimes and of what quantises for them."""
    from importlib.metadata import version

    return {name: version(name) for name in ("onnxruntime", "openvino", "nncf")}


if __name__ == "__main__":
    sys.exit(main())
