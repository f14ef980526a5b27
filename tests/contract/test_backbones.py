"""What every registered architecture must do; docs/new-backbone.md explains it. `configs.SMALLEST` holds the smallest
configuration of each."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from poa.backbones import ARCHITECTURES, architecture
from poa.config import MODEL_CONFIGS, PretrainConfig, from_dict, to_dict
from poa.elastic import num_params
from poa.errors import ConfigError
from poa.family import Family, FamilyCard, Preprocessing
from tests.contract.configs import SMALLEST
from tests.golden.reference import relative_error


@pytest.fixture(params=sorted(ARCHITECTURES))
def kind(request):
    return ARCHITECTURES[request.param]


@pytest.fixture
def config(kind):
    return SMALLEST[kind.name]


@pytest.fixture
def backbone(kind, config):
    backbone = kind.build(config)
    rng = torch.Generator().manual_seed(0)
    backbone.init_weights_(rng)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng), alpha=0.05)
    return backbone.eval()


@pytest.fixture
def family(kind, config, backbone):
    how = Preprocessing(config.image_size, config.num_channels, (0.5,), (0.5,))
    return Family(FamilyCard(kind, config, how), backbone)


def images(config, height=None, width=None):
    height = height or config.image_size
    shape = (3, config.num_channels, height, width or height)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def masks_of(config, value):
    return torch.full((3, config.mask_side**2), value)


def test_every_architecture_is_known_to_configurations_and_tests():
    assert set(SMALLEST) == set(ARCHITECTURES) == set(MODEL_CONFIGS)


def test_the_table_of_shapes_is_the_state_dict(kind, config, backbone):
    table = {name: cut.full_shape for name, cut in kind.layout(config).cuts.items()}
    assert table == {name: tuple(tensor.shape) for name, tensor in backbone.state_dict().items()}


def test_state_dict_keys_are_timms(family):
    ours = set(family.supernet.state_dict()) - family.supernet.layout.training_only
    assert ours == set(family.extract(family.space.intact).state_dict())


def test_every_parameter_learns_in_the_intact_network(config, backbone):
    masks = masks_of(config, value=False)
    masks[0, 0] = True
    found = backbone([images(config)], backbone.space.intact, [masks])[0]
    weights = torch.randn(found.cls.shape[1])
    ((found.cls * weights).sum() + (found.patches * weights).sum()).backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_features_have_the_table_s_channels_and_the_grid_s_places(config, backbone):
    for subnet in backbone.space.subnets:
        found = backbone([images(config)], subnet)[0]
        channels = backbone.layout.features.active(subnet.width)
        assert found.cls.shape == (3, channels)
        assert found.patches.shape == (3, config.mask_side**2, channels)


def test_a_masked_image_is_not_seen(config, backbone):
    masks = masks_of(config, value=True)
    first = backbone([images(config)], backbone.space.intact, [masks])[0]
    second = backbone([images(config) + 1.0], backbone.space.intact, [masks])[0]
    torch.testing.assert_close(first.cls, second.cls)


def test_a_mask_changes_what_it_covers(config, backbone):
    masks = masks_of(config, value=False)
    masks[0, 0] = True
    plain = backbone([images(config)], backbone.space.smallest)[0]
    masked = backbone([images(config)], backbone.space.smallest, [masks])[0]
    assert not torch.allclose(plain.patches[0], masked.patches[0])
    torch.testing.assert_close(plain.patches[1:], masked.patches[1:])


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 1), (1, 3), (3, 2)])
def test_crops_of_any_size_run_in_every_subnet(config, backbone, rows, columns):
    step = max(config.crop_multiple, 5) if config.crop_multiple == 1 else config.crop_multiple
    for subnet in (backbone.space.smallest, backbone.space.intact):
        found = backbone([images(config, rows * step, columns * step)], subnet)[0]
        assert found.cls.isfinite().all()
        assert found.patches.isfinite().all()


def test_several_crop_sizes_at_once_give_what_each_gives_alone(config, backbone):
    crops = [images(config), images(config, 2 * config.crop_multiple)]
    together = backbone(crops, backbone.space.middle)
    for found, crop in zip(together, crops, strict=True):
        alone = backbone([crop], backbone.space.middle)[0]
        assert relative_error(found.cls, alone.cls) < 1e-5
        assert relative_error(found.patches, alone.patches) < 1e-5


def test_every_extracted_network_equals_its_subnet_at_every_depth_and_counts_right(kind, config, family):
    for subnet in family.subnets:
        model = family.extract(subnet)
        family.verify(subnet, partial(family.supernet.timm_features, model), config.image_size)
        with torch.inference_mode():
            assert relative_error(model(images(config)), family.features(images(config), subnet)) < 1e-5
            ours = family.supernet.forward_intermediates(images(config), subnet)
            theirs = model.forward_intermediates(images(config), intermediates_only=True)
        assert len(ours) == len(theirs)
        for mine, timms in zip(ours, theirs, strict=True):
            assert relative_error(mine, timms) < 1e-5
        assert sum(part.numel() for part in model.parameters()) == num_params(family.supernet.layout, subnet)


def test_the_table_s_operations_are_those_of_the_extracted_network(kind, config, family):
    for subnet in family.subnets:
        model = family.extract(subnet)
        with torch.inference_mode(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            counter = FlopCounterMode(display=False)
            with counter:
                model(images(config)[:1])
        assert kind.flops(config, subnet, None) == counter.get_total_flops(), subnet


def test_a_written_network_opens_in_timm(family, tmp_path):
    for subnet in (family.space.smallest, family.space.intact):
        assert family.save_subnet(subnet, tmp_path / str(subnet)).relative_difference < 1e-5


def test_an_image_size_that_cannot_be_cut_is_refused(config, family):
    sizes = range(1, 2 * config.image_size)
    refused = [size for size in sizes if _is_refused(config, size)]
    for size in refused[:3]:
        with pytest.raises(ConfigError, match=r"the nearest is \d+"):
            family.extract(family.space.smallest, image_size=size)
    accepted = [size for size in sizes if size not in refused and size > config.image_size // 2]
    for size in {accepted[0], accepted[-1]}:
        model = family.extract(family.space.smallest, image_size=size)
        family.verify(family.space.smallest, partial(family.supernet.timm_features, model), size)


def _is_refused(config, size):
    try:
        config.require_image_size("the image size", size)
    except ConfigError:
        return True
    return False


def test_rows_that_stochastic_depth_leaves_out_are_drawn_from_the_generator(kind, config, backbone):
    outputs = [
        backbone([images(config)], backbone.space.intact, None, torch.Generator().manual_seed(seed))[0].cls
        for seed in (0, 0, 1, 2, 3)
    ]
    assert torch.equal(outputs[0], outputs[1])
    has_stochastic_depth = hasattr(config, "drop_path")
    assert has_stochastic_depth == (kind.name != "resnet")
    assert any(not torch.equal(outputs[0], other) for other in outputs[2:]) == has_stochastic_depth


def test_layers_rise_from_the_embedding_to_the_top(backbone):
    layers = [backbone.layer_of(name) for name, _ in backbone.named_parameters()]
    assert min(layers) == 0
    assert max(layers) == backbone.num_layers() - 1
    assert set(layers) == set(range(backbone.num_layers()))


def test_fresh_weights_are_a_function_of_the_generator(kind, config):
    states = []
    for seed in (0, 0, 1):
        backbone = kind.build(config)
        backbone.init_weights_(torch.Generator().manual_seed(seed))
        states.append(torch.cat([part.flatten() for part in backbone.state_dict().values()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
    assert states[0].isfinite().all()


def test_the_configuration_survives_its_dictionary(kind, config):
    assert from_dict(kind.config, to_dict(config), "test") == config
    assert architecture(config) is kind
    values = {"model": to_dict(config), "augment": {"num_local_crops": 0, "mean": [0.5], "std": [0.5]}}
    assert from_dict(PretrainConfig, values, "test").model == config


def test_an_unknown_architecture_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match=r"Architectures: .*vit"):
        architecture("vgg")
    with pytest.raises(ConfigError, match=r"no model\.architecture 'vti'; did you mean 'vit'\? Architectures: vit"):
        from_dict(PretrainConfig, {"model": {"architecture": "vti"}}, "test")


def test_the_last_blocks_are_timms_normed_tokens_and_the_deepest_is_the_features(kind, config, family):
    batch = images(config)
    for member in family.subnets:
        features = family.supernet([batch], member)[0]
        for num_blocks in (1, 2, 100):
            found = family.supernet.last_blocks(batch, member, num_blocks)
            assert torch.equal(found[-1].cls, features.cls)
            assert torch.equal(found[-1].patches, features.patches)
        model = family.extract(member)
        options = {"return_prefix_tokens": True} if kind.name == "vit" else {}
        theirs = model.forward_intermediates(batch, norm=kind.name == "vit", intermediates_only=True, **options)
        assert len(found) == len(theirs)
        for ours, part in zip(found[:-1], theirs[:-1], strict=True):
            cls = part[1][:, 0] if options else part.mean(dim=(2, 3))
            patches = (part[0] if options else part).flatten(2).transpose(1, 2)
            assert relative_error(ours.cls, cls) < 1e-5
            assert relative_error(ours.patches, patches) < 1e-5
