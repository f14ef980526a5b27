"""The latency policy, on simulated streams of requests."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poa.deploy.policy import LatencyPolicy, PolicyConfig, Rung, ladder_of
from poa.elastic import Subnet
from poa.errors import ConfigError

LADDER = tuple(Rung(Subnet(64 * (rung + 1), (4,)), 0.01 * 1.5**rung) for rung in range(5))
CONFIG = PolicyConfig(target_s=0.3)
SMALLEST, LARGEST = LADDER[0].subnet, LADDER[-1].subnet


def serve(policy, arrivals, slowdown=1.0, rng=None):
    """One worker that serves in order of arrival; for each request (arrival, latency, size)."""
    seconds = {rung.subnet: rung.service_s for rung in policy.ladder}
    now, told, served = 0.0, 0, []
    for position, arrival in enumerate(arrivals):
        now = max(now, arrival)
        while told < len(arrivals) and arrivals[told] <= now:
            policy.arrived(arrivals[told])
            told += 1
        subnet = policy.choose(now, told - position - 1)
        service = seconds[subnet] * slowdown * (1.0 if rng is None else float(rng.lognormal(0.0, 0.2)))
        now += service
        policy.answered(now, service, now - arrival)
        served.append((arrival, now - arrival, subnet))
    return served


def steady(rate, seconds, start=0.0):
    return (start + np.arange(int(rate * seconds)) / rate).tolist()


def random_stream(parts, seed):
    """Poisson arrivals: (rate, seconds) one after the other."""
    rng = np.random.default_rng(seed)
    arrivals, start = [], 0.0
    for rate, seconds in parts:
        times = start + np.cumsum(rng.exponential(1.0 / rate, int(2 * rate * seconds) + 50))
        arrivals += times[times < start + seconds].tolist()
        start += seconds
    return arrivals


def switches(served):
    return sum(before[2] != after[2] for before, after in itertools.pairwise(served))


def test_latency_keeps_the_target_while_the_rate_triples_and_intact_does_not():
    intact_s = LADDER[-1].service_s
    arrivals = random_stream([(0.4 / intact_s, 30), (1.2 / intact_s, 30), (0.4 / intact_s, 30)], seed=0)
    ours = serve(LatencyPolicy(LADDER, CONFIG), arrivals, rng=np.random.default_rng(1))
    fixed = serve(LatencyPolicy(LADDER[-1:], CONFIG), arrivals, rng=np.random.default_rng(1))
    assert np.quantile([latency for _, latency, _ in ours], 0.95) <= CONFIG.target_s
    assert np.quantile([latency for _, latency, _ in fixed], 0.95) > CONFIG.target_s
    calm = [subnet for arrival, _, subnet in ours if arrival < 30]
    assert np.mean([subnet == LARGEST for subnet in calm]) > 0.9


def test_size_returns_to_the_largest_after_the_load():
    arrivals = steady(60, 10) + steady(2, 10, start=10.0)
    served = serve(LatencyPolicy(LADDER, CONFIG), arrivals)
    assert served[500][2] != LARGEST
    assert served[-1][2] == LARGEST


def test_first_request_after_an_idle_time_gets_the_largest_size():
    policy = LatencyPolicy(LADDER, CONFIG)
    end = serve(policy, steady(90, 5))[-1]
    now = end[0] + end[1] + CONFIG.patience_s + 0.01
    policy.arrived(now)
    assert policy.choose(now, 0) == LARGEST


@settings(deadline=None, max_examples=15)
@given(rate=st.floats(0.5, 90.0), slowdown=st.floats(0.5, 2.0))
def test_steady_load_settles_on_one_size(rate, slowdown):
    served = serve(LatencyPolicy(LADDER, CONFIG), steady(rate, 25), slowdown)
    late = [each for each in served if each[0] > 15]
    assert switches(late) == 0


def test_random_load_of_one_rate_does_not_flap():
    served = serve(LatencyPolicy(LADDER, CONFIG), random_stream([(30, 60)], seed=3), rng=np.random.default_rng(4))
    assert switches(served) <= 60 / CONFIG.patience_s


@settings(deadline=None, max_examples=25)
@given(gaps=st.lists(st.floats(0.0, 3.0), min_size=1, max_size=60), slowdown=st.floats(0.1, 50.0))
def test_choice_never_leaves_the_ladder_and_depends_on_what_was_seen_alone(gaps, slowdown):
    arrivals = np.cumsum(gaps).tolist()
    first, second = (serve(LatencyPolicy(LADDER, CONFIG), arrivals, slowdown) for _ in range(2))
    assert first == second
    assert {subnet for _, _, subnet in first} <= {rung.subnet for rung in LADDER}


@settings(deadline=None, max_examples=50)
@given(rate=st.floats(0.1, 100.0), more=st.floats(1.0, 3.0), waiting=st.integers(0, 50))
def test_more_load_never_gets_a_larger_size(rate, more, waiting):
    def choice(rate, num_waiting):
        policy = LatencyPolicy(LADDER, CONFIG)
        for time in steady(rate, CONFIG.window_s):
            policy.arrived(time)
        return policy.choose(CONFIG.window_s, num_waiting)

    assert choice(rate * more, waiting) <= choice(rate, waiting)
    assert choice(rate, waiting + 1) <= choice(rate, waiting)


def test_prediction_is_that_of_the_queue_with_random_arrivals_and_equal_services():
    """The mean wait of M/D/1 at ρ = 0.6, s = 0.1 is ρ s / (2 (1 − ρ)) = 0.075; the tail starts at P(wait > 0) = ρ."""
    policy = LatencyPolicy(LADDER, CONFIG)
    assert policy.predicted_s(0.1, 6.0) == pytest.approx(0.1 + 0.075 / 0.6 * np.log(0.6 / 0.05))
    assert policy.predicted_s(0.1, 0.3) == 0.1
    assert policy.predicted_s(0.1, 10.0) == np.inf


def test_backlog_alone_lowers_the_size():
    policy = LatencyPolicy(LADDER, CONFIG)
    policy.arrived(10.0)
    assert policy.choose(10.0, 0) == LARGEST
    assert policy.choose(10.0, 8) < LARGEST
    assert policy.choose(10.0, 500) == SMALLEST


def test_slower_services_than_expected_lower_the_size():
    arrivals = steady(12, 20)
    expected = serve(LatencyPolicy(LADDER, CONFIG), arrivals)[-1][2]
    assert serve(LatencyPolicy(LADDER, CONFIG), arrivals, slowdown=2.0)[-1][2] < expected


def test_ladder_leaves_out_what_is_slower_and_no_better():
    small, middle, large = (Subnet(width, (4,)) for width in (64, 128, 192))
    latencies = {large: 0.03, middle: 0.02, small: 0.01}
    assert [rung.subnet for rung in ladder_of(latencies)] == [small, middle, large]
    found = ladder_of(latencies, {small: 0.5, middle: 0.4, large: 0.7})
    assert found == (Rung(small, 0.01), Rung(large, 0.03))
    with pytest.raises(ConfigError, match="ladder is empty"):
        ladder_of(latencies, {})


def test_impossible_aims_and_ladders_are_refused():
    with pytest.raises(ConfigError, match="target_s must be above 0"):
        PolicyConfig(target_s=0.0)
    with pytest.raises(ConfigError, match="quantile must be between 0 and 1"):
        PolicyConfig(target_s=1.0, quantile=1.0)
    with pytest.raises(ConfigError, match="margin must be 0 or more"):
        PolicyConfig(target_s=1.0, margin=-1.0)
    with pytest.raises(ConfigError, match="rising service times"):
        LatencyPolicy(LADDER[::-1], CONFIG)
    with pytest.raises(ConfigError, match="rising service times"):
        LatencyPolicy((), CONFIG)
