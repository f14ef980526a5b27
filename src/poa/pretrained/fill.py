"""Filling the intact network with foreign tensors; every tensor is accounted for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from poa.backbones.base import Backbone
from poa.errors import CheckpointError

_MAX_LISTED = 8

_NOT_NEEDED = re.compile(
    r"(head|head\.fc|head_dist|fc)\.(weight|bias)"  # classifiers
    r"|.*\.(relative_position_index|attn_mask)|rope\.periods"  # constants that older files store
)


@dataclass(frozen=True)
class FillReport:
    """What became of every tensor.

    Attributes:
        loaded: names that were taken as they are.
        resized: names that were fitted to another shape, with both shapes.
        missing: names that the source has not; they start fresh.
        left_out: names of the source that a backbone does not need (classifiers).
    """

    loaded: tuple[str, ...] = ()
    resized: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        if self.resized:
            parts.append("resized: " + ", ".join(f"{name} {shapes}" for name, shapes in self.resized.items()))
        if self.missing:
            parts.append("missing, so fresh: " + ", ".join(self.missing))
        if self.left_out:
            parts.append("not needed: " + ", ".join(self.left_out))
        return "; ".join(parts)


@torch.no_grad()
def fill_(backbone: Backbone, state: Mapping[str, Tensor], origin: str) -> FillReport:
    """Fills the intact network with the tensors of `state`, in place.

    Args:
        backbone: the super-network.
        state: tensors by timm's names.
        origin: where they come from, for messages.

    Raises:
        CheckpointError: a tensor is missing, does not fit, or has no place; nothing was changed. Only what training
            adds (the mask token) may be missing, and only classifiers may be left out.
    """
    ours = backbone.state_dict()
    taken: dict[str, Tensor] = {}
    resized: dict[str, str] = {}
    misfits: list[str] = []
    for name, parameter in ours.items():
        if name not in state:
            continue
        tensor = state[name]
        if tensor.shape != parameter.shape:
            fitted = backbone.adapted(name, tensor)
            shapes = f"{tuple(tensor.shape)} → {tuple(parameter.shape)}"
            if fitted is None or fitted.shape != parameter.shape:
                misfits.append(f"{name} {shapes}")
                continue
            resized[name] = shapes
            tensor = fitted
        taken[name] = tensor
    absent = [name for name in ours if name not in state]
    strangers = [name for name in state if name not in ours]
    problems = {
        "do not fit": misfits,
        "are missing": [name for name in absent if name not in backbone.layout.training_only],
        "have no place here": [name for name in strangers if not _NOT_NEEDED.fullmatch(name)],
    }
    _refuse(problems, origin)
    backbone.load_state_dict({**ours, **taken}, strict=True)
    loaded = tuple(name for name in taken if name not in resized)
    return FillReport(loaded, resized, tuple(absent), tuple(strangers))


def _refuse(problems: Mapping[str, list[str]], origin: str) -> None:
    found = []
    for what, names in problems.items():
        if names:
            more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
            found.append(f"  {len(names)} {what}: {', '.join(names[:_MAX_LISTED])}{more}")
    if found:
        lines = "\n".join(found)
        raise CheckpointError(
            f"the weights of {origin} are not those of the intact network that the model options describe:\n{lines}\n"
            "The largest width and depth, head and patch size must be those of the source."
        )
