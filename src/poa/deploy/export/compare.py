"""An export, run by its own runtime, beside the sub-network inside the family."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from poa.deploy.export.accuracy import AccuracyDrop, accuracy_drops
from poa.deploy.export.base import Exported, Exporter, Inference
from poa.deploy.profile.kit import processor_name, timed, warm_up
from poa.errors import ExtractionError
from poa.evaluate import Loading
from poa.evaluate.features import DEFAULT_LOADING
from poa.evaluate.run import Splits

TOLERANCE = 1e-4
"""Of float32 formats: the largest difference of a value, relative to the largest value where that is above 1."""
NUM_PROBE_IMAGES = 8
BATCH_SIZE = 16


@dataclass(frozen=True)
class Comparison:
    """How far an export is from the family's sub-network, what it weighs and how fast it is.

    Attributes:
        subnet: the sub-network's name.
        format: the format's name.
        precision: of its weights.
        num_images: the images that were compared.
        is_noise: they were noise, since none were given.
        max_abs_difference: the largest |export − sub-network| of a value.
        relative_difference: ‖export − sub-network‖ / ‖sub-network‖ over all images.
        cosine_similarity: between the outputs for an image, the mean over the images.
        min_cosine_similarity: the smallest over the images.
        num_bytes: the file of its weights.
        latency_ms: of one image, the median of `num_runs` runs after a warm-up.
        num_runs: the timed runs.
        num_threads: threads that compute.
        processor: the name of the machine's.
        accuracy: what it costs in accuracy, where labelled images were given.
    """

    subnet: str
    format: str
    precision: str
    num_images: int
    is_noise: bool
    max_abs_difference: float
    relative_difference: float
    cosine_similarity: float
    min_cosine_similarity: float
    num_bytes: int
    latency_ms: float
    num_runs: int
    num_threads: int
    processor: str
    accuracy: AccuracyDrop | None = None


@dataclass(frozen=True)
class Timing:
    """How an export is timed."""

    num_threads: int = 1
    """Threads that compute."""
    num_runs: int = 30
    """Timed runs on one image."""


def compare(
    exporter: Exporter,
    what: Exported,
    directory: Path,
    images: Float[Tensor, "B c h w"] | None = None,
    *,
    data: Splits | None = None,
    loading: Loading = DEFAULT_LOADING,
    timing: Timing = Timing(),
) -> Comparison:
    """Opens what `exporter` wrote with its own runtime and compares it with the sub-network.

    Args:
        exporter: the format.
        what: the sub-network that was written.
        directory: where.
        images: normalised; noise if None.
        data: labelled images for the accuracy; not looked at if None.
        loading: how those are read.
        timing: how it is timed.

    Raises:
        ExtractionError: the format is a float32 one and differs by more than `TOLERANCE`, or any gives values that are
            not finite or of another shape.
        DataError, ConfigError: the labelled images do not do; see `accuracy_drops`.
    """
    run = exporter.open(directory, timing.num_threads)
    seen = what.probe_images(NUM_PROBE_IMAGES) if images is None else images
    expected = torch.cat([what.expected(part) for part in seen.split(BATCH_SIZE)])
    found = torch.cat([torch.from_numpy(run(part.numpy())) for part in seen.split(BATCH_SIZE)])
    _check(exporter, what, found, expected)
    one = seen[:1].numpy()
    cosines = torch.cosine_similarity(found.double(), expected.double())
    comparison = Comparison(
        subnet=str(what.subnet),
        format=exporter.name,
        precision=exporter.precision,
        num_images=len(seen),
        is_noise=images is None,
        max_abs_difference=float((found - expected).abs().max()),
        relative_difference=float((found - expected).norm() / expected.norm()),
        cosine_similarity=float(cosines.mean()),
        min_cosine_similarity=float(cosines.min()),
        num_bytes=exporter.size(directory),
        latency_ms=1e3 * latency(run, one, timing.num_runs),
        num_runs=timing.num_runs,
        num_threads=timing.num_threads,
        processor=processor_name(),
    )
    if data is None:
        return comparison
    return replace(comparison, accuracy=accuracy_drops(what, {exporter.name: run}, data, loading)[exporter.name])


def latency(run: Inference, images: np.ndarray, num_runs: int) -> float:
    """The median of the seconds that a batch takes, after a warm-up."""
    call = partial(run, images)
    warm_up(call, perf_counter)
    return median(timed(call, num_runs, perf_counter))


def _check(exporter: Exporter, what: Exported, found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape or found.dtype != expected.dtype or not bool(found.isfinite().all()):
        raise ExtractionError(
            f"{what.subnet} as {exporter.name} gives {list(found.shape)} of {found.dtype}, "
            f"{'all' if bool(found.isfinite().all()) else 'not all'} finite, instead of {list(expected.shape)}. It was "
            f"not kept. Please report this with the family's family.json and the version of the runtime."
        )
    scale = max(1.0, float(expected.abs().max()))
    worst = float((found - expected).abs().max()) / scale
    if exporter.precision == "float32" and not worst <= TOLERANCE:
        raise ExtractionError(
            f"{what.subnet} as {exporter.name} differs from the sub-network by {worst:.1e} (values up to {scale:.1f} "
            f"taken as 1), more than {TOLERANCE:g}. It was not kept. Please report this with the family's family.json "
            f"and the version of the runtime."
        )
