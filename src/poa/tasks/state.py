"""The state of a training run on disk: safetensors and JSON, whole or not there, verified when read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from poa.errors import CheckpointError
from poa.files import file_sha256, read_json, replace_directory, write_json
from poa.tensor_file import read_tensors

TENSORS_FILE = "state.safetensors"
NUMBERS_FILE = "state.json"


def write_state(folder: Path, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    """Writes the state; what was there is replaced only by a whole one. Numbers that are not finite are kept as null.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        with replace_directory(folder, overwrite=True) as scratch:
            save_file(_separate(tensors), scratch / TENSORS_FILE)
            digest = file_sha256(scratch / TENSORS_FILE)
            write_json(scratch / NUMBERS_FILE, _finite({**numbers, "sha256": digest}))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write the state {folder}: {error}.") from error


def read_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors (on the CPU) and numbers that `write_state` wrote; None if there are none.

    Raises:
        CheckpointError: they are damaged.
    """
    if not folder.exists():
        return None
    remedy = "Remove it to start again."
    numbers = read_json(folder / NUMBERS_FILE, remedy=remedy)
    try:
        if file_sha256(folder / TENSORS_FILE) != numbers.get("sha256"):
            raise CheckpointError(f"the state {folder} is damaged: its checksum differs. {remedy}")
    except OSError as error:
        raise CheckpointError(f"the state {folder} is damaged: {error!r}. {remedy}") from error
    return read_tensors(folder / TENSORS_FILE), numbers


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the prefix and a dot before their names."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def of_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that `with_prefix` has named so, under their own names."""
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimiser's state, each tensor named KEY.PARAMETER."""
    return {
        f"{key}.{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts the tensors of `optimizer_tensors` back, in place.

    Raises:
        CheckpointError: one is of a parameter that the model lacks.
    """
    named = dict(model.named_parameters())
    for full, value in tensors.items():
        key, name = full.split(".", 1)
        if name not in named:
            raise CheckpointError(f"the state has an optimiser's values for {name}, which this model lacks.")
        parameter = named[name]
        optimizer.state[parameter][key] = value if key == "step" else value.to(parameter.device)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors contiguous on the CPU, none in the memory of another."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        part = tensor.detach().cpu().contiguous()
        place = part.untyped_storage().data_ptr()
        found[name] = part.clone() if place in seen else part
        seen.add(place)
    return found


def _finite(value: Any) -> Any:  # noqa: ANN401 (JSON)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_finite(part) for part in value]
    return value
