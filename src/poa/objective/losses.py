"""The losses of POA, one function for each term, and their sum."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from poa.config import ObjectiveConfig
from poa.distributed import gathered_rows, own_row_offset


class StudentTerms(NamedTuple):
    """The losses of one student, unweighted, for each head where there is one for each."""

    local: Float[Tensor, "H"]
    global_: Float[Tensor, "H"]
    patch: Float[Tensor, "H"]
    koleo: Float[Tensor, ""]
    distill_local: Float[Tensor, "H"] | None = None
    """Same-view distillation: the elastic student only."""
    distill_global: Float[Tensor, "H"] | None = None


class Shares(NamedTuple):
    """How the objective is shared between the students: of the losses, and of KoLeo."""

    losses: float
    koleo: float


def student_shares(config: ObjectiveConfig, *, has_elastic: bool) -> tuple[Shares, Shares]:
    """The shares of the intact and of the elastic student: λ and 1 − λ, KoLeo half and half.

    Without an elastic student the intact one has everything.
    """
    if not has_elastic:
        return Shares(1.0, 1.0), Shares(0.0, 0.0)
    return Shares(config.intact_weight, 0.5), Shares(1.0 - config.intact_weight, 0.5)


def at_least_float32(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`x` in float32, or in float64 where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cross_entropy(targets: Float[Tensor, "*#R K"], logits: Float[Tensor, "*#R K"], temp: float) -> Float[Tensor, "..."]:
    """−Σ_k q_k log softmax(z / temp)_k for each row. Linear in the targets, which need not sum to 1."""
    return -(targets * F.log_softmax(at_least_float32(logits) / temp, dim=-1)).sum(dim=-1)


def local_loss(targets: Float[Tensor, "G K"], logits: Float[Tensor, "L K"], temp: float) -> Float[Tensor, ""]:
    """(1/n) Σ_l Σ_g mean_B CE(q(g), X(l)) with n = 2 + 2L (DINO; POA eq. 3). 0 without local crops.

    G = 2B rows of targets, one view after the other; L rows of logits, one crop of all images after the other.

    The two views' targets are added before multiplying: the cross-entropy is linear in them.
    """
    num_images = targets.shape[0] // 2
    num_crops = logits.shape[0] // num_images
    if num_crops == 0:
        return targets.new_zeros(())
    both = targets.unflatten(0, (2, num_images)).sum(dim=0)
    rows = cross_entropy(both, logits.unflatten(0, (num_crops, num_images)), temp)
    return rows.mean(dim=1).sum() / (2 + 2 * num_crops)


def global_loss(
    targets: Float[Tensor, "G K"], logits: Float[Tensor, "G K"], temp: float, num_local_crops: int
) -> Float[Tensor, ""]:
    """(2/n) · mean CE(q(other view), X(view)) over all 2B rows (DINO; POA eq. 3)."""
    other = targets.roll(targets.shape[0] // 2, dims=0)
    return cross_entropy(other, logits, temp).mean() * 2 / (2 + 2 * num_local_crops)


def patch_loss(
    targets: Float[Tensor, "M K"],
    logits: Float[Tensor, "M K"],
    weights: Float[Tensor, "M"],
    temp: float,
    num_rows: int,
) -> Float[Tensor, ""]:
    """Σ_p w_p CE(q(p), X(p)) / rows over the masked patches, w_p = 1 / (masked patches of its row) (iBOT)."""
    if logits.shape[0] == 0:
        return weights.new_zeros(())
    return (cross_entropy(targets, logits, temp) * weights).sum() / num_rows


def distillation_loss(intact: Float[Tensor, "R K"], elastic: Float[Tensor, "R K"], temp: float) -> Float[Tensor, ""]:
    """Mean CE(softmax(S / temp), E): the elastic student learns from the intact one's same view (POA eq. 4).

    No gradient reaches the intact student. 0 without rows.
    """
    if intact.shape[0] == 0:
        return intact.new_zeros(())
    targets = torch.softmax(at_least_float32(intact.detach()) / temp, dim=-1)
    return cross_entropy(targets, elastic, temp).mean()


def koleo_loss(x: Float[Tensor, "B C"], *, over_ranks: bool = True) -> Float[Tensor, ""]:
    """mean_i −log(‖x_i − x_nn(i)‖ + 1e-8) on L2-normalised rows: spreads them out (Sablayrolles et al., 2019).

    The nearest neighbour is the one of largest inner product; its choice is not differentiated. Always computed in
    float32 or more, also under autocast: near neighbours differ by less than bfloat16 resolves.

    Args:
        x: the rows.
        over_ranks: look for neighbours among the rows of all processes. The mean is that over one's own rows.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(at_least_float32(x), eps=1e-8, dim=-1)
        everyone = gathered_rows(x) if over_ranks else x
        with torch.no_grad():
            similarity = x @ everyone.T
            similarity.diagonal(own_row_offset(len(x)) if over_ranks else 0).fill_(-1.0)
            nearest = similarity.argmax(dim=1)
        return -torch.log(F.pairwise_distance(x, everyone[nearest], eps=1e-8) + 1e-8).mean()


def student_loss(terms: StudentTerms, config: ObjectiveConfig, shares: Shares) -> Float[Tensor, ""]:
    """One student's part of the objective (POA eq. 5); the parts of both add up to the whole.

    share · (1/H) Σ_h (local + global + patch + distill) + share of KoLeo, with the weights of the configuration.
    """
    loss = config.class_weight * (terms.local + terms.global_).mean() + config.patch_weight * terms.patch.mean()
    if terms.distill_local is not None and terms.distill_global is not None:
        loss = loss + config.distill_weight * (terms.distill_local + terms.distill_global).mean()
    return shares.losses * loss + config.koleo_weight * shares.koleo * terms.koleo
