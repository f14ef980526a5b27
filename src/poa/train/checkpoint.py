"""Checkpoints: safetensors and JSON, whole or not there, verified when read."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from poa.errors import CheckpointError, PoaWarning
from poa.family import file_sha256
from poa.files import replace_directory, write_json
from poa.objective import PoaModel

TENSORS_FILE = "state.safetensors"
STATE_FILE = "state.json"
_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of a run: `step-00000500/` holds the state after 500 steps.

    Attributes:
        folder: where they are.
        keep: the newest that are kept.
        keep_every: those at multiples of this are kept for good; 0 keeps none.
    """

    folder: Path
    keep: int
    keep_every: int = 0

    def steps(self) -> list[int]:
        """The steps of all checkpoints, in rising order."""
        if not self.folder.is_dir():
            return []
        found = (_NAME.fullmatch(item.name) for item in self.folder.iterdir() if item.is_dir())
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        """The directory of that step's checkpoint."""
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Writes a checkpoint, then removes those that the policy does not keep and what a killed process left.

        Raises:
            CheckpointError: it cannot be written; older checkpoints are untouched.
        """
        try:
            with replace_directory(self.path(step), overwrite=True) as scratch:
                save_file(tensors, scratch / TENSORS_FILE)
                digest = file_sha256(scratch / TENSORS_FILE)
                write_json(scratch / STATE_FILE, {**state, "step": step, "sha256": digest})
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot write the checkpoint {self.path(step)}: {error}.") from error
        for leftover in self.folder.glob(".step-*"):
            shutil.rmtree(leftover)
        for old in self.steps()[: -self.keep]:
            if not (self.keep_every and old % self.keep_every == 0):
                shutil.rmtree(self.path(old))

    def load_newest(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and state of the newest checkpoint that is whole; None if there is no checkpoint.

        A damaged one is passed over with a warning.

        Raises:
            CheckpointError: there are checkpoints and every one is damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self._load(step)
            except CheckpointError as error:
                warnings.warn(f"{error} It is passed over for an older one.", PoaWarning, stacklevel=2)
        if steps:
            raise CheckpointError(f"all checkpoints in {self.folder} are damaged; the run must start again elsewhere.")
        return None

    def _load(self, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        folder = self.path(step)
        try:
            state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
            if file_sha256(folder / TENSORS_FILE) != state["sha256"]:
                raise CheckpointError(f"the checkpoint {folder} is damaged: its checksum differs.")
            return load_file(folder / TENSORS_FILE), state
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CheckpointError(f"the checkpoint {folder} is damaged: {error!r}.") from error


def pack_state(model: PoaModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor that training needs to go on: model, teacher, centres, and the optimiser's by parameter name."""
    tensors = {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    for name, parameter in model.student.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def unpack_state_(tensors: dict[str, Tensor], model: PoaModel, optimizer: torch.optim.Optimizer) -> None:
    """Puts the tensors of `pack_state` back, in place.

    Raises:
        CheckpointError: names or shapes do not fit the model; they are named.
    """
    state = {name.removeprefix("model."): part for name, part in tensors.items() if name.startswith("model.")}
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint does not fit this configuration: {error}") from error
    named = dict(model.student.named_parameters())
    for key, name, value in _optimizer_entries(tensors, named):
        parameter = named[name]
        device = value.device if key == "step" and not _fused(optimizer) else parameter.device
        optimizer.state[parameter][key] = value.to(device)


def _optimizer_entries(tensors: dict[str, Tensor], named: dict[str, nn.Parameter]) -> Iterator[tuple[str, str, Tensor]]:
    for full, value in tensors.items():
        if full.startswith("optimizer."):
            key, name = full.removeprefix("optimizer.").split(".", 1)
            if name not in named:
                raise CheckpointError(f"the checkpoint has optimiser state for {name}, which this model lacks.")
            yield key, name, value


def _fused(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.param_groups[0].get("fused"))
