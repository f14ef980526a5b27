"""Requests at a rate that triples and falls back, answered by the sub-networks of one family within a latency target.

    python examples/serve_with_latency_target.py RUN --results results.csv --out serving

RUN is a run or family directory; results.csv is what `poa evaluate sweep` wrote of it. One worker serves in order of
arrival; requests arrive at random (Poisson), whether or not it keeps up. Each stream is served three times: by the
policy, by the intact network and by the smallest one. Written are serving.png of the first stream, and serving.json
with all figures.

The rate is such that the intact network alone is busy for 40 % of the time at first, and for 120 % while it is tripled.
Images are noise, which costs as much as any; the quality is what the table says of the sub-networks.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

import poa
from poa.deploy.policy import LatencyPolicy, PolicyConfig, Rung, ladder_of
from poa.elastic import Subnet
from poa.family import Family
from poa.figures import COLOURS, new_figure, save_figure
from poa.randomness import generator

BUSY_AT_FIRST = 0.4
WINDOW_S = 2.0


@dataclass(frozen=True)
class Answer:
    """One request's fate, in seconds since the stream began."""

    arrival: float
    latency: float
    subnet: str


def measured(family: Family, images: torch.Tensor, repeats: int = 30) -> dict[Subnet, float]:
    """The median seconds of each sub-network for one request; they run in turn, so that noise touches all."""
    seconds: dict[Subnet, list[float]] = {subnet: [] for subnet in family.subnets}
    for _ in range(repeats + 2):
        for subnet, taken in seconds.items():
            start = time.perf_counter()
            family.backbone(subnet)(images)
            taken.append(time.perf_counter() - start)
    return {subnet: float(np.median(taken[2:])) for subnet, taken in seconds.items()}


def arrivals_at(rates: Iterable[float], seconds: float, seed: int) -> list[float]:
    """Poisson arrivals of those rates, one after the other, each for so many seconds."""
    rng = generator(seed, "arrivals")
    found: list[float] = []
    for part, rate in enumerate(rates):
        number = rng.poisson(rate * seconds)
        found += (part * seconds + np.sort(rng.uniform(0.0, seconds, number))).tolist()
    return found


def serve(family: Family, policy: LatencyPolicy, arrivals: Sequence[float], images: torch.Tensor) -> list[Answer]:
    """Serves the stream in real time."""
    answers: list[Answer] = []
    told, begin = 0, time.perf_counter()
    for position, arrival in enumerate(arrivals):
        time.sleep(max(0.0, arrival - (time.perf_counter() - begin)))
        now = time.perf_counter() - begin
        while told < len(arrivals) and arrivals[told] <= now:
            policy.arrived(arrivals[told])
            told += 1
        subnet = policy.choose(now, told - position - 1)
        family.backbone(subnet)(images)
        end = time.perf_counter() - begin
        policy.answered(end, end - now, end - arrival)
        answers.append(Answer(arrival, end - arrival, str(subnet)))
    return answers


def windows(answers: Sequence[Answer], value: Callable[[Sequence[Answer]], float]) -> tuple[list[float], list[float]]:
    """The middle of each window of time, and the value of the answers to what arrived in it."""
    ends = np.arange(0.0, answers[-1].arrival, WINDOW_S)
    parts = [[each for each in answers if start <= each.arrival < start + WINDOW_S] for start in ends]
    return (
        [float(start) + WINDOW_S / 2 for start, part in zip(ends, parts, strict=True) if part],
        [value(part) for part in parts if part],
    )


def p95_ms(answers: Sequence[Answer]) -> float:
    """The 95th percentile of the latencies in milliseconds."""
    return 1e3 * float(np.quantile([each.latency for each in answers], 0.95))


def draw(
    path: Path, served: dict[str, list[Answer]], ladder: Sequence[Rung], quality: dict[str, float], target: float
) -> None:
    """The latency of each way to serve, the sizes that the policy chose, and the quality over time."""
    figure, (left, middle, right) = new_figure(15, 4, 3)
    names = [str(rung.subnet) for rung in ladder]
    for (name, answers), colour in zip(served.items(), COLOURS, strict=False):
        left.plot(*windows(answers, p95_ms), color=colour, label=name)
        if quality:
            right.plot(
                *windows(answers, lambda part: float(np.mean([quality[each.subnet] for each in part]))),
                color=colour,
                label=name,
            )
    left.axhline(1e3 * target, color="black", linestyle="--", label="target")
    left.set(yscale="log", xlabel="seconds", ylabel=f"95th percentile of latency in {WINDOW_S:g} s, ms")
    left.legend()
    ours = served["policy"]
    middle.scatter([each.arrival for each in ours], [names.index(each.subnet) for each in ours], s=3, color=COLOURS[0])
    middle.set(xlabel="seconds", ylabel="sub-network chosen by the policy", yticks=range(len(names)), yticklabels=names)
    right.set(xlabel="seconds", ylabel="mean quality of the answers")
    save_figure(figure, path)


def main() -> int:
    """Serves, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("family", type=Path)
    parser.add_argument("--results", type=Path, help="the table of `poa evaluate sweep`")
    parser.add_argument("--quality", default="knn/accuracy", help="its column")
    parser.add_argument("--images", type=int, default=16, help="in one request")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each of the three rates")
    parser.add_argument("--target-ms", type=float, help="by default six times the intact network's latency")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the streams")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("serving"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    family = poa.load(arguments.family)
    how = family.card.preprocessing
    images = torch.randn(arguments.images, how.num_channels, how.image_size, how.image_size)
    quality = read_quality(arguments.results, arguments.quality, family) if arguments.results else {}
    with torch.inference_mode():
        latencies = measured(family, images)
        ladder = ladder_of(latencies, {Subnet.parse(name): value for name, value in quality.items()} or None)
        intact = Rung(family.space.intact, latencies[family.space.intact])
        target = arguments.target_ms / 1e3 if arguments.target_ms else 6 * intact.service_s
        rate = BUSY_AT_FIRST / intact.service_s
        streams = {seed: arrivals_at((rate, 3 * rate, rate), arguments.seconds, seed) for seed in arguments.seeds}
        config = PolicyConfig(target_s=target)
        ladders = {"policy": ladder, "intact only": (intact,), "smallest only": ladder[:1]}
        served = {
            seed: {name: serve(family, LatencyPolicy(each, config), stream, images) for name, each in ladders.items()}
            for seed, stream in streams.items()
        }
    print("ladder: " + ", ".join(f"{rung.subnet} {1e3 * rung.service_s:.1f} ms" for rung in ladder))
    print(f"{rate:.1f}, {3 * rate:.1f} and {rate:.1f} requests per second; target {1e3 * target:.1f} ms")
    summary = {
        seed: {name: summarised(answers, quality, target) for name, answers in ways.items()}
        for seed, ways in served.items()
    }
    for seed, ways in summary.items():
        for name, figures in ways.items():
            print(f"seed {seed} {name:<14}" + "  ".join(f"{key} {value:.3f}" for key, value in figures.items()))
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python examples/serve_with_latency_target.py " + " ".join(sys.argv[1:]),
        "images_per_request": arguments.images,
        "threads": arguments.threads,
        "requests_per_second": [rate, 3 * rate, rate],
        "seconds_of_each_rate": arguments.seconds,
        "target_ms": 1e3 * target,
        "intact_ms": 1e3 * intact.service_s,
        "ladder_ms": {str(rung.subnet): 1e3 * rung.service_s for rung in ladder},
        "policy": asdict(config),
        "summary": summary,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "serving.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    draw(arguments.out / "serving.png", served[arguments.seeds[0]], ladder, quality, target)
    return 0


def read_quality(path: Path, column: str, family: Family) -> dict[str, float]:
    """The column of the table, of the family's sub-networks."""
    names = {str(subnet) for subnet in family.subnets}
    with path.open(encoding="utf-8", newline="") as file:
        return {row["network"]: float(row[column]) for row in csv.DictReader(file) if row["network"] in names}


def summarised(answers: Sequence[Answer], quality: dict[str, float], target: float) -> dict[str, float]:
    """What is said of one way to serve."""
    found = {
        "p95_ms": p95_ms(answers),
        "share_late": float(np.mean([each.latency > target for each in answers])),
        "num_requests": float(len(answers)),
    }
    if quality:
        found["mean_quality"] = float(np.mean([quality[each.subnet] for each in answers]))
    return found


if __name__ == "__main__":
    sys.exit(main())
