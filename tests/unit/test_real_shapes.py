"""Extraction at the real shapes of every architecture's default space: 224 px, ten sub-networks each."""

import pytest
import torch

from poa.backbones import ARCHITECTURES
from tests.golden.reference import relative_error
from tests.unit.test_extraction import make_family

NUM_EACH = 10


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_all_of_a_spread_of_real_networks_equal_their_timm_models(name):
    config = ARCHITECTURES[name].config()
    assert config.image_size == 224
    family = make_family(config)
    last = len(family.subnets) - 1
    spread = [family.subnets[round(index * last / (NUM_EACH - 1))] for index in range(NUM_EACH)]
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    for subnet in dict.fromkeys(spread):
        model = family.extract(subnet)
        with torch.inference_mode():
            ours = family.supernet([images], subnet)[0]
            theirs = family.supernet.timm_features(model, images)
        assert relative_error(ours.cls, theirs.cls) < 1e-5, subnet
        assert relative_error(ours.patches, theirs.patches) < 1e-5, subnet
    assert len(set(spread)) == NUM_EACH
