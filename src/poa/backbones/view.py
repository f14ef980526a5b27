"""A sub-network ready to run on its super-network's own weights: a stock timm model whose parameters are windows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor, nn

from poa.backbones.base import Backbone, Features
from poa.backbones.timm_network import empty_timm_model
from poa.elastic import Subnet, Window
from poa.elastic.shared import (
    SharedConv2d,
    SharedLayerNorm,
    SharedLinear,
    SharedMergingLinear,
    SharedStackedLinear,
    frozen,
)
from poa.errors import ConfigError, ExtractionError

NOTHING_OF_ITS_OWN = "the weights of a view are its family's"


class SubnetView(nn.Module):
    """A sub-network in evaluation mode that computes with its super-network's weights where they lie.

    It computes what the extracted timm model does, with timm's code. Its parameters are windows into the
    super-network's; what it holds besides are timm's constant buffers, and parts that depend on an image size other
    than the super-network's. It is a value: views of any sizes may be used in turn and at once.

    Args:
        backbone: the super-network.
        subnet: which sub-network.
        image_size: side of the images it is for.
        head: what the sub-network owns of `weight` and `bias` of a linear classifier.

    Attributes:
        subnet: which sub-network.
        image_size: side of the images it is for.
        model: the timm model.
        classifier: class vectors → logits, or None.
    """

    def __init__(
        self,
        backbone: Backbone,
        subnet: Subnet,
        image_size: int,
        head: Mapping[str, Window] | None = None,
    ) -> None:
        super().__init__()
        self.subnet = subnet
        self.image_size = image_size
        self._made_from = (backbone, head)
        self.model: nn.Module
        self.classifier: nn.Module | None
        self.bind_()

    def forward(self, images: Float[Tensor, "B c h w"]) -> Float[Tensor, "B C"]:
        """The class vectors of normalised images."""
        found: Tensor = self.model(images)
        return found

    def logits(self, images: Float[Tensor, "B c h w"]) -> Float[Tensor, "B K"]:
        """The logits of normalised images.

        Raises:
            ConfigError: the family has no classifier.
        """
        if self.classifier is None:
            raise ConfigError("this family has no classifier. `poa finetune --elastic` makes one that has.")
        found: Tensor = self.classifier(self.model(images))
        return found

    def features(self, images: Float[Tensor, "B c h w"]) -> Features:
        """The class vectors and patch vectors of normalised images."""
        return self._made_from[0].timm_features(self.model, images)

    def bind_(self) -> None:
        """Looks at the super-network's weights anew, after they were moved to another device."""
        backbone, head = self._made_from
        self.model = shared_timm_model(backbone, self.subnet, self.image_size)
        self.classifier = None
        if head is not None:
            device = next(backbone.parameters()).device
            weight, bias = (head[name].view.to(device) for name in ("weight", "bias"))
            self.classifier = SharedLinear(weight, bias, head["weight"].scale)
        self.eval()

    def state_dict(self, *_: Any, **__: Any) -> NoReturn:  # noqa: ANN401 (torch's signature)
        """Refused: without their factors the windows are no network of timm's.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{NOTHING_OF_ITS_OWN}: there is no state to save. `family.extract({str(self.subnet)!r})`.")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SubnetView:  # noqa: ARG002 (torch's signature)
        """Refuses to move the weights to another device or type, which would copy them."""
        first = next(self.parameters())
        if fn(first) is not first:
            raise ConfigError(f"{NOTHING_OF_ITS_OWN}: `family.to(device)` moves them, and its views follow.")
        return self


class SharedEvaQKV(SharedStackedLinear):
    """Queries, keys and values of timm's Eva, which has separate biases for queries and values and none for keys."""

    def __init__(
        self,
        weight: Float[Tensor, "3 n c"],
        q_bias: Float[Tensor, "n"],
        v_bias: Float[Tensor, "n"],
        scale: float,
    ) -> None:
        super().__init__(weight, None, scale, is_flat=False)
        self.q_bias = frozen(q_bias)
        self.v_bias = frozen(v_bias)

    def stacked_bias(self) -> Float[Tensor, "3 n"]:
        """See `SharedStackedLinear.stacked_bias`."""
        return torch.stack([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])


def shared_timm_model(backbone: Backbone, subnet: Subnet, image_size: int) -> nn.Module:
    """The timm model of a sub-network, on windows into the super-network's weights.

    Args:
        backbone: the super-network.
        subnet: one of its sub-networks.
        image_size: side of the images it is for; what depends on it and differs from the super-network's own is made
            anew.
    """
    model = empty_timm_model(backbone.timm_model(subnet, image_size))
    found = backbone.timm_windows(subnet, image_size)
    strange = found.keys() ^ model.state_dict().keys()
    if strange:
        raise ExtractionError(f"timm's model for {subnet} has other parameters than it: {', '.join(sorted(strange))}.")
    by_module: dict[str, dict[str, Window]] = defaultdict(dict)
    for name, window in found.items():
        owner, _, part = name.rpartition(".")
        by_module[owner][part] = window
    for owner, parts in by_module.items():
        module = model.get_submodule(owner)
        if "q_bias" in parts and by_module[f"{owner}.qkv"]["weight"].split:
            weight = by_module[f"{owner}.qkv"]["weight"]
            q, v = (parts.pop(name).view for name in ("q_bias", "v_bias"))
            module.q_bias = module.v_bias = None  # type: ignore[assignment]
            module.qkv = SharedEvaQKV(weight.view, q, v, weight.scale)
    for owner, parts in by_module.items():
        if not isinstance(model.get_submodule(owner), SharedEvaQKV):
            _share(model, owner, parts)
    device = next(backbone.parameters()).device
    for name, buffer in list(model.named_buffers()):
        owner, _, part = name.rpartition(".")
        setattr(model.get_submodule(owner), part, buffer.to(device))
    return model


def _share(model: nn.Module, owner: str, parts: dict[str, Window]) -> None:
    """Gives one of the model's modules its windows; one that a plain window does not fit is replaced."""
    module = model.get_submodule(owner)
    weight = parts.get("weight")
    if weight is None or (weight.scale == 1.0 and not weight.split):
        for name, window in parts.items():
            setattr(module, name, frozen(window.view))
        return
    bias = parts["bias"].view if "bias" in parts else None
    model.set_submodule(owner, _shared_layer(module, weight, bias, is_flat=not owner.endswith("qkv")))


def _shared_layer(module: nn.Module, weight: Window, bias: Tensor | None, *, is_flat: bool) -> nn.Module:
    if isinstance(module, nn.Conv2d):
        return SharedConv2d(module, weight.view, bias, weight.scale)
    if isinstance(module, nn.LayerNorm) and bias is not None:
        return SharedLayerNorm(weight.view, bias, module.eps)
    if weight.split == (0,):
        return SharedStackedLinear(weight.view, bias, weight.scale, is_flat=is_flat)
    kind = SharedMergingLinear if weight.split == (1,) else SharedLinear
    return kind(weight.view, bias, weight.scale)
