"""How far exports in float32 are from their family, on real images.

    python benchmarks/export.py FAMILY IMAGES [--subnets all] [--formats onnx openvino] [--out FILE]
    python benchmarks/export.py --fresh swin IMAGES

Every sub-network is written in every format, opened by its own runtime and compared on 128 images. --fresh makes a
small family of that architecture with fresh weights in place of a trained one. A file that is there keeps the figures
of other families, sub-networks and formats.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine

from poa.backbones import architecture
from poa.config import ConvNeXtConfig, DataConfig, ModelConfig, ResNetConfig, SwinConfig, ViTConfig
from poa.data import open_source
from poa.deploy.export.base import Exporter
from poa.deploy.export.images import ExportImages, read_images
from poa.deploy.export.registry import EXPORTERS
from poa.deploy.export.run import export_all
from poa.elastic import Subnet
from poa.errors import PoaError
from poa.family import Family, FamilyCard, Preprocessing, load
from poa.files import write_json

OUT = Path(__file__).parent / "results" / "2026-11-25-export-differences.json"
FRESH: dict[str, ModelConfig] = {
    "vit": ViTConfig(widths=(64, 128), depths=(2, 4), head_dim=32, patch_size=4, image_size=32),
    "swin": SwinConfig(
        widths=(16, 32), depths=(2, 4), other_depths=(2, 2, 2), head_dim=16, window_size=4, patch_size=2, image_size=32
    ),
    "resnet": ResNetConfig(
        widths=(128, 256),
        stage2_depths=(1, 2),
        stage3_depths=(1, 2),
        outer_depths=(1, 1),
        base_channels=32,
        image_size=32,
    ),
    "convnext": ConvNeXtConfig(widths=(16, 32), depths=(1, 3), other_depths=(1, 1, 1), image_size=32),
}
FLOAT32 = tuple(name for name, exporter in EXPORTERS.items() if exporter.precision == "float32")


def fresh_family(name: str) -> Family:
    """A small family with fresh weights for colour images of 32 pixels."""
    config: Any = FRESH[name]
    backbone = architecture(config).build(config)
    backbone.init_weights_(torch.Generator().manual_seed(0))
    how = Preprocessing(config.image_size, config.num_channels, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return Family(FamilyCard(architecture(config), config, how), backbone)


def measure(
    family: Family, subnets: Sequence[Subnet], exporter: Exporter, images: ExportImages, scratch: Path
) -> list[dict[str, Any]]:
    """The figures of all sub-networks in one format."""
    rows = []
    for subnet in subnets:
        start = time.perf_counter()
        (found,) = export_all(family, [subnet], [exporter], scratch, images=images)
        if found.comparison is None:
            print(found.trace, file=sys.stderr)
            raise SystemExit(f"{subnet} as {exporter.name} failed: {found.error}")
        rows.append(
            {
                "subnet": str(subnet),
                "format": exporter.name,
                "max_abs_difference": found.comparison.max_abs_difference,
                "relative_difference": found.comparison.relative_difference,
                "seconds_to_write_and_compare": round(time.perf_counter() - start, 1),
            }
        )
        print(exporter.name, subnet, f"{found.comparison.max_abs_difference:.1e}", flush=True)
    return rows


def merged(path: Path, label: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All figures by family, new ones in place of old."""
    known = json.loads(path.read_text(encoding="utf-8"))["families"] if path.exists() else {}
    before = {(row["subnet"], row["format"]): row for row in known.get(label, {}).get("exports", [])}
    after = before | {(row["subnet"], row["format"]): row for row in rows}
    names = dict.fromkeys(row["format"] for row in after.values())
    largest = {
        name: max(row["max_abs_difference"] for row in after.values() if row["format"] == name) for name in names
    }
    return known | {label: {"largest_difference": largest, "exports": list(after.values())}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="?")
    parser.add_argument("images")
    parser.add_argument("--fresh", choices=FRESH)
    parser.add_argument("--subnets", nargs="+", default=["all"])
    parser.add_argument("--formats", nargs="+", choices=FLOAT32, default=FLOAT32)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    if (given.family is None) == (given.fresh is None):
        parser.error("give FAMILY, or --fresh")
    try:
        family = fresh_family(given.fresh) if given.fresh else load(given.family)
        source = open_source(given.images, DataConfig(), family.card.preprocessing.num_channels)
        images = read_images(family, source, 128)
        subnets = family.space.parse_all(given.subnets)
    except PoaError as error:
        sys.exit(f"error: {error}")
    label = f"{family.card.architecture.name}, {'fresh' if given.fresh else 'trained'}"
    for name in given.formats:
        with tempfile.TemporaryDirectory() as scratch:
            rows = measure(family, subnets, EXPORTERS[name](), images, Path(scratch))
        result = {
            "command": "python benchmarks/export.py FAMILY IMAGES, and --fresh swin, --fresh resnet",
            "date": time.strftime("%Y-%m-%d"),
            "machine": describe_machine(),
            "num_images": len(images.compared),
            "families": merged(given.out, label, rows),
        }
        write_json(given.out, result)


if __name__ == "__main__":
    main()
