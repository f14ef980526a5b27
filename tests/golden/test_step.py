import re

import pytest

from poa.backbones.vit import ElasticViT
from poa.config import HeadsConfig, ObjectiveConfig, ViTConfig
from poa.elastic import Subnet
from poa.objective import PoaModel, Views, student_loss, student_shares, student_terms
from tests.golden.reference import golden_json, golden_tensors, our_backbone_name, relative_error

GOLDEN = golden_json("step")
CASES = GOLDEN["cases"]
LAMBDA = 0.8


def our_name(name):
    if name.startswith("backbone."):
        return "backbone." + our_backbone_name(name.removeprefix("backbone."))
    name = name.replace(".linear.", ".")
    head, layer, rest = (
        re.fullmatch(r"dino_head\.mlp(\d)\.(\d)\.(.+)", name).groups()
        if ".mlp" in name
        else (*re.fullmatch(r"dino_head\.last_layer(\d)\.(.+)", name).groups(), None)
    )
    if rest is None:
        return f"heads.heads.{head}.last_layer.{layer}"
    return f"heads.heads.{head}.fc{int(layer) // 2 + 1}.{rest}"


@pytest.fixture(scope="module")
def views():
    batch = golden_tensors("step_batch")
    return Views(
        global_crops=batch["collated_global_crops"],
        local_crops=batch["collated_local_crops"],
        masks=batch["collated_masks"],
        masked=batch["mask_indices_list"],
        mask_weights=batch["masks_weight"],
    )


def make_model(objective):
    config = ViTConfig(
        widths=(32, 48, 64),
        depths=(2, 3, 4),
        head_dim=16,
        patch_size=8,
        image_size=32,
        init_values=0.1,
        drop_path=0.0,
    )
    heads = HeadsConfig(num_prototypes=(48, 96), hidden_dim=64, bottleneck_dim=32)
    model = PoaModel(ElasticViT(config), heads, objective)
    for branch, file in ((model.student, "step_student_weights"), (model.teacher, "step_teacher_weights")):
        branch.load_state_dict({our_name(name): part for name, part in golden_tensors(file).items()})
    return model


def run_students(model, config, views, network, teacher_temp):
    width, depth = network
    targets = model.teacher_targets(views, teacher_temp)
    shares = student_shares(config, has_elastic=True)
    intact = model.student(views, model.student.backbone.space.intact)
    elastic = model.student(views, Subnet(width, (depth,)))
    terms = (
        student_terms(targets, intact, views, config.student_temp),
        student_terms(targets, elastic, views, config.student_temp, intact.detached()),
    )
    losses = [student_loss(part, config, share) for part, share in zip(terms, shares, strict=True)]
    return targets, (intact, elastic), terms, losses


def run_case(case, views):
    config = ObjectiveConfig(targets=case.get("centering", "sinkhorn").split("_")[0])
    model = make_model(config)
    if not case["activate_ibot"]:
        views = views._replace(masks=None, masked=views.masked[:0], mask_weights=views.mask_weights[:0])
    return model, *run_students(model, config, views, case["network"], case["teacher_temp"])


@pytest.mark.parametrize("name", CASES)
def test_every_loss_term_and_the_total_equal_the_reference(name, views):
    case = CASES[name]
    *_, (intact, elastic), losses = run_case(case, views)
    assert relative_error(sum(losses), case["total_loss"]) < 1e-5
    for head in range(2):
        ours = {
            f"dino_local_crops_loss_{head}": LAMBDA * intact.local[head] + 0.2 * elastic.local[head],
            f"dino_global_crops_loss_{head}": LAMBDA * intact.global_[head] + 0.2 * elastic.global_[head],
            f"distill_local_crops_loss_{head}": elastic.distill_local[head],
            f"distill_global_crops_loss_{head}": elastic.distill_global[head],
            f"ibot_loss_{head}": (LAMBDA * intact.patch[head] + 0.2 * elastic.patch[head]) / 2,
        }
        for key, value in ours.items():
            if key in case["loss_dict"]:
                assert relative_error(value, case["loss_dict"][key]) < 1e-5, key
    koleo = 0.1 * (intact.koleo + elastic.koleo) / 4
    assert relative_error(koleo, case["loss_dict"]["koleo_loss"]) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_every_gradient_norm_equals_the_reference(name, views):
    case = CASES[name]
    model, *_, losses = run_case(case, views)
    for loss in losses:
        loss.backward()
    found = dict(model.student.named_parameters())
    for key, norm in case["grad_norms"].items():
        gradient = found[our_name(key)].grad
        assert abs(float(gradient.norm()) - norm) <= 1e-5 * norm + 1e-9, key
    for key in case["params_without_grad"]:
        gradient = found[our_name(key)].grad
        assert gradient is None or not gradient.any()
    golden = golden_tensors("step_io")
    prefix = f"{name}.grad."
    for key in (key for key in golden if key.startswith(prefix)):
        assert relative_error(found[our_name(key.removeprefix(prefix))].grad, golden[key]) < 1e-5, key


def test_logits_and_targets_of_the_first_case_equal_the_reference(views):
    golden = golden_tensors("step_io")
    _, targets, (intact, elastic), *_ = run_case(CASES["sk_w48_d3"], views)
    num_local = views.local_crops.shape[0]
    num_global = views.global_crops.shape[0]
    for head in range(2):
        teacher = golden[f"sk_w48_d3.teacher_target.dino.head{head}"]
        assert relative_error(targets[head].cls.roll(num_global // 2, 0), teacher) < 1e-5
        patch = golden[f"sk_w48_d3.teacher_target.ibot.head{head}"]
        assert relative_error(targets[head].patch, patch) < 1e-5
        for branch, output in (("intact", intact), ("elastic", elastic)):
            logits = golden[f"sk_w48_d3.student_logits.{branch}.head{head}"][0]
            rows = output.heads[head]
            split = logits.split([num_local, num_global, len(logits) - num_local - num_global])
            assert relative_error(rows.local, split[0]) < 1e-5
            assert relative_error(rows.global_, split[1]) < 1e-5
            assert relative_error(rows.patch, split[2][: rows.patch.shape[0]]) < 1e-5


def test_centring_variant_equals_the_reference_over_its_steps(views):
    model = make_model(ObjectiveConfig(targets="centering"))
    config = ObjectiveConfig(targets="centering")
    for step in GOLDEN["centering_sequence"]:
        if isinstance(step, dict):
            *_, losses = run_students(model, config, views, step["network"], step["teacher_temp"])
            assert relative_error(sum(losses), step["total_loss"]) < 1e-5
            model.targets.update_centers_(keep=True)
    centers = golden_tensors("step_centering")
    for head in range(2):
        assert relative_error(model.targets.cls_centers[head].center, centers[f"dino_center_{head}"]) < 1e-5
        patch = centers[f"ibot_center_{head}"].reshape(1, -1)
        assert relative_error(model.targets.patch_centers[head].center, patch) < 1e-5
