"""The vectors of many networks on one set of images, every image decoded once."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from poa.config.checks import require, require_probability
from poa.data import BadImage, ImageSource, SkippedImage, normalize
from poa.errors import ConfigError, DataError
from poa.evaluate.base import Vectors
from poa.evaluate.looks import PLAIN, Look
from poa.evaluate.store import Slot
from poa.family import Preprocessing
from poa.files import write_json
from poa.models import Candidate, RunningMember

MEMORY_BUDGET = 2 << 30
"""Bytes of vectors that are kept in memory; beyond, they go to temporary files."""
FLUSH_SECONDS = 20.0
"""With a store, at most this much work is lost when the process is killed."""
SKIPPED_FILE = "skipped.json"

Network = Candidate | RunningMember
"""What features can be read of."""


@dataclass(frozen=True)
class Loading:
    """How images are read for an evaluation."""

    batch_size: int = 64
    """Images per forward pass."""
    num_workers: int = 0
    """Processes that decode; 0 decodes in the evaluating process."""
    max_bad_share: float = 0.01
    """Refuse when more than this share of the images cannot be read; below, they are left out and reported."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        require(self.num_workers >= 0, "num_workers", self.num_workers, "0 or more")
        require_probability("max_bad_share", self.max_bad_share)


DEFAULT_LOADING = Loading()


@dataclass(frozen=True)
class Extraction:
    """The vectors of every network under every look, for the images that could be read."""

    slots: Mapping[tuple[str, str], Slot]
    """By the names of network and look."""
    num_blocks: int
    source: ImageSource
    indices: np.ndarray
    """The images' positions in the source."""
    skipped: tuple[SkippedImage, ...]
    """The images that could not be read."""

    @property
    def labels(self) -> Tensor | None:
        """The classes of the images; None where the source has none."""
        labels = self.source.labels
        return None if labels is None else torch.from_numpy(np.asarray(labels)[self.indices])

    def of(self, network: str, look: str = PLAIN.name) -> Vectors:
        """One network's vectors."""
        parts = [torch.from_numpy(np.asarray(part)) for part in self.slots[network, look].rows()]
        blocks = parts[: len(parts) - (self.num_blocks > 1)]
        pooled = parts[-1] if self.num_blocks > 1 else None
        return Vectors(blocks[-1], self.labels, num_classes(self.source), tuple(blocks), pooled)


def num_classes(source: ImageSource) -> int:
    """The classes of a labelled source, those without an image counted where their names are known; else 0."""
    if source.labels is None:
        return 0
    return len(source.class_names) if source.class_names else int(source.labels.max()) + 1


@contextmanager
def extract_features(
    networks: Sequence[Network],
    source: ImageSource,
    *,
    looks: Sequence[Look] = (PLAIN,),
    num_blocks: int = 1,
    indices: np.ndarray | None = None,
    loading: Loading = DEFAULT_LOADING,
    store: Path | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Iterator[Extraction]:
    """Computes the vectors of all networks under all looks; while the context is open they can be read.

    Each image is decoded once. Beyond `MEMORY_BUDGET` the vectors live in temporary files, so memory stays bounded
    for any number of networks and images.

    Args:
        networks: each runs on the device that it is on.
        source: the images.
        looks: what is done to every image before a network sees it.
        num_blocks: depths whose class vectors are kept; above 1 also the mean patch vectors.
        indices: positions of the images to use; all by default.
        loading: batch size and workers.
        store: a directory in which everything is kept. An extraction that was stopped goes on; networks that are
            complete are not computed again.
        on_progress: called with the number of images done after every batch.

    Raises:
        DataError: more images than allowed could not be read.
        ConfigError: the networks take images of different numbers of channels.
    """
    positions = np.arange(len(source)) if indices is None else np.asarray(indices)
    _check_channels(networks)
    with ExitStack() as stack:
        run = _Run(networks, looks, num_blocks, source, positions, store)
        run.compute(loading, stack, on_progress)
        bad = {image for image, _ in run.skipped}
        good = np.asarray([index for index in positions.tolist() if index not in bad], dtype=np.int64)
        skipped = tuple(SkippedImage(source.image_name(index), reason) for index, reason in run.skipped)
        _check_share(source, skipped, len(positions), loading.max_bad_share)
        yield Extraction(run.slots, num_blocks, source, good, skipped)


class _Run:
    """An extraction under way."""

    def __init__(
        self,
        networks: Sequence[Network],
        looks: Sequence[Look],
        num_blocks: int,
        source: ImageSource,
        positions: np.ndarray,
        store: Path | None,
    ) -> None:
        self.networks, self.looks, self.num_blocks = networks, looks, num_blocks
        self.source, self.positions = source, positions
        self.folder = None if store is None else store / _key(source.fingerprint, positions.tobytes())
        self.slots = {
            (network.name, look.name): Slot(self._slot_folder(network, look), len(positions))
            for network in networks
            for look in looks
        }
        self.skipped: list[tuple[int, str]] = self._read_skipped()
        self.flushed = time.monotonic()

    def compute(self, loading: Loading, stack: ExitStack, on_progress: Callable[[int], None] | None) -> None:
        """Fills all slots; those that are complete already are left alone."""
        start = min(slot.num_images for slot in self.slots.values())
        num_rows = min(slot.num_rows for slot in self.slots.values())
        known = set(self.positions[:start].tolist())
        self.skipped = [(index, reason) for index, reason in self.skipped if index in known]
        images = _Images(self.source, self.positions[start:], self._inputs())
        loader = DataLoader(images, loading.batch_size, num_workers=loading.num_workers, collate_fn=list)
        done = start
        for batch in loader:
            done += len(batch)
            self.skipped += [(index, item) for index, item in batch if isinstance(item, str)]
            read = [item for _, item in batch if not isinstance(item, str)]
            if read:
                self._fill(read, num_rows, done, stack)
            num_rows += len(read)
            for slot in self.slots.values():
                if slot.num_images < done:
                    slot.advance(done, num_rows)
            self._flush(at_once=done == len(self.positions))
            if on_progress is not None:
                on_progress(done)

    def _fill(self, read: list[dict[_Input, np.ndarray]], row: int, done: int, stack: ExitStack) -> None:
        found = {}
        for network, look in self._due(done):
            how = network.preprocessing
            pixels = torch.from_numpy(np.stack([item[_input(look, how)] for item in read])).to(network.device)
            with torch.inference_mode():
                blocks = network.last_blocks(normalize(pixels, how.mean, how.std), self.num_blocks)
            vectors = [block.cls for block in blocks]
            if self.num_blocks > 1:
                vectors.append(blocks[-1].patches.mean(dim=1))
            found[network.name, look.name] = [part.float().cpu().numpy() for part in vectors]
        if self.folder is None and all(not slot.arrays for slot in self.slots.values()):
            self._choose_place(sum(part.shape[1] for parts in found.values() for part in parts), stack)
        for key, parts in found.items():
            self.slots[key].put(row, parts)

    def _due(self, done: int) -> Iterator[tuple[Network, Look]]:
        for network in self.networks:
            for look in self.looks:
                if self.slots[network.name, look.name].num_images < done:
                    yield network, look

    def _choose_place(self, num_channels: int, stack: ExitStack) -> None:
        if 4 * num_channels * len(self.positions) <= MEMORY_BUDGET:
            return
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="poa-features-")))
        for number, slot in enumerate(self.slots.values()):
            slot.folder = folder / str(number)

    def _inputs(self) -> dict[_Input, tuple[Look, Preprocessing]]:
        return {
            _input(look, network.preprocessing): (look, network.preprocessing)
            for network in self.networks
            for look in self.looks
        }

    def _slot_folder(self, network: Network, look: Look) -> Path | None:
        if self.folder is None:
            return None
        return self.folder / _key(network.fingerprint, repr(network.preprocessing), look.name, self.num_blocks)

    def _flush(self, *, at_once: bool) -> None:
        if self.folder is None or (time.monotonic() - self.flushed < FLUSH_SECONDS and not at_once):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / SKIPPED_FILE, self.skipped)
        for slot in self.slots.values():
            slot.flush()
        self.flushed = time.monotonic()

    def _read_skipped(self) -> list[tuple[int, str]]:
        if self.folder is None or not (self.folder / SKIPPED_FILE).is_file():
            return []
        return [(index, reason) for index, reason in json.loads((self.folder / SKIPPED_FILE).read_text("utf-8"))]


_Input = tuple[str, int, float, str]
"""What tells the inputs made of one image apart: look, side, crop and interpolation."""


def _input(look: Look, how: Preprocessing) -> _Input:
    return look.name, how.image_size, how.crop_pct, how.interpolation


class _Images(Dataset[tuple[int, "dict[_Input, np.ndarray] | str"]]):
    """(index, its inputs [C, S, S] in 8 bits) or (index, reason) of the images at some positions of a source."""

    def __init__(
        self, source: ImageSource, indices: np.ndarray, inputs: dict[_Input, tuple[Look, Preprocessing]]
    ) -> None:
        self.source = source
        self.indices = indices
        self.inputs = inputs

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[int, dict[_Input, np.ndarray] | str]:
        index = int(self.indices[position])
        try:
            image = self.source.load(index)
        except BadImage as error:
            return index, error.reason
        return index, {key: look(image, index, how) for key, (look, how) in self.inputs.items()}


def _key(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def _check_channels(networks: Sequence[Network]) -> None:
    channels = {network.preprocessing.num_channels: network.name for network in networks}
    if len(channels) > 1:
        listed = ", ".join(f"{name}: {number}" for number, name in sorted(channels.items()))
        raise ConfigError(f"networks for images of different numbers of channels cannot be compared ({listed}).")


def _check_share(source: ImageSource, skipped: tuple[SkippedImage, ...], num_images: int, max_share: float) -> None:
    if len(skipped) > max_share * num_images or num_images == len(skipped):
        examples = "; ".join(f"{bad.name}: {bad.reason}" for bad in skipped[:3])
        raise DataError(
            f"{len(skipped)} of the {num_images} images of {source.spec} could not be read ({examples}). "
            f"Mend them, or allow more with --max-bad-share (now {max_share:g})."
        )
