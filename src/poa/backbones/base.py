"""The contract of an elastic backbone. How to write one: docs/new-backbone.md."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from poa.elastic import Layout, SearchSpace, Subnet, Window, windows


class Features(NamedTuple):
    """What a backbone gives back for one batch of crops."""

    cls: Float[Tensor, "B C"]
    """One vector per crop."""
    patches: Float[Tensor, "B N C"]
    """One vector per place of the mask's grid, row by row."""


class TimmModel(NamedTuple):
    """How timm makes an extracted network."""

    architecture: str
    """timm's name of a stock model of that class."""
    arguments: dict[str, Any]
    """What is passed to it."""
    pretrained_cfg: Mapping[str, Any]
    """Of timm's description of weights what depends on the class: `first_conv`, `classifier`, `pool_size`, and
    `fixed_input_size` where it is False (True by default)."""
    global_pool: str
    """How timm's class makes the class vector: `token`, `avg`."""


class ResidualBlock(nn.Module):
    """What a backbone consists of: compiled, computed anew and divided among processes each on its own.

    Its `forward` draws nothing at random; where rows are dropped is an argument.
    """

    is_recomputed = False
    """Whether a backward pass finds its inputs only and computes what is between anew."""

    def __call__(self, *arguments: Any) -> Any:  # noqa: ANN401 (as nn.Module's)
        """The block's output."""
        if not (self.is_recomputed and torch.is_grad_enabled()):
            return super().__call__(*arguments)
        return checkpoint(super().__call__, *arguments, use_reentrant=False, preserve_rng_state=False)


class Backbone(nn.Module, ABC):
    """A super-network that runs any of its sub-networks.

    The sub-network is an argument of every call: no module remembers a width or a depth. State-dict keys are
    timm's. `layout` is the table that its parameters are made from and cut by.
    """

    config: Any
    layout: Layout
    space: SearchSpace

    embedding: ClassVar[str | None] = None
    """Prefix of the patch embedding's parameters, which learn at `optim.patch_embed_lr_scale`; None: no such part."""

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
            masks: for each batch which places of the grid (`config.mask_side` on a side, row by row) are replaced by
                the mask token, or None.
            rows_rng: a CPU generator; where given, stochastic depth draws the rows it computes from it.
                Without it every row is computed, as in evaluation.
        """

    @abstractmethod
    def forward_intermediates(self, image: Float[Tensor, "B c h w"], subnet: Subnet) -> list[Float[Tensor, "B _ _ _"]]:
        """The maps [B, C, h, w] at several depths: those that timm's `forward_intermediates` gives."""

    @abstractmethod
    def last_blocks(self, image: Float[Tensor, "B c h w"], subnet: Subnet, num_blocks: int) -> list[Features]:
        """The features at the last `num_blocks` depths (or as many as there are), deepest last.

        The last one is what `forward` gives. Depths are blocks after the final norm for a ViT (DINO's linear
        protocol), stages of the other architectures with the mean of the map as class vector.
        """

    @abstractmethod
    def num_layers(self) -> int:
        """The number of steps of the layer-wise learning-rate decay: blocks, and the embedding below them."""

    @abstractmethod
    def layer_of(self, name: str) -> int:
        """The step of that parameter: 0 for the embedding, i + 1 for block i, `num_layers()` − 1 at the top."""

    @abstractmethod
    def timm_model(self, subnet: Subnet, image_size: int) -> TimmModel:
        """How timm makes the extracted network."""

    def timm_state(self, subnet: Subnet, image_size: int) -> dict[str, Tensor]:
        """The extracted network's state dict, for timm's class, at that image size; in memory of its own."""
        return {name: window.dense() for name, window in self.timm_windows(subnet, image_size).items()}

    def timm_windows(self, subnet: Subnet, image_size: int) -> dict[str, Window]:
        """The same where it lies in the super-network's weights; what is made for another image size is a copy."""
        found = windows(self.layout, self.state_dict(), subnet)
        return {name: self.for_image_size(name, window, image_size) for name, window in found.items()}

    def for_image_size(self, name: str, window: Window, image_size: int) -> Window:  # noqa: ARG002 (for subclasses)
        """What an extracted network owns under that name of timm's, made for that image size."""
        return window

    @abstractmethod
    def timm_features(self, model: nn.Module, images: Float[Tensor, "B c h w"]) -> Features:
        """What `forward` would give, read from an extracted timm model."""

    def adapted(self, name: str, tensor: Tensor) -> Tensor | None:
        """A foreign network's parameter of another shape, fitted to ours of that name; None if there is no way.

        Here: the first layer of a network for images of another number of channels, as timm does it.
        """
        ours = self.layout.cuts[name].full_shape
        first = self.timm_model(self.space.intact, self.config.image_size).pretrained_cfg["first_conv"]
        if name != f"{first}.weight" or tensor.ndim != len(ours) or tensor.shape[1] != 3:
            return None
        from timm.models import adapt_input_conv

        fitted: Tensor = adapt_input_conv(ours[1], tensor)
        return fitted

    @abstractmethod
    def init_weights_(self, generator: torch.Generator) -> None:
        """Draws fresh weights."""

    def block_modules(self) -> list[ResidualBlock]:
        """Its residual blocks in the order in which the intact network runs them."""
        return [module for module in self.modules() if isinstance(module, ResidualBlock)]

    def checkpoint_blocks_(self) -> None:
        """From now on keeps only the blocks' inputs for the backward pass, which computes each block once more.

        Outputs and gradients stay the same (Chen et al., *Training Deep Nets with Sublinear Memory Cost*, 2016).
        """
        for block in self.block_modules():
            block.is_recomputed = True

    def compile_blocks_(self) -> None:
        """Compiles each block with `torch.compile`, specialised per width."""
        torch._dynamo.config.recompile_limit = max(64, 64 * len(self.space.widths))
        for block in self.block_modules():
            block.compile(dynamic=False)
