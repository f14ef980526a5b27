"""A sub-network as a value, and the search space that it belongs to. No torch here."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from poa.errors import SubnetError
from poa.randomness import generator

_NAME = re.compile(r"w(?P<width>[0-9]{1,6})-d(?P<depths>[0-9]{1,4}(?:-[0-9]{1,4})*)")


@dataclass(frozen=True, order=True)
class Subnet:
    """The name of a sub-network: its width and the depths of its elastic stages.

    It prints as `w384-d12`; with several elastic stages as `w64-d4-6`.
    """

    width: int
    depths: tuple[int, ...]

    def __str__(self) -> str:
        return f"w{self.width}-d{'-'.join(map(str, self.depths))}"

    @classmethod
    def parse(cls, text: str) -> Subnet:
        """The sub-network that `text` names.

        Raises:
            SubnetError: `text` is not of the form `w384-d12`.
        """
        match = _NAME.fullmatch(text.strip())
        if match is None:
            raise SubnetError(
                f"{text!r} is not the name of a sub-network. A name gives the width and the depth, "
                "like w384-d12 (several elastic stages: w64-d4-6)."
            )
        return cls(int(match["width"]), tuple(int(depth) for depth in match["depths"].split("-")))


@dataclass(frozen=True)
class SearchSpace:
    """All the sub-networks of a super-network, and how often each is drawn in training.

    Attributes:
        widths: in rising order; the last is the intact network's.
        depths: for each elastic stage its depths in rising order; the last are the intact network's.
        width_emphasis: how much more often the narrowest are drawn than the widest, ≥ 1.
        depth_emphasis: the same for the shallowest and the deepest.
    """

    widths: tuple[int, ...]
    depths: tuple[tuple[int, ...], ...]
    width_emphasis: float = 3.0
    depth_emphasis: float = 3.0

    @cached_property
    def depth_tuples(self) -> tuple[tuple[int, ...], ...]:
        """Every combination of the stages' depths, in rising order of their sum."""
        return tuple(sorted(itertools.product(*self.depths), key=sum))

    @cached_property
    def subnets(self) -> tuple[Subnet, ...]:
        """Every sub-network: by width, then by depth; the first is the smallest, the last the intact one."""
        return tuple(Subnet(width, depths) for width in self.widths for depths in self.depth_tuples)

    @property
    def intact(self) -> Subnet:
        """The whole super-network."""
        return self.subnets[-1]

    @property
    def smallest(self) -> Subnet:
        """The narrowest and shallowest sub-network."""
        return self.subnets[0]

    @property
    def middle(self) -> Subnet:
        """The sub-network half-way along the widths and along the depths."""
        return Subnet(self.widths[len(self.widths) // 2], self.depth_tuples[len(self.depth_tuples) // 2])

    def __contains__(self, subnet: object) -> bool:
        return subnet in self._positions

    def __len__(self) -> int:
        return len(self.subnets)

    @cached_property
    def _positions(self) -> dict[Subnet, int]:
        return {subnet: index for index, subnet in enumerate(self.subnets)}

    def parse(self, name: str | Subnet) -> Subnet:
        """The member of this space that `name` names; a `Subnet` is checked and given back.

        Raises:
            SubnetError: the name does not parse, or the space does not hold it; the nearest members are named.
        """
        subnet = Subnet.parse(name) if isinstance(name, str) else name
        if subnet in self:
            return subnet
        if len(subnet.depths) != len(self.depths):
            raise SubnetError(
                f"{subnet} names {len(subnet.depths)} depths, this family has {len(self.depths)} elastic stages: "
                f"a name looks like {self.smallest}."
            )
        nearest = ", ".join(str(member) for member in self.nearest(subnet))
        depths = " and ".join(_spell(values) for values in self.depths)
        raise SubnetError(
            f"{subnet} is not in this family (widths {_spell(self.widths)}; depths {depths}). Nearest: {nearest}."
        )

    def parse_all(self, names: list[str] | tuple[str, ...]) -> list[Subnet]:
        """The sub-networks that `names` name, each once, in the order given; `all` stands for every one.

        Also `smallest`, `middle` and `intact` are understood.

        Raises:
            SubnetError: as `parse`.
        """
        special = {"smallest": self.smallest, "middle": self.middle, "intact": self.intact}
        found: dict[Subnet, None] = {}
        for name in names:
            if name == "all":
                found.update(dict.fromkeys(self.subnets))
            else:
                found[special[name] if name in special else self.parse(name)] = None
        return list(found)

    def nearest(self, subnet: Subnet, num: int = 3) -> list[Subnet]:
        """The `num` members nearest to `subnet`, which names as many depths: by relative width and depth together."""

        def distance(member: Subnet) -> tuple[float, int]:
            width = abs(member.width - subnet.width) / self.widths[-1]
            depth = sum(abs(a - b) for a, b in zip(member.depths, subnet.depths, strict=True))
            return width + depth / sum(self.intact.depths), depth

        return sorted(self.subnets, key=distance)[:num]

    @cached_property
    def multiplicities(self) -> dict[Subnet, int]:
        """How often each sub-network stands in the list that training draws from.

        round(a·b), a running linearly from `width_emphasis` to 1 over the widths and b from `depth_emphasis`
        to 1 over the depth combinations; halves are rounded to even (POA §3.3 and its implementation).
        """
        a = np.linspace(self.width_emphasis, 1.0, len(self.widths))
        b = np.linspace(self.depth_emphasis, 1.0, len(self.depth_tuples))
        counts = np.round(np.outer(a, b)).astype(int).ravel()
        return {subnet: int(count) for subnet, count in zip(self.subnets, counts, strict=True)}

    @cached_property
    def draw_list(self) -> tuple[Subnet, ...]:
        """The list that training draws from: each as often as its multiplicity, the intact network never."""
        return tuple(
            subnet for subnet, count in self.multiplicities.items() if subnet != self.intact for _ in range(count)
        )

    def draw(self, seed: int, position: int) -> Subnet | None:
        """The sub-network of draw number `position`: the shuffled list is walked without replacement.

        A pure function of its arguments. None when the space holds the intact network only.
        """
        if not self.draw_list:
            return None
        walk, step = divmod(position, len(self.draw_list))
        order = generator(seed, "subnets", walk).permutation(len(self.draw_list))
        return self.draw_list[int(order[step])]


def _spell(values: tuple[int, ...]) -> str:
    if len(values) > 3 and len({b - a for a, b in itertools.pairwise(values)}) == 1:
        step = values[1] - values[0]
        return f"{values[0]}…{values[-1]}" + (f" step {step}" if step != 1 else "")
    return ", ".join(map(str, values))
