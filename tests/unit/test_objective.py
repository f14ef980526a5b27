import math

import pytest
import torch

from poa.backbones.vit import ElasticViT, _add_rows, _select_rows
from poa.config import HeadsConfig, ObjectiveConfig, ViTConfig
from poa.elastic import Subnet, elastic
from poa.objective import (
    PoaModel,
    ProjectionHeads,
    Views,
    ema_update_,
    student_loss,
    student_shares,
    student_terms,
)
from poa.objective.losses import global_loss, koleo_loss, local_loss, patch_loss
from poa.objective.targets import Targets, sinkhorn_knopp
from tests.golden.reference import relative_error

CONFIG = ViTConfig(
    widths=(16, 32), depths=(1, 2), head_dim=16, patch_size=4, image_size=16, num_channels=1, init_values=0.1
)
HEADS = HeadsConfig(num_prototypes=(12, 20), hidden_dim=32, bottleneck_dim=16)
SMALL = Subnet(16, (1,))
NUM_IMAGES, NUM_LOCAL = 4, 3


def make_model(objective=None, drop_path=0.0):
    model = PoaModel(
        ElasticViT(ViTConfig(**{**vars(CONFIG), "drop_path": drop_path})), HEADS, objective or ObjectiveConfig()
    )
    model.init_weights_(torch.Generator().manual_seed(0))
    with torch.no_grad():
        rng = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng), alpha=0.1)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


def make_views(num_local=NUM_LOCAL, masked=True):
    rng = torch.Generator().manual_seed(2)
    masks = torch.zeros(2 * NUM_IMAGES, 16, dtype=torch.bool)
    if masked:
        masks[1, :5] = True
        masks[6, 3:9] = True
    weights = (1.0 / masks.sum(dim=1, keepdim=True).clamp(min=1)).expand(masks.shape)[masks]
    return Views(
        torch.randn(2 * NUM_IMAGES, 1, 16, 16, generator=rng),
        torch.randn(num_local * NUM_IMAGES, 1, 8, 8, generator=rng),
        masks if masked else None,
        masks.flatten().nonzero().squeeze(1),
        weights,
    )


def terms_of(model, views, subnet=SMALL, temp=0.1):
    targets = model.teacher_targets(views, 0.05)
    intact = model.student(views, model.student.backbone.space.intact)
    elastic = model.student(views, subnet)
    return (
        student_terms(targets, intact, views, temp),
        student_terms(targets, elastic, views, temp, intact.detached()),
    )


def total_of(terms, config):
    shares = student_shares(config, has_elastic=True)
    return sum(student_loss(part, config, share) for part, share in zip(terms, shares, strict=True))


def test_teacher_moves_by_exactly_the_complement_of_its_momentum():
    model = make_model()
    before = [parameter.clone() for parameter in model.teacher.parameters()]
    student = [parameter.detach().clone() for parameter in model.student.parameters()]
    ema_update_(model.teacher, model.student, 0.75)
    for new, old, towards in zip(model.teacher.parameters(), before, student, strict=True):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * towards, rtol=1e-6, atol=1e-7)
    for ours, theirs in zip(model.student.parameters(), student, strict=True):
        assert torch.equal(ours, theirs)


def test_momentum_one_keeps_the_teacher_and_zero_copies_the_student():
    model = make_model()
    before = [parameter.clone() for parameter in model.teacher.parameters()]
    ema_update_(model.teacher, model.student, 1.0)
    assert all(map(torch.equal, model.teacher.parameters(), before))
    ema_update_(model.teacher, model.student, 0.0)
    assert all(map(torch.equal, model.teacher.parameters(), model.student.parameters()))


def test_fresh_teacher_equals_the_student_and_takes_no_gradient():
    model = PoaModel(ElasticViT(CONFIG), HEADS, ObjectiveConfig())
    model.init_weights_(torch.Generator().manual_seed(0))
    assert all(map(torch.equal, model.teacher.parameters(), model.student.parameters()))
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())
    assert all(parameter.requires_grad for parameter in model.student.parameters())


def test_only_the_first_layer_of_a_head_is_cut():
    heads = ProjectionHeads(elastic(32, 32), HEADS)
    heads.init_weights_(torch.Generator().manual_seed(0))
    x = torch.randn(5, 16)
    padded = torch.cat([x * 2.0, torch.randn(5, 16)], dim=1)
    with torch.no_grad():
        for head in heads.heads:
            head.fc1.weight[:, 16:] = 0.0
        for narrow, wide in zip(heads(x, 16), heads(padded, 32), strict=True):
            torch.testing.assert_close(narrow, wide, rtol=1e-4, atol=1e-5)
            assert narrow.shape == wide.shape
    sum(logits.square().sum() for logits in heads(x, 16)).backward()
    for head in heads.heads:
        assert head.fc1.weight.grad[:, 16:].abs().sum() == 0
        assert head.fc1.weight.grad[:, :16].abs().sum() > 0
        assert head.last_layer.weight_v.grad.abs().sum(dim=1).min() > 0


def test_logits_are_cosines_times_the_prototypes_lengths():
    heads = ProjectionHeads(elastic(32, 32), HEADS)
    heads.init_weights_(torch.Generator().manual_seed(0))
    logits = heads(torch.randn(50, 32) * 100, 32)[0]
    assert logits.abs().max() <= 1.0 + 1e-5
    with torch.no_grad():
        heads.heads[0].last_layer.weight_v.mul_(7.0)
        heads.heads[0].last_layer.weight_g.mul_(3.0)
    x = torch.randn(5, 32)
    assert heads(x, 32)[0].abs().max() <= 3.0 + 1e-5


@pytest.mark.parametrize("temp", [0.04, 0.07, 1.0])
@pytest.mark.parametrize("shape", [(1, 5), (7, 3), (3, 200), (64, 64)])
def test_sinkhorn_rows_sum_to_one_and_prototypes_are_used_alike(shape, temp):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    targets = sinkhorn_knopp(logits, temp)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(shape[0]))
    assert (targets >= 0).all()
    even = sinkhorn_knopp(logits, temp, iterations=2000)
    torch.testing.assert_close(even.sum(dim=0), torch.full((shape[1],), shape[0] / shape[1]), rtol=0.02, atol=1e-3)


def test_sinkhorn_does_not_see_a_constant_added_to_a_row_or_a_prototype():
    logits = torch.randn(8, 12)
    shifted = logits + torch.randn(8, 1) + torch.randn(1, 12)
    torch.testing.assert_close(
        sinkhorn_knopp(logits, 0.5, 500), sinkhorn_knopp(shifted, 0.5, 500), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["sinkhorn", "centering"])
def test_no_rows_give_no_targets_and_leave_the_centre_alone(kind):
    targets = Targets(ObjectiveConfig(targets=kind), (6,))
    assert targets(torch.empty(0, 6), 0, 0.05, patches=True).shape == (0, 6)
    for center in targets.patch_centers:
        assert not center.center.any()


def test_class_vectors_and_patches_have_centres_of_their_own():
    targets = Targets(ObjectiveConfig(targets="centering"), (6, 8))
    targets(torch.randn(5, 8), 1, 0.05, patches=False)
    assert not targets.cls_centers[1].center.any()
    targets.update_centers_(keep=True)
    assert targets.cls_centers[1].center.any()
    assert not targets.patch_centers[1].center.any()
    assert not targets.cls_centers[0].center.any()


def test_a_step_that_does_not_count_leaves_the_centre_where_it_was():
    targets = Targets(ObjectiveConfig(targets="centering"), (6,))
    targets(torch.full((5, 6), float("nan")), 0, 0.05, patches=False)
    targets.update_centers_(keep=False)
    targets(torch.ones(5, 6), 0, 0.05, patches=False)
    targets.update_centers_(keep=True)
    torch.testing.assert_close(targets.cls_centers[0].center, torch.full((1, 6), 0.1))


def test_without_local_crops_their_losses_are_zero_and_gradients_are_finite(model):
    terms = terms_of(model, make_views(num_local=0))
    for student in terms:
        assert student.local.tolist() == [0.0, 0.0]
        assert student.global_.min() > 0
    assert terms[1].distill_local.tolist() == [0.0, 0.0]
    assert terms[1].distill_global.min() > 0
    total_of(terms, ObjectiveConfig()).backward()
    assert all(part.grad is None or part.grad.isfinite().all() for part in model.student.parameters())
    model.zero_grad()


def test_without_masks_the_patch_loss_is_zero_and_gradients_are_finite(model):
    terms = terms_of(model, make_views(masked=False))
    for student in terms:
        assert student.patch.tolist() == [0.0, 0.0]
    total_of(terms, ObjectiveConfig()).backward()
    assert model.student.backbone.mask_token.grad is None
    assert all(part.grad is None or part.grad.isfinite().all() for part in model.student.parameters())
    model.zero_grad()


def test_without_an_elastic_student_the_intact_one_has_all_the_weight(model):
    config = ObjectiveConfig(koleo_weight=0.3, patch_weight=0.7, class_weight=1.3)
    terms, _ = terms_of(model, make_views())
    assert terms.distill_local is terms.distill_global is None
    share, none = student_shares(config, has_elastic=False)
    expected = 1.3 * (terms.local + terms.global_).mean() + 0.7 * terms.patch.mean() + 0.3 * terms.koleo
    torch.testing.assert_close(student_loss(terms, config, share), expected)
    assert tuple(none) == (0.0, 0.0)


def test_total_weighs_the_students_and_the_distillation_as_configured(model):
    intact, elastic = terms_of(model, make_views())
    config = ObjectiveConfig(
        intact_weight=0.6, class_weight=2.0, patch_weight=3.0, distill_weight=5.0, koleo_weight=0.5
    )
    losses = [2.0 * (part.local + part.global_).mean() + 3.0 * part.patch.mean() for part in (intact, elastic)]
    distill = 5.0 * (elastic.distill_local + elastic.distill_global).mean()
    expected = 0.6 * losses[0] + 0.4 * (losses[1] + distill) + 0.25 * (intact.koleo + elastic.koleo)
    torch.testing.assert_close(total_of((intact, elastic), config), expected)


def test_an_elastic_student_that_is_the_intact_one_has_the_same_losses(model):
    intact, elastic = terms_of(model, make_views(), subnet=model.student.backbone.space.intact)
    assert all(map(torch.equal, intact[:4], elastic[:4]))


def test_distillation_teaches_the_elastic_student_alone(model):
    views = make_views()
    intact = model.student(views, model.student.backbone.space.intact)
    elastic = model.student(views, SMALL)
    targets = model.teacher_targets(views, 0.05)
    terms = student_terms(targets, elastic, views, 0.1, intact)
    intact_logits = [rows for head in intact.heads for rows in (head.global_, head.local)]
    loss = (terms.distill_local + terms.distill_global).sum()
    found = torch.autograd.grad(loss, intact_logits, allow_unused=True, retain_graph=True)
    assert found == (None,) * len(intact_logits)
    assert all(part.any() for part in torch.autograd.grad(loss, [head.global_ for head in elastic.heads]))


def permuted(views, order):
    def rows(x, groups):
        return x.unflatten(0, (groups, NUM_IMAGES))[:, order].flatten(0, 1)

    masks = rows(views.masks, 2)
    return Views(
        rows(views.global_crops, 2),
        rows(views.local_crops, NUM_LOCAL),
        masks,
        masks.flatten().nonzero().squeeze(1),
        (1.0 / masks.sum(dim=1, keepdim=True).clamp(min=1)).expand(masks.shape)[masks],
    )


def swapped(views):
    order = torch.arange(2 * NUM_IMAGES).roll(NUM_IMAGES)
    masks = views.masks[order]
    return Views(
        views.global_crops[order],
        views.local_crops,
        masks,
        masks.flatten().nonzero().squeeze(1),
        (1.0 / masks.sum(dim=1, keepdim=True).clamp(min=1)).expand(masks.shape)[masks],
    )


@pytest.mark.parametrize(
    "change", [lambda views: permuted(views, [2, 0, 3, 1]), swapped], ids=["order of the images", "order of the views"]
)
def test_losses_do_not_depend_on(model, change):
    before, after = terms_of(model, make_views()), terms_of(model, change(make_views()))
    for ours, theirs in zip(before[0][:4] + before[1], after[0][:4] + after[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_global_loss_compares_each_view_with_the_other_one():
    views = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    logits = torch.tensor([[9.0, 0.0], [0.0, 9.0]])
    crossed, straight = global_loss(views, logits, 1.0, 0), global_loss(views.flip(0), logits, 1.0, 0)
    assert crossed < 0.001
    assert straight > 8


def test_perfect_prediction_of_one_hot_targets_costs_nothing():
    targets = torch.eye(6).repeat(2, 1)
    logits = 100 * torch.eye(6)
    assert local_loss(targets, logits.repeat(3, 1), 1.0) < 1e-6
    assert patch_loss(targets, logits.repeat(2, 1), torch.ones(12), 1.0, 4) < 1e-6


def test_each_masked_row_weighs_the_same_in_the_patch_loss_however_many_patches_it_hides():
    targets = torch.softmax(torch.randn(6, 9), dim=-1)
    logits = torch.zeros(6, 9)
    weights = torch.tensor([1.0, 0.2, 0.2, 0.2, 0.2, 0.2])
    torch.testing.assert_close(patch_loss(targets, logits, weights, 0.1, 4), torch.tensor(2 * math.log(9) / 4))


def test_koleo_is_lower_for_spread_vectors_and_finite_for_equal_ones():
    spread = torch.eye(4)
    assert koleo_loss(spread) == pytest.approx(-math.log(math.sqrt(2)), rel=1e-5)
    equal = torch.ones(4, 3, requires_grad=True)
    loss = koleo_loss(equal)
    loss.backward()
    assert loss > 15
    assert loss.isfinite()
    assert equal.grad.isfinite().all()


def forward(backbone, crops, seed, subnet=None):
    rng = None if seed is None else torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return [found.cls for found in backbone(crops, subnet or backbone.space.intact, rows_rng=rng)]


def random_crops(rows=8):
    rng = torch.Generator().manual_seed(3)
    return [torch.randn(rows, 1, 16, 16, generator=rng), torch.randn(2 * rows, 1, 8, 8, generator=rng)]


def test_stochastic_depth_is_a_function_of_its_generator():
    backbone, crops = make_model(drop_path=0.4).student.backbone, random_crops()
    first, again, other = (forward(backbone, crops, seed) for seed in (1, 1, 2))
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))


def test_without_a_generator_or_a_rate_every_row_is_computed():
    crops = random_crops()
    dropping, plain = (make_model(drop_path=rate).student.backbone for rate in (0.4, 0.0))
    full = forward(plain, crops, None)
    for mode in (True, False):
        assert all(map(torch.equal, forward(dropping.train(mode), crops, None), full))
    assert all(map(torch.equal, forward(plain, crops, 1), full))
    assert not any(map(torch.equal, forward(dropping, crops, 1), full))


@pytest.mark.parametrize(("rows", "rate", "kept"), [(8, 0.2, 6), (10, 0.5, 5), (1, 0.9, 1), (3, 0.9, 1), (5, 0.01, 4)])
def test_as_many_rows_are_kept_as_the_rate_says_without_repeats(rows, rate, kept):
    assert kept == max(int(rows * (1 - rate)), 1)
    backbone = make_model(drop_path=rate).student.backbone
    drawn = backbone._draw_rows(((rows, 3), (2 * rows, 2)), 4, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert len(drawn) == 4
    for part in (branch for block in drawn for branch in block):
        assert part.shapes[0] == (kept, 3)
        for drawn_rows, total, scale in zip(part.rows, (rows, 2 * rows), part.scales, strict=True):
            assert len(set(drawn_rows.tolist())) == len(drawn_rows)
            assert 0 <= drawn_rows.min() <= drawn_rows.max() < total
            assert scale == total / len(drawn_rows)
        assert len(part.rows[0]) == kept


def test_kept_rows_differ_from_branch_to_branch_and_each_row_is_kept_alike():
    backbone = make_model(drop_path=0.5).student.backbone
    counts, num_draws = torch.zeros(8), 400
    for seed in range(num_draws // 4):
        drawn = backbone._draw_rows(((8, 1),), 2, torch.Generator().manual_seed(seed), torch.device("cpu"))
        for part in (branch for block in drawn for branch in block):
            counts[part.rows[0]] += 1
    error = math.sqrt(num_draws * 0.5 * 0.5)
    assert (counts - num_draws / 2).abs().max() < 4 * error


def test_stochastic_depth_gives_the_full_branch_on_average():
    config = ViTConfig(**{**vars(CONFIG), "depths": (1,), "drop_path": 0.4})
    backbone = ElasticViT(config)
    backbone.init_weights_(torch.Generator().manual_seed(0))
    shapes, width = ((8, 5),), 32
    x = torch.randn(40, width, generator=torch.Generator().manual_seed(4))
    block = backbone.blocks[0]
    with torch.no_grad():
        full = block._attn_branch(x, shapes, width)
        total, squares, num_draws = torch.zeros_like(x), torch.zeros_like(x), 2000
        for seed in range(num_draws):
            kept = backbone._draw_rows(shapes, 1, torch.Generator().manual_seed(seed), torch.device("cpu"))[0][0]
            branch = block._attn_branch(_select_rows(x, shapes, kept), kept.shapes, width)
            found = _add_rows(torch.zeros_like(x), branch, shapes, kept)
            total += found
            squares += found.square()
    mean = total / num_draws
    error = ((squares / num_draws - mean.square()).clamp_min(0) / num_draws).sqrt()
    assert ((mean - full).abs() <= 5 * error + 1e-7).all()
    assert relative_error(mean, full) < 0.1


def test_a_computed_row_does_not_depend_on_which_rows_are_computed_beside_it():
    model = make_model(drop_path=0.5)
    backbone, crops = model.student.backbone, random_crops()[:1]
    alone = [forward(backbone, [crops[0][row : row + 1]], None)[0] for row in range(8)]
    torch.testing.assert_close(torch.cat(alone), forward(backbone, crops, None)[0], rtol=1e-4, atol=1e-5)
