import re

import pytest
import torch

from poa.backbones.resnet import ElasticResNet
from poa.backbones.resnet_layout import resnet_layout, resnet_space
from poa.config import HeadsConfig, OptimConfig, ResNetConfig
from poa.elastic import Subnet
from poa.objective import ProjectionHeads
from poa.objective.poa import Branch
from poa.train.optim import parameter_multipliers
from tests.golden.reference import golden_json, golden_tensors, relative_error

CONFIG = ResNetConfig(
    widths=(8, 12, 16),
    stage2_depths=(1, 2),
    stage3_depths=(1, 2, 3),
    outer_depths=(1, 1),
    base_channels=8,
    stem_channels=8,
    num_groups=4,
    image_size=64,
)
GOLDEN = golden_json("resnet")
NETWORKS = golden_json("networks")
NAMES = [f"w{width}_d{'-'.join(map(str, depths))}" for width in CONFIG.widths for depths in GOLDEN["depths"]]

DECAYED_BY_THE_REFERENCE_ALONE = {f"layer{stage}.0.downsample.1.weight" for stage in (1, 2, 3, 4)}
"""The gains of the shortcuts' norms, which it does not recognise by their names."""


def our_name(name):
    name = name.replace(".layers.", ".").replace(".conv.", ".")
    return re.sub(r"\bnorm(\d)\.", r"bn\1.", name)


def subnet_of(name):
    width, _, second, third, _ = map(int, re.findall(r"\d+", name))
    return Subnet(width, (second, third))


@pytest.fixture(scope="module")
def resnet():
    weights = {our_name(name): part.float() for name, part in golden_tensors("resnet_weights_f16").items()}
    model = ElasticResNet(CONFIG)
    model.load_state_dict({**weights, "mask_token": weights["mask_token"].flatten(1)})
    return model.eval()


@pytest.fixture(scope="module")
def io():
    return golden_tensors("resnet_io.part0", "resnet_io.part1")


@pytest.mark.parametrize("case", ["64", "64_mask", "48"])
@pytest.mark.parametrize("name", NAMES)
def test_subnet_outputs_equal_the_reference(resnet, io, name, case):
    masks = [io["mask64"].bool()] if case.endswith("mask") else None
    with torch.inference_mode():
        found = resnet([io[f"x{case[:2]}"]], subnet_of(name), masks)[0]
    assert relative_error(found.cls, io[f"{name}.{case}.cls"]) < 1e-5
    assert relative_error(found.patches, io[f"{name}.{case}.patch"]) < 1e-5


def test_the_golden_space_is_ours():
    assert {subnet_of(name) for name in NAMES} == set(resnet_space(CONFIG).subnets)


def test_kept_blocks_equal_the_reference():
    stages = dict(zip((1, 2), resnet_layout(CONFIG).stages, strict=True))
    for number, stage in stages.items():
        for depth, blocks in GOLDEN["block_indices"][str(number)].items():
            assert list(stage.kept(int(depth))) == blocks
    for stage in resnet_layout(ResNetConfig()).stages:
        expected = NETWORKS["resnet_stage_block_indices"][stage.prefix.replace("layer", "stage")]
        assert expected
        for depth, blocks in expected.items():
            assert list(stage.kept(int(depth))) == blocks


def test_the_default_space_draws_as_the_reference():
    golden = NETWORKS["resnet_default"]
    expected = {Subnet(widths[0], (depths[1], depths[2])): count for widths, depths, count in golden["networks"]}
    space = resnet_space(ResNetConfig())
    assert space.multiplicities == expected
    assert list(space.multiplicities) == list(expected)
    assert len(space.draw_list) == golden["samplable_entries"]


def test_multipliers_of_every_parameter_equal_the_reference_but_for_the_shortcuts_gains():
    heads = HeadsConfig(num_prototypes=(64,), hidden_dim=64, bottleneck_dim=32)
    with torch.device("meta"):
        backbone = ElasticResNet(ResNetConfig())
        student = Branch(backbone, ProjectionHeads(backbone.layout.features, heads))
    ours = parameter_multipliers(student, OptimConfig(layer_decay=0.95))
    expected = {our_name(name): entry for name, *entry in golden_json("param_groups_resnet")}
    assert sorted(expected) == sorted(name for name in ours if name.startswith("backbone."))
    for name, (lr, weight_decay, _) in expected.items():
        assert ours[name].lr == pytest.approx(lr, rel=1e-8), name
        decays = 0.0 if name.removeprefix("backbone.") in DECAYED_BY_THE_REFERENCE_ALONE else weight_decay
        assert ours[name].weight_decay == decays, name
