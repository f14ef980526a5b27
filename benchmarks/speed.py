"""How fast extracted networks and views are: against the same timm architecture made by hand, and against each other.

    python benchmarks/speed.py                       # prints a table
    python benchmarks/speed.py --json result.json    # and writes the figures

Families with fresh weights at 224 px: vit-s16, swin-t and resnet50 as in the recipes, and ConvNeXt-T of widths 48, 72
and 96. Of each the smallest, the middle and the intact sub-network, on batches of 1 and 8 images, on one thread. The
three modules of a sub-network (timm.create_model with timm's own weights, the extracted model, the view) run in turn,
in another order each round; a ratio is the median over the rounds of the ratio of two modules' times. Times are of the
processor, not of the clock on the wall, so that what else runs on the machine counts less.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import timm
import torch
from machine import describe_machine
from torch import Tensor, nn

from poa.backbones import architecture
from poa.config import ConvNeXtConfig, load_recipe
from poa.elastic import Subnet
from poa.family import Family, FamilyCard, Preprocessing

RECIPES = ("vit-s16", "swin-t", "resnet50")
KINDS = ("hand", "extracted", "view")


def fresh_family(config: object) -> Family:
    """A family of that configuration with fresh weights."""
    kind = architecture(config)
    backbone = kind.build(config)
    backbone.init_weights_(torch.Generator().manual_seed(0))
    image_size, num_channels = config.image_size, config.num_channels  # type: ignore[attr-defined]
    return Family(FamilyCard(kind, config, Preprocessing(image_size, num_channels, (0.5,), (0.25,))), backbone)


def families() -> Iterator[tuple[str, Family]]:
    for recipe in RECIPES:
        yield recipe, fresh_family(load_recipe(recipe).model)
    yield "convnext-t", fresh_family(ConvNeXtConfig(widths=(48, 72, 96), depths=(3, 6, 9), image_size=224))


def by_hand(family: Family, subnet: Subnet) -> nn.Module:
    made = family.supernet.timm_model(subnet, family.card.preprocessing.image_size)
    model: nn.Module = timm.create_model(made.architecture, pretrained=False, num_classes=0, **made.arguments)
    return model.eval()


def times(modules: dict[str, Callable[[Tensor], Tensor]], images: Tensor, rounds: int) -> list[dict[str, float]]:
    """The processor's seconds for each module in each round."""
    orders = itertools.cycle(itertools.permutations(modules))
    found = []
    for _ in range(rounds + 2):
        taken = {}
        for name in next(orders):
            start = time.thread_time()
            modules[name](images)
            taken[name] = time.thread_time() - start
        found.append(taken)
    return found[2:]


def spread(values: list[float]) -> dict[str, float]:
    low, _, high = statistics.quantiles(values, n=4)
    return {"median": statistics.median(values), "quartile_1": low, "quartile_3": high, "num": len(values)}


def measure(family: Family, subnet: Subnet, batch: int, seconds: float) -> dict[str, object]:
    modules = {"hand": by_hand(family, subnet), "extracted": family.extract(subnet), "view": family.backbone(subnet)}
    side = family.card.preprocessing.image_size
    images = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        estimate = sum(times(modules, images, 1)[0].values())
        rounds = times(modules, images, max(18, int(seconds / estimate)))
    return {
        "subnet": str(subnet),
        "batch_size": batch,
        "milliseconds": {kind: spread([1e3 * each[kind] for each in rounds]) for kind in KINDS},
        "extracted_over_hand": spread([each["extracted"] / each["hand"] for each in rounds]),
        "view_over_extracted": spread([each["view"] / each["extracted"] for each in rounds]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8.0, help="for each sub-network and batch size")
    parser.add_argument("--only", default="", help="one family of the four")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for name, family in families():
        if arguments.only not in ("", name):
            continue
        for subnet in (family.space.smallest, family.space.middle, family.space.intact):
            for batch in arguments.batches:
                row = {"family": name, **measure(family, subnet, batch, arguments.seconds)}
                found.append(row)
                ratios = [row["extracted_over_hand"], row["view_over_extracted"]]
                shown = "   ".join(f"{r['median']:.3f} ({r['quartile_1']:.3f}…{r['quartile_3']:.3f})" for r in ratios)  # type: ignore[index]
                ms = row["milliseconds"]["extracted"]["median"]  # type: ignore[index]
                print(f"{name:<12}{row['subnet']!s:<14}batch {batch}  {ms:8.1f} ms   {shown}", flush=True)
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python benchmarks/speed.py " + " ".join(sys.argv[1:]),
        "machine": {**describe_machine(), "threads": 1},
        "networks": found,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
