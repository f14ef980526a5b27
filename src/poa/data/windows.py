"""An order of images that lie in blocks (shards), in which only a few blocks are needed at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int64

from poa.errors import ConfigError
from poa.randomness import generator

_EPOCHS_KEPT = 2
_WINDOWS_KEPT = 2


class WindowedOrder:
    """Shuffled blocks, dealt into lanes, with the images shuffled inside windows of a few blocks.

    In every epoch the blocks are shuffled and laid end to end. That row is cut into `lanes` parts of equally many
    images (what is left over comes in no batch of that epoch), each part into windows of at most `window` blocks, as
    even as can be, and the images of a window are shuffled among each other. A batch takes equally many images from
    every lane, in the order of the lanes.

    So each image comes at most once in an epoch, a lane needs `window` blocks at a time, and where an image comes is a
    function of the seed and the epoch alone. With a single window it is a permutation drawn uniformly.

    Args:
        block_sizes: the images of every block, consecutive ones.
        window: blocks that are shuffled together.
        lanes: parts that advance side by side.
        seed: of the run.

    Raises:
        ConfigError: there are more lanes than blocks.
    """

    def __init__(self, block_sizes: Int64[np.ndarray, " blocks"], window: int, lanes: int, seed: int) -> None:
        if lanes > len(block_sizes):
            raise ConfigError(
                f"data.lanes must be at most the number of shards, {len(block_sizes)}; got {lanes}. Largest valid: "
                f"--data.lanes {len(block_sizes)}."
            )
        self.block_sizes = block_sizes
        self.window = window
        self.lanes = lanes
        self.seed = seed
        self._epochs: dict[int, _Epoch] = {}

    def take(self, epoch: int, start: int, size: int) -> Int64[np.ndarray, " size"]:
        """The images at places start … start + size − 1 of an epoch; both are multiples of the number of lanes."""
        if epoch not in self._epochs:
            while len(self._epochs) >= _EPOCHS_KEPT:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = _Epoch(self, epoch)
        first, last = start // self.lanes, (start + size) // self.lanes
        return np.concatenate([self._epochs[epoch].take(lane, first, last) for lane in range(self.lanes)])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_epochs": {}}


class _Epoch:
    """One epoch's order. Places are counted in the row of shuffled blocks."""

    def __init__(self, order: WindowedOrder, epoch: int) -> None:
        self.seed, self.epoch, self.window = order.seed, epoch, order.window
        shuffled = generator(order.seed, "blocks", epoch).permutation(len(order.block_sizes))
        self.ends = np.cumsum(order.block_sizes[shuffled])
        firsts = (np.cumsum(order.block_sizes) - order.block_sizes)[shuffled]
        self.shifts = firsts - (self.ends - order.block_sizes[shuffled])
        self.lane_size = int(self.ends[-1]) // order.lanes
        self.edges = [self._edges(lane * self.lane_size, (lane + 1) * self.lane_size) for lane in range(order.lanes)]
        self.windows: list[dict[int, np.ndarray]] = [{} for _ in range(order.lanes)]

    def _edges(self, begin: int, end: int) -> Int64[np.ndarray, " windows+1"]:
        """Where the windows of a lane begin, and where the last one ends."""
        first, last = np.searchsorted(self.ends, [begin, end - 1], side="right").tolist()
        num_blocks = last - first + 1
        num_windows = -(-num_blocks // self.window)
        inner = first + np.arange(1, num_windows) * num_blocks // num_windows
        return np.concatenate([[begin], self.ends[inner - 1], [end]]).astype(np.int64)

    def take(self, lane: int, first: int, last: int) -> Int64[np.ndarray, " images"]:
        """The images at places first … last − 1 of a lane."""
        edges = self.edges[lane]
        first, last = first + int(edges[0]), last + int(edges[0])
        begin, end = np.searchsorted(edges, [first, last - 1], side="right").tolist()
        parts = []
        for window in range(begin - 1, end):
            low, high = int(edges[window]), int(edges[window + 1])
            parts.append(self._shuffled(lane, window, low, high)[max(first - low, 0) : max(last - low, 0)])
        places = np.concatenate(parts)
        images: np.ndarray = places + self.shifts[np.searchsorted(self.ends, places, side="right")]
        return images

    def _shuffled(self, lane: int, window: int, low: int, high: int) -> Int64[np.ndarray, " images"]:
        known = self.windows[lane]
        if window not in known:
            while len(known) >= _WINDOWS_KEPT:
                del known[next(iter(known))]
            known[window] = low + generator(self.seed, "window", self.epoch, lane, window).permutation(high - low)
        return known[window]
