"""Extracted networks as models of Hugging Face's transformers.

A ViT with learned positions becomes a `Dinov2Model` (with registers a `Dinov2WithRegistersModel`), a Swin a
`SwinModel`. What transformers has no class for stays in timm's format, which transformers opens through its timm
wrapper: a rotary position embedding, a hidden size of the MLP that no whole ratio gives, a Swin of which a stage has
another window than the others, ResNet and ConvNeXt. Where the family has a classifier, so has the written model: a
`Dinov2ForImageClassification`, `SwinForImageClassification` or `TimmWrapperForImageClassification`. Needs the extra
`poa[transformers]`.

Parameters are handed over under the names of the checkpoints on the Hub, which every version of transformers reads;
the names inside its modules change between versions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from poa.backbones.base import Features
from poa.backbones.hierarchical import HierarchicalBackbone
from poa.deploy.export.graph import quiet
from poa.elastic import Subnet
from poa.errors import ConfigError
from poa.family import Family, Preprocessing, Verification
from poa.files import read_json, replace_directory, write_json
from poa.task_head import TaskHead

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CLASSIFIER = "ForImageClassification"
"""The end of the names of transformers' classes with a classifier."""

_DINOV2_NAMES = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.qkv": "attention.attention",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_SWIGLU_NAMES = {"mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out"}
_SWIN_NAMES = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.qkv": "attention.self",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def save_transformers(
    family: Family,
    subnet: str | Subnet,
    directory: str | Path,
    *,
    image_size: int | None = None,
    overwrite: bool = False,
) -> Verification:
    """Writes a directory that `transformers.AutoModel.from_pretrained(DIRECTORY)` opens without poa.

    Where the family has a classifier, so has the written model: open it with `AutoModelForImageClassification`.
    `transformers.AutoImageProcessor.from_pretrained(DIRECTORY)` prepares images for it. The written model is opened
    with transformers again and compared with the sub-network on a probe batch; the difference is recorded in
    `poa.json` beside it.

    Args:
        family: what is cut from.
        subnet: its name, `w384-d12`, or value.
        directory: what is written.
        image_size: side of the images the model is for; the family's own by default.
        overwrite: replace the directory if it is there.

    Raises:
        ConfigError: transformers is not installed, or no network can be cut for that image size.
        SubnetError: the family has no such sub-network.
        CheckpointError: the directory holds something and `overwrite` is False.
        ExtractionError: the written model differs by more than `poa.family.TOLERANCE`; nothing is left behind.
    """
    _require_transformers()
    member = family.space.parse(subnet)
    size = family.checked_image_size(image_size)
    with replace_directory(Path(directory), overwrite=overwrite) as scratch:
        write_transformers(family, member, scratch, size)
        opened = open_transformers_directory(scratch)
        classify = None if family.head is None else lambda images: opened(pixel_values=images).logits
        found = family.verify(member, lambda images: _features(family, opened, images), size, classify=classify)
        write_json(scratch / "poa.json", family.record(member, size, found))
    return found


def write_transformers(family: Family, member: Subnet, directory: Path, image_size: int) -> None:
    """Writes the model and its image processor into a directory that is there, without a look at what was written."""
    _require_transformers()
    head = _head_of(family, member)
    with quiet_transformers():
        model = transformers_model(family.extract(member, image_size), head)
        if model is not None:
            model.save_pretrained(directory)
    if model is not None:
        write_json(directory / "preprocessor_config.json", _preprocessor(family.card.preprocessing, image_size))
        return
    family.write_timm(member, directory, image_size)
    if head is not None:
        file = directory / "config.json"
        write_json(file, json.loads(file.read_text(encoding="utf-8")) | {"problem_type": _problem_type(head)})


def open_transformers_directory(directory: str | Path) -> PreTrainedModel:
    """The model in a directory that `save_transformers` or `Family.save_subnet` wrote, in evaluation mode.

    It is opened by `AutoModelForImageClassification` where it has a classifier, else by `AutoModel`.

    Raises:
        ConfigError: transformers is not installed.
    """
    _require_transformers()
    described = read_json(Path(directory) / "config.json")
    names = described.get("architectures") or ()
    classifies = bool(described.get("num_classes")) or any(name.endswith(CLASSIFIER) for name in names)
    with quiet_transformers():
        from transformers import AutoModel, AutoModelForImageClassification

        kind = AutoModelForImageClassification if classifies else AutoModel
        model: PreTrainedModel = kind.from_pretrained(str(directory))
    return model.eval()


def transformers_model(model: nn.Module, head: TaskHead | None = None) -> PreTrainedModel | None:
    """An extracted network as a model of transformers that computes the same, in evaluation mode.

    Args:
        model: what `Family.extract` gives.
        head: the classifier on its class vectors, if it shall have one: a model for image classification.

    Returns:
        A `Dinov2Model`, `Dinov2WithRegistersModel` or `SwinModel`, or their `ForImageClassification`; None where
        transformers has no class for it.

    Raises:
        ConfigError: transformers is not installed.
    """
    _require_transformers()
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.vision_transformer import VisionTransformer

    if isinstance(model, VisionTransformer):
        mlp = _dinov2_mlp(model.blocks[0].mlp)
        return None if mlp is None else _dinov2(model, mlp, head)
    if isinstance(model, SwinTransformer) and _is_swin(model):
        return _swin(model, head)
    return None


def _dinov2_mlp(mlp: Any) -> dict[str, Any] | None:  # noqa: ANN401 (timm's classes are untyped)
    """The settings of Dinov2Config that make an MLP of those sizes; None if there are none: its ratio is whole."""
    width, hidden = mlp.fc1.in_features, mlp.fc2.in_features
    is_swiglu = mlp.fc1.out_features != hidden
    for ratio in range(1, 2 * hidden // width + 1):
        if hidden == (-(-int(width * ratio * 2 / 3) // 8) * 8 if is_swiglu else width * ratio):
            return {"mlp_ratio": ratio, "use_swiglu_ffn": is_swiglu}
    return None


def _is_swin(model: Any) -> bool:  # noqa: ANN401 (timm's classes are untyped)
    """Whether a SwinModel has the same windows: one side in all stages, shifted wherever the map is larger only."""
    blocks = [block for stage in model.layers for block in stage.blocks]
    windows = {side for block in blocks for side in block.window_size}
    return len(windows) == 1 and not any(
        block.always_partition and min(block.input_resolution) <= block.window_size[0] for block in blocks
    )


def _dinov2(
    model: Any,  # noqa: ANN401 (timm's classes are untyped)
    mlp: dict[str, Any],
    head: TaskHead | None,
) -> PreTrainedModel:
    from transformers import Dinov2Config, Dinov2WithRegistersConfig

    first = model.blocks[0]
    settings: dict[str, Any] = {
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": first.attn.num_heads,
        "image_size": model.patch_embed.img_size[0],
        "patch_size": model.patch_embed.patch_size[0],
        "num_channels": model.patch_embed.proj.in_channels,
        "qkv_bias": first.attn.qkv.bias is not None,
        "layer_norm_eps": model.norm.eps,
        **mlp,
    }
    names = _DINOV2_NAMES | (_SWIGLU_NAMES if mlp["use_swiglu_ffn"] else {})
    state = dict(_dinov2_state(model.state_dict(), model, names))
    if head is not None:
        # Its classifier reads the class vector and the mean patch vector; ours reads the class vector.
        head = replace(head, weight=torch.cat([head.weight, torch.zeros_like(head.weight)], dim=1))
    if not model.num_reg_tokens:
        return _loaded("Dinov2", Dinov2Config(**settings), state, head)
    config = Dinov2WithRegistersConfig(**settings, num_register_tokens=model.num_reg_tokens)
    return _loaded("Dinov2WithRegisters", config, state, head)


def _dinov2_state(
    ours: Mapping[str, Tensor],
    model: Any,  # noqa: ANN401 (timm's classes are untyped)
    names: Mapping[str, str],
) -> Iterator[tuple[str, Tensor]]:
    """Timm's tensors by the names of `Dinov2Model`; what a register's position adds goes into the register itself."""
    position, registers, num_registers = ours["pos_embed"], ours.get("reg_token"), model.num_reg_tokens
    if model.no_embed_class:
        position = torch.cat([torch.zeros_like(position[:, :1]), position], dim=1)
    elif registers is not None:
        token, added, grid = position.split([1, num_registers, position.shape[1] - 1 - num_registers], dim=1)
        position, registers = torch.cat([token, grid], dim=1), registers + added
    yield "embeddings.cls_token", ours["cls_token"]
    yield "embeddings.mask_token", torch.zeros_like(ours["cls_token"][0])
    yield "embeddings.position_embeddings", position
    if registers is not None:
        yield "embeddings.register_tokens", registers
    for part in ("weight", "bias"):
        yield f"embeddings.patch_embeddings.projection.{part}", ours[f"patch_embed.proj.{part}"]
        yield f"layernorm.{part}", ours[f"norm.{part}"]
    for index in range(len(model.blocks)):
        source, target = f"blocks.{index}", f"encoder.layer.{index}"
        yield from _block(ours, source, target, names)
        for branch in (1, 2):
            scale = ours.get(f"{source}.ls{branch}.gamma")
            yield f"{target}.layer_scale{branch}.lambda1", torch.ones(model.embed_dim) if scale is None else scale


def _swin(model: Any, head: TaskHead | None) -> PreTrainedModel:  # noqa: ANN401 (timm's classes are untyped)
    from transformers import SwinConfig

    first = model.layers[0].blocks[0]
    config = SwinConfig(
        image_size=model.patch_embed.img_size[0],
        patch_size=model.patch_embed.patch_size[0],
        num_channels=model.patch_embed.proj.in_channels,
        embed_dim=model.embed_dim,
        depths=[len(stage.blocks) for stage in model.layers],
        num_heads=[stage.blocks[0].attn.num_heads for stage in model.layers],
        window_size=first.window_size[0],
        mlp_ratio=first.mlp.fc1.out_features / first.mlp.fc1.in_features,
        layer_norm_eps=model.norm.eps,
        drop_path_rate=0.0,
    )
    return _loaded("Swin", config, dict(_swin_state(model.state_dict(), config.depths)), head)


def _swin_state(ours: Mapping[str, Tensor], depths: list[int]) -> Iterator[tuple[str, Tensor]]:
    """Timm's tensors by the names of `SwinModel`, whose stages end with the merging that timm's begin with."""
    for part in ("weight", "bias"):
        yield f"embeddings.patch_embeddings.projection.{part}", ours[f"patch_embed.proj.{part}"]
        yield f"embeddings.norm.{part}", ours[f"patch_embed.norm.{part}"]
        yield f"layernorm.{part}", ours[f"norm.{part}"]
    for stage, depth in enumerate(depths):
        if stage:
            merging, before = f"layers.{stage}.downsample", f"encoder.layers.{stage - 1}.downsample"
            for name in ("norm.weight", "norm.bias", "reduction.weight"):
                yield f"{before}.{name}", ours[f"{merging}.{name}"]
        for block in range(depth):
            source, target = f"layers.{stage}.blocks.{block}", f"encoder.layers.{stage}.blocks.{block}"
            yield from _block(ours, source, target, _SWIN_NAMES)
            table = "relative_position_bias_table"
            yield f"{target}.attention.self.{table}", ours[f"{source}.attn.{table}"]


def _block(
    ours: Mapping[str, Tensor], source: str, target: str, names: Mapping[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """The norms, attention and MLP of a block by the names of a table."""
    for ours_name, name in names.items():
        for part in ("weight", "bias"):
            tensor = ours.get(f"{source}.{ours_name}.{part}")
            if tensor is None:
                continue
            if ours_name != "attn.qkv":
                yield f"{target}.{name}.{part}", tensor
                continue
            for letter, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                yield f"{target}.{name}.{letter}.{part}", third.clone()


def _loaded(
    name: str,
    config: Any,  # noqa: ANN401 (transformers is imported where it is used)
    state: dict[str, Tensor],
    head: TaskHead | None,
) -> PreTrainedModel:
    """The model of that family of classes: `SwinModel`, or `SwinForImageClassification` with a classifier."""
    import transformers

    kind = getattr(transformers, f"{name}Model" if head is None else f"{name}{CLASSIFIER}")
    if head is not None:
        state = {f"{kind.base_model_prefix}.{key}": part for key, part in state.items()}
        state |= {"classifier.weight": head.weight, "classifier.bias": head.bias}
        config.id2label = dict(enumerate(head.class_names))
        config.label2id = {name: index for index, name in config.id2label.items()}
        config.problem_type = _problem_type(head)
    with quiet_transformers():
        model: PreTrainedModel = kind.from_pretrained(None, config=config, state_dict=state)
    return model.eval()


def _head_of(family: Family, member: Subnet) -> TaskHead | None:
    """The classifier cut for that sub-network, if the family has one."""
    if family.head is None:
        return None
    state = family.head.state(family.supernet.layout.features, member.width)
    return replace(family.head, weight=state["weight"], bias=state["bias"])


def _problem_type(head: TaskHead) -> str:
    return "multi_label_classification" if head.multi_label else "single_label_classification"


def _features(family: Family, model: PreTrainedModel, images: Tensor) -> Features:
    """What the opened model gives, its class vectors as `pooler_output` has them, or as its classifier gets them."""
    if model.config.model_type == "timm_wrapper":
        found = family.supernet.timm_features(model.timm_model, images)
        return found if family.head is not None else found._replace(cls=model(pixel_values=images).pooler_output)
    out = model.base_model(pixel_values=images)
    if isinstance(family.supernet, HierarchicalBackbone):
        return family.supernet.token_features(out.pooler_output, out.last_hidden_state)
    num_prefix = 1 + getattr(model.config, "num_register_tokens", 0)
    return Features(out.pooler_output, out.last_hidden_state[:, num_prefix:])


def _preprocessor(how: Preprocessing, image_size: int) -> dict[str, Any]:
    """Timm's evaluation transform as transformers describes it, whose crop is a pixel off where the margin is odd."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": int(image_size / how.crop_pct)},
        "resample": int(Image.Resampling[how.interpolation.upper()]),
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(how.per_channel(how.mean)),
        "image_std": list(how.per_channel(how.std)),
        "do_convert_rgb": how.num_channels == 3,
    }


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without progress bars and log lines of transformers and what it imports; both are as before afterwards."""
    with quiet():
        from transformers.utils import logging

    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with quiet():
            yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()


def _require_transformers() -> None:
    try:
        import transformers  # noqa: F401 (only whether it is there)
    except ImportError as error:
        raise ConfigError(
            "this needs Hugging Face's transformers. Install it with: pip install 'poa[transformers]'"
        ) from error
