"""Starting from public weights: filling, refusing, reordering."""

import json
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import save_file

from poa.backbones import ARCHITECTURES, architecture
from poa.backbones.from_timm import config_from_timm
from poa.config import PretrainConfig, ViTConfig, from_dict
from poa.data import open_source
from poa.elastic import channel_groups, feature_order, num_params, reordered
from poa.errors import CheckpointError, ConfigError
from poa.family import Family, FamilyCard, Preprocessing, load
from poa.pretrained import channel_orders, fill_, grown_from, open_weights, start_from_
from poa.pretrained.importance import _read_axis, _watched
from tests.contract.configs import SMALLEST
from tests.golden.reference import relative_error

TIMM = {
    "dinov2": (
        "vit_small_patch14_dinov2",
        {"embed_dim": 48, "depth": 3, "num_heads": 3, "img_size": 28},
    ),
    "dinov2 with registers": (
        "vit_small_patch14_reg4_dinov2",
        {"embed_dim": 48, "depth": 3, "num_heads": 3, "img_size": 28},
    ),
    "dinov3": ("vit_small_patch16_dinov3", {"embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": 32}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 32, "depths": (1, 2, 3, 1), "num_heads": (2, 4, 8, 16), "img_size": 64, "window_size": 4},
    ),
    "convnext": ("convnext_tiny", {"dims": (16, 32, 64, 128), "depths": (1, 1, 3, 1)}),
    "resnet": ("resnet50_gn", {"layers": (1, 2, 2, 1), "channels": (32, 64, 128, 256)}),
}


def timm_model(kind, seed=0, **arguments):
    name, small = TIMM[kind]
    model = timm.create_model(name, num_classes=0, **{**small, **arguments}).eval()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng), alpha=0.05)
    return model


def write_timm(model, kind, directory, licence="apache-2.0"):
    name, small = TIMM[kind]
    directory.mkdir()
    save_file(model.state_dict(), directory / "model.safetensors")
    channels = next(p for p in model.parameters() if p.ndim == 4).shape[1]
    cfg = {"input_size": [channels, 32, 32], "num_classes": 0, "license": licence}
    cfg |= {"mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3]}
    for key in ("first_conv", "classifier"):
        cfg[key] = model.pretrained_cfg[key]
    config = {"architecture": name, "num_classes": 0, "model_args": small, "pretrained_cfg": cfg}
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


def filled(model):
    config = config_from_timm(model)
    backbone = architecture(config).build(config).eval()
    backbone.init_weights_(torch.Generator().manual_seed(0))
    return backbone, fill_(backbone, model.state_dict(), "timm")


def probe(backbone):
    config = backbone.config
    return torch.randn(3, config.num_channels, config.image_size, config.image_size)


@pytest.mark.parametrize("kind", TIMM)
def test_the_intact_network_reproduces_timms_features_before_and_after_reordering(kind):
    model = timm_model(kind)
    backbone, report = filled(model)
    images = probe(backbone)
    with torch.inference_mode():
        expected = backbone.timm_features(model, images)
        before = backbone([images], backbone.space.intact)[0]
        orders = channel_orders(backbone, images)
        backbone.load_state_dict(reordered(backbone.layout, backbone.state_dict(), orders))
        after = backbone([images], backbone.space.intact)[0]
    assert report.missing == ("mask_token",)
    assert not report.resized
    assert relative_error(before.cls, expected.cls) < 1e-5
    assert relative_error(before.patches, expected.patches) < 1e-5
    order = feature_order(backbone.layout, orders)
    order = torch.arange(expected.cls.shape[1]) if order is None else order
    assert relative_error(after.cls, expected.cls[:, order]) < 1e-5
    assert relative_error(after.patches, expected.patches[..., order]) < 1e-5
    has_free_order = kind != "resnet"
    assert bool(orders) == has_free_order
    if has_free_order:
        assert not torch.equal(order, torch.arange(len(order)))


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_any_order_of_any_group_leaves_the_intact_network_s_function(name):
    config = SMALLEST[name]
    backbone = architecture(config).build(config).eval()
    rng = torch.Generator().manual_seed(0)
    backbone.init_weights_(rng)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng), alpha=0.1)
    groups = channel_groups(backbone.layout)
    orders = {group.name: torch.randperm(group.num_units, generator=rng) for group in groups.values()}
    images = probe(backbone)
    masks = [torch.rand(3, config.mask_side**2, generator=rng) < 0.4]
    with torch.inference_mode():
        before = backbone([images], backbone.space.intact, masks)[0]
        backbone.load_state_dict(reordered(backbone.layout, backbone.state_dict(), orders))
        after = backbone([images], backbone.space.intact, masks)[0]
    order = feature_order(backbone.layout, orders)
    order = torch.arange(before.cls.shape[1]) if order is None else order
    assert relative_error(after.cls, before.cls[:, order]) < 1e-5
    assert relative_error(after.patches, before.patches[..., order]) < 1e-5


def test_channels_that_contribute_nothing_come_last():
    backbone, _ = filled(timm_model("dinov2"))
    dead = [5, 17, 60]
    with torch.no_grad():
        for block in backbone.blocks:
            block.mlp.fc2.weight[:, dead] = 0.0
            block.attn.proj.weight[:, 16:32] = 0.0
    orders = channel_orders(backbone, probe(backbone))
    for index in range(3):
        assert sorted(orders[f"blocks.{index}.hidden"][-3:].tolist()) == dead
        assert orders[f"blocks.{index}.heads"][-1] == 1


@pytest.mark.parametrize("kind", TIMM)
def test_every_elastic_layer_that_reads_free_channels_is_heard(kind):
    backbone, _ = filled(timm_model(kind))
    readers = [module for module in backbone.modules() if _read_axis(module)[0] is not None]
    with _watched(backbone) as energies:
        backbone([probe(backbone)], backbone.space.intact)
    assert set(energies) == set(readers)


def test_importance_puts_more_energy_into_narrow_subnets_than_chance():
    model = timm_model("dinov2")
    backbone, _ = filled(model)
    images = probe(backbone)
    orders = channel_orders(backbone, images)
    backbone.load_state_dict(reordered(backbone.layout, backbone.state_dict(), orders))
    again = channel_orders(backbone, images)
    for order in again.values():
        assert torch.equal(order, torch.arange(len(order)))


@pytest.mark.parametrize("kind", TIMM)
def test_a_directory_says_what_it_is_and_grows_into_a_space(kind, tmp_path):
    spec = write_timm(timm_model(kind), kind, tmp_path / "net")
    weights = open_weights(spec)
    assert weights.provenance["license"] == "apache-2.0"
    assert weights.provenance["name"] == "net"
    grown, mean, std = grown_from(spec, ViTConfig(image_size=64))
    assert (mean, std) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    space = architecture(grown).space(grown)
    assert space.intact.width == weights.config.widths[-1]
    assert len(space) > 1
    assert 2 * space.smallest.width >= space.intact.width
    assert all(2 * low >= high for low, high in zip(space.smallest.depths, space.intact.depths, strict=True))
    layout = architecture(grown).layout(grown)
    resized_only = abs(num_params(layout, space.intact) - sum(part.numel() for part in weights.model.parameters()))
    assert resized_only <= 64 * 48


def test_positions_and_input_channels_are_resized_and_reported():
    model = timm_model("dinov2")
    config = replace(config_from_timm(model), image_size=56, num_channels=1)
    backbone = architecture(config).build(config)
    backbone.init_weights_(torch.Generator().manual_seed(0))
    report = fill_(backbone, model.state_dict(), "timm")
    assert set(report.resized) == {"pos_embed", "patch_embed.proj.weight"}
    assert "(1, 5, 48) → (1, 17, 48)" in str(report)
    summed = model.patch_embed.proj.weight.sum(dim=1, keepdim=True)
    torch.testing.assert_close(backbone.patch_embed.proj.weight, summed)


def test_every_tensor_that_is_not_explained_is_an_error():
    model = timm_model("dinov2")
    config = config_from_timm(model)
    state = model.state_dict()
    cases = [
        ({**state, "blocks.0.extra": torch.zeros(2)}, r"1 have no place here: blocks\.0\.extra"),
        ({k: v for k, v in state.items() if k != "norm.bias"}, r"1 are missing: norm\.bias"),
        ({**state, "norm.bias": torch.zeros(7)}, r"1 do not fit: norm\.bias \(7,\) → \(48,\)"),
    ]
    for wrong, message in cases:
        backbone = architecture(config).build(config)
        backbone.init_weights_(torch.Generator().manual_seed(0))
        before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
        with pytest.raises(CheckpointError, match=message):
            fill_(backbone, wrong, "a file")
        assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())


def test_a_classifier_is_left_out_and_named():
    name, small = TIMM["dinov2"]
    model = timm.create_model(name, num_classes=7, **small)
    config = config_from_timm(timm_model("dinov2"))
    backbone = architecture(config).build(config)
    report = fill_(backbone, model.state_dict(), "timm")
    assert report.left_out == ("head.weight", "head.bias")
    assert "not needed: head.weight, head.bias" in str(report)


def test_what_poa_cannot_represent_is_refused_with_the_reason():
    with torch.device("meta"):
        cases = {
            "resnet50": "BatchNorm",
            "convnextv2_atto": "global response norm",
            "mobilenetv3_small_050": "MobileNetV3",
        }
        for name, reason in cases.items():
            model = timm.create_model(name, num_classes=0)
            with pytest.raises(ConfigError, match=reason):
                config_from_timm(model)


def test_sources_that_are_not_there_are_refused_with_help(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    cases = {
        str(tmp_path / "nowhere"): (CheckpointError, "there is no"),
        str(tmp_path / "empty"): (CheckpointError, "no config.json of timm"),
        str(tmp_path / "broken.safetensors"): (CheckpointError, "cannot be read as safetensors"),
        str(tmp_path / "gone.safetensors"): (CheckpointError, "there is no file"),
        "timm:vit_smal_patch14_dinov2": (ConfigError, "vit_small_patch14_dinov2"),
    }
    for spec, (error, message) in cases.items():
        with pytest.raises(error, match=message):
            open_weights(spec)


def test_a_network_with_other_parts_than_ours_is_noticed(tmp_path, monkeypatch):
    spec = write_timm(timm_model("dinov2"), "dinov2", tmp_path / "net")
    honest = timm.models.VisionTransformer.forward_features
    monkeypatch.setattr(timm.models.VisionTransformer, "forward_features", lambda self, x: 1.001 * honest(self, x))
    with pytest.raises(CheckpointError, match="other features than timm's"):
        start_from_(*_start(spec))


def _start(spec, **init):
    config = _config(spec, **init)
    backbone = architecture(config.model).build(config.model)
    backbone.init_weights_(torch.Generator().manual_seed(0))
    return backbone, config, open_source("digits:train", config.data, 3)


def _config(spec, **init):
    model = {"widths": [32, 48], "depths": [2, 3], "head_dim": 16, "patch_size": 14, "image_size": 28, "drop_path": 0.0}
    values = {
        "model": model,
        "init": {"source": spec, "num_images": 16, **init},
        "augment": {"local_size": 14, "mean": [0.5], "std": [0.5]},
    }
    return from_dict(PretrainConfig, values, "test")


def test_a_start_reports_source_licence_difference_and_order(tmp_path):
    spec = write_timm(timm_model("dinov2"), "dinov2", tmp_path / "net", licence="cc-by-nc-4.0")
    backbone, config, images = _start(spec)
    report = start_from_(backbone, config, images)
    assert report.provenance == {"source": spec, "name": "net", "license": "cc-by-nc-4.0"}
    assert report.relative_difference < 1e-5
    assert sorted(report.feature_order) == list(range(48))
    assert report.num_reordered_groups == 1 + 2 * 3
    kept, config, images = _start(spec, reorder=False)
    report = start_from_(kept, config, images)
    assert (report.feature_order, report.num_reordered_groups) == ((), 0)
    x = probe(kept)
    with torch.inference_mode():
        ours, other = (each.eval()([x], each.space.intact)[0].cls for each in (kept, backbone))
    assert relative_error(ours.sort(dim=1).values, other.sort(dim=1).values) < 1e-5


def test_a_bare_file_fills_the_network_that_the_options_describe(tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file(timm_model("dinov2").state_dict(), file)
    assert grown_from(str(file), ViTConfig()) is None
    backbone, config, images = _start(str(file))
    assert start_from_(backbone, config, images).relative_difference is None
    wrong = replace(config.model, depths=(2, 4))
    backbone = architecture(wrong).build(wrong)
    with pytest.raises(CheckpointError, match=r"14 are missing: blocks\.3\."):
        start_from_(backbone, config, images)


def test_a_family_grows_on(tmp_path):
    backbone, config, images = _start(write_timm(timm_model("dinov2"), "dinov2", tmp_path / "net"))
    how = Preprocessing(28, 3, (0.5,), (0.5,))
    provenance = {"init": {"license": "cc-by-nc-4.0"}}
    Family(FamilyCard(ARCHITECTURES["vit"], config.model, how, provenance=provenance), backbone).save(
        tmp_path / "family"
    )
    again, config, images = _start(str(tmp_path / "family"), reorder=False)
    report = start_from_(again, config, images)
    assert not report.tensors.missing
    assert report.provenance["license"] == "cc-by-nc-4.0"
    expected = load(tmp_path / "family").supernet.state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in again.state_dict().items())
