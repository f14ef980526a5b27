"""Work on many images in processes, with results in order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
from jaxtyping import Int64
from torch.utils.data import Dataset

from poa.data.loader import make_loader
from poa.errors import DataError

ResultT = TypeVar("ResultT")


@contextmanager
def death_of_workers_in_words(advice: str = "Give fewer --num-workers, or a smaller --batch-size.") -> Iterator[None]:
    """Within, the end of a process that reads images is a `DataError`; it may interrupt whatever is under way.

    Args:
        advice: a sentence that says how less memory is used.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a process that reads images was ended from outside, most often because memory ran out. {advice}"
        ) from error


def map_images(
    work: Callable[[int], ResultT], indices: Int64[np.ndarray, " N"], num_workers: int, chunk_size: int
) -> Iterator[ResultT]:
    """`work(index)` for every index, in order; the same for any number of workers.

    Results of at most 2 · `num_workers` chunks wait in memory.

    Args:
        work: can be pickled, and gives back what can be.
        indices: any.
        num_workers: processes; 0 works in this one.
        chunk_size: images that a process takes at a time.

    Raises:
        DataError: a process was ended from outside.
    """
    chunks = _Chunks(work, indices, chunk_size)
    with death_of_workers_in_words("Give fewer --num-workers."):
        for results in make_loader(chunks, 0, len(chunks), min(num_workers, len(chunks)), pin_memory=False):
            yield from results


class _Chunks(Dataset[list[ResultT]]):
    """The results of consecutive indices, as one item."""

    def __init__(self, work: Callable[[int], ResultT], indices: Int64[np.ndarray, " N"], chunk_size: int) -> None:
        self.work, self.indices, self.chunk_size = work, indices, chunk_size

    def __len__(self) -> int:
        return math.ceil(len(self.indices) / self.chunk_size)

    def __getitem__(self, number: int) -> list[ResultT]:
        start = number * self.chunk_size
        return [self.work(index) for index in self.indices[start : start + self.chunk_size].tolist()]
