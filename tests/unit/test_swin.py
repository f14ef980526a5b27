import itertools

import pytest
import torch

from poa.backbones import ARCHITECTURES
from poa.backbones.swin import MASKED, ElasticSwin, windows_of
from poa.backbones.swin_layout import alternating_blocks
from poa.config import SwinConfig
from poa.elastic import Subnet
from poa.errors import ConfigError
from poa.family import Family, FamilyCard, Preprocessing
from tests.golden.reference import relative_error

CPU = torch.device("cpu")
SMALL = {"widths": (16, 32), "depths": (2, 3, 5), "head_dim": 8, "num_channels": 1}
DEFAULT = SwinConfig(image_size=56)


def family_of(config):
    """Random weights, large enough that a wrong window or table would be seen."""
    backbone = ElasticSwin(config)
    rng = torch.Generator().manual_seed(0)
    backbone.init_weights_(rng)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng), alpha=0.05)
    how = Preprocessing(config.image_size, config.num_channels, (0.5,), (0.5,))
    return Family(FamilyCard(ARCHITECTURES["swin"], config, how), backbone)


def noise(config, height=None, width=None, rows=2):
    height = height or config.image_size
    shape = (rows, config.num_channels, height, width or height)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def largest_error(family, subnet, image_size=None):
    """Of class vectors, patch vectors and the maps of every stage, between the sub-network and its timm model."""
    model = family.extract(subnet, image_size)
    images = noise(family.supernet.config, image_size)
    with torch.inference_mode():
        ours, theirs = family.supernet([images], subnet)[0], family.supernet.timm_features(model, images)
        pairs = [(ours.cls, theirs.cls), (ours.patches, theirs.patches), (ours.cls, model(images))]
        maps = model.forward_intermediates(images, intermediates_only=True)
        pairs += zip(family.supernet.forward_intermediates(images, subnet), maps, strict=True)
    return max(relative_error(mine, timms) for mine, timms in pairs)


@pytest.fixture(scope="module")
def default_family():
    return family_of(DEFAULT)


def test_kept_blocks_rise_and_alternate_at_every_depth():
    for num_blocks in range(1, 41):
        assert alternating_blocks(num_blocks, num_blocks) == tuple(range(num_blocks))
        for depth in range(1, num_blocks + 1):
            kept = alternating_blocks(num_blocks, depth)
            assert len(kept) == depth
            assert kept[0] == 0
            assert kept[-1] in (num_blocks - 1, num_blocks - 2) or depth == 1
            assert all(a < b for a, b in itertools.pairwise(kept))
            assert all(block % 2 == index % 2 for index, block in enumerate(kept))


@pytest.mark.parametrize(("sides", "window"), [((8, 12), 4), ((14, 7), 7), ((10, 6), 4), ((9, 3), 3)])
@pytest.mark.parametrize("always", [False, True])
def test_places_see_each_other_unless_the_shift_has_wrapped_between_them(sides, window, always):
    found = windows_of(sides, window, always, True, CPU)
    (rows, columns), (high, broad) = found.padded, found.size
    before = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(rows, columns, 2)
    after = before.roll([-move for move in found.shift], (0, 1))
    for index, mask in enumerate(found.mask):
        top, left = (index // (columns // broad)) * high, (index % (columns // broad)) * broad
        place, origin = (grid[top : top + high, left : left + broad].flatten(0, 1) for grid in (before, after))
        kept_apart = (place[:, None] - place[None]) == (origin[:, None] - origin[None])
        assert torch.equal(mask == 0.0, kept_apart.all(-1))
        assert set(mask.unique().tolist()) <= {0.0, MASKED}


def test_a_map_that_its_window_covers_is_one_unshifted_window():
    assert windows_of((4, 7), 7, False, True, CPU)[:3] == ((4, 7), (4, 7), (0, 0))
    assert windows_of((4, 7), 7, False, True, CPU).mask is None
    assert windows_of((4, 14), 7, False, True, CPU)[:3] == ((4, 7), (4, 14), (0, 3))
    assert windows_of((4, 14), 7, True, True, CPU)[:3] == ((7, 7), (7, 14), (3, 3))
    assert windows_of((4, 14), 7, True, False, CPU)[:3] == ((7, 7), (7, 14), (0, 0))


def test_smaller_windows_take_the_inner_part_of_the_table():
    whole, part = windows_of((7, 7), 7, False, False, CPU).offsets, windows_of((3, 2), 7, False, False, CPU).offsets
    places = torch.cartesian_prod(torch.arange(3), torch.arange(2))
    numbers = places[:, 0] * 7 + places[:, 1]
    assert torch.equal(part, whole[numbers][:, numbers])
    assert whole.unique().tolist() == list(range(13 * 13))


@pytest.mark.parametrize(
    "config",
    [
        SwinConfig(**SMALL, image_size=56),
        SwinConfig(**SMALL, image_size=56, patch_scale=1, mlp_ratio=2, other_depths=(1, 3, 4)),
        SwinConfig(**SMALL, image_size=56, patch_size=1, always_partition=True, patch_scale=4),
        SwinConfig(**SMALL, image_size=64, window_size=4, always_partition=True),
        SwinConfig(**SMALL, image_size=16, window_size=4, patch_size=2, always_partition=True),
        SwinConfig(**SMALL, image_size=12, window_size=3, patch_size=4),
    ],
)
def test_extracted_networks_are_exact_for_every_way_to_cut_windows(config):
    family = family_of(config)
    for subnet in (family.space.smallest, family.space.middle, family.space.intact):
        assert largest_error(family, subnet) < 1e-5


@pytest.mark.parametrize("name", ["smallest", "middle", "intact"])
def test_networks_of_the_default_space_are_exact(default_family, name):
    assert largest_error(default_family, getattr(default_family.space, name)) < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_all_39_subnets_of_the_default_space_equal_their_timm_models(default_family):
    errors = {str(subnet): largest_error(default_family, subnet) for subnet in default_family.subnets}
    assert len(errors) == 39
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("image_size", [28, 16, 4])
def test_extraction_for_a_smaller_image_is_exact(image_size):
    family = family_of(SwinConfig(**SMALL, image_size=56))
    model = family.extract("w16-d3", image_size)
    sides = family.supernet.config.map_sides(image_size)
    tables = [model.layers[stage].blocks[0].attn.relative_position_bias_table for stage in range(4)]
    assert [len(table) for table in tables] == [(2 * min(7, side) - 1) ** 2 for side in sides]
    assert largest_error(family, Subnet.parse("w16-d3"), image_size) < 1e-5


def test_image_sizes_that_timm_would_treat_otherwise_are_refused_with_the_nearest():
    config = SwinConfig(image_size=28)
    for size, nearest in ((30, 28), (32, 28), (56, 28), (0, 4), (-4, 4)):
        with pytest.raises(ConfigError, match=rf"the image size must be .*the nearest is {nearest}; got {size}"):
            config.require_image_size("the image size", size)
    with pytest.raises(ConfigError, match=r"model\.image_size must be .*the nearest is 224; got 240"):
        SwinConfig(image_size=240)
    with pytest.raises(ConfigError, match=r"the nearest is 224; got 112"):
        SwinConfig(image_size=112, always_partition=True)
    SwinConfig().require_image_size("the image size", 448)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("widths", (96, 100), "multiples of head_dim 16"),
        ("depths", (6, 6), "rising order"),
        ("other_depths", (2, 0, 2), "three positive numbers"),
        ("window_size", 0, "greater than 0"),
        ("patch_scale", 3, "1, 2 or 4"),
        ("drop_path", 1.0, "less than 1"),
        ("draw_emphasis", 0.5, "1 or more"),
    ],
)
def test_options_out_of_range_are_refused(option, value, expected):
    with pytest.raises(ConfigError, match=rf"model\.{option} must be .*{expected}"):
        SwinConfig(**{option: value})


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize(("height", "width"), [(3, 5), (17, 40), (28, 56), (64, 20)])
def test_crops_are_padded_to_whole_patches_at_the_bottom_and_right(always, height, width):
    config = SwinConfig(**SMALL, image_size=64, window_size=4, always_partition=always)
    backbone = family_of(config).supernet
    image = noise(config, height, width)
    padded = torch.zeros(2, 1, -(-height // 4) * 4, -(-width // 4) * 4)
    padded[:, :, :height, :width] = image
    with torch.inference_mode():
        ours, expected = (backbone([crop], backbone.space.middle)[0] for crop in (image, padded))
    assert torch.equal(ours.cls, expected.cls)
    assert ours.patches.shape[1] == 4 * -(-height // 32) * -(-width // 32)


def test_masks_of_a_map_with_an_odd_side_cover_what_they_name():
    config = SwinConfig(**SMALL, image_size=56, window_size=7)
    assert config.mask_side == 4
    backbone = family_of(config).supernet
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[:, 1, 2] = True
    image = noise(config)
    hidden = image.clone()
    hidden[:, :, 16:32, 32:48] = 0.0
    with torch.inference_mode():
        one, other = (backbone([crop], backbone.space.intact, [mask.flatten(1)])[0] for crop in (image, hidden))
        plain = backbone([image], backbone.space.intact)[0]
    assert torch.equal(one.cls, other.cls)
    assert not torch.allclose(one.cls, plain.cls)


def test_stochastic_depth_rises_from_the_first_block_to_the_last_by_original_number():
    backbone = family_of(SwinConfig(**SMALL, image_size=28, drop_path=0.2)).supernet
    rates = [backbone._drop_rate(stage, block) for stage, depth in enumerate((2, 2, 5, 2)) for block in range(depth)]
    assert rates == pytest.approx([0.02 * block for block in range(11)])


def test_windows_first_made_in_inference_mode_can_be_trained_through():
    windows_of.cache_clear()
    backbone = family_of(SwinConfig(**SMALL, image_size=28)).supernet.requires_grad_(True)
    image = noise(backbone.config)
    with torch.inference_mode():
        backbone([image], backbone.space.intact)
    backbone([image], backbone.space.intact)[0].cls.square().sum().backward()
    assert backbone.layers[0].blocks[1].attn.relative_position_bias_table.grad.abs().sum() > 0


def test_the_residual_stream_stays_float32_under_autocast():
    backbone = family_of(SwinConfig(**SMALL, image_size=28)).supernet
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        maps = backbone.forward_intermediates(noise(backbone.config), backbone.space.smallest)
    assert {part.dtype for part in maps} == {torch.float32}


def test_every_row_computes_what_it_computes_alone():
    config = SwinConfig(**SMALL, image_size=56)
    backbone = family_of(config).supernet
    images = noise(config, rows=3)
    with torch.inference_mode():
        together = backbone([images], backbone.space.middle)[0].cls
        alone = torch.cat([backbone([image[None]], backbone.space.middle)[0].cls for image in images])
    assert relative_error(together, alone) < 1e-6
