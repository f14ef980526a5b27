"""A family on disk and in memory: one set of weights, the space of its sub-networks, and how to cut them out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poa.backbones import Architecture, architecture
from poa.config import from_dict, to_dict
from poa.config.card import CardFile
from poa.config.checks import MAX_SIDE, require
from poa.elastic import SearchSpace, Subnet, num_params
from poa.errors import CheckpointError, ConfigError, ExtractionError
from poa.files import file_sha256, read_json, replace_directory, write_json
from poa.randomness import derived_seed
from poa.task_head import TaskHead, read_head
from poa.tensor_file import Part, read_tensors, write_safetensors
from poa.timm_directory import open_timm_directory
from poa.version import __version__

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float
    from torch import Tensor, nn

    from poa.backbones.base import Backbone, Features
    from poa.backbones.view import SubnetView

CARD_FILE = "family.json"
WEIGHTS_FILE = "weights.safetensors"
FORMAT = "poa-family"
FORMAT_VERSION = 1
WEIGHT_TYPES = ("float32", "float16", "bfloat16", "float64")
"""What the weights of a family may be, all of them alike."""
RESAMPLING = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
"""The ways to resize an image."""

TOLERANCE = 1e-5
"""Largest relative difference (in the Euclidean norm) between a sub-network and the model extracted from it."""


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the family's input."""

    image_size: int
    """Side in pixels."""
    num_channels: int
    """1 grey, 3 colour, 4 colour and alpha."""
    mean: tuple[float, ...]
    """Subtracted from each channel (values 0-1)."""
    std: tuple[float, ...]
    """Divided by, for each channel."""
    crop_pct: float = 1.0
    """Side of the central crop over the resized image's shorter side."""
    interpolation: str = "bicubic"
    """How the image is resized, one of `RESAMPLING`."""

    def __post_init__(self) -> None:
        for name, most in (("image_size", MAX_SIDE), ("num_channels", 1_024)):
            value = getattr(self, name)
            require(1 <= value <= most, f"preprocessing.{name}", value, f"1 to {most:,}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            allowed = sorted({1, self.num_channels})
            fits = len(values) in allowed and all(map(math.isfinite, values))
            require(fits, f"preprocessing.{name}", values, f"{' or '.join(map(str, allowed))} finite numbers")
        require(min(self.std) > 0, "preprocessing.std", self.std, "greater than 0")
        require(0.01 <= self.crop_pct <= 10.0, "preprocessing.crop_pct", self.crop_pct, "0.01 to 10")
        name = self.interpolation
        require(name in RESAMPLING, "preprocessing.interpolation", name, f"one of {', '.join(RESAMPLING)}")

    def per_channel(self, values: tuple[float, ...]) -> tuple[float, ...]:
        """`values` repeated to one for each channel."""
        return values * self.num_channels if len(values) == 1 else values


@dataclass(frozen=True)
class FamilyCard:
    """What is known of a family without opening its weights; `family.json`. Reading it needs no torch."""

    architecture: Architecture
    config: Any
    preprocessing: Preprocessing
    weights_sha256: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def space(self) -> SearchSpace:
        """The space of its sub-networks."""
        return self.architecture.space(self.config)

    def num_params(self, subnet: Subnet) -> int:
        """Parameters of the extracted network."""
        return num_params(self.architecture.layout(self.config), subnet)

    def flops(self, subnet: Subnet) -> int:
        """Operations of one forward pass on one image of the family's size."""
        return self.architecture.flops(self.config, subnet, self.preprocessing.image_size)


@dataclass(frozen=True)
class Verification:
    """How far an extracted model is from the sub-network it was cut from, on a probe batch."""

    subnet: str
    relative_difference: float
    """‖extracted − sub-network‖ / ‖sub-network‖ of the class vectors and patch vectors."""
    max_abs_difference: float
    tolerance: float
    num_probe_images: int
    logits_relative_difference: float | None = None
    """The same of the logits, where the family has a classifier."""


class Family:
    """One set of weights out of which every sub-network is cut, exactly.

    Attributes:
        card: architecture, search space, preprocessing and provenance.
        supernet: the super-network, in evaluation mode.
        head: the classifier that its sub-networks share, where it was fine-tuned (`poa finetune --elastic`).
    """

    def __init__(self, card: FamilyCard, backbone: Backbone, head: TaskHead | None = None) -> None:
        self.card = card
        self.supernet = backbone.eval().requires_grad_(False)
        self.head = head
        self._views: dict[tuple[Subnet, int], SubnetView] = {}

    @property
    def space(self) -> SearchSpace:
        """The search space."""
        return self.supernet.space

    @property
    def subnets(self) -> tuple[Subnet, ...]:
        """Every sub-network, the smallest first, the intact network last."""
        return self.space.subnets

    def features(self, images: Float[Tensor, "B c h w"], subnet: str | Subnet) -> Float[Tensor, "B C"]:
        """The class vectors of normalised images, computed by the sub-network inside the super-network."""
        found: list[Features] = self.supernet([images], self.space.parse(subnet))
        return found[0].cls

    def logits(self, images: Float[Tensor, "B c h w"], subnet: str | Subnet) -> Float[Tensor, "B K"]:
        """The logits of normalised images, computed by the sub-network inside the super-network.

        Raises:
            ConfigError: the family has no classifier.
        """
        if self.head is None:
            raise ConfigError("this family has no classifier. `poa finetune --elastic` makes one that has.")
        vectors = self.features(images, subnet)
        state = self.head.state(self.supernet.layout.features, self.space.parse(subnet).width)
        found: Tensor = vectors @ state["weight"].to(vectors).T + state["bias"].to(vectors)
        return found

    def backbone(self, subnet: str | Subnet, image_size: int | None = None) -> SubnetView:
        """The sub-network as a module that computes with the family's own weights; nothing is copied.

        Asking again gives the same module: switching between sizes costs a look-up.

        Args:
            subnet: its name, `w384-d12`, or value.
            image_size: side of the images it is for; the family's own by default.

        Returns:
            A module in evaluation mode: calling it gives the class vectors [B, C], `logits` those of the family's
            classifier, `features` also the patch vectors.

        Raises:
            SubnetError: the family has no such sub-network.
            ConfigError: no network can be cut for that image size.
        """
        from poa.backbones.view import SubnetView

        key = self.space.parse(subnet), self.checked_image_size(image_size)
        if key not in self._views:
            head = None if self.head is None else self.head.windows(self.supernet.layout.features, key[0].width)
            self._views[key] = SubnetView(self.supernet, *key, head)
        return self._views[key]

    def extract(self, subnet: str | Subnet, image_size: int | None = None, *, drop_path: float = 0.0) -> nn.Module:
        """The sub-network as an ordinary timm model with its own weights, in evaluation mode.

        Args:
            subnet: its name, `w384-d12`, or value.
            image_size: side of the images it is for; the family's own by default. The position embedding is
                resized to it.
            drop_path: rate of stochastic depth at the last block, for training it further.

        Returns:
            A timm model of a stock class with `num_classes=0`: calling it gives the class vectors [B, C]. The family's
            classifier, if it has one, is left out.

        Raises:
            SubnetError: the family has no such sub-network.
            ConfigError: no network can be cut for that image size.
        """
        from poa.backbones.timm_network import empty_timm_model

        member = self.space.parse(subnet)
        size = self.checked_image_size(image_size)
        model = empty_timm_model(self.supernet.timm_model(member, size), drop_path_rate=drop_path)
        model.load_state_dict(self.supernet.timm_state(member, size), strict=True, assign=True)
        return model.eval()

    def save_subnet(
        self,
        subnet: str | Subnet,
        directory: str | Path,
        *,
        image_size: int | None = None,
        overwrite: bool = False,
    ) -> Verification:
        """Writes a directory that `timm.create_model("local-dir:DIRECTORY", pretrained=True)` opens without poa.

        Where the family has a classifier, so has the written model: calling it gives the logits.

        The written model is opened with timm again and compared with the sub-network on a probe batch; the
        difference is recorded in `poa.json` beside it.

        Raises:
            SubnetError: the family has no such sub-network.
            CheckpointError: the directory holds something and `overwrite` is False.
            ExtractionError: the written model differs by more than `TOLERANCE`; nothing is left behind.
        """
        member = self.space.parse(subnet)
        size = self.checked_image_size(image_size)
        with replace_directory(Path(directory), overwrite=overwrite) as scratch:
            self.write_timm(member, scratch, size)
            model = open_timm_directory(scratch)
            classify = None if self.head is None else model
            found = self.verify(
                member, lambda images: self.supernet.timm_features(model, images), size, classify=classify
            )
            write_json(scratch / "poa.json", self.record(member, size, found))
        return found

    def write_timm(self, member: Subnet, directory: Path, image_size: int) -> None:
        """Writes `model.safetensors` and timm's `config.json` of a sub-network into a directory that is there."""
        write_safetensors(self.timm_parts(member, image_size), directory / "model.safetensors")
        write_json(directory / "config.json", self.timm_config(member, image_size))

    def timm_parts(self, member: Subnet, image_size: int) -> dict[str, Part]:
        """The tensors of an extracted network by timm's names, the classifier's included; none is made yet."""
        found = self.supernet.timm_windows(member, image_size)
        if self.head is not None:
            part = self.supernet.timm_model(member, image_size).pretrained_cfg["classifier"]
            head = self.head.windows(self.supernet.layout.features, member.width)
            found |= {f"{part}.{name}": window for name, window in head.items()}
        return {name: Part(window.shape, window.view.dtype, window.part) for name, window in found.items()}

    def record(self, member: Subnet, image_size: int, found: Verification) -> dict[str, Any]:
        """What is written beside an extracted network: where it came from, its size, and that it is exact."""
        return {
            "subnet": str(member),
            "num_params": self.card.num_params(member),
            "flops": self.card.architecture.flops(self.card.config, member, image_size),
            "preprocessing": to_dict(self.card.preprocessing) | {"image_size": image_size},
            "verification": to_dict(found),
            "provenance": dict(self.card.provenance),
            "family_weights_sha256": self.card.weights_sha256,
            **({} if self.head is None else {"classes": list(self.head.class_names)}),
            "poa_version": __version__,
        }

    def verify(
        self,
        subnet: Subnet,
        read: Callable[[Tensor], Features],
        image_size: int,
        num_images: int = 4,
        *,
        classify: Callable[[Tensor], Tensor] | None = None,
    ) -> Verification:
        """Compares an extracted model with the sub-network on a probe batch of random images.

        Args:
            subnet: the sub-network.
            read: gives the extracted model's features of a batch of images.
            image_size: side of the images.
            num_images: how many.
            classify: gives the extracted model's logits, where the family has a classifier.

        Raises:
            ExtractionError: they differ by more than `TOLERANCE`.
        """
        import torch

        rng = torch.Generator().manual_seed(derived_seed(0, "probe"))
        shape = (num_images, self.card.preprocessing.num_channels, image_size, image_size)
        images = torch.randn(shape, generator=rng)
        with torch.inference_mode():
            ours = self.supernet([images], subnet)[0]
            theirs = read(images)
            expected = torch.cat([ours.cls.unsqueeze(1), ours.patches], dim=1)
            difference = torch.cat([theirs.cls.unsqueeze(1), theirs.patches], dim=1) - expected
            relative, of_logits = float(difference.norm() / expected.norm()), None
            if classify is not None:
                logits = self.logits(images, subnet)
                of_logits = float((classify(images) - logits).norm() / logits.norm())
        found = Verification(str(subnet), relative, float(difference.abs().max()), TOLERANCE, num_images, of_logits)
        worst = max(relative, of_logits or 0.0)
        if not worst <= TOLERANCE:
            raise ExtractionError(
                f"the model extracted for {subnet} differs from the sub-network by {worst:.2e} relative, more than "
                f"{TOLERANCE:g}. It was not kept. Please report this with the family's family.json."
            )
        return found

    def save(self, directory: str | Path, *, overwrite: bool = False) -> None:
        """Writes the family, all or nothing: `weights.safetensors`, `family.json`, and its classifier where it has one.

        Raises:
            CheckpointError: the directory holds something and `overwrite` is False.
        """
        from safetensors.torch import save_file

        with replace_directory(Path(directory), overwrite=overwrite) as scratch:
            state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.supernet.state_dict().items()}
            save_file(state, scratch / WEIGHTS_FILE)
            card = {
                "format": FORMAT,
                "version": FORMAT_VERSION,
                "architecture": self.card.architecture.name,
                "config": to_dict(self.card.config),
                "preprocessing": to_dict(self.card.preprocessing),
                "weights": {"file": WEIGHTS_FILE, "sha256": file_sha256(scratch / WEIGHTS_FILE)},
                "provenance": dict(self.card.provenance),
            }
            write_json(scratch / CARD_FILE, card)
            if self.head is not None:
                self.head.save(scratch)

    def to(self, device: str | torch.device) -> Family:
        """The same family with its weights on that device; its views follow."""
        self.supernet.to(device)
        for view in self._views.values():
            view.bind_()
        return self

    def checked_image_size(self, image_size: int | None) -> int:
        """The side of the images that a network is cut for: the family's own if None.

        Raises:
            ConfigError: no network can be cut for that size.
        """
        size = self.card.preprocessing.image_size if image_size is None else image_size
        self.card.config.require_image_size("the image size", size)
        return size

    def _licence(self) -> dict[str, str]:
        """Timm's `license` of a family that was grown from public weights."""
        init = self.card.provenance.get("init", {})
        return {"license": init["license"]} if "license" in init else {}

    def timm_config(self, subnet: Subnet, image_size: int) -> dict[str, Any]:
        """What timm's `config.json` says of an extracted network."""
        num_classes = 0 if self.head is None else self.head.num_classes
        made = self.supernet.timm_model(subnet, image_size)
        how = self.card.preprocessing
        return {
            "architecture": made.architecture,
            "num_classes": num_classes,
            "num_features": self.supernet.layout.features.active(subnet.width),
            "global_pool": made.global_pool,
            "model_args": made.arguments,
            "pretrained_cfg": {
                "tag": "poa",
                "custom_load": False,
                "input_size": [how.num_channels, image_size, image_size],
                "fixed_input_size": True,
                "interpolation": how.interpolation,
                "crop_pct": how.crop_pct,
                "crop_mode": "center",
                "mean": list(how.per_channel(how.mean)),
                "std": list(how.per_channel(how.std)),
                "num_classes": num_classes,
                **made.pretrained_cfg,
                **self._licence(),
            },
            **({} if self.head is None else {"label_names": list(self.head.class_names)}),
        }


def load(path: str | Path) -> Family:
    """The family in a run directory (`RUN`) or family directory (`RUN/family`), on the CPU.

    Raises:
        CheckpointError: there is no family, it is damaged, or it is from a newer version of poa.
    """
    folder = family_directory(path)
    card = read_card(folder)
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise CheckpointError(f"{folder} has no {WEIGHTS_FILE}: the family is incomplete, copy it anew.")
    # Before memory is asked for: a card of a few bytes can describe a network of terabytes.
    num_bytes, num_numbers = weights.stat().st_size, card.num_params(card.space.intact)
    if not 2 * num_numbers <= num_bytes <= 16 * num_numbers + 2**24:
        raise CheckpointError(
            f"{weights} does not fit the architecture in {CARD_FILE}: {num_bytes} bytes for {num_numbers} parameters. "
            "Copy the family anew."
        )
    if file_sha256(weights) != card.weights_sha256:
        raise CheckpointError(f"{weights} is damaged: its checksum is not the one in {CARD_FILE}. Copy it anew.")
    backbone = card.architecture.build(card.config)
    state = read_tensors(weights)
    _require_one_type(state, weights)
    try:
        backbone.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{weights} does not fit the architecture in {CARD_FILE}: {error}") from error
    return Family(card, backbone, read_head(folder, backbone.layout.features))


def family_directory(path: str | Path) -> Path:
    """The directory with `family.json`: `path` itself, or `path/family`.

    Raises:
        CheckpointError: neither has one.
    """
    folder = Path(path)
    try:
        for candidate in (folder, folder / "family"):
            if (candidate / CARD_FILE).is_file():
                return candidate
        exists = folder.exists()
    except OSError as error:
        raise CheckpointError(f"cannot look into {folder}: {error.strerror}.") from error
    if not exists:
        raise CheckpointError(f"there is no {folder}. Name a run directory or the family directory inside it.")
    hint = " Its run has not finished: `poa pretrain --out` it again." if (folder / "config.yaml").exists() else ""
    raise CheckpointError(f"{folder} holds no family (no {CARD_FILE}, no family/{CARD_FILE}).{hint}")


def read_card(path: str | Path) -> FamilyCard:
    """The card of the family in `path`, without its weights and without torch.

    Raises:
        CheckpointError: there is none, or it is damaged or from a newer version of poa.
    """
    file, remedy = family_directory(path) / CARD_FILE, "Copy the family anew."
    values = read_json(file, remedy=remedy)
    known, version = values.get("format") == FORMAT, values.get("version")
    if not known or not isinstance(version, int) or version > FORMAT_VERSION:
        found = f"{values.get('format')!s:.40} version {version!s:.40}"
        raise CheckpointError(
            f"{file} is {found}; this poa reads {FORMAT} up to version {FORMAT_VERSION}. Install a newer poa."
        )
    try:
        card = from_dict(CardFile, values, str(file))
        kind = architecture(card.architecture)
        config = from_dict(kind.config, card.config, str(file))
        how = from_dict(Preprocessing, card.preprocessing, str(file))
        config.require_image_size("preprocessing.image_size", how.image_size)
        require(how.num_channels == config.num_channels, "preprocessing.num_channels", how.num_channels, "the model's")
    except ConfigError as error:
        raise CheckpointError(f"{file} is damaged: {error} {remedy}") from error
    return FamilyCard(kind, config, how, card.weights.sha256, card.provenance)


def _require_one_type(state: Mapping[str, Tensor], weights: Path) -> None:
    """Refuses weights that are no floating-point numbers, or of several types: the network could not compute."""
    kinds = {tensor.dtype for tensor in state.values()}
    if len(kinds) != 1 or str(next(iter(kinds))).removeprefix("torch.") not in WEIGHT_TYPES:
        found = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds)) or "none"
        raise CheckpointError(f"{weights} must hold tensors of one of {', '.join(WEIGHT_TYPES)}; got {found}.")
