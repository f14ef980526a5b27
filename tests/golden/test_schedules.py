import pytest
import torch

from poa.backbones.vit import ElasticViT
from poa.config import HeadsConfig, OptimConfig, PretrainConfig, TrainConfig, ViTConfig
from poa.elastic import SearchSpace, Subnet
from poa.objective import ProjectionHeads
from poa.objective.poa import Branch
from poa.train.optim import parameter_multipliers
from poa.train.schedules import make_schedules
from tests.golden.reference import golden_json, golden_tensors
from tests.golden.test_step import our_name

GOLDEN = golden_json("schedules")
NETWORKS = golden_json("networks")
FIELDS = {
    "lr": "lr",
    "wd": "weight_decay",
    "momentum": "ema_momentum",
    "teacher_temp": "teacher_temp",
    "last_layer_lr": "last_layer_lr",
}
SCALES = ("1.0", "0.9", "0.78")
TOLERANCE = 1e-9


def small_run(scale):
    optim = OptimConfig(warmup_epochs=1, schedule_stretch=1 / float(scale))
    return make_schedules(PretrainConfig(optim=optim, train=TrainConfig(epochs=5, batch_size=1024)), 20)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("scale", SCALES)
def test_every_schedule_equals_the_reference_at_every_step(scale, name):
    expected = golden_tensors("schedules")[f"scale{scale}.{name}"].tolist()
    schedules = small_run(scale)
    assert schedules.num_steps == 100
    ours = [getattr(schedules.at(step), FIELDS[name]) for step in range(len(expected))]
    assert len(expected) == GOLDEN["lengths"][f"scale{scale}.{name}"]
    assert ours == pytest.approx(expected, rel=TOLERANCE, abs=1e-15)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("scale", SCALES)
def test_after_its_end_every_schedule_has_its_final_value(scale, name):
    length = GOLDEN["lengths"][f"scale{scale}.{name}"]
    for step in (length, length + 1, 10 * length):
        assert getattr(small_run(scale).at(step), FIELDS[name]) == GOLDEN["final_value"][name]


@pytest.mark.parametrize("name", FIELDS)
def test_schedules_of_the_published_vit_run_equal_the_reference(name):
    golden = GOLDEN["vit_ee1200"]
    optim = OptimConfig(warmup_epochs=golden["warmup_epochs"], schedule_stretch=1 / 0.78)
    schedules = make_schedules(PretrainConfig(optim=optim, train=TrainConfig(epochs=346, batch_size=1600)), 800)
    assert schedules.num_steps == golden["iterations"][-1]
    ours = [getattr(schedules.at(step), FIELDS[name]) for step in golden["iterations"]]
    assert ours == pytest.approx(golden[name], rel=TOLERANCE, abs=1e-15)


def test_multipliers_of_every_parameter_equal_the_reference():
    heads = HeadsConfig(num_prototypes=(64, 128), hidden_dim=64, bottleneck_dim=32)
    config = ViTConfig()
    with torch.device("meta"):
        backbone = ElasticViT(config)
        student = Branch(backbone, ProjectionHeads(backbone.layout.features, heads))
    ours = parameter_multipliers(student, OptimConfig())
    expected = {our_name(name): entry for name, *entry in golden_json("param_groups_vit")}
    assert sorted(ours) == sorted(expected)
    for name, (lr, weight_decay, is_last_layer) in expected.items():
        assert ours[name].lr == pytest.approx(lr, rel=1e-8), name
        assert ours[name].weight_decay == weight_decay, name
        assert (ours[name].rate == "last_layer_lr") == is_last_layer, name


def resnet_space():
    return SearchSpace((64, 96, 128), (tuple(range(4, 9)), tuple(range(6, 37))), width_emphasis=1.0, depth_emphasis=2.0)


def test_resnets_stand_in_the_list_as_often_as_in_the_reference():
    golden = NETWORKS["resnet_default"]
    expected = {Subnet(widths[0], (depths[1], depths[2])): count for widths, depths, count in golden["networks"]}
    space = resnet_space()
    assert space.multiplicities == expected
    assert list(space.multiplicities) == list(expected)
    assert len(space) == golden["distinct"]
    assert len(space.draw_list) == golden["samplable_entries"]
