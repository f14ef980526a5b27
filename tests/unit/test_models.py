import numpy as np
import pytest
import timm
import torch
from PIL import Image

from poa.backbones import ARCHITECTURES
from poa.data import eval_transform, normalize
from poa.errors import CheckpointError, ConfigError, SubnetError
from poa.family import Family, FamilyCard, Preprocessing
from poa.models import FamilyMember, TimmCandidate, family_members, open_models, preprocessing_of_timm
from tests.contract.configs import SMALLEST


@pytest.fixture(params=sorted(ARCHITECTURES))
def family(request):
    config = SMALLEST[request.param]
    kind = ARCHITECTURES[request.param]
    backbone = kind.build(config)
    backbone.init_weights_(torch.Generator().manual_seed(0))
    how = Preprocessing(config.image_size, config.num_channels, (0.5,), (0.5,))
    return Family(FamilyCard(kind, config, how, weights_sha256="x"), backbone)


def images_of(how, height=None, width=None):
    shape = (2, how.num_channels, height or how.image_size, width or height or how.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_a_sub_network_and_the_directory_cut_for_it_are_the_same_candidate(family, tmp_path):
    subnet = family.subnets[0]
    family.save(tmp_path / "family")
    family.save_subnet(subnet, tmp_path / "net")
    ours, theirs = open_models([str(tmp_path / "family"), str(tmp_path / "net")], [str(subnet)])
    assert isinstance(ours, FamilyMember)
    assert isinstance(theirs, TimmCandidate)
    assert (ours.name, theirs.name) == (f"family/{subnet}", "net")
    assert (ours.num_params, ours.num_features) == (theirs.num_params, theirs.num_features)
    assert (ours.preprocessing.image_size, ours.preprocessing.mean) == (
        theirs.preprocessing.image_size,
        theirs.preprocessing.mean[:1],
    )
    images = images_of(ours.preprocessing)
    torch.testing.assert_close(ours.features(images).cls, theirs.features(images).cls, rtol=1e-4, atol=1e-5)
    for one, other in zip(ours.last_blocks(images, 4), theirs.last_blocks(images, 4), strict=True):
        torch.testing.assert_close(one.cls, other.cls, rtol=1e-4, atol=1e-5)


def test_a_network_to_be_trained_is_a_copy_that_gives_the_same_and_learns(family):
    for member in family_members(family)[:2]:
        network = member.network(drop_path=0.1)
        images = images_of(member.preprocessing)
        torch.testing.assert_close(network(images), member.features(images).cls, rtol=1e-4, atol=1e-5)
        assert all(parameter.requires_grad for parameter in network.parameters())
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.zero_()
        assert member.features(images).cls.abs().sum() > 0


def test_a_network_takes_images_that_are_no_squares(family):
    size = family.card.preprocessing.image_size
    for member in family_members(family)[:1]:
        network = member.network((size, 2 * size))
        maps = network.forward_intermediates(images_of(member.preprocessing, size, 2 * size), intermediates_only=True)
        assert maps[-1].shape[-1] == 2 * maps[-1].shape[-2]


def test_untrained_networks_are_a_function_of_the_seed(family, tmp_path):
    family.save(tmp_path / "family")
    family.save_subnet(family.subnets[0], tmp_path / "net")
    for spec in ("family", "net"):
        one, same, other = (
            open_models([str(tmp_path / spec)], ["smallest"], untrained_seed=seed)[0] for seed in (0, 0, 1)
        )
        images = images_of(one.preprocessing)
        assert torch.equal(one.features(images).cls, same.features(images).cls)
        assert not torch.equal(one.features(images).cls, other.features(images).cls)
        assert one.name.endswith(" untrained")
        assert one.fingerprint == same.fingerprint != other.fingerprint


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18", "convnext_atto", "test_vit", "test_efficientnet"])
def test_any_timm_model_gives_the_vectors_that_timm_gives(name):
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=0).eval()
    candidate = TimmCandidate(model, f"timm:{name}", "")
    images = images_of(candidate.preprocessing)
    with torch.inference_mode():
        assert torch.equal(candidate.features(images).cls, model(images))
        assert torch.equal(candidate.last_blocks(images, 4)[-1].cls, model(images))
        assert len(candidate.last_blocks(images, 4)) >= min(4, len(model.feature_info))
    assert candidate.num_features == model(images).shape[1]
    assert candidate.flops > 1e6


def test_preprocessing_is_timms_own():
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False)
    how = preprocessing_of_timm(model)
    data = timm.data.resolve_data_config({}, model=model)
    assert (how.mean, how.std, how.crop_pct) == (data["mean"], data["std"], data["crop_pct"])
    transform = timm.data.create_transform(**data)
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (300, 260, 3), dtype=np.uint8))
    ours = eval_transform(image, how.image_size, how.crop_pct, how.interpolation)
    torch.testing.assert_close(normalize(torch.from_numpy(ours), how.mean, how.std), transform(image))


@pytest.mark.parametrize(
    ("specs", "subnets", "error", "words"),
    [
        ([], ["all"], ConfigError, "no network is named"),
        (["timm:resnet5O"], ["all"], ConfigError, "timm has no model 'resnet5O'"),
        (["nowhere"], ["all"], CheckpointError, "there is no nowhere"),
    ],
)
def test_networks_that_are_not_there_are_refused(specs, subnets, error, words):
    with pytest.raises(error, match=words):
        open_models(specs, subnets)


def test_a_directory_without_a_network_and_a_sub_network_that_is_not_there_are_refused(family, tmp_path):
    with pytest.raises(CheckpointError, match="holds no network"):
        open_models([str(tmp_path)])
    family.save(tmp_path / "family")
    with pytest.raises(SubnetError):
        open_models([str(tmp_path / "family")], ["w1-d1"])


def test_an_image_size_that_does_not_fit_the_patches_is_refused_with_the_nearest():
    model = timm.create_model("test_vit", pretrained=False, num_classes=0)
    with pytest.raises(ConfigError, match="the nearest is 96×128"):
        TimmCandidate(model, "timm:test_vit", "").network((100, 130))
