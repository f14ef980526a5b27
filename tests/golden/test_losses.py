import pytest
import torch

from poa.objective.losses import cross_entropy, distillation_loss, koleo_loss, patch_loss
from poa.objective.targets import CenteredTargets, sinkhorn_knopp
from tests.golden.reference import golden_json, golden_tensors, relative_error

VALUES = golden_json("losses")["values"]


@pytest.fixture(scope="module")
def golden():
    return golden_tensors("losses")


@pytest.mark.parametrize("temp", ["0.04", "0.07"])
@pytest.mark.parametrize("size", ["B12_K64", "B37_K96", "B3_K200", "B4_K16"])
def test_sinkhorn_knopp_equals_the_reference(golden, size, temp):
    ours = sinkhorn_knopp(golden[f"sinkhorn.{size}.logits"], float(temp))
    assert relative_error(ours, golden[f"sinkhorn.{size}.T{temp}"]) < 1e-5


def test_sinkhorn_knopp_stays_finite_for_any_spread():
    logits = torch.randn(8, 32)
    logits[3] -= 500.0
    logits[:, 5] -= 500.0
    targets = sinkhorn_knopp(logits, 0.04)
    assert targets.isfinite().all()
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(8))


@pytest.mark.parametrize("kind", ["dino", "ibot"])
@pytest.mark.parametrize("head", [0, 1])
def test_centred_targets_equal_the_reference_over_three_calls(golden, kind, head):
    size = golden[f"center.step0.{kind}_in{head}"].shape[-1]
    centering = CenteredTargets(size, 0.9)
    for step, temp in enumerate((0.04, 0.05, 0.07)):
        logits = golden[f"center.step{step}.{kind}_in{head}"].reshape(-1, size)
        expected = golden[f"center.step{step}.{kind}_target{head}"].reshape(-1, size)
        assert relative_error(centering(logits, temp), expected) < 1e-5
        centering.update_center_(keep=True)
    assert relative_error(centering.center, golden[f"center.final_{kind}{head}"].reshape(1, size)) < 1e-5


def test_cross_entropy_equals_the_reference_and_is_linear_in_the_targets(golden):
    students, targets = golden["dino_ce.student"], golden["dino_ce.target"]
    apart = sum(cross_entropy(q, z, 0.1).mean() for q in targets for z in students)
    added = sum(cross_entropy(targets.sum(dim=0), z, 0.1).mean() for z in students)
    assert relative_error(apart, VALUES["dino_ce"]) < 1e-5
    assert relative_error(added, VALUES["dino_ce"]) < 1e-5


def test_patch_loss_equals_the_reference(golden):
    rows = golden["ibot.masks"].shape[0]
    ours = patch_loss(golden["ibot.target"], golden["ibot.student"], golden["ibot.masks_weight"], 0.1, rows)
    assert relative_error(ours, VALUES["ibot_forward_masked"]) < 1e-5


def test_koleo_and_its_gradient_equal_the_reference(golden):
    x = golden["koleo.x"].clone().requires_grad_()
    loss = koleo_loss(x)
    loss.backward()
    assert relative_error(loss, VALUES["koleo"]) < 1e-5
    assert relative_error(x.grad, golden["koleo.grad"]) < 1e-5


def test_koleo_is_computed_in_float32_under_autocast(golden):
    close = torch.nn.functional.normalize(golden["koleo.x"][:1] + 1e-3 * golden["koleo.x"], dim=-1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = koleo_loss(close)
    assert relative_error(mixed, koleo_loss(close)) < 1e-6


def test_distillation_equals_the_reference_and_leaves_the_intact_student_alone(golden):
    intact = golden["distill.intact"].clone().requires_grad_()
    elastic = golden["distill.elastic"].clone().requires_grad_()
    loss = distillation_loss(intact, elastic, 0.1)
    loss.backward()
    assert relative_error(loss, VALUES["distill"]) < 1e-5
    assert intact.grad is None
    assert elastic.grad is not None
