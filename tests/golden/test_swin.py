import re

import pytest
import torch

from poa.backbones.swin import ElasticSwin, windows_of
from poa.backbones.swin_layout import alternating_blocks, swin_space
from poa.config import HeadsConfig, OptimConfig, SwinConfig
from poa.elastic import Subnet
from poa.objective import ProjectionHeads
from poa.objective.poa import Branch
from poa.train.optim import parameter_multipliers
from tests.golden.reference import golden_json, golden_tensors, our_backbone_name, relative_error
from tests.golden.test_step import our_name as our_head_name

CONFIG = SwinConfig(
    widths=(8, 12, 16),
    depths=(2, 3, 4, 5, 6),
    head_dim=4,
    window_size=4,
    image_size=64,
    always_partition=True,
    drop_path=0.0,
)
CASES = ("64", "64_mask", "24")


def our_name(name):
    """Ours, or None where timm has no such parameter: the norms after stages 1 to 3."""
    if re.match(r"norm[012]\.", name):
        return None
    name = our_backbone_name(name).replace(".w_msa.", ".").replace(".ffn.", ".mlp.").replace("stages.", "layers.")
    if name.startswith("norm3."):
        return name.replace("norm3.", "norm.")
    return re.sub(r"layers\.(\d)\.downsample", lambda found: f"layers.{int(found[1]) + 1}.downsample", name)


def columns_first(tensor):
    """The four neighbours that are merged go along the rows first in the reference, along the columns in timm."""
    return tensor.unflatten(-1, (2, 2, -1)).transpose(-3, -2).flatten(-3)


def our_state(weights):
    state = {}
    for name, tensor in weights.items():
        ours = our_name(name)
        if ours is not None and not name.endswith("position_index"):
            state[ours] = columns_first(tensor.float()) if ".downsample." in name else tensor.float()
    return state


@pytest.fixture(scope="module")
def swin():
    model = ElasticSwin(CONFIG)
    model.load_state_dict(our_state(golden_tensors("swin_weights_f16.part0", "swin_weights_f16.part1")))
    return model.eval()


@pytest.fixture(scope="module")
def io():
    return golden_tensors("swin_exact_io")


def features(swin, io, name, case):
    masks = [io["mask64"]] if case.endswith("mask") else None
    with torch.inference_mode():
        return swin([io[f"x{case[:2]}"]], Subnet.parse(name), masks)[0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", [f"w{w}-d{d}" for w in (8, 12, 16) for d in (2, 3, 4, 5, 6)])
def test_subnet_outputs_equal_the_reference_under_our_two_rules(swin, io, name, case):
    found = features(swin, io, name, case)
    key = f"{name.replace('-', '_')}.{case}"
    assert relative_error(found.cls, io[f"{key}.cls"]) < 1e-5
    assert relative_error(found.patches, io[f"{key}.patch"]) < 1e-5


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["w16-d6", "w16-d2"])
def test_where_the_rules_agree_outputs_equal_the_reference_as_it_is(swin, io, name, case):
    found = features(swin, io, name, case)
    expected = golden_tensors("swin_io_full_width")
    key = f"{name.replace('-', '_')}.{case}"
    assert relative_error(found.cls, expected[f"{key}.cls"]) < 1e-5
    assert relative_error(found.patches, expected[f"{key}.patch"]) < 1e-5


def test_pairs_of_places_read_the_rows_of_the_table_that_they_read_in_the_reference():
    ours = windows_of((4, 4), 4, True, False, torch.device("cpu")).offsets
    theirs = golden_tensors("swin_weights_f16.part0")
    indices = [index for name, index in theirs.items() if name.endswith("position_index")]
    assert len(indices) == 12
    assert all(torch.equal(ours, index) for index in indices)


def test_kept_blocks_are_those_of_the_golden_outputs():
    expected = golden_json("swin_blocks")["swin_exact"]
    assert {str(depth): list(alternating_blocks(6, depth)) for depth in CONFIG.depths} == expected


def test_default_subnets_stand_in_the_list_as_often_as_in_the_reference():
    golden = golden_json("networks")["swin_default"]
    space = swin_space(SwinConfig())
    expected = {Subnet(width, (depth,)): count for width, depth, count in golden["networks"]}
    assert space.multiplicities == expected
    assert len(space) == golden["distinct"]
    assert len(space.draw_list) == golden["samplable_entries"]


def test_multipliers_of_every_parameter_equal_the_reference():
    heads = HeadsConfig(num_prototypes=(64, 128), hidden_dim=64, bottleneck_dim=32)
    with torch.device("meta"):
        backbone = ElasticSwin(SwinConfig())
        student = Branch(backbone, ProjectionHeads(backbone.layout.features, heads))
    ours = parameter_multipliers(student, OptimConfig())
    expected = {}
    for name, *entry in golden_json("param_groups_swin"):
        inner = name.removeprefix("backbone.")
        target = our_head_name(name) if inner == name else our_name(inner)
        if target is not None:
            expected[target if inner == name else f"backbone.{target}"] = entry
    assert sorted(ours) == sorted(expected)
    for name, (lr, weight_decay, _) in expected.items():
        assert ours[name].lr == pytest.approx(lr, rel=1e-8), name
        assert ours[name].weight_decay == weight_decay, name
