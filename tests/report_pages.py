"""A small family with tables and curves, and pages about it, for the tests of the report."""

import csv
import json
import math

import torch

from poa.backbones import ARCHITECTURES
from poa.config import ViTConfig
from poa.deploy.profile.table import ProfileRow, family_key, write_profile
from poa.family import Family, FamilyCard, Preprocessing

CONFIG = ViTConfig(
    widths=(16, 24, 32, 40), depths=(1, 2, 3), head_dim=8, patch_size=4, image_size=16, num_channels=3, mlp="gelu"
)
SETTINGS = {"board": ("onnx", 1.0), "server": ("torch", 0.21)}
"""By device: the runtime, and how slow it is."""
NASTY = "</script><img src=x onerror=\"document.title='owned'\">&'"


def make_family(source="digits:train", **provenance):
    kind = ARCHITECTURES["vit"]
    backbone = kind.build(CONFIG)
    backbone.init_weights_(torch.Generator().manual_seed(0))
    told = {"finished": "2026-11-25T12:00:00+00:00", "seed": 7, "data": {"source": source, "num_images": 1437}}
    how = Preprocessing(CONFIG.image_size, CONFIG.num_channels, (0.5,), (0.25,))
    return Family(FamilyCard(kind, CONFIG, how, provenance=told | provenance), backbone)


def accuracy_of(place):
    """Rises with size, with ties and setbacks."""
    return round(0.5 + 0.04 * math.log1p(place) + 0.01 * math.sin(3 * place), 2)


def write_results(path, card):
    """k-NN of all but one sub-network, RankMe of all, and a network that is not the family's."""
    rows = [
        {
            "network": str(subnet),
            "source": "gone",
            "num_params": card.num_params(subnet),
            "flops": card.flops(subnet),
            "knn/accuracy": "" if place == 4 else accuracy_of(place),
            "health/rankme": 10 + (place * 7) % 12,
            "linear/learning_rate": 0.1,
        }
        for place, subnet in enumerate(card.space.subnets)
    ]
    rows.append(rows[0] | {"network": f"{rows[0]['network']} untrained"})
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_costs(path, card):
    """Two devices; every other sub-network of the board is interpolated."""
    rows = []
    for device, (runtime, slowness) in SETTINGS.items():
        for place, subnet in enumerate(card.space.subnets):
            latency = slowness * (1.3 + card.num_params(subnet) / 9e3 + 0.7 * (place % 3))
            is_measured = device == "server" or place % 2 == 0
            rows.append(
                ProfileRow(
                    device=device,
                    runtime=runtime,
                    precision="float32",
                    num_threads=1,
                    batch_size=1,
                    image_size=CONFIG.image_size,
                    subnet=str(subnet),
                    is_measured=is_measured,
                    latency_ms=latency,
                    latency_p95_ms=1.2 * latency,
                    throughput=1000 / latency,
                    peak_memory_mb=3.0 + place,
                    num_params=card.num_params(subnet),
                    flops=card.flops(subnet),
                    file_size_mb=card.num_params(subnet) * 4e-6,
                    fit_error=None if is_measured else 0.031,
                    family=family_key(card),
                    date="2026-11-25",
                    poa_version="0.1.0",
                )
            )
    write_profile(path, rows)
    return path


def metric_lines(num_steps=900):
    """A long run's metrics: a peak of one line, a loss that is 0 throughout, and a monitor."""
    lines = []
    for step in range(1, num_steps + 1):
        loss = 5 / math.sqrt(step) + (40.0 if step == 333 else 0.0)
        lines.append({"step": step, "loss": loss, "loss/intact/global": loss / 2, "loss/intact/patch": 0.0, "lr": 1e-3})
        if step % 300 == 0:
            seen = {"w16-d1": {"rankme": step / 100, "knn": 0.5}, "w40-d3": {"rankme": step / 50, "knn": 0.25}}
            lines.append({"step": step, "monitor": seen})
    return lines


def write_run(folder, **provenance):
    """A run directory with its family, curves, environment and configuration."""
    make_family(**provenance).save(folder / "family")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metric_lines()))
    start = {"time": "2026-11-25T11:00:00+00:00", "packages": {"torch": "2.14.1"}, "device": "cpu"}
    (folder / "environment.json").write_text(json.dumps({"data": {}, "starts": [start]}))
    (folder / "config.yaml").write_text("train: {seed: 7}\n")
    return folder
