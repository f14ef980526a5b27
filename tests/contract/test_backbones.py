"""What every registered architecture must do, with the smallest configuration of each."""

import pytest
import torch

from poa.backbones import ARCHITECTURES, architecture
from poa.config import ViTConfig, from_dict, to_dict
from poa.elastic import num_params
from poa.errors import ConfigError
from poa.family import Family, FamilyCard, Preprocessing
from tests.golden.reference import relative_error

SMALLEST = {
    "vit": ViTConfig(widths=(16, 32), depths=(1, 2), head_dim=8, patch_size=4, image_size=16, num_channels=2),
}


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


def images(config, size=None):
    size = size or config.image_size
    return torch.randn(3, config.num_channels, size, size, generator=torch.Generator().manual_seed(1))


def test_every_architecture_has_a_smallest_configuration():
    assert set(SMALLEST) == set(ARCHITECTURES)


def test_the_table_of_shapes_is_the_state_dict(kind, config, backbone):
    table = {name: cut.full_shape for name, cut in kind.layout(config).cuts.items()}
    assert table == {name: tuple(tensor.shape) for name, tensor in backbone.state_dict().items()}


def test_every_parameter_learns_in_the_intact_network(config, backbone):
    num_patches = backbone([images(config)], backbone.space.intact)[0].patches.shape[1]
    masks = torch.zeros(3, num_patches, dtype=torch.bool)
    masks[0, 0] = True
    found = backbone([images(config)], backbone.space.intact, [masks])[0]
    weights = torch.randn(found.cls.shape[1])
    ((found.cls * weights).sum() + (found.patches * weights).sum()).backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_features_have_the_subnets_width(config, backbone):
    for subnet in backbone.space.subnets:
        found = backbone([images(config)], subnet)[0]
        assert found.cls.shape == (3, subnet.width)
        assert found.patches.shape[0] == 3
        assert found.patches.shape[2] == subnet.width


def test_a_masked_patch_is_not_seen(config, backbone):
    num_patches = backbone([images(config)], backbone.space.intact)[0].patches.shape[1]
    masks = torch.ones(3, num_patches, dtype=torch.bool)
    first = backbone([images(config)], backbone.space.intact, [masks])[0]
    second = backbone([images(config) + 1.0], backbone.space.intact, [masks])[0]
    torch.testing.assert_close(first.cls, second.cls)


def test_every_extracted_network_equals_its_subnet_and_counts_right(kind, config, backbone):
    how = Preprocessing(config.image_size, config.num_channels, (0.5,), (0.5,))
    family = Family(FamilyCard(kind, config, how), backbone)
    for subnet in family.subnets:
        model = family.extract(subnet)
        with torch.inference_mode():
            assert relative_error(model(images(config)), family.features(images(config), subnet)) < 1e-5
        assert sum(part.numel() for part in model.parameters()) == num_params(backbone.layout, subnet)
        assert 0 < kind.flops(config, subnet, None) <= kind.flops(config, family.space.intact, None)


def test_layers_rise_from_the_embedding_to_the_top(backbone):
    layers = [backbone.layer_of(name) for name, _ in backbone.named_parameters()]
    assert min(layers) == 0
    assert max(layers) == backbone.num_layers() - 1


def test_fresh_weights_are_a_function_of_the_generator(kind, config):
    states = []
    for seed in (0, 0, 1):
        backbone = kind.build(config)
        backbone.init_weights_(torch.Generator().manual_seed(seed))
        states.append(torch.cat([part.flatten() for part in backbone.state_dict().values()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_the_configuration_survives_its_dictionary(kind, config):
    assert from_dict(kind.config, to_dict(config), "test") == config
    assert architecture(config) is kind


def test_an_unknown_architecture_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match=r"Architectures: .*vit"):
        architecture("vgg")
