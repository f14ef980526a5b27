"""Where vectors are kept while they are computed: in memory, or in files that a stopped extraction goes on with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from poa.errors import CheckpointError
from poa.files import read_json, write_json

PROGRESS_FILE = "progress.json"
MAX_ARRAYS = 1_024
"""Depths of one network that vectors are kept of."""


class Slot:
    """The vectors of one network under one look: an array for each depth, a row for each image that was read.

    Attributes:
        num_total: rows that there may be.
        num_images: images that are done, those that could not be read among them.
        num_rows: rows that are filled.
    """

    def __init__(self, folder: Path | None, num_total: int) -> None:
        self.folder = folder
        self.num_total = num_total
        self.num_images = 0
        self.num_rows = 0
        self.arrays: list[np.ndarray] = []
        if folder is not None and (folder / PROGRESS_FILE).is_file():
            self._go_on(folder)

    def put(self, row: int, parts: Sequence[np.ndarray]) -> None:
        """Fills rows from `row` on; the first call makes the arrays."""
        if not self.arrays:
            self.arrays = [self._made(index, part.shape[1]) for index, part in enumerate(parts)]
        for array, part in zip(self.arrays, parts, strict=True):
            array[row : row + len(part)] = part

    def advance(self, num_images: int, num_rows: int) -> None:
        """Says how much is done."""
        self.num_images, self.num_rows = num_images, num_rows

    def flush(self) -> None:
        """Makes what is done outlive this process."""
        if self.folder is None:
            return
        for array in self.arrays:
            if isinstance(array, np.memmap):
                array.flush()
        progress = {"num_images": self.num_images, "num_rows": self.num_rows, "num_arrays": len(self.arrays)}
        write_json(self.folder / PROGRESS_FILE, progress)

    def rows(self) -> list[np.ndarray]:
        """The arrays, the filled rows only."""
        return [array[: self.num_rows] for array in self.arrays]

    def _go_on(self, folder: Path) -> None:
        """Takes up what is there.

        Raises:
            CheckpointError: it is damaged.
        """
        remedy = "Remove the folder to compute its vectors again."
        progress = read_json(folder / PROGRESS_FILE, remedy=remedy)
        counts = [progress.get(name) for name in ("num_images", "num_rows", "num_arrays")]
        if not all(isinstance(count, int) and 0 <= count <= max(self.num_total, MAX_ARRAYS) for count in counts):
            raise CheckpointError(f"{folder / PROGRESS_FILE} is damaged: it counts {counts}. {remedy}")
        self.num_images, self.num_rows, num_arrays = map(int, counts)  # type: ignore[arg-type]
        try:
            files = [folder / f"{index}.npy" for index in range(min(num_arrays, MAX_ARRAYS))]
            self.arrays = [np.lib.format.open_memmap(file, "r+") for file in files]
        except (OSError, ValueError) as error:
            raise CheckpointError(f"the vectors in {folder} are damaged: {error}. {remedy}") from error
        if any(array.dtype != np.float32 or array.shape[:1] != (self.num_total,) for array in self.arrays):
            raise CheckpointError(f"the vectors in {folder} are of other images. {remedy}")

    def _made(self, index: int, width: int) -> np.ndarray:
        shape = (self.num_total, width)
        if self.folder is None:
            return np.empty(shape, np.float32)
        self.folder.mkdir(parents=True, exist_ok=True)
        return np.lib.format.open_memmap(self.folder / f"{index}.npy", "w+", np.float32, shape)
