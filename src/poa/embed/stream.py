"""Images in, vectors out, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch.utils.data import Dataset

from poa.data import BadImage, ImageSource, SkippedImage, eval_transform, make_loader, normalize
from poa.data.workers import death_of_workers_in_words
from poa.family import Preprocessing
from poa.models import Candidate


@dataclass(frozen=True)
class Computing:
    """How vectors are computed.

    Attributes:
        batch_size: images per forward pass.
        num_workers: processes that decode; 0 decodes in this one.
        is_bfloat16: matrix products in bfloat16 (torch's autocast).
    """

    batch_size: int
    num_workers: int
    is_bfloat16: bool


class VectorBatch(NamedTuple):
    """Some of the images of a span.

    Attributes:
        span: which of the spans, counted from 0.
        is_last: whether the span ends with it.
        indices: the images that could be read, as positions in the source.
        vectors: theirs.
        skipped: the images that could not be read.
    """

    span: int
    is_last: bool
    indices: list[int]
    vectors: Float[np.ndarray, "B C"]
    skipped: list[SkippedImage]


def stream_vectors(
    network: Candidate, source: ImageSource, spans: Sequence[range], how: Computing
) -> Iterator[VectorBatch]:
    """The class vectors of the images of all spans, in order; no batch reaches from one span into the next.

    Raises:
        DataError: a process that reads images died.
    """
    batches = _Batches(source, network.preprocessing, spans, how.batch_size)
    num_workers = min(how.num_workers, len(batches))
    pin = network.device.type == "cuda"
    with death_of_workers_in_words():
        for span, is_last, indices, pixels, skipped in make_loader(batches, 0, len(batches), num_workers, pin):
            yield VectorBatch(span, is_last, indices, _vectors(network, pixels, how.is_bfloat16), skipped)


@torch.inference_mode()
def _vectors(network: Candidate, pixels: UInt8[torch.Tensor, "B c s s"], is_bfloat16: bool) -> np.ndarray:
    if not len(pixels):
        return np.empty((0, network.num_features), np.float32)
    look = network.preprocessing
    images = normalize(pixels.to(network.device, non_blocking=True), look.mean, look.std)
    with torch.autocast(network.device.type, torch.bfloat16, enabled=is_bfloat16):
        found = network.features(images).cls
    return found.float().cpu().numpy()


_Item = tuple[int, bool, list[int], torch.Tensor, list[SkippedImage]]
"""As in `VectorBatch`, with the images [B, c, s, s] in 8 bits in place of the vectors."""


class _Batches(Dataset[_Item]):
    """The decoded images of all spans in batches."""

    def __init__(self, source: ImageSource, how: Preprocessing, spans: Sequence[range], batch_size: int) -> None:
        self.source, self.how = source, how
        self.places = [
            (number, span[start : start + batch_size], start + batch_size >= len(span))
            for number, span in enumerate(spans)
            for start in range(0, len(span), batch_size)
        ]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> _Item:
        span, wanted, is_last = self.places[number]
        how, skipped, read = self.how, list[SkippedImage](), dict[int, np.ndarray]()
        for index in wanted:
            try:
                read[index] = eval_transform(self.source.load(index), how.image_size, how.crop_pct, how.interpolation)
            except BadImage as error:
                skipped.append(SkippedImage(self.source.image_name(index), error.reason))
        empty = np.empty((0, how.num_channels, how.image_size, how.image_size), np.uint8)
        pixels = np.stack(list(read.values())) if read else empty
        return span, is_last, list(read), torch.from_numpy(pixels), skipped
