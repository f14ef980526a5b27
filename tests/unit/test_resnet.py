import pytest
import timm
import torch
from torch import nn

from poa.backbones.resnet_layout import resnet_layout
from poa.config import ResNetConfig
from poa.elastic import Cut, Subnet, fixed
from poa.elastic.layers import ElasticConv2d
from poa.errors import ConfigError
from tests.golden.reference import relative_error
from tests.unit.test_extraction import make_family

SMALL = {"widths": (32, 64, 96), "base_channels": 8, "image_size": 32, "num_channels": 1}
SHALLOW = {"stage2_depths": (1, 2, 3), "stage3_depths": (2, 4, 5), "outer_depths": (1, 1)}


def images(config, count=2):
    shape = (count, config.num_channels, config.image_size, config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def assert_equals_timm(family, subnet, batch):
    assert_same(family.supernet, subnet, family.extract(subnet), batch)


def assert_same(backbone, subnet, model, batch):
    with torch.inference_mode():
        ours = backbone([batch], subnet)[0]
        theirs = backbone.timm_features(model, batch)
        assert relative_error(ours.cls, theirs.cls) < 1e-5, subnet
        assert relative_error(ours.patches, theirs.patches) < 1e-5, subnet


@pytest.mark.parametrize("which", ["smallest", "middle", "intact"])
@pytest.mark.parametrize("base_channels", [8, 16, 24])
def test_extracted_networks_equal_their_subnets(which, base_channels):
    widths = (96, 192) if base_channels == 24 else SMALL["widths"]
    config = ResNetConfig(**{**SMALL, **SHALLOW, "base_channels": base_channels, "widths": widths})
    family = make_family(config)
    assert_equals_timm(family, getattr(family.space, which), images(config))


@pytest.mark.parametrize(("base_channels", "has_shortcut"), [(8, True), (16, False)])
def test_stage_one_has_a_shortcut_only_where_the_channels_differ(base_channels, has_shortcut):
    layout = resnet_layout(ResNetConfig(**{**SMALL, "base_channels": base_channels}))
    assert ("layer1.0.downsample.0.weight" in layout.cuts) == has_shortcut


def test_blocks_start_as_the_identity_where_asked():
    for zero in (True, False):
        config = ResNetConfig(**SMALL, **SHALLOW, zero_init_last=zero)
        backbone = make_family(config).supernet
        backbone.init_weights_(torch.Generator().manual_seed(0))
        gains = [part for name, part in backbone.state_dict().items() if name.endswith("bn3.weight")]
        assert all(bool((gain == (0.0 if zero else 1.0)).all()) for gain in gains)


@pytest.mark.parametrize("options", [{"stem_channels": 32}, {"num_groups": 16}])
def test_what_timm_has_no_network_for_trains_but_is_not_cut(options):
    config = ResNetConfig(**{**SMALL, **SHALLOW, **options})
    family = make_family(config)
    assert family.features(images(config), family.space.smallest).isfinite().all()
    name = next(iter(options))
    with pytest.raises(ConfigError, match=f"model.{name} is"):
        family.extract(family.space.smallest)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (40, 64)}, "num_groups 32 divides the 40 channels"),
        ({"base_channels": 4}, "num_groups 32 divides the 16 channels"),
        ({"stem_channels": 65}, "num_groups 32 divides the 65 channels"),
        ({"base_channels": 48, "widths": (64,)}, "base_width"),
        ({"patch_scale": 3}, "1, 2 or 4"),
        ({"image_size": 4}, "the nearest is 5"),
        ({"outer_depths": (0, 3)}, "outer_depths"),
        ({"stage2_depths": (2, 1)}, "stage2_depths"),
    ],
)
def test_settings_that_make_no_network_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ResNetConfig(**options)


@pytest.mark.parametrize("size", [33, 48, 63, 65])
@pytest.mark.parametrize("patch_scale", [1, 2, 4])
def test_masks_fit_the_patches_of_any_image_size(size, patch_scale):
    config = ResNetConfig(**{**SMALL, **SHALLOW, "image_size": size, "patch_scale": patch_scale})
    backbone = make_family(config).supernet
    everything = torch.ones(2, config.mask_side**2, dtype=torch.bool)
    first, second = (
        backbone([batch], backbone.space.smallest, [everything])[0] for batch in (images(config), images(config) + 1)
    )
    assert first.patches.shape[1] == config.mask_side**2
    torch.testing.assert_close(first.patches, second.patches)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_465_subnets_of_the_default_depths_equal_their_timm_models():
    config = ResNetConfig(**SMALL, outer_depths=(1, 1))
    family = make_family(config)
    backbone, batch = family.supernet, images(config, count=1)
    assert len(family.subnets) == 465
    for width in config.widths:
        # As `cut_state`, but blocks that many depths have in common are cut once: copying them is most of the work.
        state = {name: cut.apply(backbone.state_dict()[name], width) for name, cut in backbone.layout.cuts.items()}
        for depths in family.space.depth_tuples:
            subnet = Subnet(width, depths)
            made = backbone.timm_model(subnet, config.image_size)
            with torch.device("meta"):
                model = timm.create_model(made.architecture, num_classes=0, **made.arguments).eval()
            owned = {target: state[source] for source, target, _ in backbone.layout.owned(subnet)}
            model.load_state_dict(owned, strict=True, assign=True)
            assert_same(backbone, subnet, model, batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_strided_convolution_of_one_place_is_that_of_its_central_tap(dtype):
    side = fixed(32)
    layer = ElasticConv2d(Cut((side, side, fixed(3), fixed(3))), stride=2, padding=1)
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    layer = layer.to(dtype)
    images = torch.randn(16, 32, 1, 1, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = layer(images, 1)
    torch.testing.assert_close(out.flatten(1), images.flatten(1) @ layer.weight[:, :, 1, 1].T, rtol=1e-2, atol=5e-2)
    freed = [torch.full((32 * 32 * 9,), float("nan"), dtype=kind) for kind in (dtype, torch.float32) for _ in range(9)]
    del freed  # what a kernel does not write shows
    out.float().sum().backward()
    outer = torch.ones(3, 3, dtype=torch.bool)
    outer[1, 1] = False
    assert torch.equal(layer.weight.grad[:, :, outer], torch.zeros(32, 32, 8, dtype=dtype))
    assert layer.weight.grad[:, :, 1, 1].abs().sum() > 0
