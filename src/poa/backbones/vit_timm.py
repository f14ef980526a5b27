"""From a timm VisionTransformer or Eva to the configuration of the super-network whose intact network it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from poa.backbones.vit_layout import mlp_ratio_of, vit_layout
from poa.config import ViTConfig
from poa.errors import ConfigError

ACTIVATIONS = {"Mlp": "GELU", "GluMlp": "SiLU", "SwiGLU": "SiLU"}
"""timm's MLPs that poa has, each with its activation."""
MLP_KINDS = {"Mlp": "gelu", "GluMlp": "swiglu_packed", "SwiGLU": "swiglu"}
BLOCKS = {"VisionTransformer": ("Block", "Attention"), "Eva": ("EvaBlock", "EvaAttention")}
"""timm's classes that poa has, each with the classes of its blocks and of their attention."""


def config_from_timm(model: nn.Module) -> ViTConfig:
    """The configuration of a space whose only member is that network; the model may be on the meta device.

    The super-network then has the model's parameters by the model's names, besides the mask token; the model's
    classifier is left out. What only matters in training (dropout, stochastic depth) is not read.

    Raises:
        ConfigError: the model is of another class, or has parts that poa's ViT has not; all of them are named.
    """
    kind = type(model).__name__
    if kind not in BLOCKS:
        raise ConfigError(f"poa's ViT cannot start from timm's {kind}; it can from {' and '.join(BLOCKS)}.")
    found: Any = model
    faults = list(dict.fromkeys([*_stem_faults(found), *_top_faults(found), *_position_faults(found)]))
    for block in found.blocks:
        faults += [fault for fault in _block_faults(kind, block) if fault not in faults]
    if not faults and len({(type(block.mlp), block.attn.num_heads) for block in found.blocks}) > 1:
        faults = ["its blocks differ"]
    _refuse(kind, faults)
    config = _read(found)
    _refuse(kind, list(_table_faults(config, found)))
    return config


def _refuse(kind: str, faults: list[str]) -> None:
    if faults:
        raise ConfigError(f"poa cannot start from this {kind}: {'; '.join(faults)}.")


def _read(model: Any) -> ViTConfig:  # noqa: ANN401 (timm's classes are not typed)
    block = model.blocks[0]
    rope = type(model).__name__ == "Eva"
    bias = block.attn.q_bias if rope else block.attn.qkv.bias
    scale = block if rope else block.ls1
    scaled = block.gamma_1 is not None if rope else not isinstance(scale, nn.Identity)
    width = model.embed_dim
    return ViTConfig(
        widths=(width,),
        depths=(len(model.blocks),),
        head_dim=_head_dim(block.attn),
        patch_size=model.patch_embed.patch_size[0],
        image_size=model.patch_embed.img_size[0],
        num_channels=model.patch_embed.proj.in_channels,
        mlp_ratio=mlp_ratio_of(block.mlp.fc2.in_features, width),
        mlp=MLP_KINDS[type(block.mlp).__name__],  # type: ignore[arg-type]
        position="rope" if rope else "learned",
        rope_temperature=model.rope.temperature if rope else 100.0,
        qkv_bias=bias is not None,
        norm_eps=model.norm.eps,
        num_reg_tokens=model.num_prefix_tokens - 1,
        no_embed_class=model.no_embed_class and not rope,
        init_values=getattr(scale, "init_values", 1e-5) if scaled else None,
    )


def _stem_faults(model: Any) -> Iterator[str]:  # noqa: ANN401 (timm's classes are not typed)
    embed = model.patch_embed
    if type(embed).__name__ != "PatchEmbed":
        yield f"its patch embedding is a {type(embed).__name__}"
        return
    if not _is_absent(embed.norm):
        yield "its patch embedding has a norm"
    if embed.proj.bias is None:
        yield "its patch embedding has no bias"
    if len(set(embed.patch_size)) > 1 or embed.img_size is None or len(set(embed.img_size)) > 1:
        yield "its patches or images are not square"
    if not _is_absent(model.norm_pre):
        yield "it has a norm before the blocks (norm_pre)"


def _top_faults(model: Any) -> Iterator[str]:  # noqa: ANN401 (timm's classes are not typed)
    if model.cls_token is None:
        yield "it has no class token"
    if getattr(model, "attn_pool", None) is not None:
        yield "it has attention pooling"
    elif type(model).__name__ == "VisionTransformer" and model.global_pool not in ("", "token"):
        yield f"its pooling is {model.global_pool}, not the class token"
    if not _is_absent(model.fc_norm):
        yield "it has a norm after pooling (fc_norm)"
    if not isinstance(model.norm, nn.LayerNorm):
        yield "it has no LayerNorm after the blocks"
        return
    norms = [model.norm, *(part for block in model.blocks for name, part in block.named_children() if "norm" in name)]
    if len({(type(norm), getattr(norm, "eps", None)) for norm in norms}) > 1:
        yield "its norms differ"


def _position_faults(model: Any) -> Iterator[str]:  # noqa: ANN401 (timm's classes are not typed)
    if type(model).__name__ == "VisionTransformer":
        if model.pos_embed is None:
            yield "it has no position embedding"
        return
    if model.pos_embed is not None:
        yield "it has a learned position embedding beside the rotary one"
    rope = model.rope
    if type(rope).__name__ != "RotaryEmbeddingDinoV3":
        yield "it has no rotary position embedding of DINOv3's kind"
    elif rope.aug_active:
        yield "its rotary position embedding is augmented in training"
    elif (
        rope.temperature is None
        or (rope.min_period is not None and rope.max_period is not None)
        or (rope.normalize_coords, rope.grid_offset, rope.grid_indexing, rope.rotate_half)
        != ("separate", 0.0, "ij", True)
    ):
        yield "its rotary position embedding is not made as DINOv3's"


def _block_faults(kind: str, block: Any) -> Iterator[str]:  # noqa: ANN401 (timm's classes are not typed)
    block_class, attention_class = BLOCKS[kind]
    if type(block).__name__ != block_class:
        yield f"its blocks are {type(block).__name__}, not {block_class}"
        return
    if type(block.attn).__name__ == attention_class:
        yield from _attention_faults(block.attn)
    else:
        yield f"its attention is {type(block.attn).__name__}, not {attention_class}"
    mlp = type(block.mlp).__name__
    if mlp not in MLP_KINDS or (mlp == "SwiGLU" and kind == "VisionTransformer"):
        yield f"its MLP is a {mlp}"
        return
    activation = type(block.mlp.act).__name__
    if activation != ACTIVATIONS[mlp] or getattr(block.mlp.act, "approximate", "none") != "none":
        yield f"its MLP's activation is {activation}, not {ACTIVATIONS[mlp]}"
    if getattr(block.mlp, "gate_last", False):
        yield "its MLP's gate comes last"


def _attention_faults(attn: Any) -> Iterator[str]:  # noqa: ANN401 (timm's classes are not typed)
    if not (_is_absent(attn.q_norm) and _is_absent(attn.k_norm)):
        yield "its queries and keys are normalised (qk_norm)"
    if not getattr(attn, "rotate_half", True):
        yield "its rotation pairs neighbouring channels"
    if not _is_absent(getattr(attn, "gate", None)):
        yield "its attention is gated"
    if attn.qkv is None:
        yield "its queries, keys and values are not from one matrix"
    elif attn.scale != _head_dim(attn) ** -0.5:
        yield "its attention is scaled in its own way"


def _head_dim(attn: Any) -> int:  # noqa: ANN401 (timm's classes are not typed)
    size: int = attn.qkv.out_features // 3 // attn.num_heads
    return size


def _table_faults(config: ViTConfig, model: nn.Module) -> Iterator[str]:
    """What the model's parameters have more or less than the table says."""
    layout = vit_layout(config)
    ours = {name: cut.full_shape for name, cut in layout.cuts.items() if name not in layout.training_only}
    theirs = {name: tuple(part.shape) for name, part in model.state_dict().items() if not name.startswith("head.")}
    for text, names in (
        ("poa's has no", theirs.keys() - ours.keys()),
        ("it has no", ours.keys() - theirs.keys()),
        ("another shape has", {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]}),
    ):
        if names:
            shown = sorted(names)
            yield f"{text} {', '.join(shown[:3])}{f' and {len(shown) - 3} more' if len(shown) > 3 else ''}"


def _is_absent(part: nn.Module | None) -> bool:
    return part is None or isinstance(part, nn.Identity)
