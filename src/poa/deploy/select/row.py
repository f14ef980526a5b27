"""What is known of one sub-network when sizes are compared."""

from __future__ import annotations

from dataclasses import dataclass

from poa.deploy.select.budget import Figure


@dataclass(frozen=True)
class Row:
    """A sub-network with its figures; None: not known. MB are 10⁶ bytes."""

    subnet: str
    place: int
    """In the order of the space."""
    num_params: int
    flops: int
    """Of one image."""
    quality: float | None = None
    """More is better."""
    latency_ms: float | None = None
    """Of one batch, the median."""
    latency_p95_ms: float | None = None
    throughput: float | None = None
    """Images per second."""
    peak_memory_mb: float | None = None
    file_size_mb: float | None = None
    is_measured: bool | None = None
    """Whether the device's figures were measured or predicted; None: there are none."""
    fit_error: float | None = None
    """Relative error of predicted latencies."""

    def value(self, figure: Figure) -> float | None:
        """The figure's value."""
        found = getattr(self, figure.name)
        return None if found is None else float(found)

    def known(self, figure: Figure) -> float:
        """The figure's value, of a row that was checked to have it."""
        found = self.value(figure)
        if found is None:
            raise ValueError(f"{self.subnet} has no {figure.name}.")
        return found
