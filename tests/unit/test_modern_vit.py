"""The parts of timm's DINOv2 and DINOv3 networks: registers, SwiGLU, rotary positions, other biases and norms."""

import inspect

import pytest
import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from poa.backbones import architecture
from poa.backbones.vit import ElasticViT
from poa.backbones.vit_blocks import rotation
from poa.backbones.vit_layout import mlp_ratio_of
from poa.backbones.vit_timm import config_from_timm
from poa.config import ViTConfig
from poa.elastic import Axis, Cut
from poa.errors import ConfigError
from poa.family import Family, FamilyCard, Preprocessing
from poa.pretrained import fill_
from tests.contract import test_backbones as contract
from tests.golden.reference import relative_error

SMALL = {"embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 0}

TIMM = {
    "vit_small_patch14_dinov2": {"img_size": 56},
    "vit_small_patch14_reg4_dinov2": {"img_size": 56},
    "vit_giant_patch14_reg4_dinov2": {"img_size": 56},
    "vit_small_patch16_dinov3": {"img_size": 64},
    "vit_small_patch16_dinov3_qkvb": {"img_size": 64},
    "vit_small_plus_patch16_dinov3": {"img_size": 64},
    "vit_7b_patch16_dinov3": {"img_size": 64, "in_chans": 2},
}

TINY = {"widths": (32, 48, 64), "depths": (2, 3), "head_dim": 16, "patch_size": 4, "image_size": 16, "num_channels": 3}

VARIANTS = {
    "packed SwiGLU": {"mlp": "swiglu_packed", "mlp_ratio": 2.66667, "num_reg_tokens": 4, "no_embed_class": True},
    "no bias": {"qkv_bias": False, "mlp_ratio": 3.7361},
    "rope": {"position": "rope", "num_reg_tokens": 2, "norm_eps": 1e-5},
    "rope, norms of 1e-6, SwiGLU, no LayerScale": {"position": "rope", "mlp": "swiglu", "init_values": None},
    "rope, no bias": {"position": "rope", "qkv_bias": False, "norm_eps": 1e-5, "rope_temperature": 1000.0},
    "rope, packed SwiGLU": {"position": "rope", "mlp": "swiglu_packed", "mlp_ratio": 2.1, "drop_path": 0.4},
    "rope, SwiGLU": {"position": "rope", "mlp": "swiglu", "mlp_ratio": 2.1, "norm_eps": 1e-5, "num_reg_tokens": 4},
}


@torch.no_grad()
def randomise_(model):
    """Every parameter far from its start, so that no branch is hidden by a small LayerScale or a zero bias."""
    rng = torch.Generator().manual_seed(0)
    for name, part in model.named_parameters():
        scale = 0.1 if "weight" in name and part.ndim > 1 else 0.5
        part.copy_(torch.randn(part.shape, generator=rng) * scale + (1.0 if "norm" in name else 0.0))
    return model.eval()


def loaded(model):
    """Our super-network with the timm model's parameters, and nothing but the mask token missing."""
    backbone = ElasticViT(config_from_timm(model))
    report = fill_(backbone, model.state_dict(), "timm")
    assert report.missing == ("mask_token",)
    assert not report.resized
    assert not report.left_out
    with torch.no_grad():
        backbone.mask_token.zero_()
    return backbone.eval()


def noise(config, height, width, number=2):
    shape = (number, config.num_channels, height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=VARIANTS)
def config(request):
    return ViTConfig(**{**TINY, **VARIANTS[request.param]})


@pytest.fixture
def kind(config):
    return architecture(config)


@pytest.fixture
def backbone(kind, config):
    return randomise_(kind.build(config))


@pytest.fixture
def family(kind, config, backbone):
    how = Preprocessing(config.image_size, config.num_channels, (0.5,), (0.5,))
    return Family(FamilyCard(kind, config, how), backbone)


# The contract of every backbone, with these configurations in place of the smallest one.
globals().update(
    {
        name: test
        for name, test in vars(contract).items()
        if name.startswith("test_") and {"config", "backbone", "family"} & set(inspect.signature(test).parameters)
    }
)


def test_extracted_networks_are_of_timms_stock_classes(config, family):
    expected = Eva if config.position == "rope" else VisionTransformer
    assert type(family.extract(family.space.smallest)) is expected


def test_a_written_network_with_rotation_takes_any_size_a_classifier_and_gives_maps(tmp_path):
    config = ViTConfig(**{**TINY, **VARIANTS["rope, SwiGLU"]})
    kind = architecture(config)
    how = Preprocessing(16, 3, (0.5,), (0.5,))
    family = Family(FamilyCard(kind, config, how), randomise_(kind.build(config)))
    family.save_subnet("w48-d3", tmp_path / "net")
    name = f"local-dir:{tmp_path / 'net'}"
    images = noise(config, 24, 36)
    model = timm.create_model(name, pretrained=True).eval()
    assert relative_error(model(images).detach(), family.features(images, "w48-d3")) < 1e-5
    assert timm.create_model(name, pretrained=True, num_classes=7)(images).shape == (2, 7)
    assert timm.create_model(name, pretrained=True, features_only=True)(images)[-1].shape == (2, 48, 6, 9)


@pytest.mark.parametrize("name", TIMM)
def test_timms_weights_give_timms_features(name):
    model = randomise_(timm.create_model(name, **SMALL, **TIMM[name]))
    backbone = loaded(model)
    config = backbone.config
    sizes = [(config.image_size, config.image_size)]
    if config.position == "rope":
        sizes += [(96, 96), (48, 80)]
    for height, width in sizes:
        images = noise(config, height, width)
        with torch.inference_mode():
            theirs = model.forward_features(images)
            ours = backbone([images], backbone.space.intact)[0]
            between = model.forward_intermediates(images, intermediates_only=True)
            found = backbone.forward_intermediates(images, backbone.space.intact)
        assert relative_error(ours.cls, theirs[:, 0]) < 1e-5
        assert relative_error(ours.patches, theirs[:, model.num_prefix_tokens :]) < 1e-5
        for mine, other in zip(found, between, strict=True):
            assert relative_error(mine, other) < 1e-5


def test_the_configuration_is_read_from_the_model():
    read = {name: config_from_timm(timm.create_model(name, **SMALL, **options)) for name, options in TIMM.items()}
    shared = {"widths": (48,), "depths": (3,), "head_dim": 16, "init_values": 1e-5}
    dinov2 = ViTConfig(patch_size=14, image_size=56, **shared)
    dinov3 = ViTConfig(image_size=64, position="rope", num_reg_tokens=4, norm_eps=1e-5, **shared)
    registers = {"num_reg_tokens": 4, "no_embed_class": True}
    assert read["vit_small_patch14_dinov2"] == dinov2
    assert read["vit_small_patch14_reg4_dinov2"] == ViTConfig(**vars(dinov2) | registers)
    packed = {"mlp": "swiglu_packed", "mlp_ratio": 128 / 48}
    assert read["vit_giant_patch14_reg4_dinov2"] == ViTConfig(**vars(dinov2) | registers | packed)
    assert read["vit_small_patch16_dinov3_qkvb"] == dinov3
    assert read["vit_small_patch16_dinov3"] == ViTConfig(**vars(dinov3) | {"qkv_bias": False})
    assert read["vit_small_plus_patch16_dinov3"] == ViTConfig(**vars(dinov3) | {"qkv_bias": False, "mlp": "swiglu"})
    wide = {"qkv_bias": False, "mlp": "swiglu", "mlp_ratio": 128 / 48, "num_channels": 2}
    assert read["vit_7b_patch16_dinov3"] == ViTConfig(**vars(dinov3) | wide)


@pytest.mark.parametrize(
    "name",
    [
        "vit_giant_patch14_reg4_dinov2",
        "vit_7b_patch16_dinov3",
        "vit_huge_plus_patch16_dinov3_qkvb",
        "vit_small_patch16_224",
        "deit3_small_patch16_224",
    ],
)
def test_networks_of_full_size_are_read_without_their_weights(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    config = config_from_timm(model)
    kind = architecture(config)
    theirs = {name: tuple(part.shape) for name, part in model.state_dict().items()}
    table = {name: cut.full_shape for name, cut in kind.layout(config).cuts.items()}
    assert table == theirs | {"mask_token": (1, model.embed_dim)}
    if name == "vit_giant_patch14_reg4_dinov2":
        assert config.hidden_channels == 4096


UNSUPPORTED = [
    ("vit_base_patch16_clip_224", {}, r"no bias; it has a norm before the blocks \(norm_pre\)"),
    ("vit_base_patch16_siglip_224", {}, "no class token; it has attention pooling"),
    ("vit_base_patch16_clip_quickgelu_224", {}, "activation is QuickGELU, not GELU"),
    ("vit_so400m_patch14_siglip_gap_224", {}, "its pooling is avg"),
    ("vit_base_patch16_18x2_224", {}, "its blocks are ParallelThingsBlock, not Block"),
    ("vit_base_r50_s16_224", {}, "its patch embedding is a HybridEmbed"),
    ("vit_small_patch16_224", {"qk_norm": True}, r"normalised \(qk_norm\)"),
    ("vit_small_patch16_224", {"pos_embed": "none"}, "it has no position embedding"),
    ("vit_small_patch16_224", {"img_size": (32, 64)}, "not square"),
    ("vit_small_patch16_224", {"proj_bias": False}, "it has no blocks.0.attn.proj.bias, blocks.0.mlp.fc1.bias"),
    ("vit_small_patch16_224", {"global_pool": "avg", "fc_norm": True}, r"a norm after pooling \(fc_norm\)"),
    ("vit_small_patch16_224", {"norm_layer": "rmsnorm"}, "no LayerNorm after the blocks"),
    ("vit_small_patch16_224", {"embed_norm_layer": "layernorm"}, "its patch embedding has a norm"),
    ("eva02_tiny_patch14_224", {}, "learned position embedding beside the rotary one; .*of DINOv3's kind"),
    ("vit_small_patch16_rope_224", {}, "its attention is AttentionRope, not EvaAttention"),
    ("vit_small_patch16_dinov3", {"qkv_fused": False}, "not from one matrix"),
    ("vit_small_patch16_dinov3", {"scale_mlp": True}, "poa's has no blocks.0.mlp.norm.bias, blocks.0.mlp.norm.weight"),
    ("vit_small_patch16_dinov3", {"use_post_norm": True}, "its blocks are EvaBlockPostNorm"),
    ("vit_small_patch16_dinov3", {"rope_rotate_half": False}, "its rotation pairs neighbouring channels"),
    ("vit_relpos_base_patch16_224", {}, "cannot start from timm's VisionTransformerRelPos"),
    ("samvit_base_patch16_224", {}, "cannot start from timm's VisionTransformerSAM"),
    ("beit_base_patch16_224", {}, "cannot start from timm's Beit"),
]


@pytest.mark.parametrize(("name", "options", "message"), UNSUPPORTED)
def test_networks_with_other_parts_are_refused_by_name(name, options, message):
    with torch.device("meta"):
        model = timm.create_model(name, depth=1, **options) if "samvit" not in name else timm.create_model(name)
    with pytest.raises(ConfigError, match=message):
        config_from_timm(model)


def test_a_norm_that_no_stock_class_has_is_refused():
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_224", depth=1)
    model.blocks[0].norm1.eps = 1e-5
    with pytest.raises(ConfigError, match="its norms differ"):
        config_from_timm(model)
    model.blocks[0].norm2.eps = model.norm.eps = 1e-5
    with pytest.raises(ConfigError, match=r"model\.norm_eps must be 1e-06 with learned positions"):
        config_from_timm(model)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("grid_offset", 0.5, "not made as DINOv3's"),
        ("normalize_coords", "max", "not made as DINOv3's"),
        ("temperature", None, "not made as DINOv3's"),
        ("aug_active", True, "augmented in training"),
    ],
)
def test_another_rotation_is_refused(name, value, message):
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_dinov3", depth=1)
    setattr(model.rope, name, value)
    with pytest.raises(ConfigError, match=message):
        config_from_timm(model)


@pytest.mark.parametrize("hidden", range(1, 700, 7))
def test_timm_makes_exactly_the_hidden_channels_wanted(hidden):
    for width in (32, 96, 384, 448, 832, 1408, 1536):
        assert int(width * mlp_ratio_of(hidden, width)) == hidden
    assert mlp_ratio_of(4 * 384, 384) == 4.0


def test_packed_halves_are_each_cut_to_their_leading_part():
    config = ViTConfig(**TINY, mlp="swiglu_packed", mlp_ratio=2.1)
    cuts = architecture(config).layout(config).cuts
    assert config.hidden_channels == 134
    assert cuts["blocks.0.mlp.fc1.weight"].axes[0] == Axis(268, 64, 2, "blocks.0.hidden")
    assert cuts["blocks.0.mlp.fc1.weight"].shape(32) == (134, 32)
    assert cuts["blocks.0.mlp.fc2.weight"].shape(32) == (32, 67)
    packed = torch.arange(268.0)
    cut = Cut(cuts["blocks.0.mlp.fc1.bias"].axes).apply(packed, 48)
    assert torch.equal(cut, torch.cat([packed[:100], packed[134:234]]))


@pytest.mark.parametrize("grid", [(4, 4), (1, 1), (3, 7)])
@pytest.mark.parametrize("temperature", [100.0, 1000.0])
def test_rotation_is_timms(grid, temperature):
    from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3

    sin, cos = RotaryEmbeddingDinoV3(16, temperature=temperature).get_embed(list(grid)).chunk(2, dim=-1)
    ours = rotation(grid, 3, 16, temperature, torch.device("cpu"))
    assert torch.equal(ours.cos[:3], torch.ones(3, 16))
    assert torch.equal(ours.sin[:3], torch.zeros(3, 16))
    torch.testing.assert_close(ours.cos[3:], cos, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.sin[3:], sin, atol=1e-5, rtol=0)


def test_rotation_made_in_inference_serves_training():
    config = ViTConfig(**TINY, position="rope", rope_temperature=123.0)
    backbone = ElasticViT(config)
    backbone.init_weights_(torch.Generator().manual_seed(0))
    with torch.inference_mode():
        backbone([noise(config, 12, 20)], backbone.space.smallest)
    backbone([noise(config, 12, 20)], backbone.space.smallest)[0].cls.sum().backward()
    assert backbone.blocks[0].attn.q_bias.grad is not None


def test_heads_may_be_put_into_another_order_under_rotation():
    from poa.elastic.reorder import channel_groups, reordered

    config = ViTConfig(**TINY, position="rope", mlp="swiglu_packed", num_reg_tokens=1)
    backbone = randomise_(ElasticViT(config))
    images = noise(config, 16, 16)
    before = backbone([images], backbone.space.intact)[0].cls
    groups = channel_groups(backbone.layout)
    assert {"stream", "blocks.0.heads", "blocks.0.hidden"} <= set(groups)
    orders = {
        name: torch.randperm(group.num_units, generator=torch.Generator().manual_seed(3))
        for name, group in groups.items()
        if name != "stream"
    }
    backbone.load_state_dict(reordered(backbone.layout, backbone.state_dict(), orders))
    assert relative_error(backbone([images], backbone.space.intact)[0].cls, before) < 1e-5
