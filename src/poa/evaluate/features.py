"""The vectors of many networks on one set of images, every image decoded once."""

from __future__ import annotations

import hashlib
import math
import tempfile
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from poa.config.checks import require, require_probability
from poa.data import BadImage, ImageSource, SkippedImage, make_loader, normalize
from poa.data.workers import death_of_workers_in_words
from poa.errors import CheckpointError, ConfigError, DataError
from poa.evaluate.base import Vectors
from poa.evaluate.looks import PLAIN, AnyLook, Look, Shown, salience
from poa.evaluate.store import Slot
from poa.family import Preprocessing
from poa.files import json_value, write_json
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
    only: Mapping[str, np.ndarray]
    """For looks at some of the images, by name: these, as positions in the source."""

    def rows(self, look: str) -> Int[Tensor, "M"]:
        """Which of `indices` the look's vectors are of."""
        if look not in self.only:
            return torch.arange(len(self.indices))
        return torch.from_numpy(np.flatnonzero(np.isin(self.indices, self.only[look])))

    def of(self, network: str, look: str = PLAIN.name) -> Vectors:
        """One network's vectors; several depths of the plain look only."""
        parts = [torch.from_numpy(np.asarray(part)) for part in self.slots[network, look].rows()]
        has_depths = self.num_blocks > 1 and look == PLAIN.name
        blocks, pooled = (parts[:-1], parts[-1]) if has_depths else (parts, None)
        labels = None
        if self.source.labels is not None:
            labels = torch.from_numpy(np.asarray(self.source.labels)[self.indices])[self.rows(look)]
        return Vectors(blocks[-1], labels, num_classes(self.source), tuple(blocks), pooled)


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
    looks: Sequence[AnyLook] | Mapping[AnyLook, np.ndarray | None] = (PLAIN,),
    num_blocks: int = 1,
    indices: np.ndarray | None = None,
    loading: Loading = DEFAULT_LOADING,
    store: Path | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Iterator[Extraction]:
    """Computes the vectors of all networks under all looks; while the context is open they can be read.

    Each image is decoded once, and each input made of it is moved and normalised once for all networks. Beyond
    `MEMORY_BUDGET` the vectors live in temporary files, so memory stays bounded for any number of networks and images.

    Args:
        networks: each runs on the device that it is on.
        source: the images.
        looks: what is done to every image before a network sees it; or to some only, given by their positions (None:
            to all).
        num_blocks: depths whose class vectors are kept of the plain look; above 1 also the mean patch vectors.
        indices: positions of the images to use; all by default.
        loading: batch size and workers.
        store: a directory in which everything is kept. An extraction that was stopped goes on; networks that are
            complete are not computed again.
        on_progress: called with the number of images done after every batch.

    Raises:
        DataError: more images than allowed could not be read, or a process that reads them died.
        ConfigError: the networks take images of different numbers of channels, or a look cannot be had of them.
    """
    positions = np.arange(len(source)) if indices is None else np.asarray(indices)
    plan = dict(looks) if isinstance(looks, Mapping) else dict.fromkeys(looks)
    _check_networks(networks, plan)
    with ExitStack() as stack:
        run = _Run(networks, plan, num_blocks, source, positions, store)
        with death_of_workers_in_words():
            run.compute(loading, stack, on_progress)
        good = positions[~np.isin(positions, [image for image, _ in run.skipped])]
        skipped = tuple(SkippedImage(source.image_name(index), reason) for index, reason in run.skipped)
        _check_share(source, skipped, len(positions), loading.max_bad_share)
        only = {look.name: chosen for look, chosen in plan.items() if chosen is not None}
        yield Extraction(run.slots, num_blocks, source, good, skipped, only)


class _Run:
    """An extraction under way."""

    def __init__(
        self,
        networks: Sequence[Network],
        plan: Mapping[AnyLook, np.ndarray | None],
        num_blocks: int,
        source: ImageSource,
        positions: np.ndarray,
        store: Path | None,
    ) -> None:
        self.networks, self.num_blocks, self.source, self.positions = networks, num_blocks, source, positions
        self.looks = tuple(plan)
        every = np.ones(len(positions), bool)
        self.wanted = {
            look.name: every if chosen is None else np.isin(positions, chosen) for look, chosen in plan.items()
        }
        self.folder = None if store is None else store / _key(source.fingerprint, positions.tobytes())
        self.slots = {
            (network.name, look.name): Slot(self._slot_folder(network, look), int(self.wanted[look.name].sum()))
            for network in networks
            for look in self.looks
        }
        self.skipped: list[tuple[int, str]] = self._read_skipped()
        self.flushed = time.monotonic()

    def compute(self, loading: Loading, stack: ExitStack, on_progress: Callable[[int], None] | None) -> None:
        """Fills all slots; those that are complete already are left alone."""
        done = min(slot.num_images for slot in self.slots.values())
        known = self.positions[:done]
        self.skipped = [(index, reason) for index, reason in self.skipped if index in known]
        read = ~np.isin(known, [index for index, _ in self.skipped])
        rows = {name: int((wanted[:done] & read).sum()) for name, wanted in self.wanted.items()}
        images = _Images(self, done, loading.batch_size)
        for items in make_loader(images, 0, len(images), min(loading.num_workers, len(images)), pin_memory=False):
            self.skipped += [(index, item) for index, item in items if isinstance(item, str)]
            batch = _Batch(self, done, items)
            done += len(items)
            for look in self.looks:
                self._fill(batch, look, rows[look.name], done, stack)
                rows[look.name] += len(batch.wanted[look.name])
            self._flush(at_once=done == len(self.positions))
            if on_progress is not None:
                on_progress(done)

    def _fill(self, batch: _Batch, look: AnyLook, row: int, done: int, stack: ExitStack) -> None:
        """Computes one look at one batch with the networks that lack it."""
        due = [network for network in self.networks if self.slots[network.name, look.name].num_images < done]
        num_rows = len(batch.wanted[look.name])
        if due and num_rows:
            found = {network.name: batch.vectors(network, look) for network in due}
            batch.forget(look)
            self._choose_place({name: sum(part.shape[1] for part in parts) for name, parts in found.items()}, stack)
            for name, parts in found.items():
                self.slots[name, look.name].put(row, [part.cpu().numpy() for part in parts])
        for network in due:
            self.slots[network.name, look.name].advance(done, row + num_rows)

    def _choose_place(self, widths: Mapping[str, int], stack: ExitStack) -> None:
        """Before the first vectors come: in files, where they would not fit into memory."""
        if self.folder is not None or any(slot.arrays or slot.folder for slot in self.slots.values()):
            return
        needed = sum(4 * widths[name] * slot.num_total for (name, _), slot in self.slots.items())
        if needed > MEMORY_BUDGET:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="poa-features-")))
            for number, slot in enumerate(self.slots.values()):
                slot.folder = folder / str(number)

    def _slot_folder(self, network: Network, look: AnyLook) -> Path | None:
        if self.folder is None:
            return None
        wanted = self.wanted[look.name]
        part = () if wanted.all() else (hashlib.sha256(wanted.tobytes()).hexdigest(),)
        num_blocks = self.num_blocks if look == PLAIN else 1
        return self.folder / _key(network.fingerprint, repr(network.preprocessing), look.name, num_blocks, *part)

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
        file = self.folder / SKIPPED_FILE
        try:
            return [(int(index), str(reason)) for index, reason in json_value(file.read_bytes())]
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{file} is damaged: {error}. Remove {self.folder} to compute its vectors again."
            ) from error


class _Batch:
    """Some images on their way through all networks; what several networks see is moved and normalised once."""

    def __init__(self, run: _Run, first: int, items: Sequence[_Item]) -> None:
        self.looks, self.num_blocks = run.looks, run.num_blocks
        self.read = [(index, item) for index, item in items if not isinstance(item, str)]
        is_read = np.array([not isinstance(item, str) for _, item in items])
        part = slice(first, first + len(items))
        self.wanted = {name: np.flatnonzero(wanted[part][is_read]) for name, wanted in run.wanted.items()}
        self._made: dict[tuple[str, Hashable], Tensor] = {}
        self._salience: dict[str, Tensor] = {}

    @torch.inference_mode()
    def vectors(self, network: Network, look: AnyLook) -> list[Tensor]:
        """One network's class vectors at every depth, and the mean patch vectors, of the images the look is at."""
        num_blocks = self.num_blocks if look == PLAIN else 1
        blocks = network.last_blocks(self._seen(network, look), num_blocks)
        if look == PLAIN and self._is_all(look) and any(_needs_salience(each) for each in self.looks):
            self._salience[network.name] = salience(blocks[-1])
        found = [block.cls.float() for block in blocks]
        return found if num_blocks == 1 else [*found, blocks[-1].patches.mean(dim=1).float()]

    def forget(self, look: AnyLook) -> None:
        """Frees what was made for that look."""
        if look != PLAIN:
            self._made = {key: made for key, made in self._made.items() if key[0] != look.name}

    def _is_all(self, look: AnyLook) -> bool:
        return len(self.wanted[look.name]) == len(self.read)

    def _seen(self, network: Network, look: AnyLook) -> Tensor:
        """What the network sees."""
        if isinstance(look, Look) and look != PLAIN:
            return self._normalised(network, look, self.wanted[look.name])
        plain = self._normalised(network, PLAIN, np.arange(len(self.read)))
        chosen = self.wanted[look.name]
        if not self._is_all(look):
            plain = plain[torch.from_numpy(chosen)]
        if isinstance(look, Look):
            return plain
        indices = tuple(self.read[number][0] for number in chosen.tolist())
        if look.needs_salience:
            return look(plain, indices, self._salience_of(network)[torch.from_numpy(chosen)])
        return self._once(look, (network.preprocessing, network.device), lambda: look(plain, indices, None))

    def _salience_of(self, network: Network) -> Tensor:
        """Of the plain images: kept from the pass that measured them, unless that was done earlier."""
        if network.name not in self._salience:
            plain = self._normalised(network, PLAIN, np.arange(len(self.read)))
            self._salience[network.name] = salience(network.last_blocks(plain, 1)[-1])
        return self._salience[network.name]

    def _normalised(self, network: Network, look: Look, chosen: np.ndarray) -> Tensor:
        how, device = network.preprocessing, network.device
        key = _input(look, how)

        def moved() -> Tensor:
            inputs = [self.read[number][1][key] for number in chosen.tolist()]
            return torch.from_numpy(np.stack(inputs)).to(device)

        def normalised() -> Tensor:
            return normalize(self._once(look, (key, device), moved), how.mean, how.std)

        return self._once(look, (key, device, how.mean, how.std), normalised)

    def _once(self, look: AnyLook, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        if (look.name, key) not in self._made:
            self._made[look.name, key] = make()
        return self._made[look.name, key]


def _needs_salience(look: AnyLook) -> bool:
    return not isinstance(look, Look) and look.needs_salience


_Input = tuple[str, int, float, str]
"""What tells the inputs made of one image apart: look, side, crop and interpolation."""
_Item = tuple[int, "dict[_Input, np.ndarray] | str"]
"""An image's position in the source, and its inputs [C, S, S] in 8 bits, or why it cannot be read."""


def _input(look: Look, how: Preprocessing) -> _Input:
    return look.name, how.image_size, how.crop_pct, how.interpolation


class _Images(Dataset[list[_Item]]):
    """The images of a run from position `first` on, in batches, under all looks at decoded images."""

    def __init__(self, run: _Run, first: int, batch_size: int) -> None:
        self.source, self.positions, self.first, self.batch_size = run.source, run.positions, first, batch_size
        self.looks = [(look, run.wanted[look.name]) for look in run.looks if isinstance(look, Look) and look != PLAIN]
        if len(self.looks) < len(run.looks):
            self.looks.insert(0, (PLAIN, np.ones(len(run.positions), bool)))
        geometries = {_input(PLAIN, network.preprocessing): network.preprocessing for network in run.networks}
        self.geometries = list(geometries.values())

    def __len__(self) -> int:
        return math.ceil((len(self.positions) - self.first) / self.batch_size)

    def __getitem__(self, number: int) -> list[_Item]:
        start = self.first + number * self.batch_size
        return [self._item(place) for place in range(start, min(start + self.batch_size, len(self.positions)))]

    def _item(self, place: int) -> _Item:
        index = int(self.positions[place])
        try:
            shown = Shown(self.source.load(index), index, self.source, self.positions)
            return index, {
                _input(look, how): look(shown, how)
                for look, wanted in self.looks
                if wanted[place]
                for how in self.geometries
            }
        except BadImage as error:
            return index, error.reason


def _key(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def _check_networks(networks: Sequence[Network], looks: Iterable[AnyLook]) -> None:
    channels = {network.preprocessing.num_channels: network.name for network in networks}
    if len(channels) > 1:
        listed = ", ".join(f"{name}: {number}" for number, name in sorted(channels.items()))
        raise ConfigError(f"networks for images of different numbers of channels cannot be compared ({listed}).")
    for look in looks:
        for network in networks:
            look.check(network.preprocessing)


def _check_share(source: ImageSource, skipped: tuple[SkippedImage, ...], num_images: int, max_share: float) -> None:
    if len(skipped) > max_share * num_images or num_images == len(skipped):
        examples = "; ".join(f"{bad.name}: {bad.reason}" for bad in skipped[:3])
        raise DataError(
            f"{len(skipped)} of the {num_images} images of {source.spec} could not be read ({examples}). "
            f"Mend them, or allow more with --max-bad-share (now {max_share:g})."
        )
