"""The contract of an elastic backbone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from poa.elastic import Layout, SearchSpace, Subnet


class Features(NamedTuple):
    """What a backbone gives back for one batch of crops."""

    cls: Float[Tensor, "B C"]
    """One vector per crop."""
    patches: Float[Tensor, "B N C"]
    """One vector per patch, row by row."""


class Backbone(nn.Module, ABC):
    """A super-network that runs any of its sub-networks.

    The sub-network is an argument of every call: no module remembers a width or a depth. State-dict keys are
    timm's. `layout` is the table that its parameters are made from and cut by.
    """

    layout: Layout
    space: SearchSpace

    @abstractmethod
    def forward(
        self,
        crops: Sequence[Float[Tensor, "_ c _ _"]],
        subnet: Subnet,
        masks: Sequence[Bool[Tensor, "_ _"] | None] | None = None,
        rows_rng: torch.Generator | None = None,
    ) -> list[Features]:
        """The features of several batches of crops, each batch with its own image size, in one pass.

        Args:
            crops: batches of normalised crops.
            subnet: which sub-network runs.
            masks: for each batch which patches are replaced by the mask token, or None.
            rows_rng: a CPU generator; where given, stochastic depth draws the rows it computes from it.
                Without it every row is computed, as in evaluation.
        """

    @abstractmethod
    def forward_intermediates(self, image: Float[Tensor, "B c h w"], subnet: Subnet) -> list[Float[Tensor, "B N C"]]:
        """The patch vectors after each kept block, before the final norm, row by row."""

    @abstractmethod
    def num_layers(self) -> int:
        """The number of steps of the layer-wise learning-rate decay: blocks, and the embedding below them."""

    @abstractmethod
    def layer_of(self, name: str) -> int:
        """The step of that parameter: 0 for the embedding, i + 1 for block i, `num_layers()` − 1 at the top."""

    @abstractmethod
    def timm_model(self, subnet: Subnet, image_size: int) -> tuple[str, dict[str, Any]]:
        """The timm architecture and arguments of the extracted network."""

    @abstractmethod
    def timm_state(self, subnet: Subnet, image_size: int) -> dict[str, Tensor]:
        """The extracted network's state dict, for timm's class, at that image size."""

    @abstractmethod
    def init_weights_(self, generator: torch.Generator) -> None:
        """Draws fresh weights."""

    @abstractmethod
    def compile_blocks_(self) -> None:
        """Compiles each block with `torch.compile`, specialised per width."""
