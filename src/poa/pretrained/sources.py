"""Where public weights come from: timm's models, directories in timm's format, families of poa, bare files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from poa.backbones.from_timm import config_from_timm
from poa.config import ModelConfig
from poa.data.shards.location import redacted
from poa.errors import CheckpointError, ConfigError
from poa.family import load, read_card
from poa.files import file_sha256
from poa.tensor_file import read_tensors
from poa.timm_models import TIMM_PREFIX, create_timm_model, is_family

_DEPTH_FIELDS = ("depths", "stage2_depths", "stage3_depths")
_MAX_WIDTHS = 9


@dataclass(frozen=True)
class PublicWeights:
    """Weights to start from.

    Attributes:
        spec: what the user wrote.
        state: the tensors by timm's names.
        provenance: name, licence and origin, for the family's record.
        config: the network that they are of, as a space of one sub-network; None for a bare file.
        model: that network as timm's; None where there is none.
    """

    spec: str
    state: Mapping[str, Tensor]
    provenance: dict[str, Any]
    config: ModelConfig | None = None
    model: nn.Module | None = None


def open_weights(spec: str) -> PublicWeights:
    """The weights that `spec` names.

    Args:
        spec: `timm:NAME`, a directory in timm's format, a run or family of poa, or a `.safetensors` file with timm's
            names.

    Raises:
        ConfigError: there is no such model, or poa has no architecture for it.
        CheckpointError: there is nothing of that kind there, or it cannot be read or downloaded.
    """
    path = Path(spec)
    if spec.startswith(TIMM_PREFIX):
        return _from_timm(spec, name=spec.removeprefix(TIMM_PREFIX))
    if path.suffix == ".safetensors":
        return _from_file(spec, path)
    if is_family(path):
        family = load(path)
        card = family.card
        origin = {"name": f"poa family {card.space.intact}", "family": dict(card.provenance)}
        origin["license"] = card.provenance.get("init", {}).get("license", "unknown")
        config = _one_member(card.config)
        return PublicWeights(spec, family.supernet.state_dict(), {"source": spec, **origin}, config)
    return _from_timm(spec, name=path.name)


class Grown(NamedTuple):
    """What a run takes over from the network that it starts from.

    Attributes:
        model: the super-network; its intact network is the source's.
        mean: of the images that the source was trained on, by channel, values 0-1; empty if unknown.
        std: their standard deviation.
    """

    model: ModelConfig
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


def grown_from(spec: str, base: ModelConfig) -> Grown | None:
    """The super-network that grows from those weights, without reading them.

    The sub-networks go down to half of its width and half of its depth. Image size, channels of the images and
    stochastic depth are those of `base`; the image size is moved to the nearest that the patches allow.

    Returns:
        None for a bare file, which does not say what it is of.

    Raises:
        ConfigError, CheckpointError: as `open_weights`.
    """
    path = Path(spec)
    if path.suffix == ".safetensors" and not spec.startswith(TIMM_PREFIX):
        if not path.is_file():
            raise CheckpointError(f"there is no file {path} to start from.")
        return None
    if not spec.startswith(TIMM_PREFIX) and is_family(path):
        card = read_card(path)
        config, mean, std = card.config, card.preprocessing.mean, card.preprocessing.std
    else:
        model = create_timm_model(spec, pretrained=False)
        config = _with_space(config_from_timm(model))
        described: Any = getattr(model, "pretrained_cfg", None) or {}
        mean, std = (tuple(described.get(key) or ()) for key in ("mean", "std"))
    shared: dict[str, Any] = {"num_channels": base.num_channels}
    if hasattr(config, "drop_path") and hasattr(base, "drop_path"):
        shared["drop_path"] = base.drop_path
    grown: ModelConfig = replace(config, image_size=_nearest_size(config, base.image_size), **shared)
    return Grown(grown, mean, std)


def _from_timm(spec: str, name: str) -> PublicWeights:
    model = create_timm_model(spec, pretrained=True).eval()
    described = getattr(model, "pretrained_cfg", None) or {}
    origin = {
        "name": name,
        "license": described.get("license") or "unknown",
        "hf_hub_id": described.get("hf_hub_id"),
        "url": described.get("url") or described.get("origin_url"),
    }
    # A directory says of itself what it likes, a URL with a password included.
    kept = {key: redacted(str(value)[:500]) for key, value in origin.items() if value}
    return PublicWeights(spec, model.state_dict(), {"source": spec, **kept}, config_from_timm(model), model)


def _from_file(spec: str, path: Path) -> PublicWeights:
    if not path.is_file():
        raise CheckpointError(f"there is no file {path} to start from.")
    state = read_tensors(path)
    origin = {"source": spec, "name": path.name, "license": "unknown", "sha256": file_sha256(path)}
    return PublicWeights(spec, state, origin)


def _one_member(config: ModelConfig) -> ModelConfig:
    depths: dict[str, Any] = {name: getattr(config, name)[-1:] for name in _DEPTH_FIELDS if hasattr(config, name)}
    return replace(config, widths=config.widths[-1:], **depths)


def _with_space(config: ModelConfig) -> ModelConfig:
    """The configuration of one network, widened to a space down to half of its width and half of its depth."""
    unit = getattr(config, "head_dim", 0) or getattr(config, "num_groups", 0) or 8
    units = config.widths[-1] // unit
    half = _half(units)
    step = -(-(units - half) // (_MAX_WIDTHS - 1)) or 1
    widths = sorted(range(units, half - 1, -step))
    depths: dict[str, Any] = {}
    for name in _DEPTH_FIELDS:
        if hasattr(config, name):
            deepest = getattr(config, name)[-1]
            depths[name] = tuple(range(_half(deepest), deepest + 1))
    return replace(config, widths=tuple(unit * count for count in widths), **depths)


def _half(count: int) -> int:
    return -(-count // 2)


def _nearest_size(config: ModelConfig, wanted: int) -> int:
    for distance in range(config.image_size + wanted):
        for size in (wanted + distance, wanted - distance):
            try:
                config.require_image_size("model.image_size", size)
            except ConfigError:
                continue
            return size
    return config.image_size
