"""What networks cost that were not measured: models fitted to the measured ones, with the error on those left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
from jaxtyping import Float64

from poa.deploy.profile.kit.timing import latency_columns
from poa.deploy.profile.plan import corners
from poa.deploy.profile.table import ProfileRow, Setting
from poa.elastic import Subnet
from poa.errors import DataError
from poa.family import FamilyCard
from poa.version import __version__

MIN_MEASURED = 6
"""Rows that a fit needs at the least."""

Matrix = Float64[np.ndarray, "N F"]
Vector = Float64[np.ndarray, "N"]


@dataclass(frozen=True)
class HeldOut:
    """How far the model of latency was off at rows that were measured but left out of the fit, one at a time."""

    setting: Setting
    num_measured: int
    errors: tuple[float, ...]
    """Relative: (predicted − measured) / measured."""

    @property
    def root_mean_square(self) -> float:
        """What the table states."""
        return float(np.sqrt(np.mean(np.square(self.errors))))

    @property
    def median(self) -> float:
        """Of the absolute values."""
        return float(np.median(np.abs(self.errors)))

    @property
    def worst(self) -> float:
        """Of the absolute values."""
        return float(np.max(np.abs(self.errors)))


def cost_features(card: FamilyCard, subnets: Sequence[Subnet], image_size: int) -> Matrix:
    """What the cost is made of, a row for each sub-network.

    With width w and depth d of each elastic stage: 1, w and w² (stem, head, stages of fixed depth); d, w·d and w²·d
    (a call, normalisations and attention maps, matrix products of each block); operations and parameters.
    """
    widths = np.array([each.width for each in subnets], dtype=np.float64)
    depths = np.array([each.depths for each in subnets], dtype=np.float64)
    powers = np.stack([np.ones_like(widths), widths, widths**2], axis=1)
    blocks = [powers * depths[:, [stage]] for stage in range(depths.shape[1])]
    flops = [card.architecture.flops(card.config, each, image_size) for each in subnets]
    counts = np.array([flops, [card.num_params(each) for each in subnets]], dtype=np.float64).T
    return np.concatenate([powers, *blocks, counts], axis=1)


def fitted(features: Matrix, values: Vector) -> Float64[np.ndarray, "F"]:
    """Coefficients ≥ 0 that give the least sum of squared relative errors of `features @ coefficients`.

    For small errors that is the least squares of logarithms; no part of a network has a negative cost.
    """
    from scipy.optimize import nnls

    largest = np.abs(features).max(axis=0)
    scale = np.where(largest > 0, largest, 1.0)
    coefficients, _ = nnls(features / scale / values[:, None], np.ones(len(values)))
    found: Float64[np.ndarray, "F"] = coefficients / scale
    return found


def held_out_errors(features: Matrix, values: Vector, held: Sequence[int]) -> tuple[float, ...]:
    """Relative errors at the rows `held`, each predicted by a fit to all the other rows."""
    errors = []
    for index in held:
        others = np.arange(len(values)) != index
        predicted = features[index] @ fitted(features[others], values[others])
        errors.append(float(predicted / values[index] - 1.0))
    return tuple(errors)


def predicted_rows(
    card: FamilyCard, rows: Sequence[ProfileRow], subnets: Sequence[Subnet], file_sizes: Vector | None = None
) -> tuple[list[ProfileRow], HeldOut]:
    """Rows of sub-networks that were not measured, from those of the same setting that were.

    The error is that at measured rows left out of the fit one at a time; the corners of what was measured always stay
    in it, because no prediction lies outside them. The rows are then predicted by the fit to all of them.

    Args:
        card: the family's.
        rows: of one setting; predicted ones are not looked at.
        subnets: what is predicted.
        file_sizes: of `subnets`, in MB, where they are known; else they are fitted, too.

    Raises:
        DataError: fewer than `MIN_MEASURED` rows were measured, or they are nothing but corners.
    """
    measured = [row for row in rows if row.is_measured]
    known = [card.space.parse(row.subnet) for row in measured]
    if len(measured) < MIN_MEASURED or len(set(known) - set(corners(known))) < 2:
        raise DataError(
            f"a fit needs at least {MIN_MEASURED} measured sub-networks, two of them of a width or a depth in between; "
            f"{_said(measured)}. Measure more (`poa subnets` lists them)."
        )
    size = measured[0].image_size
    ours, theirs = (cost_features(card, each, size) for each in (known, subnets))
    held = [index for index, each in enumerate(known) if each not in corners(known)]
    error = HeldOut(measured[0].setting, len(known), held_out_errors(ours, _column(measured, "latency_ms"), held))

    def predict(name: str) -> Vector:
        found: Vector = theirs @ fitted(ours, _column(measured, name))
        return found

    latency = predict("latency_ms")
    p95 = np.maximum(predict("latency_p95_ms"), latency)
    memory = predict("peak_memory_mb") if all(row.peak_memory_mb for row in measured) else None
    sizes = predict("file_size_mb") if file_sizes is None else file_sizes
    found = []
    for index, each in enumerate(subnets):
        times = latency_columns(float(latency[index]), float(p95[index]), measured[0].batch_size)
        row = replace(
            measured[0],
            subnet=str(each),
            is_measured=False,
            latency_ms=times["latency_ms"],
            latency_p95_ms=times["latency_p95_ms"],
            throughput=times["throughput"],
            peak_memory_mb=None if memory is None else round(float(memory[index]), 3),
            num_params=card.num_params(each),
            flops=card.architecture.flops(card.config, each, size),
            file_size_mb=round(float(sizes[index]), 6),
            fit_error=round(error.root_mean_square, 4),
            date=datetime.now(UTC).date().isoformat(),
            poa_version=__version__,
        )
        found.append(row)
    return found, error


def _said(measured: Sequence[ProfileRow]) -> str:
    return f"measured are {', '.join(row.subnet for row in measured[:8]) or 'none'}"


def _column(rows: Sequence[ProfileRow], name: str) -> Vector:
    return np.array([getattr(row, name) for row in rows], dtype=np.float64)
