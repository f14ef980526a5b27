from dataclasses import replace

import pytest
import torch

from poa.config import ConvNeXtConfig
from poa.elastic import channel_groups, reordered
from poa.elastic.reorder import feature_order
from poa.errors import ConfigError
from tests.golden.reference import relative_error
from tests.unit.test_extraction import make_family
from tests.unit.test_resnet import assert_equals_timm, images

SMALL = ConvNeXtConfig(widths=(8, 10, 12), depths=(2, 4, 5), other_depths=(1, 2, 1), image_size=32, num_channels=1)


@pytest.mark.parametrize("which", ["smallest", "middle", "intact"])
@pytest.mark.parametrize("patch_size", [1, 4])
def test_extracted_networks_equal_their_subnets(which, patch_size):
    family = make_family(replace(SMALL, patch_size=patch_size))
    assert_equals_timm(family, getattr(family.space, which), images(family.card.config))


@pytest.mark.parametrize(("height", "width"), [(45, 70), (96, 33)])
def test_odd_images_are_seen_as_by_timm(height, width):
    family = make_family(SMALL)
    batch = torch.randn(2, 1, height, width, generator=torch.Generator().manual_seed(0))
    assert_equals_timm(family, family.space.middle, batch)


def test_small_crops_are_padded_with_zeros_below_and_to_the_right():
    family = make_family(SMALL)
    crop = torch.randn(2, 1, 20, 40, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(crop, (0, 0, 0, 12))
    assert torch.equal(*(family.features(batch, family.space.middle) for batch in (crop, padded)))


def test_only_parameters_with_an_elastic_fan_in_have_a_factor():
    cuts = make_family(SMALL).supernet.layout.cuts
    scaled = {name for name, cut in cuts.items() if cut.scale(8) != 1.0}
    expected = {name for name in cuts if name.endswith(("fc1.weight", "fc2.weight", "downsample.1.weight"))}
    assert scaled == expected


def test_channels_may_be_reordered_without_changing_what_is_computed():
    backbone = make_family(SMALL).supernet
    rng = torch.Generator().manual_seed(0)
    before = backbone([images(SMALL)], backbone.space.intact)[0].cls
    groups = channel_groups(backbone.layout)
    assert sum(name.startswith("stream.") for name in groups) == 4
    assert sum(name.endswith(".hidden") for name in groups) == 9
    orders = {name: torch.randperm(group.num_units, generator=rng) for name, group in groups.items()}
    backbone.load_state_dict(reordered(backbone.layout, backbone.state_dict(), orders))
    after = backbone([images(SMALL)], backbone.space.intact)[0].cls
    assert relative_error(after, before[:, feature_order(backbone.layout, orders)]) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (96, 64)}, "rising order"),
        ({"other_depths": (3, 0, 3)}, "other_depths"),
        ({"patch_size": 8}, "patch_size must be one of 1, 4"),
        ({"patch_scale": 3}, "patch_scale must be one of"),
        ({"image_size": 225}, "a multiple of 32"),
        ({"image_size": 16}, "the nearest is 32"),
        ({"drop_path": 1.0}, "drop_path"),
    ],
)
def test_settings_that_make_no_network_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ConvNeXtConfig(**options)


@pytest.mark.slow
def test_all_57_subnets_of_the_default_space_equal_their_timm_models():
    config = ConvNeXtConfig(image_size=32)
    family = make_family(config)
    assert len(family.subnets) == 57
    for subnet in family.subnets:
        assert_equals_timm(family, subnet, images(config))
