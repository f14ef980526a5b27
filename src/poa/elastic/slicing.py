"""The one rule that says what a sub-network owns of its super-network.

Training, extraction and counting all use it: a layer calls `Cut.apply` on its own parameters in its forward
pass, `cut_state` calls it on a whole state dict, `num_params` only asks for the shapes. That is why an
extracted network equals the sub-network that was trained.

No torch is imported here: the tables can be read and counted without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from poa.elastic.subnet import Subnet

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """One axis of a parameter.

    Attributes:
        size: its length in the intact network.
        max_width: the intact network's width if this axis shrinks in proportion to the width, else None.
        num_groups: the axis consists of this many equal blocks, each cut to its own leading part
            (3 for the stacked q, k and v).
        channels: a name for what runs along this axis. All axes of one name may be put into another order
            together without changing what the intact network computes; None where no order is free.
        unit: neighbours that stay together in such an order (the channels of an attention head).
    """

    size: int
    max_width: int | None = None
    num_groups: int = 1
    channels: str | None = None
    unit: int = 1

    def active(self, width: int) -> int:
        """The length of this axis in a sub-network of that width, rounded down within each of its blocks."""
        if self.max_width is None:
            return self.size
        return self.num_groups * (self.size // self.num_groups * width // self.max_width)

    def is_split(self, width: int) -> bool:
        """Whether a sub-network of that width owns parts of this axis that do not adjoin."""
        return self.num_groups > 1 and self.active(width) != self.size


def fixed(size: int) -> Axis:
    """An axis that every sub-network owns whole."""
    return Axis(size)


def elastic(size: int, max_width: int, channels: str | None = None, *, num_groups: int = 1, unit: int = 1) -> Axis:
    """An axis of which a sub-network owns the leading part, in proportion to its width."""
    return Axis(size, max_width, num_groups, channels, unit)


@dataclass(frozen=True)
class Window:
    """What a sub-network owns of a parameter, where it lies in the super-network's: nothing is copied.

    Attributes:
        view: of the intact network's parameter. An axis of several blocks that is shortened has become two, blocks
            and length.
        scale: the factor that it lacks.
        split: the axes of the extracted network's parameter that have become two, in rising order.
    """

    view: Tensor
    scale: float = 1.0
    split: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the extracted network's parameter."""
        shape = list(self.view.shape)
        for dim in self.split:
            shape[dim : dim + 2] = [shape[dim] * shape[dim + 1]]
        return tuple(shape)

    def part(self) -> Tensor:
        """The extracted network's parameter; where nothing is to be done, the view itself. Differentiable."""
        part = self.view if self.scale == 1.0 else self.view * self.scale
        for dim in self.split:
            part = part.flatten(dim, dim + 1)
        return part

    def dense(self) -> Tensor:
        """The extracted network's parameter in contiguous memory of its own."""
        part = self.part().contiguous()
        is_shared = part.untyped_storage().data_ptr() == self.view.untyped_storage().data_ptr()
        return part.clone() if is_shared else part


@dataclass(frozen=True)
class Cut:
    """How a parameter is cut.

    Attributes:
        axes: one for each axis of the parameter.
        fan_in: the axis whose shortening is made up for by a factor on the parameter: its full length over its
            active length, so that a sum over fewer inputs keeps its size (POA's elastic layers). None: no factor.
    """

    axes: tuple[Axis, ...]
    fan_in: int | None = None

    def shape(self, width: int) -> tuple[int, ...]:
        """The parameter's shape in a sub-network of that width."""
        return tuple(axis.active(width) for axis in self.axes)

    @property
    def full_shape(self) -> tuple[int, ...]:
        """The parameter's shape in the intact network."""
        return tuple(axis.size for axis in self.axes)

    def scale(self, width: int) -> float:
        """The factor on the parameter in a sub-network of that width; 1 in the intact network."""
        if self.fan_in is None:
            return 1.0
        axis = self.axes[self.fan_in]
        return axis.size / axis.active(width)

    def apply(self, tensor: Tensor, width: int) -> Tensor:
        """The part of the intact network's `tensor` that a sub-network of that width owns, times its factor.

        Differentiable. At full width it is `tensor` itself.
        """
        return tensor if self.shape(width) == self.full_shape else self.window(tensor, width).part()

    def window(self, tensor: Tensor, width: int) -> Window:
        """The part of the intact network's `tensor` that a sub-network of that width owns, where it lies."""
        dim = 0
        for axis in self.axes:
            length = axis.active(width)
            if axis.is_split(width):
                tensor = tensor.unflatten(dim, (axis.num_groups, axis.size // axis.num_groups))
                tensor = tensor.narrow(dim + 1, 0, length // axis.num_groups)
                dim += 1
            elif length != axis.size:
                tensor = tensor.narrow(dim, 0, length)
            dim += 1
        split = tuple(dim for dim, axis in enumerate(self.axes) if axis.is_split(width))
        return Window(tensor, self.scale(width), split)


@dataclass(frozen=True)
class Stage:
    """A row of blocks of which shallower sub-networks keep some.

    Attributes:
        prefix: of the blocks' names in the state dict; block i is `{prefix}.{i}`.
        num_blocks: blocks of the intact network.
        rule: (blocks of the intact network, depth) → the blocks that a sub-network of that depth keeps.
    """

    prefix: str
    num_blocks: int
    rule: Callable[[int, int], tuple[int, ...]] = field(default_factory=lambda: kept_blocks)

    def kept(self, depth: int) -> tuple[int, ...]:
        """The blocks that a sub-network of that depth keeps, in rising order."""
        return self.rule(self.num_blocks, depth)


@dataclass(frozen=True)
class Layout:
    """The table of a super-network: every parameter with its cut, and the stages of elastic depth.

    Attributes:
        cuts: for each name in the state dict how it is cut.
        stages: the stages of elastic depth, in the order of `Subnet.depths`.
        features: the channels of the class and patch vectors.
        training_only: names that an extracted network does not have (the mask token).
    """

    cuts: Mapping[str, Cut]
    stages: tuple[Stage, ...]
    features: Axis
    training_only: frozenset[str] = field(default_factory=frozenset)

    def owned(self, subnet: Subnet) -> Iterator[tuple[str, str, Cut]]:
        """(name in the super-network, name in the extracted network, cut) of all that `subnet` owns."""
        renumbered = {
            f"{stage.prefix}.{block}": f"{stage.prefix}.{index}"
            for stage, depth in zip(self.stages, subnet.depths, strict=True)
            for index, block in enumerate(stage.kept(depth))
        }
        for name, cut in self.cuts.items():
            if name in self.training_only:
                continue
            block = self._block_of(name)
            if block is None:
                yield name, name, cut
            elif block in renumbered:
                yield name, renumbered[block] + name.removeprefix(block), cut

    def _block_of(self, name: str) -> str | None:
        for stage in self.stages:
            if name.startswith(f"{stage.prefix}."):
                index = name.removeprefix(f"{stage.prefix}.").split(".", 1)[0]
                return f"{stage.prefix}.{index}"
        return None


def kept_blocks(num_blocks: int, depth: int) -> tuple[int, ...]:
    """The blocks that a sub-network of that depth keeps: ⌊linspace(0, num_blocks − 1, depth)⌋, in exact integers.

    The first and the last block are always kept. (The reference truncates a float64 linspace; the two agree for
    all shipped depths, see docs/decisions.md.)
    """
    if depth == 1:
        return (0,)
    return tuple(index * (num_blocks - 1) // (depth - 1) for index in range(depth))


def cut_state(layout: Layout, state: Mapping[str, Tensor], subnet: Subnet) -> dict[str, Tensor]:
    """The state dict of the network extracted for `subnet`: its own contiguous tensors, factors folded in.

    Args:
        layout: the super-network's table.
        state: the super-network's state dict.
        subnet: the sub-network.
    """
    return {name: window.dense() for name, window in windows(layout, state, subnet).items()}


def windows(layout: Layout, state: Mapping[str, Tensor], subnet: Subnet) -> dict[str, Window]:
    """What the network extracted for `subnet` owns, by its names, where it lies in the super-network's `state`."""
    return {target: cut.window(state[source].detach(), subnet.width) for source, target, cut in layout.owned(subnet)}


def num_params(layout: Layout, subnet: Subnet) -> int:
    """The number of parameters of the extracted network, from the table of shapes alone."""
    return sum(math.prod(cut.shape(subnet.width)) for _, _, cut in layout.owned(subnet))
