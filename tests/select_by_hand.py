"""The rule of `poa select` once more, naively, over dictionaries, and tables and budgets to try it on.

Nothing of `poa.deploy.select` is used here: the tests and `benchmarks/selection.py` hold the two against each other.
"""

import math

LESS = ("latency_ms", "latency_p95_ms", "peak_memory_mb", "file_size_mb", "num_params", "flops")
MORE = ("quality", "throughput")


def draw_table(rng, subnets):
    """A row for each name; of coarse numbers (ties), and some unknown in every second table."""
    coarse, unknown = rng.random() < 0.5, 0.05 if rng.random() < 0.5 else 0.0
    table = []
    for place, name in enumerate(subnets):
        size = float(rng.uniform(1, 50))
        row = {"subnet": name, "place": place, "num_params": int(size * (4 if coarse else 1e6)), "flops": int(size * 7)}
        row["quality"] = 0.5 + 0.004 * size + float(rng.normal(0, 0.05))
        for figure in ("latency_ms", "latency_p95_ms", "peak_memory_mb", "file_size_mb"):
            row[figure] = size * float(rng.uniform(0.5, 1.5))
        row["throughput"] = 1000 / row["latency_ms"]
        for figure in ("quality", "latency_ms", "latency_p95_ms", "peak_memory_mb", "file_size_mb", "throughput"):
            if coarse:
                row[figure] = round(row[figure], 1 if figure == "quality" else 0)
            if rng.random() < unknown:
                row[figure] = None
        table.append(row)
    return table


def draw_budget(rng, table):
    """Limits by figure: any number of them, at values of the table, between them, or out of reach."""
    names = rng.permutation([*LESS, *MORE])[: rng.integers(0, 5)].tolist()
    budget = {}
    for name in names:
        values = sorted(row[name] for row in table if row[name] is not None)
        limit = values[int(rng.integers(len(values)) ** rng.choice([1.0, 0.6]))]
        if name in MORE:
            limit = values[-1 - values.index(limit)]
        budget[name] = float(limit) * float(rng.choice([1.0, 1.0, 1.03, 0.97]))
        if rng.random() < 0.25:
            budget[name] = 2.0 * values[-1] if name in MORE else 0.5 * values[0] + 0.01
    return budget


def is_met(row, name, limit):
    return row[name] >= limit if name in MORE else row[name] <= limit


def best(rows):
    """Best quality, then lowest latency, then fewest parameters, then first in the order."""
    winner = None
    for row in rows:
        if winner is None or row["quality"] > winner["quality"]:
            winner = row
            continue
        if row["quality"] < winner["quality"]:
            continue
        mine, other = (each["latency_ms"] if each["latency_ms"] is not None else math.inf for each in (row, winner))
        if (mine, row["num_params"], row["place"]) < (other, winner["num_params"], winner["place"]):
            winner = row
    return winner


def usable(table, budget):
    return [row for row in table if all(row[name] is not None for name in ("quality", *budget))]


def pick(table, budget):
    """The row that is picked; None where nothing fits."""
    return best(row for row in usable(table, budget) if all(is_met(row, name, at) for name, at in budget.items()))


def front(table, budget):
    """Names of the rows that no other row beats, in the order of the table."""
    rows = usable(table, budget)
    names = {"quality", "num_params", *budget}
    if all(row["latency_ms"] is not None for row in rows):
        names.add("latency_ms")
    found = []
    for row in rows:
        beaten = False
        for other in rows:
            worse = [name for name in names if row[name] != other[name] and not is_met(row, name, other[name])]
            better = [name for name in names if row[name] != other[name] and is_met(row, name, other[name])]
            if worse and not better:
                beaten = True
                break
        if not beaten:
            found.append(row["subnet"])
    return found


def relaxations(table, budget):
    """Where nothing fits: pairs of new limits and the row that is picked then."""
    rows, found = usable(table, budget), []
    for name in budget:
        others = {each: limit for each, limit in budget.items() if each != name}
        values = sorted(row[name] for row in rows if all(is_met(row, each, at) for each, at in others.items()))
        for value in reversed(values) if name in MORE else values:
            winner = pick(rows, {**others, name: value})
            if winner is not None:
                found.append(({name: value}, winner["subnet"]))
                break
    if found:
        return found
    sums = {}
    for row in rows:
        beyond = [
            0.0 if is_met(row, name, at) else abs(row[name] - at) / (abs(at) or 1.0) for name, at in budget.items()
        ]
        sums[row["subnet"]] = sum(beyond)
    nearest = best([row for row in rows if sums[row["subnet"]] == min(sums.values())])
    limits = {name: nearest[name] for name, at in budget.items() if not is_met(nearest, name, at)}
    return [(limits, pick(rows, {**budget, **limits})["subnet"])]
