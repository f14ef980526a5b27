"""Which sub-network each rank trains in a step. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Int64

from poa.elastic.subnet import SearchSpace, Subnet
from poa.randomness import generator

DrawMode = Literal["cost-bucket", "independent", "shared"]

NUM_BUCKETS = 16
"""Into how many buckets of neighbours in cost a walk's entries fall: more make the ranks wait less for the largest
network of a step, fewer make the networks of a step differ more (docs/decisions.md)."""


@dataclass(frozen=True)
class SubnetDraws:
    """The draws of several ranks from the weighted list of a space (POA §3.3). One rank walks it as POA does.

    Attributes:
        space: the search space.
        costs: what each sub-network costs, in any unit; only the order counts.
        mode: cost-bucket: in a step the ranks train different entries of the list, of nearly equal cost. In a walk,
            whose steps are shuffled, each entry comes once; where the entries are no multiple of the ranks, as many
            as are too many are left out, in turn. Before a walk has `NUM_BUCKETS` steps, each entry comes several
            times in it. independent: the ranks walk the one shuffled list together. shared: all train the same.
        num_ranks: ranks that train, ≥ 1.
    """

    space: SearchSpace
    costs: Mapping[Subnet, int | float]
    mode: DrawMode = "cost-bucket"
    num_ranks: int = 1

    def at(self, seed: int, position: int) -> tuple[Subnet | None, ...]:
        """The sub-network of every rank at draw number `position`, a pure function of its arguments.

        All None when the space holds the intact network only.
        """
        ranks = self.num_ranks
        if ranks == 1 or self.mode == "shared" or not self.space.draw_list:
            return (self.space.draw(seed, position),) * ranks
        if self.mode == "independent":
            return tuple(self.space.draw(seed, position * ranks + rank) for rank in range(ranks))
        walk, step = divmod(position, self.num_steps)
        return tuple(self._ranked[index] for index in self._walk(seed, walk)[step])

    @property
    def num_steps(self) -> int:
        """Steps of a walk by cost bucket."""
        return len(self._ranked) // self.num_ranks

    @cached_property
    def _ranked(self) -> tuple[Subnet, ...]:
        """A walk's entries by rising cost, equal ones together."""
        entries = sorted(self.space.draw_list, key=lambda subnet: (self.costs[subnet], subnet))
        repeats = -(-NUM_BUCKETS * self.num_ranks // len(entries))
        return tuple(subnet for subnet in entries for _ in range(repeats))

    def _walk(self, seed: int, walk: int) -> Int64[np.ndarray, "steps ranks"]:
        """Positions in `_ranked`, a row for each step.

        A bucket's entries are dealt out to its steps in turn, so that copies of one sub-network fall apart.
        """
        num_entries, ranks = len(self._ranked), self.num_ranks
        num_left_out = num_entries % ranks
        turn = generator(seed, "subnets left out").permutation(num_entries)
        left_out = np.roll(turn, -walk * num_left_out)[:num_left_out]
        entries = np.delete(np.arange(num_entries), left_out).reshape(-1, ranks)
        buckets = np.array_split(entries, NUM_BUCKETS)
        steps = np.concatenate([bucket.reshape(ranks, -1).T for bucket in buckets])
        rng = generator(seed, "subnets by cost", walk)
        return rng.permuted(steps[rng.permutation(len(steps))], axis=1)
