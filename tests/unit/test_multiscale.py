import pytest
import timm
import torch
from torch import nn

from poa.backbones import ARCHITECTURES
from poa.errors import ConfigError
from poa.family import Family, FamilyCard, Preprocessing
from poa.models import family_members
from poa.tasks.dense.multiscale import finest_stride, last_scales, multi_scale
from tests.contract.configs import SMALLEST


def members(name):
    config, kind = SMALLEST[name], ARCHITECTURES[name]
    backbone = kind.build(config)
    backbone.init_weights_(torch.Generator().manual_seed(0))
    card = FamilyCard(kind, config, Preprocessing(config.image_size, config.num_channels, (0.5,), (0.5,)))
    return family_members(Family(card, backbone))


def images_of(height, width, channels=2):
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))


def shapes_wanted(maps, height, width):
    return [
        (2, channels, -(-height // stride), -(-width // stride))
        for stride, channels in zip(maps.strides, maps.num_channels, strict=True)
    ]


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_sub_network_gives_four_maps_of_doubling_strides_and_all_of_it_learns(name):
    for member in (members(name)[0], members(name)[-1]):
        height, width = 2 * member.preprocessing.image_size, 3 * member.preprocessing.image_size
        maps = multi_scale(member.network((height, width)).requires_grad_(True))
        assert len(maps.strides) == 4
        assert [2 * stride for stride in maps.strides[:-1]] == list(maps.strides[1:])
        found = maps(images_of(height, width))
        assert [tuple(part.shape) for part in found] == shapes_wanted(maps, height, width)
        sum(part.square().sum() for part in found).backward()
        assert all(parameter.grad is not None for parameter in maps.scales.parameters())
        still = [name for name, parameter in maps.backbone.named_parameters() if parameter.grad is None]
        assert all("norm" in name for name in still), still


def test_hierarchical_networks_give_their_own_last_stages():
    for name in ("resnet18", "convnext_atto", "swin_tiny_patch4_window7_224"):
        network = timm.create_model(name, num_classes=0, **({"img_size": 64} if "swin" in name else {})).eval()
        maps, images = multi_scale(network).eval(), images_of(64, 64, 3)
        assert maps.strides == (4, 8, 16, 32)
        assert not list(maps.scales.parameters())
        own = network.forward_intermediates(images, norm=True, intermediates_only=True)[-4:]
        for ours, theirs in zip(maps(images), own, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_plain_networks_give_normed_patch_tokens_at_quarters_of_their_depth():
    network = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=64,
        patch_size=4,
        depth=7,
        embed_dim=16,
        num_heads=2,
        reg_tokens=3,
        num_classes=0,
    ).eval()
    maps, images = multi_scale(network).eval(), images_of(64, 64, 3)
    outputs = []
    for block in network.blocks:
        block.register_forward_hook(lambda _module, _input, output: outputs.append(output))
    found = maps(images)
    assert maps.strides == (4, 8, 16, 32)
    for block, stride, part in zip((2, 4, 6, 7), maps.strides, found, strict=True):
        tokens = network.norm(outputs[block - 1])[:, 4:].transpose(1, 2).reshape(2, 16, 16, 16)
        torch.testing.assert_close(part, nn.functional.max_pool2d(tokens, stride // 4))


@pytest.mark.parametrize(("depth", "indices"), [(1, (0,)), (2, (0, 1)), (3, (0, 1, 2)), (12, (2, 5, 8, 11))])
def test_any_depth_gives_four_maps(depth, indices):
    network = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=depth, embed_dim=16, num_heads=2, class_token=False, num_classes=0,
        global_pool="avg",
    )  # fmt: skip
    maps = multi_scale(network)
    assert maps.scales.indices == indices
    assert [part.shape[2] for part in maps(images_of(32, 32, 3))] == [8, 4, 2, 1]
    assert multi_scale(network, simple=True).scales.indices == (depth - 1,)


def test_the_finest_stride_is_bounded():
    strides = {1: 4, 2: 4, 4: 4, 8: 4, 14: 7, 16: 4, 32: 8}
    assert {patch: finest_stride(patch) for patch in strides} == strides


def test_maps_can_be_projected_to_one_number_of_channels():
    for name in ("vit", "convnext"):
        member = members(name)[-1]
        side = member.preprocessing.image_size
        maps = multi_scale(member.network(), num_channels=6)
        assert maps.num_channels == (6, 6, 6, 6)
        found = maps(images_of(side, side))
        assert [tuple(part.shape) for part in found] == shapes_wanted(maps, side, side)


def test_networks_of_three_stages_are_pooled_to_a_fourth_scale():
    network = timm.create_model("levit_128s", num_classes=0).eval()
    maps = multi_scale(network).eval()
    third, fourth = maps(images_of(224, 224, 3))[2:]
    assert maps.strides == (16, 32, 64, 128)
    torch.testing.assert_close(fourth, nn.functional.max_pool2d(third, 2))


def test_the_last_maps_are_those_of_the_last_blocks_as_they_are():
    network = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=16, num_heads=2, num_classes=0
    ).eval()
    images = images_of(32, 32, 3)
    own = network.forward_intermediates(images, norm=True, intermediates_only=True)
    for num_maps, wanted in ((1, own[-1:]), (2, own[-2:]), (4, own)):
        scales = last_scales(network, num_maps)
        assert scales.strides == (16,) * len(wanted)
        for ours, theirs in zip(scales(network, images), wanted, strict=True):
            torch.testing.assert_close(ours, theirs)


class Jumping(nn.Module):
    """Maps of strides 2 and 8."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 4, 4, 4)

    def forward_intermediates(self, images, **_):
        first = self.first(images)
        return [first, self.second(first)]


def test_networks_that_cannot_give_such_maps_are_refused():
    with pytest.raises(ConfigError, match="strides 2, 8; dense tasks need each stride to be twice"):
        multi_scale(Jumping())
    with pytest.raises(ConfigError, match="Sequential gives no intermediate maps"):
        multi_scale(nn.Sequential(nn.Conv2d(3, 4, 2)))
    with pytest.raises(ConfigError, match="Sequential gives no intermediate maps"):
        last_scales(nn.Sequential(nn.Conv2d(3, 4, 2)), 1)


def test_measuring_leaves_training_mode_and_statistics_as_they_are():
    network = timm.create_model("resnet10t", num_classes=0)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    multi_scale(network.train())
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
