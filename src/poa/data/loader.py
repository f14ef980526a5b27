"""Micro-batches of augmented crops with masks, made in this process or in others."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from poa.config import PretrainConfig
from poa.data.augment import NUM_GLOBAL_CROPS, MultiCrop
from poa.data.base import ImageSource, SkippedImage
from poa.data.decode import BadImage
from poa.data.masking import batch_masks
from poa.data.sampler import EpochPlan
from poa.data.shards.fetch import Stop, Stopped, end_downloads_with
from poa.errors import DataError
from poa.randomness import generator

ItemT = TypeVar("ItemT")

_MAX_UNREADABLE = 100
_MAX_WORKERS = 16
_WATCH_SECONDS = 2.0


class Batch(NamedTuple):
    """A micro-batch of B images, or this process's part of one.

    Attributes:
        global_crops: two of every image; view first, so that both views of an image lie B rows apart.
        local_crops: L of every image, L may be 0.
        masks: of the global crops, N patches each: all first views, then all second views.
        indices: where the images stand in the source (as planned, also where another one stands in).
        skipped: images that could not be read; each was replaced by the next one that could.
    """

    global_crops: UInt8[Tensor, "2 B C H W"]
    local_crops: UInt8[Tensor, "L B C h w"]
    masks: Bool[Tensor, "2*B N"]
    indices: Int64[Tensor, " B"]
    skipped: list[SkippedImage]


class MultiCropBatches(Dataset[Batch]):
    """Micro-batch t of a run, as item t: a pure function of the source, the plan and the configuration.

    Of several processes each makes its own part (`EpochPlan.ranks`): the parts together are what one process makes.
    What is drawn for an image depends on the plan's seed, the epoch and the image's index only; the targets
    of the masks depend on the seed and t.

    Args:
        source: the images, of `config.model.num_channels` channels.
        plan: which images micro-batch t holds.
        config: augmentation, masks, image and patch size.
    """

    def __init__(self, source: ImageSource, plan: EpochPlan, config: PretrainConfig) -> None:
        self.source = source
        self.plan = plan
        self.mask_config = config.mask
        self.grid = (config.model.mask_side, config.model.mask_side)
        self._crops = MultiCrop(config.augment, config.model.image_size, config.model.num_channels)

    def __getitem__(self, micro_step: int) -> Batch:
        """The micro-batch.

        Raises:
            DataError: 100 images in a row cannot be read.
        """
        epoch, whole = self.plan.position(micro_step)
        part = self.plan.ranks.part(len(whole))
        indices = whole[part]
        skipped: list[SkippedImage] = []
        crops = [self._sample(epoch, index, skipped) for index in indices.tolist()]
        return Batch(
            global_crops=torch.from_numpy(np.stack([views for views, _ in crops], axis=1)),
            local_crops=torch.from_numpy(np.stack([views for _, views in crops], axis=1)),
            masks=torch.from_numpy(self._masks(epoch, whole, micro_step, part)),
            indices=torch.from_numpy(indices),
            skipped=skipped,
        )

    def _sample(
        self, epoch: int, index: int, skipped: list[SkippedImage]
    ) -> tuple[UInt8[np.ndarray, "2 C H W"], UInt8[np.ndarray, "L C h w"]]:
        image, _ = first_readable(self.source, range(len(self.source)), index, skipped)
        return self._crops(image, lambda crop: generator(self.plan.seed, "augment", epoch, index, crop))

    def _masks(
        self, epoch: int, whole: Int64[np.ndarray, " images"], micro_step: int, part: slice
    ) -> Bool[np.ndarray, "_ N"]:
        """The masks of a part of the micro-batch: how much of each row is masked is drawn for the whole."""
        seed, size = self.plan.seed, len(whole)

        def rng_for_row(row: int) -> np.random.Generator:
            view, place = divmod(row, size)
            return generator(seed, "mask", epoch, int(whole[place]), view)

        rows = np.arange(NUM_GLOBAL_CROPS * size).reshape(NUM_GLOBAL_CROPS, size)[:, part].ravel()
        rng_for_targets = generator(seed, "mask targets", micro_step)
        return batch_masks(NUM_GLOBAL_CROPS * size, self.grid, self.mask_config, rng_for_targets, rng_for_row, rows)


def first_readable(
    source: ImageSource, indices: Sequence[int] | Int64[np.ndarray, " N"], place: int, skipped: list[SkippedImage]
) -> tuple[Image.Image, int]:
    """The first image that can be read, from `indices[place]` on and around, and its place in `indices`.

    Args:
        source: the images.
        indices: those of them that may stand in for one another.
        place: where to begin.
        skipped: those that cannot be read are added to it.

    Raises:
        DataError: 100 images in a row cannot be read.
    """
    for step in range(_MAX_UNREADABLE):
        found = (place + step) % len(indices)
        try:
            return source.load(int(indices[found])), found
        except BadImage as error:
            skipped.append(SkippedImage(source.image_name(int(indices[found])), error.reason))
    last = "".join(f"\n  {name}: {reason}" for name, reason in skipped[-3:])
    raise DataError(
        f"{_MAX_UNREADABLE} images of {source.spec!r} in a row cannot be read; the last:{last}\n"
        f"Is the disk still there? If the files are broken, remove them and start again."
    )


class BatchLoader(DataLoader[ItemT]):
    """A `DataLoader` whose `DataError`s arrive as they were raised, without a worker's traceback in them.

    Attributes:
        stop: when it is set, or the loop over the batches is left, downloads that are under way are given up, in the
            workers too, and the batches end.
        on_start: called when the workers are there, before the first batch is waited for.
    """

    stop: Stop
    on_start: Callable[[], None] | None = None

    def __iter__(self) -> Iterator[ItemT]:  # type: ignore[override]
        self.stop.clear()
        outer = None if self.num_workers else end_downloads_with(self.stop)
        try:
            items = super().__iter__()
            if self.on_start is not None:
                self.on_start()
            for item in items:
                if isinstance(item, DataError):
                    raise item
                if isinstance(item, Stopped):
                    return
                yield item
        finally:
            self.stop.set()
            if outer is not None:
                end_downloads_with(outer)


class _ErrorsAsItems(Dataset[ItemT | DataError | Stopped]):
    """Gives a `DataError` or `Stopped` back instead of raising it, so that it crosses the process unchanged."""

    def __init__(self, batches: Dataset[ItemT]) -> None:
        self.batches = batches

    def __getitem__(self, micro_step: int) -> ItemT | DataError | Stopped:
        try:
            return self.batches[micro_step]
        except (DataError, Stopped) as error:
            return error


def make_loader(
    batches: Dataset[ItemT], first: int, last: int, num_workers: int, pin_memory: bool
) -> BatchLoader[ItemT]:
    """Items first … last − 1 of a data set of batches in order; the same ones for any number of workers.

    Workers run one thread each and leave SIGINT, SIGTERM and SIGUSR1 to this process. Without workers, OpenCV is set
    to one thread in this process: on crops of this size its threads cost more than they give.

    Args:
        batches: where the batches come from; an item is a batch.
        first: the first batch.
        last: one past the last batch.
        num_workers: processes that make them; 0 makes them in this one.
        pin_memory: copy them into page-locked memory (for CUDA).
    """
    if num_workers == 0:
        cv2.setNumThreads(0)
    stop = Stop()
    loader: BatchLoader[ItemT] = BatchLoader(
        _ErrorsAsItems(batches),  # type: ignore[arg-type]
        batch_size=None,
        sampler=range(first, last),
        num_workers=num_workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        prefetch_factor=2 if num_workers else None,
        worker_init_fn=partial(_start_worker, os.getpid(), stop),
        generator=torch.Generator(),
    )
    loader.stop = stop
    return loader


def resolve_num_workers(requested: int, device_type: str, num_processes: int = 1) -> int:
    """The number of worker processes: `requested`, or for -1 a number that suits the machine.

    Args:
        requested: `runtime.num_workers`.
        device_type: "cuda" takes all cores but one (at most 16), others half of the cores; 1 at least.
        num_processes: processes on this machine that share its cores.
    """
    if requested >= 0:
        return requested
    cores = _num_cores() // num_processes
    return max(1, min(_MAX_WORKERS, cores - 1) if device_type == "cuda" else cores // 2)


def _num_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _start_worker(main_process: int, stop: Stop, worker: int) -> None:
    del worker
    # The main process's garbage (connections, say) is not this one's to end; memory that is not touched stays shared.
    gc.freeze()
    end_downloads_with(stop)
    if os.name == "posix":
        threading.Thread(target=_end_with, args=(main_process,), daemon=True).start()
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)


def _end_with(process: int) -> None:
    """Ends this process when that one is gone. A fork server, the parent of workers, outlives a run that is killed."""
    while _lives(process):
        time.sleep(_WATCH_SECONDS)
    os._exit(1)


def _lives(process: int) -> bool:
    """Whether that process runs; one that has ended and that its parent has not asked after does not."""
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except ProcessLookupError:
        return False
    except (OSError, IndexError):
        return True  # no /proc here


def _unchanged(item: ItemT) -> ItemT:
    return item
