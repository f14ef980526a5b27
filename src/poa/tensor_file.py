"""Files of tensors in the safetensors format: read, and written tensor by tensor as they are made."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poa.errors import CheckpointError

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
        dtype: its type; a floating-point one, int64, int32, uint8 or bool.
        make: gives the tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def write_safetensors(parts: Mapping[str, Part], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes the tensors, and `metadata` into the header: the same bytes as `safetensors.torch.save_file`.

    Each is made when its turn comes, while the one before it is written, and freed after it.

    The format (https://huggingface.co/docs/safetensors): the header's length in 8 bytes, little-endian; the header, a
    JSON object, padded with spaces to a multiple of 8; the tensors, the larger types first, then by name.
    """
    ordered = _ordered(parts)
    waiting: deque[Future[int]] = deque()
    with path.open("wb") as file, ThreadPoolExecutor(max_workers=1) as writer:
        file.write(_header(ordered, metadata))
        for part in ordered.values():
            waiting.append(writer.submit(file.write, _bytes(part.make())))
            if len(waiting) > NUM_WAITING:
                waiting.popleft().result()
        for written in waiting:
            written.result()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU. The format holds numbers only: nothing in it is executed.

    Raises:
        CheckpointError: it is not there, cannot be read, or is no whole safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise CheckpointError(f"there is no file {path}.")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {str(error)[:200].rstrip('.')}.") from error


def num_bytes(parts: Mapping[str, Part]) -> int:
    """Bytes of the file that `write_safetensors` would write; no tensor is made."""
    sizes = (math.prod(part.shape) * part.dtype.itemsize for part in parts.values())
    return len(_header(_ordered(parts))) + sum(sizes)


def _ordered(parts: Mapping[str, Part]) -> dict[str, Part]:
    places = {dtype: place for place, dtype in enumerate(_codes())}
    return dict(sorted(parts.items(), key=lambda item: (places[item[1].dtype], item[0])))


def _header(parts: Mapping[str, Part], metadata: Mapping[str, str] | None = None) -> bytes:
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    codes, start = _codes(), 0
    for name, part in parts.items():
        end = start + math.prod(part.shape) * part.dtype.itemsize
        entries[name] = {"dtype": codes[part.dtype], "shape": list(part.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _codes() -> dict[torch.dtype, str]:
    """How safetensors calls the types, in the order in which it writes them."""
    import torch

    return {
        torch.int64: "I64",
        torch.float64: "F64",
        torch.float32: "F32",
        torch.int32: "I32",
        torch.bfloat16: "BF16",
        torch.float16: "F16",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }


def _bytes(tensor: Tensor) -> Any:  # noqa: ANN401 (a buffer)
    """The tensor's memory, row by row."""
    import torch

    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
