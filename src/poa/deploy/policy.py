"""Which sub-network answers the next request: smaller ones under load, larger ones when there is time.

That a service may keep its latency under a changing load by answering with a cheaper network was shown for separate
networks by Zhang et al. (Model-Switching, HotCloud 2020), and for the sub-networks of one super-network, between which
switching costs nothing, by Khare et al. (SuperServe, NSDI 2025). The sizes are chosen here by what queueing theory says
of one worker (Pollaczek and Khinchine; Kingman 1962), so that a rising rate is met before its requests are late.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from poa.elastic import Subnet
from poa.errors import ConfigError

Events = deque[tuple[float, int]]
"""What happened lately, the oldest first: the time, and a number."""


@dataclass(frozen=True)
class Rung:
    """A sub-network that may be chosen.

    Attributes:
        subnet: which.
        service_s: seconds that it is expected to take for one request.
    """

    subnet: Subnet
    service_s: float


@dataclass(frozen=True)
class PolicyConfig:
    """What a policy aims at, and how it reacts."""

    target_s: float
    """Seconds between a request's arrival and its answer that `quantile` of all requests are to keep."""
    quantile: float = 0.95
    max_utilisation: float = 0.85
    """Largest share of the time that the worker may be busy."""
    backlog_share: float = 0.75
    """Share of the target within which all that wait are to be answered; those that arrive meanwhile need the rest."""
    window_s: float = 2.0
    """Seconds over which the rate of arrivals is counted."""
    patience_s: float = 2.0
    """Seconds for which a larger size must have been possible before it is taken; a smaller one is taken at once."""
    margin: float = 0.25
    """A larger size must be possible with a rate and a service time larger by this share."""
    smoothing: float = 0.05
    """Weight of the newest request in the running estimate of how far service times are from those expected."""

    def __post_init__(self) -> None:
        positive = ("target_s", "window_s", "patience_s")
        shares = ("quantile", "max_utilisation", "backlog_share", "smoothing")
        for name in positive:
            if not getattr(self, name) > 0.0:
                raise ConfigError(f"{name} must be above 0; got {getattr(self, name)!r}.")
        for name in shares:
            if not 0.0 < getattr(self, name) < 1.0:
                raise ConfigError(f"{name} must be between 0 and 1; got {getattr(self, name)!r}.")
        if not self.margin >= 0.0:
            raise ConfigError(f"margin must be 0 or more; got {self.margin!r}.")


def ladder_of(latencies: Mapping[Subnet, float], quality: Mapping[Subnet, float] | None = None) -> tuple[Rung, ...]:
    """The sub-networks between which there is something to choose, the fastest first.

    Args:
        latencies: seconds of each for one request.
        quality: the higher the better; where given, a sub-network stays out if another is as fast and as good.

    Raises:
        ConfigError: there is no sub-network with both figures.
    """
    known = [subnet for subnet in latencies if quality is None or subnet in quality]
    if not known:
        raise ConfigError("the ladder is empty: no sub-network has a latency and, where it is asked for, a quality.")
    found: list[Rung] = []
    best = -math.inf
    for subnet in sorted(known, key=lambda each: (latencies[each], 0.0 if quality is None else -quality[each], each)):
        if quality is None or quality[subnet] > best:
            best = best if quality is None else quality[subnet]
            found.append(Rung(subnet, latencies[subnet]))
    return tuple(found)


class LatencyPolicy:
    """Chooses the largest size with which the latency target is kept, for one worker that serves in order of arrival.

    It is told of every arrival and every answer, and asked before each request is served. What it says depends on
    nothing else: times are passed in. Not for several threads at once.

    A size with service time s is possible at the rate λ of arrivals (counted over `window_s`) and n waiting requests if

    - the worker keeps up: ρ = λ s ≤ `max_utilisation`;
    - the quantile q of the latency keeps the target: with the mean wait w = ρ / (1 − ρ) · (1 + c²) / 2 · s of random
      arrivals (Pollaczek 1930, Khinchine 1932; c is the service times' coefficient of variation) and waits that are
      exponential where there are any (Kingman, On queues in heavy traffic, 1962), it is s + w / ρ · ln(ρ / (1 − q));
    - those that wait now keep it: (n + 1) s ≤ `backlog_share` · `target_s`.

    If the present size is not possible, the largest possible one is taken at once, or the smallest of all. A larger one
    is taken when the rate left room for it with `margin` for `patience_s`, the last change is as long ago, and of the
    last requests no more than 1 − q were late.

    Args:
        ladder: the sizes with their expected service times, in rising order (`ladder_of`).
        config: what it aims at.

    Raises:
        ConfigError: the ladder is empty, or not in rising order of service times above 0.
    """

    def __init__(self, ladder: Sequence[Rung], config: PolicyConfig) -> None:
        times = [rung.service_s for rung in ladder]
        if not times or times[0] <= 0.0 or times != sorted(times):
            raise ConfigError(f"a ladder has sizes of rising service times above 0; got {times}.")
        self.ladder = tuple(ladder)
        self.config = config
        self._index = len(ladder) - 1
        self._changed = -math.inf
        self._arrivals: Events = deque()
        self._late: Events = deque()
        self._possible: Events = deque()
        self._ratio = 1.0
        self._ratio_squared = 1.0

    @property
    def subnet(self) -> Subnet:
        """The size chosen last; the largest before the first choice."""
        return self.ladder[self._index].subnet

    def arrived(self, now: float) -> None:
        """A request arrived at that time, in seconds of any clock that does not go back."""
        self._arrivals.append((now, 1))

    def answered(self, now: float, service_s: float, latency_s: float) -> None:
        """A request was answered by the size chosen last.

        Args:
            now: the time.
            service_s: seconds that the network took.
            latency_s: seconds since the request's arrival.
        """
        ratio = service_s / self.ladder[self._index].service_s
        self._ratio += self.config.smoothing * (ratio - self._ratio)
        self._ratio_squared += self.config.smoothing * (ratio * ratio - self._ratio_squared)
        self._late.append((now, int(latency_s > self.config.target_s)))

    def choose(self, now: float, num_waiting: int) -> Subnet:
        """The sub-network for the next request.

        Args:
            now: the time.
            num_waiting: requests that have arrived and are not being served, the next one left out.
        """
        config = self.config
        _forget(self._arrivals, now - config.window_s)
        _forget(self._late, now - config.window_s)
        rate = len(self._arrivals) / config.window_s
        largest = self._largest_possible(rate, num_waiting)
        self._possible.append((now, self._largest_possible(rate, 0, config.margin)))
        _forget(self._possible, now - config.patience_s)
        if largest < self._index:
            self._change(now, largest)
        elif largest > self._index and now - self._changed >= config.patience_s and not self._is_late():
            self._change(now, max(self._index, min(largest, *(index for _, index in self._possible))))
        return self.subnet

    def predicted_s(self, service_s: float, rate: float) -> float:
        """The latency's quantile at that service time and that rate in requests per second; ∞ without an end."""
        busy = rate * service_s
        if busy >= 1.0:
            return math.inf
        variation = max(0.0, self._ratio_squared / self._ratio**2 - 1.0)
        wait_if_any = service_s * (1.0 + variation) / (2.0 * (1.0 - busy))
        share_beyond = 1.0 - self.config.quantile
        return service_s + (wait_if_any * math.log(busy / share_beyond) if busy > share_beyond else 0.0)

    def _largest_possible(self, rate: float, num_waiting: int, margin: float = 0.0) -> int:
        """The number of the largest size that is possible; 0 if none is."""
        config = self.config
        for index in range(len(self.ladder) - 1, 0, -1):
            service_s = self.ladder[index].service_s * self._ratio * (1.0 + margin)
            keeps_up = rate * (1.0 + margin) * service_s <= config.max_utilisation
            clears = (num_waiting + 1) * service_s <= config.backlog_share * config.target_s
            if keeps_up and clears and self.predicted_s(service_s, rate * (1.0 + margin)) <= config.target_s:
                return index
        return 0

    def _is_late(self) -> bool:
        num_late = sum(late for _, late in self._late)
        return num_late > (1.0 - self.config.quantile) * len(self._late)

    def _change(self, now: float, index: int) -> None:
        if index != self._index:
            self._index, self._changed = index, now


def _forget(events: Events, before: float) -> None:
    """Drops what happened before that time."""
    while events and events[0][0] < before:
        events.popleft()
