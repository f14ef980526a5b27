"""Writing tensors in the safetensors format while they are being made, so that only a few are in memory at once."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NUM_WAITING = 2
"""Tensors that are made ahead of the one that is being written."""


@dataclass(frozen=True)
class Part:
    """A tensor that is to be written.

    Attributes:
        shape: its shape.
        dtype: its type; float32, float16, bfloat16 or float64.
        make: gives the tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def write_safetensors(parts: Mapping[str, Part], path: Path) -> None:
    """Writes the tensors: the same bytes as `safetensors.torch.save_file`.

    Each is made when its turn comes, while the one before it is written, and freed after it.

    The format (https://huggingface.co/docs/safetensors): the header's length in 8 bytes, little-endian; the header, a
    JSON object, padded with spaces to a multiple of 8; the tensors, the larger types first, then by name.
    """
    ordered = _ordered(parts)
    waiting: deque[Future[int]] = deque()
    with path.open("wb") as file, ThreadPoolExecutor(max_workers=1) as writer:
        file.write(_header(ordered))
        for part in ordered.values():
            waiting.append(writer.submit(file.write, _bytes(part.make())))
            if len(waiting) > NUM_WAITING:
                waiting.popleft().result()
        for written in waiting:
            written.result()


def num_bytes(parts: Mapping[str, Part]) -> int:
    """Bytes of the file that `write_safetensors` would write; no tensor is made."""
    sizes = (math.prod(part.shape) * part.dtype.itemsize for part in parts.values())
    return len(_header(_ordered(parts))) + sum(sizes)


def _ordered(parts: Mapping[str, Part]) -> dict[str, Part]:
    return dict(sorted(parts.items(), key=lambda item: (-item[1].dtype.itemsize, _code(item[1].dtype), item[0])))


def _header(parts: Mapping[str, Part]) -> bytes:
    entries, start = {}, 0
    for name, part in parts.items():
        end = start + math.prod(part.shape) * part.dtype.itemsize
        entries[name] = {"dtype": _code(part.dtype), "shape": list(part.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _code(dtype: torch.dtype) -> str:
    """How safetensors calls the type."""
    import torch

    return {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}[dtype]


def _bytes(tensor: Tensor) -> Any:  # noqa: ANN401 (a buffer)
    """The tensor's memory, row by row."""
    import torch

    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
