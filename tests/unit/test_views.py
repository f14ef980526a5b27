"""Views: sub-networks that run on their family's own weights."""

import pytest
import torch
from torch import nn

from poa.backbones import ARCHITECTURES
from poa.config import ViTConfig
from poa.elastic.shared import SharedConv2d, SharedLinear, SharedMergingLinear, SharedStackedLinear
from poa.errors import ConfigError, SubnetError
from poa.task_head import TaskHead
from tests.contract.configs import SMALLEST
from tests.golden.reference import relative_error
from tests.unit.test_extraction import make_family

MODERN = {
    "rotary": ViTConfig(
        widths=(16, 32), depths=(1, 2), head_dim=8, patch_size=4, image_size=16, position="rope", num_reg_tokens=1
    ),
    "gated": ViTConfig(widths=(16, 32), depths=(1, 2), head_dim=8, patch_size=4, image_size=16, mlp="swiglu_packed"),
    "gated without scales": ViTConfig(
        widths=(16, 32),
        depths=(1, 2),
        head_dim=8,
        patch_size=4,
        image_size=16,
        mlp="swiglu_packed",
        init_values=None,
    ),
    "rotary and gated": ViTConfig(
        widths=(16, 32), depths=(1, 2), head_dim=8, patch_size=4, image_size=16, position="rope", mlp="swiglu"
    ),
}
CONFIGS = {**SMALLEST, **MODERN}


def with_classifier(config):
    family = make_family(config)
    rng = torch.Generator().manual_seed(1)
    channels = family.supernet.layout.features.size
    family.head = TaskHead(torch.randn(3, channels, generator=rng), torch.randn(3, generator=rng), ("a", "b", "c"))
    return family


def images_for(config, seed=2):
    shape = (2, config.num_channels, config.image_size, config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def storages(module):
    return {part.untyped_storage().data_ptr() for part in module.parameters()}


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def family(request):
    return with_classifier(CONFIGS[request.param])


def test_every_architecture_has_a_view_tested():
    assert set(ARCHITECTURES) <= set(CONFIGS)


def test_view_equals_extracted_model_for_every_subnet(family):
    images = images_for(family.card.config)
    for subnet in family.subnets:
        view, model = family.backbone(subnet), family.extract(subnet)
        with torch.inference_mode():
            assert relative_error(view(images), model(images)) < 1e-5, subnet
            assert relative_error(view.logits(images), family.logits(images, subnet)) < 1e-5, subnet
            ours, theirs = view.features(images), family.supernet([images], subnet)[0]
            assert relative_error(ours.patches, theirs.patches) < 1e-5, subnet
        assert sum(part.numel() for part in view.model.parameters()) == family.card.num_params(subnet)


def test_view_shares_every_weight_with_the_family(family):
    own = storages(family.supernet) | {part.data_ptr() for part in (family.head.weight, family.head.bias)}
    for subnet in family.subnets:
        assert storages(family.backbone(subnet)) <= own, subnet


def test_view_computes_with_what_the_family_s_weights_are_now(family):
    view = family.backbone(family.space.smallest)
    images = images_for(family.card.config)
    with torch.no_grad():
        before = view(images).clone()
        for parameter in family.supernet.parameters():
            parameter.mul_(2.0)
        after, expected = view(images), family.features(images, family.space.smallest)
        for parameter in family.supernet.parameters():
            parameter.mul_(0.5)
        assert not torch.allclose(after, before)
        assert relative_error(after, expected) < 1e-5
        assert torch.equal(view(images), before)


@pytest.fixture(scope="module")
def vit():
    return with_classifier(SMALLEST["vit"])


def test_views_of_all_sizes_run_in_turn_and_asking_again_makes_nothing(vit):
    images = images_for(vit.card.config)
    views = [vit.backbone(subnet) for subnet in vit.subnets]
    first = [view(images) for view in views]
    for view, subnet, expected in zip(views[::-1], vit.subnets[::-1], first[::-1], strict=True):
        assert vit.backbone(str(subnet)) is view
        assert torch.equal(view(images), expected)


def test_view_for_another_image_size_equals_the_network_cut_for_it(vit):
    images = torch.randn(2, 2, 24, 24)
    view, model = vit.backbone("w16-d1", 24), vit.extract("w16-d1", 24)
    with torch.inference_mode():
        assert relative_error(view(images), model(images)) < 1e-5
    assert vit.backbone("w16-d1") is not view


def test_view_follows_its_family_to_another_type_of_weights():
    family = with_classifier(SMALLEST["swin"])
    view = family.backbone("w8-d2")
    family.supernet.double()
    family.to("cpu")
    images = images_for(family.card.config).double()
    with torch.inference_mode():
        assert relative_error(view(images), family.features(images, "w8-d2")) < 1e-5
    assert storages(view.model) <= storages(family.supernet)


def test_view_refuses_to_be_moved_or_saved_on_its_own(vit):
    view = vit.backbone("w16-d1")
    assert view.to("cpu") is view
    for work in (view.half, view.double, view.state_dict):
        with pytest.raises(ConfigError, match="weights of a view are its family's"):
            work()


def test_view_of_what_the_family_has_not_is_refused(vit):
    with pytest.raises(SubnetError, match="Nearest"):
        vit.backbone("w17-d1")
    with pytest.raises(ConfigError, match="no classifier"):
        make_family(SMALLEST["vit"]).backbone("w16-d1").logits(images_for(vit.card.config))


def test_view_gives_gradients_to_images_and_none_to_weights(vit):
    images = images_for(vit.card.config).requires_grad_()
    vit.backbone("w16-d1").logits(images).sum().backward()
    assert images.grad is not None
    assert all(part.grad is None for part in vit.supernet.parameters())


WEIGHT = torch.randn(12, 8, generator=torch.Generator().manual_seed(5))
X = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("bias", [None, torch.arange(6.0)])
def test_linear_layer_on_a_window_equals_one_on_a_copy(bias):
    expected = nn.functional.linear(X, 2.0 * WEIGHT[:6, :4], bias)
    torch.testing.assert_close(SharedLinear(WEIGHT[:6, :4], bias, 2.0)(X), expected)


@pytest.mark.parametrize("bias", [None, torch.arange(6.0).view(3, 2)])
def test_stacked_linear_layer_on_windows_equals_one_on_a_copy(bias):
    windows = WEIGHT.view(3, 4, 8)[:, :2, :4]
    expected = nn.functional.linear(X, 2.0 * windows.flatten(0, 1), None if bias is None else bias.flatten())
    torch.testing.assert_close(SharedStackedLinear(windows, bias, 2.0, is_flat=True)(X), expected)
    apart = SharedStackedLinear(windows, bias, 2.0, is_flat=False)(X)
    torch.testing.assert_close(apart, expected.unflatten(-1, (3, 2)))


@pytest.mark.parametrize("bias", [None, torch.arange(12.0)])
def test_linear_layer_on_windows_of_columns_equals_one_on_a_copy(bias):
    windows = WEIGHT.view(12, 2, 4)[:, :, :2]
    expected = nn.functional.linear(X, 2.0 * windows.flatten(1), bias)
    torch.testing.assert_close(SharedMergingLinear(windows, bias, 2.0)(X), expected)


def test_convolution_on_a_window_equals_one_on_a_copy():
    whole = nn.Conv2d(6, 8, 3, stride=2, padding=1)
    images = torch.randn(2, 3, 7, 7)
    window = whole.weight[:4, :3]
    shared = SharedConv2d(whole, window, whole.bias[:4], 2.0)
    expected = nn.functional.conv2d(images, 2.0 * window, whole.bias[:4], stride=2, padding=1)
    torch.testing.assert_close(shared(images), expected)
    assert shared.weight.data_ptr() == whole.weight.data_ptr()
