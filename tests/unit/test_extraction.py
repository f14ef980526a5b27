import json
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from poa.backbones import architecture
from poa.config import ViTConfig
from poa.elastic import num_params
from poa.errors import CheckpointError, ConfigError, ExtractionError, SubnetError
from poa.family import Family, FamilyCard, Preprocessing, load, read_card
from poa.timm_directory import open_timm_directory
from tests.golden.reference import relative_error


def make_family(config, seed=0):
    kind = architecture(config)
    backbone = kind.build(config)
    rng = torch.Generator().manual_seed(seed)
    backbone.init_weights_(rng)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng), alpha=0.02)
    how = Preprocessing(config.image_size, config.num_channels, (0.5,), (0.25,))
    return Family(FamilyCard(kind, config, how), backbone)


TINY = ViTConfig(widths=(32, 48, 64), depths=(2, 3, 4), head_dim=16, patch_size=4, image_size=16, num_channels=1)

VARIANTS = {
    "plain": {},
    "registers": {"num_reg_tokens": 2},
    "registers outside the position embedding": {"num_reg_tokens": 2, "no_embed_class": True},
    "class token outside the position embedding": {"no_embed_class": True},
    "no LayerScale": {"init_values": None},
    "five channels": {"num_channels": 5},
    "MLP ratio 2": {"mlp_ratio": 2},
}


@pytest.fixture(scope="module")
def family():
    return make_family(TINY)


@pytest.mark.parametrize("variant", VARIANTS)
def test_extracted_model_equals_subnet_forward_for_every_subnet(variant):
    config = ViTConfig(**{**vars(TINY), **VARIANTS[variant]})
    family = make_family(config)
    images = torch.randn(2, config.num_channels, 16, 16)
    for subnet in family.subnets:
        model = family.extract(subnet)
        with torch.inference_mode():
            assert relative_error(model(images), family.features(images, subnet)) < 1e-5
        assert sum(part.numel() for part in model.parameters()) == family.card.num_params(subnet)


@pytest.mark.slow
def test_all_143_subnets_of_the_large_space_equal_their_timm_models_at_every_depth():
    config = ViTConfig(image_size=32, patch_size=16)
    family = make_family(config)
    images = torch.randn(2, 3, 32, 32)
    assert len(family.subnets) == 143
    with torch.inference_mode():
        for subnet in family.subnets:
            model = family.extract(subnet)
            theirs, between = model.forward_intermediates(images, norm=False, output_fmt="NCHW")
            ours = family.supernet([images], subnet)[0]
            assert relative_error(ours.cls, theirs[:, 0]) < 1e-5, subnet
            assert relative_error(ours.patches, theirs[:, 1:]) < 1e-5, subnet
            blocks = family.supernet.forward_intermediates(images, subnet)
            assert len(blocks) == len(between) == subnet.depths[0]
            for mine, other in zip(blocks, between, strict=True):
                assert relative_error(mine, other) < 1e-5, subnet


def test_cost_without_building_equals_what_the_profiler_counts(family):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    for subnet in (family.space.smallest, family.space.middle, family.space.intact):
        model = family.extract(subnet)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.inference_mode():
            model(torch.randn(1, 1, 16, 16))
        assert counter.get_total_flops() == family.card.flops(subnet)


def test_extraction_for_another_image_size_resizes_the_positions(family):
    images = torch.randn(2, 1, 24, 24)
    model = family.extract("w48-d3", image_size=24)
    assert relative_error(model(images).detach(), family.features(images, "w48-d3")) < 1e-5


def test_extracted_weights_share_no_memory_with_the_family(family):
    model = family.extract(family.space.intact)
    before = family.supernet.norm.weight.clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(family.supernet.norm.weight, before)


def test_gradients_reach_only_what_the_subnet_owns():
    backbone = make_family(TINY).supernet.requires_grad_(True)
    backbone([torch.randn(2, 1, 16, 16)], backbone.space.parse("w32-d2"))[0].cls.sum().backward()
    gradient = backbone.blocks[0].attn.qkv.weight.grad.view(3, 64, 64)
    assert gradient[:, :32, :32].abs().sum() > 0
    assert gradient[:, 32:].abs().sum() == 0
    assert gradient[:, :, 32:].abs().sum() == 0
    assert backbone.blocks[1].attn.qkv.weight.grad is None
    assert backbone.blocks[3].attn.qkv.weight.grad is not None


def test_saved_subnet_opens_with_timm_where_poa_is_not_installed(family, tmp_path):
    found = family.save_subnet("w48-d3", tmp_path / "net")
    assert found.relative_difference < 1e-5
    assert json.loads((tmp_path / "net" / "poa.json").read_text())["verification"]["subnet"] == "w48-d3"
    images = torch.randn(2, 1, 16, 16)
    torch.save(images, tmp_path / "images.pt")
    script = (
        "import sys, torch, timm; sys.modules['poa'] = None\n"
        f"m = timm.create_model('local-dir:{tmp_path / 'net'}', pretrained=True).eval()\n"
        f"torch.save(m(torch.load('{tmp_path / 'images.pt'}')).detach(), '{tmp_path / 'out.pt'}')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    theirs = torch.load(tmp_path / "out.pt")
    assert relative_error(theirs, family.features(images, "w48-d3")) < 1e-5


def test_saved_subnet_takes_a_classifier_and_gives_feature_maps_in_timm(family, tmp_path):
    import timm

    family.save_subnet("w48-d3", tmp_path / "net")
    images = torch.randn(2, 1, 16, 16)
    assert timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True, num_classes=7)(images).shape == (2, 7)
    maps = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True, features_only=True)(images)
    assert maps[-1].shape == (2, 48, 4, 4)


def test_a_model_that_differs_is_refused(family, tmp_path):
    family.save_subnet("w48-d3", tmp_path / "net")
    model = open_timm_directory(tmp_path / "net")
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[0, 0] += 0.5
    with pytest.raises(ExtractionError, match="w48-d3 differs"):
        family.verify(family.space.parse("w48-d3"), partial(family.supernet.timm_features, model), 16)


def test_a_damaged_cut_leaves_nothing_behind(family, tmp_path, monkeypatch):
    honest = family.supernet.timm_windows

    def damaged(subnet, image_size):
        found = honest(subnet, image_size)
        return found | {"norm.weight": replace(found["norm.weight"], scale=1.01)}

    monkeypatch.setattr(family.supernet, "timm_windows", damaged)
    with pytest.raises(ExtractionError):
        family.save_subnet("w48-d3", tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


def test_family_survives_saving_and_loading_bit_for_bit(family, tmp_path):
    family.save(tmp_path / "family")
    again = load(tmp_path)
    assert again.card.config == family.card.config
    for name, tensor in family.supernet.state_dict().items():
        assert torch.equal(tensor, again.supernet.state_dict()[name])


def test_existing_directory_is_not_overwritten_unasked(family, tmp_path):
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is there already"):
        family.save_subnet("w48-d3", tmp_path / "net")
    assert (tmp_path / "net" / "notes.txt").read_text() == "mine"


def _flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "weights.safetensors").unlink(), "incomplete"),
        (lambda folder: (folder / "weights.safetensors").write_bytes(b"1" * 100), "does not fit"),
        (lambda folder: _flip(folder / "weights.safetensors"), "checksum"),
        (lambda folder: (folder / "family.json").write_text("{"), "damaged"),
        (
            lambda folder: (folder / "family.json").write_text('{"format": "other", "version": 1}'),
            "other version 1",
        ),
        (lambda folder: (folder / "family.json").unlink(), "holds no family"),
    ],
)
def test_damaged_family_is_refused_with_its_reason(family, tmp_path, damage, message):
    family.save(tmp_path / "family")
    damage(tmp_path / "family")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "family")


def test_unknown_subnet_names_the_nearest(family):
    with pytest.raises(SubnetError, match="Nearest: w48-d3"):
        family.extract("w50-d3")
    with pytest.raises(SubnetError, match="not the name of a sub-network"):
        family.extract("small")


def test_image_size_must_fit_the_patches(family):
    with pytest.raises(ConfigError, match="nearest is 16"):
        family.extract("w48-d3", image_size=17)
    with pytest.raises(ConfigError, match="multiple of the patch size"):
        family.features(torch.randn(1, 1, 18, 16), "w48-d3")


def test_card_is_read_without_torch(family, tmp_path):
    family.save(tmp_path / "family")
    script = (
        "import sys; from poa.family import read_card\n"
        f"card = read_card({str(tmp_path)!r})\n"
        "print(card.num_params(card.space.intact)); assert 'torch' not in sys.modules"
    )
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert int(out) == num_params(family.supernet.layout, family.space.intact)
    assert read_card(tmp_path).space == family.space
