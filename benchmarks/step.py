"""One training step against a plain matrix product, in the same run on the same machine.

    python benchmarks/step.py                     # prints a table
    python benchmarks/step.py --json result.json  # and writes the figures
    python benchmarks/step.py --recipe swin-t     # another architecture

The configuration is a recipe's, smaller in batch and heads: for vit-s16 widths 192…384, depths 6…12, head size 64,
2×224 and 8×96 px, batch 8, prototypes 1024/2048/4096/8192. The sub-network is fixed to the middle one, w320-d9. A step
is everything between two batches: normalising, teacher, both students, losses, backward, clipping, AdamW, EMA. Its
floating-point operations are those of its matrix products, counted by torch's profiler on one step (attention by its
plain products; what stochastic depth leaves out is not counted). Pairs of a product's time and a step's time alternate,
so a drifting clock touches both.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from machine import describe_machine
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from poa.config import PretrainConfig, from_dict, load_recipe, to_dict
from poa.config.files import merged
from poa.data import Batch, batch_masks
from poa.elastic import SearchSpace, Subnet
from poa.randomness import generator
from poa.runtime import resolve_runtime
from poa.train.setup import build_trainer
from poa.train.step import Trainer, train_step

OVERRIDES = {
    "heads": {"num_prototypes": [1024, 2048, 4096, 8192]},
    "objective": {"patch_start_epoch": 0},
    "train": {"batch_size": 8},
    "optim": {"warmup_epochs": 1},
}
SIDE = 2048


class FixedDraw(SearchSpace):
    """A search space that always draws the same sub-network, so that steps are alike."""

    def draw(self, seed: int, position: int) -> Subnet | None:  # noqa: ARG002 (the signature of SearchSpace.draw)
        """The middle sub-network."""
        return self.middle


def make_trainer(arguments: argparse.Namespace) -> Trainer:
    values = merged(to_dict(load_recipe(arguments.recipe)), OVERRIDES)
    runtime = {"checkpoint_activations": arguments.checkpoint_activations}
    values = merged(values, {"runtime": {"device": arguments.device, "compile": arguments.compile, **runtime}})
    config = from_dict(PretrainConfig, values, "benchmark")
    trainer = build_trainer(config, 100, resolve_runtime(config.runtime))
    space = trainer.draws.space
    fixed = FixedDraw(space.widths, space.depths, space.width_emphasis, space.depth_emphasis)
    return replace(trainer, draws=replace(trainer.draws, space=fixed))


def make_batch(config: PretrainConfig, step: int) -> Batch:
    size, images = config.model.image_size, config.train.batch_size
    side = config.model.mask_side
    masks = batch_masks(
        2 * images,
        (side, side),
        config.mask,
        generator(0, "targets", step),
        lambda row: generator(0, "mask", step, row),
    )
    rng = torch.Generator().manual_seed(step)
    crops = (
        torch.randint(0, 256, (number, images, 3, pixels, pixels), dtype=torch.uint8, generator=rng)
        for number, pixels in ((2, size), (config.augment.num_local_crops, config.augment.local_size))
    )
    return Batch(*crops, torch.from_numpy(np.asarray(masks)), torch.arange(images), [])


def seconds(device: torch.device, work: object) -> float:
    start = time.perf_counter()
    work()  # type: ignore[operator]
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def count_flops(trainer: Trainer) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        train_step(trainer, [make_batch(trainer.config, 0)], 1)
    return counter.get_total_flops()


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    trainer = make_trainer(arguments)
    device = trainer.runtime.device
    dtype = torch.bfloat16 if trainer.runtime.precision == "bfloat16" else torch.float32
    left, right = (torch.randn(SIDE, SIDE, device=device, dtype=dtype) for _ in range(2))
    for step in range(2):
        train_step(trainer, [make_batch(trainer.config, step)], step + 1)
    step_times, product_times = [], []
    for step in range(arguments.steps):
        batch = make_batch(trainer.config, step)
        # As many products as fill a second or two, so that both rates average over the machine's noise.
        products = [seconds(device, lambda: left @ right) for _ in range(arguments.products)]
        product_times.append(statistics.median(products))
        step_times.append(seconds(device, lambda step=step, batch=batch: train_step(trainer, [batch], step + 3)))
    memory = peak_memory(device)
    flops = count_flops(trainer)
    product_rates = [2 * SIDE**3 / each / 1e9 for each in product_times]
    step_rates = [flops / each / 1e9 for each in step_times]
    ratios = [step / product for step, product in zip(step_rates, product_rates, strict=True)]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python benchmarks/step.py " + " ".join(sys.argv[1:]),
        "machine": {
            **describe_machine(),
            **trainer.runtime.describe(),
        },
        "gflop_per_step": flops / 1e9,
        "matrix_product_gflops": spread(product_rates),
        "step_gflops": spread(step_rates),
        "ratio": spread(ratios),
        "images_per_second": spread([trainer.config.train.batch_size / each for each in step_times]),
        "peak_memory_gib": memory,
    }


def peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"median": statistics.median(ordered), "min": ordered[0], "max": ordered[-1], "num": len(ordered)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="vit-s16")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--products", type=int, default=20, help="matrix products timed before each step")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--compile", default="auto", choices=["auto", "on", "off"])
    parser.add_argument(
        "--checkpoint-activations", action="store_true", help="recompute the blocks in the backward pass"
    )
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    found = measure(arguments)
    for name in ("matrix_product_gflops", "step_gflops", "ratio", "images_per_second"):
        values = found[name]
        print(f"{name:<24}{values['median']:10.3f}   ({values['min']:.3f} … {values['max']:.3f})")  # type: ignore[index]
    print(f"{'gflop_per_step':<24}{found['gflop_per_step']:10.1f}")
    print(f"{'peak_memory_gib':<24}{found['peak_memory_gib']:10.2f}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
