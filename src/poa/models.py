"""The networks that are evaluated or trained further: sub-networks of a family, timm's models, timm directories."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from poa.backbones.base import Backbone, Features
from poa.elastic import Subnet
from poa.errors import CheckpointError, ConfigError
from poa.family import Family, Preprocessing, load
from poa.randomness import derived_seed
from poa.timm_models import create_timm_model, is_family


class Candidate(ABC):
    """A network with its preprocessing, whatever it came from.

    Attributes:
        name: for tables and file names, unique among those opened together.
        source: what the user wrote.
        preprocessing: how an image becomes its input.
        num_params: parameters, without a head.
        num_features: channels of the class vector.
        flops: operations of one forward pass on one image of its size; None if not known.
        fingerprint: changes when the weights do.
        is_intact: whether it is the largest network of its family, which the others are compared with.
    """

    name: str
    source: str
    preprocessing: Preprocessing
    num_params: int
    num_features: int
    flops: int | None
    fingerprint: str
    is_intact: bool

    @abstractmethod
    def features(self, images: Float[Tensor, "B c h w"]) -> Features:
        """Class vectors and patch vectors of normalised images."""

    @abstractmethod
    def last_blocks(self, images: Float[Tensor, "B c h w"], num_blocks: int) -> list[Features]:
        """The features at the last `num_blocks` depths (or as many as there are), deepest last; see `Backbone`."""

    @abstractmethod
    def network(self, image_size: int | tuple[int, int] | None = None, *, drop_path: float = 0.0) -> nn.Module:
        """A copy as a stock timm model without a head, to be trained.

        For images of another size timm resizes position embeddings and tables: a start, not the same function.

        Args:
            image_size: side, or (height, width), of the images it is for; its own by default.
            drop_path: rate of stochastic depth at the last block.

        Raises:
            ConfigError: the network cannot take images of that size.
        """

    @abstractmethod
    def to(self, device: torch.device) -> None:
        """Moves the weights."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the weights are."""


@dataclass(frozen=True)
class RunningMember:
    """A sub-network inside a super-network that may be in training: what reading its features needs."""

    backbone: Backbone
    subnet: Subnet
    preprocessing: Preprocessing
    fingerprint: str = ""

    @property
    def name(self) -> str:
        """The sub-network's."""
        return str(self.subnet)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.backbone.parameters()).device

    def last_blocks(self, images: Float[Tensor, "B c h w"], num_blocks: int) -> list[Features]:
        """See `Candidate.last_blocks`; in float32, whatever the super-network trains in."""
        dtype = next(self.backbone.parameters()).dtype
        found = self.backbone.last_blocks(images.to(dtype), self.subnet, num_blocks)
        return [Features(*(part.float() for part in each)) for each in found]


class FamilyMember(Candidate):
    """A sub-network; its family's weights are shared between all of them."""

    def __init__(self, family: Family, subnet: Subnet, source: str = "", name: str = "") -> None:
        self.family = family
        self.subnet = subnet
        self.source = source
        self.name = name or str(subnet)
        self.preprocessing = family.card.preprocessing
        self.num_params = family.card.num_params(subnet)
        self.num_features = family.supernet.layout.features.active(subnet.width)
        self.flops: int | None = family.card.flops(subnet)
        self.fingerprint = f"{family.card.weights_sha256}/{subnet}"
        self.is_intact = subnet == family.space.intact

    def features(self, images: Float[Tensor, "B c h w"]) -> Features:
        """See `Candidate.features`."""
        found: list[Features] = self.family.supernet([images], self.subnet)
        return found[0]

    def last_blocks(self, images: Float[Tensor, "B c h w"], num_blocks: int) -> list[Features]:
        """See `Candidate.last_blocks`."""
        return self.family.supernet.last_blocks(images, self.subnet, num_blocks)

    def network(self, image_size: int | tuple[int, int] | None = None, *, drop_path: float = 0.0) -> nn.Module:
        """See `Candidate.network`."""
        own = self.preprocessing.image_size
        sides = _sides(image_size, own)
        model = self.family.extract(self.subnet, drop_path=drop_path)
        return model if sides == (own, own) else resized(model, sides, self.source)

    def to(self, device: torch.device) -> None:
        """See `Candidate.to`."""
        self.family.to(device)

    @property
    def device(self) -> torch.device:
        """See `Candidate.device`."""
        return next(self.family.supernet.parameters()).device


class TimmCandidate(Candidate):
    """A model of timm's, or one in timm's directory format."""

    def __init__(self, model: nn.Module, source: str, fingerprint: str) -> None:
        self.model = model.eval()
        self.source = source
        self.name = source if source.startswith("timm:") else Path(source).name
        self.preprocessing = preprocessing_of_timm(model)
        self.num_params = sum(parameter.numel() for parameter in model.parameters())
        self.num_features = int(getattr(model, "head_hidden_size", 0) or model.num_features)  # type: ignore[arg-type]
        self.flops = counted_flops(model, self.preprocessing)
        self.fingerprint = fingerprint
        self.is_intact = True

    def features(self, images: Float[Tensor, "B c h w"]) -> Features:
        """See `Candidate.features`."""
        made: Any = self.model
        x = made.forward_features(images)
        cls = made.forward_head(x, pre_logits=True)
        if x.ndim == 3:
            return Features(cls, x[:, getattr(made, "num_prefix_tokens", 0) :])
        is_last = getattr(made, "output_fmt", "NCHW") == "NHWC"
        return Features(cls.flatten(1), x.flatten(1, 2) if is_last else x.flatten(2).transpose(1, 2))

    def last_blocks(self, images: Float[Tensor, "B c h w"], num_blocks: int) -> list[Features]:
        """See `Candidate.last_blocks`."""
        made: Any = self.model
        if num_blocks > 1 and not hasattr(made, "forward_intermediates"):
            raise ConfigError(f"timm's {type(made).__name__} gives the features of its last block only; ask for 1.")
        last = self.features(images)
        if num_blocks == 1:
            return [last]
        count = min(num_blocks, len(made.feature_info))
        tokens = getattr(made, "num_prefix_tokens", 0) > 0
        options = {"return_prefix_tokens": True, "norm": True} if tokens else {}
        found = made.forward_intermediates(images, indices=count, intermediates_only=True, **options)
        if tokens:
            lower = [Features(prefix[:, 0], part.flatten(2).transpose(1, 2)) for part, prefix in found[:-1]]
        else:
            lower = [Features(part.mean(dim=(2, 3)), part.flatten(2).transpose(1, 2)) for part in found[:-1]]
        return [*lower, last]

    def network(self, image_size: int | tuple[int, int] | None = None, *, drop_path: float = 0.0) -> nn.Module:
        """See `Candidate.network`."""
        sides = _sides(image_size, self.preprocessing.image_size)
        training = {"drop_path_rate": drop_path} if drop_path else {}
        model = create_timm_model(self.source, pretrained=False, empty=False, **training)
        model.load_state_dict(self.model.state_dict(), strict=True)
        own = self.preprocessing.image_size
        return model.eval() if sides == (own, own) else resized(model.eval(), sides, self.source)

    def to(self, device: torch.device) -> None:
        """See `Candidate.to`."""
        self.model.to(device)

    @property
    def device(self) -> torch.device:
        """See `Candidate.device`."""
        return next(self.model.parameters()).device


def family_members(family: Family, subnets: Sequence[Subnet] | None = None) -> list[Candidate]:
    """The sub-networks of a family that is open; all by default."""
    return [FamilyMember(family, subnet) for subnet in (family.subnets if subnets is None else subnets)]


def open_models(
    specs: Sequence[str], subnets: Sequence[str] = ("all",), *, untrained_seed: int | None = None
) -> list[Candidate]:
    """The networks that the specs name, on the CPU.

    Args:
        specs: run or family directories of poa, directories in timm's format, `timm:NAME`.
        subnets: of families which sub-networks: names like `w384-d12`, or all, smallest, middle, intact.
        untrained_seed: where given, the same networks with fresh weights drawn from it.

    Raises:
        ConfigError: there is no such timm model, or nothing is named.
        CheckpointError: a directory holds no network, or is damaged.
        SubnetError: a family has no such sub-network.
    """
    if not specs or not subnets:
        raise ConfigError("no network is named. Give a run, a family, a directory in timm's format, or timm:NAME.")
    found: list[Candidate] = []
    for spec in dict.fromkeys(specs):
        if not spec.startswith("timm:") and is_family(Path(spec)):
            found += _members(spec, subnets, untrained_seed, is_only=len(set(specs)) == 1)
        else:
            found.append(_timm_candidate(spec, untrained_seed))
    names = [candidate.name for candidate in found]
    for candidate in found:
        if names.count(candidate.name) > 1:
            candidate.name = candidate.source
    return found


def _members(spec: str, subnets: Sequence[str], untrained_seed: int | None, *, is_only: bool) -> list[Candidate]:
    family = load(spec)
    if untrained_seed is not None:
        seed = derived_seed(untrained_seed, "weights")
        family.supernet.init_weights_(torch.Generator().manual_seed(seed))
    prefix = "" if is_only else f"{Path(spec).name}/"
    members = family.space.parse_all(list(subnets))
    found: list[Candidate] = [FamilyMember(family, member, spec, f"{prefix}{member}") for member in members]
    for candidate in found:
        _mark(candidate, untrained_seed)
    return found


def _timm_candidate(spec: str, untrained_seed: int | None) -> Candidate:
    if untrained_seed is None:
        model = create_timm_model(spec)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(untrained_seed, "weights"))
            model = create_timm_model(spec, pretrained=False, empty=False)
    candidate = TimmCandidate(model, spec, _weights_fingerprint(model))
    _mark(candidate, untrained_seed)
    return candidate


def _mark(candidate: Candidate, untrained_seed: int | None) -> None:
    if untrained_seed is not None:
        candidate.name += " untrained"
        candidate.fingerprint += f" untrained {untrained_seed}"


def preprocessing_of_timm(model: nn.Module) -> Preprocessing:
    """What timm's `pretrained_cfg` says of the images that the model takes."""
    described: dict[str, Any] = dict(getattr(model, "pretrained_cfg", None) or {})
    try:
        channels, size = described.get("input_size", (3, 224))[:2]
        return Preprocessing(
            image_size=int(size),
            num_channels=int(channels),
            mean=tuple(map(float, described.get("mean", (0.485, 0.456, 0.406)))),
            std=tuple(map(float, described.get("std", (0.229, 0.224, 0.225)))),
            crop_pct=float(described.get("crop_pct", 1.0)),
            interpolation=str(described.get("interpolation", "bicubic")),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"what the network says of its images is damaged: {error}.") from error


def counted_flops(model: nn.Module, how: Preprocessing) -> int:
    """Operations of one forward pass on one image, a multiplication with its addition counted as two."""
    from torch.utils.flop_counter import FlopCounterMode

    device = next(model.parameters()).device
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), counter:
        model(torch.zeros(1, how.num_channels, how.image_size, how.image_size, device=device))
    return int(counter.get_total_flops())


def resized(model: nn.Module, sides: tuple[int, int], source: str) -> nn.Module:
    """The timm model made ready for images of that (height, width); convolutional ones take any.

    Raises:
        ConfigError: it has no way to take them.
    """
    made: Any = model
    patch = getattr(getattr(made, "patch_embed", None), "patch_size", (1, 1))
    if any(side % length for side, length in zip(sides, patch, strict=True)):
        near = tuple(max(length, round(side / length) * length) for side, length in zip(sides, patch, strict=True))
        raise ConfigError(
            f"{source} takes images whose sides are multiples of its patches ({patch[0]}); got {sides[0]}×{sides[1]}, "
            f"the nearest is {near[0]}×{near[1]}."
        )
    if hasattr(made, "set_input_size"):
        made.set_input_size(img_size=sides)
    elif hasattr(made, "patch_embed") and getattr(made.patch_embed, "img_size", None):
        raise ConfigError(f"timm's {type(made).__name__} ({source}) takes images of one size only.")
    return model


def _sides(image_size: int | tuple[int, int] | None, own: int) -> tuple[int, int]:
    if image_size is None:
        return own, own
    return (image_size, image_size) if isinstance(image_size, int) else image_size


def _weights_fingerprint(model: nn.Module) -> str:
    """A number that changes when the weights do: sums over every tensor, written exactly."""
    import hashlib

    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        values = tensor.detach().float().flatten()
        summary = (float(values.sum()), float((values * values).sum())) if values.numel() else (0.0, 0.0)
        digest.update(f"{name} {tuple(tensor.shape)} {summary[0]!r} {summary[1]!r} {math.prod(tensor.shape)}".encode())
    return digest.hexdigest()
