"""POA's three branches: the teacher, the intact student and the elastic student (POA fig. 2, §3.1)."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from poa.backbones.base import Backbone
from poa.config import HeadsConfig, ObjectiveConfig
from poa.elastic import Subnet
from poa.objective.heads import ProjectionHeads
from poa.objective.losses import (
    StudentTerms,
    distillation_loss,
    global_loss,
    koleo_loss,
    local_loss,
    patch_loss,
)
from poa.objective.targets import Targets


class Views(NamedTuple):
    """A batch of B images on the device: G = 2B global crops, L local crops in all, M masked patches."""

    global_crops: Float[Tensor, "G c H W"]
    """Normalised; first all first views, then all second views."""
    local_crops: Float[Tensor, "L c h w"]
    """Normalised; first the first crop of every image, and so on."""
    masks: Bool[Tensor, "G N"] | None
    """The patches that the students do not see; None without the patch loss."""
    masked: Int[Tensor, "M"]
    """Positions of the masked patches in the flattened masks."""
    mask_weights: Float[Tensor, "M"]
    """1 / (masked patches of its row)."""


class HeadRows(NamedTuple):
    """One head's logits, by kind of row."""

    global_: Float[Tensor, "G K"]
    local: Float[Tensor, "L K"]
    patch: Float[Tensor, "M K"]


class BranchOutput(NamedTuple):
    """What a student gives back for a batch."""

    cls: Float[Tensor, "G C"]
    """The backbone's class vectors of the global crops."""
    heads: list[HeadRows]
    """The logits of each head."""

    def detached(self) -> BranchOutput:
        """The same values without their graph."""
        return BranchOutput(self.cls.detach(), [HeadRows(*(rows.detach() for rows in head)) for head in self.heads])


class HeadTargets(NamedTuple):
    """One head's targets."""

    cls: Float[Tensor, "G K"]
    patch: Float[Tensor, "M K"]


class Branch(nn.Module):
    """A backbone and its projection heads."""

    def __init__(self, backbone: Backbone, heads: ProjectionHeads) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = heads

    def forward(self, views: Views, subnet: Subnet, rows_rng: torch.Generator | None = None) -> BranchOutput:
        """Class vectors and logits of a batch, by one sub-network.

        Args:
            views: the batch; local crops and masks may be absent.
            subnet: which sub-network runs.
            rows_rng: where given, stochastic depth draws from it.
        """
        has_local = views.local_crops.shape[0] > 0
        crops = [views.global_crops, views.local_crops] if has_local else [views.global_crops]
        masks = [views.masks, None] if has_local else [views.masks]
        features = self.backbone(crops, subnet, masks, rows_rng)
        cls = features[0].cls
        local = features[1].cls if has_local else cls[:0]
        patches = features[0].patches.flatten(0, 1).index_select(0, views.masked)
        rows = torch.cat([cls, local, patches])
        sizes = [cls.shape[0], local.shape[0], patches.shape[0]]
        return BranchOutput(cls, [HeadRows(*logits.split(sizes)) for logits in self.heads(rows, subnet.width)])


class PoaModel(nn.Module):
    """The student (intact and elastic share it) and its teacher."""

    def __init__(self, backbone: Backbone, heads: HeadsConfig, objective: ObjectiveConfig) -> None:
        super().__init__()
        self.student = Branch(backbone, ProjectionHeads(backbone.layout.features, heads))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.targets = Targets(objective, heads.num_prototypes)

    def init_weights_(self, generator: torch.Generator) -> None:
        """Draws fresh student weights; the teacher starts as its copy."""
        self.student.backbone.init_weights_(generator)
        self.student.heads.init_weights_(generator)
        self.restart_teacher_()

    def restart_teacher_(self) -> None:
        """Makes the teacher a copy of the student."""
        self.teacher.load_state_dict(self.student.state_dict(), strict=True)

    @torch.no_grad()
    def teacher_targets(self, views: Views, temp: float) -> list[HeadTargets]:
        """Each head's targets: the intact teacher on the unmasked global crops."""
        seen = views._replace(local_crops=views.local_crops[:0], masks=None)
        output = self.teacher(seen, self.teacher.backbone.space.intact)
        return [
            HeadTargets(
                self.targets(rows.global_, head, temp, patches=False),
                self.targets(rows.patch, head, temp, patches=True),
            )
            for head, rows in enumerate(output.heads)
        ]


def student_terms(
    targets: list[HeadTargets],
    output: BranchOutput,
    views: Views,
    temp: float,
    teacher: BranchOutput | None = None,
    *,
    koleo_over_ranks: bool = True,
) -> StudentTerms:
    """One student's losses, unweighted. Their means over all processes are those of the whole batch.

    Args:
        targets: the teacher's, for each head.
        output: the student's output.
        views: the batch.
        temp: the students' temperature.
        teacher: for the elastic student the intact one's output, from which it learns the same view; no gradient
            reaches it.
        koleo_over_ranks: whether KoLeo compares with the class vectors of all processes, which must then be of one
            sub-network.
    """
    num_rows = output.cls.shape[0]
    num_local_crops = 2 * views.local_crops.shape[0] // num_rows
    pairs = list(zip(targets, output.heads, strict=True))
    terms = StudentTerms(
        local=torch.stack([local_loss(q.cls, z.local, temp) for q, z in pairs]),
        global_=torch.stack([global_loss(q.cls, z.global_, temp, num_local_crops) for q, z in pairs]),
        patch=torch.stack([patch_loss(q.patch, z.patch, views.mask_weights, temp, num_rows) for q, z in pairs]),
        koleo=sum(
            (koleo_loss(view, over_ranks=koleo_over_ranks) for view in output.cls.chunk(2)),
            start=output.cls.new_zeros(()),
        ),
    )
    if teacher is None:
        return terms
    same = list(zip(teacher.heads, output.heads, strict=True))
    return terms._replace(
        distill_local=torch.stack([distillation_loss(s.local, e.local, temp) for s, e in same]),
        distill_global=torch.stack([distillation_loss(s.global_, e.global_, temp) for s, e in same]),
    )
