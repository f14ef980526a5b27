"""Configuration of the targets and losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from poa.config.checks import require, require_bounded, require_non_negative, require_positive, require_probability


@dataclass(frozen=True)
class ObjectiveConfig:
    """Targets and losses of POA (Zhang et al., ECCV 2024)."""

    intact_weight: float = 0.8
    """λ: share of the intact student's losses; the elastic student gets the rest."""
    class_weight: float = 1.0
    """Weight of the DINO losses on class vectors."""
    patch_weight: float = 1.0
    """Weight of the iBOT loss on masked patches; 0 switches masks and loss off."""
    distill_weight: float = 1.0
    """Weight of the same-view distillation from the intact to the elastic student."""
    koleo_weight: float = 0.1
    """Weight of the KoLeo regulariser."""
    patch_start_epoch: float = 30.0
    """Masks and patch loss begin at this epoch."""
    student_temp: float = 0.1
    """Temperature of the students' predictions."""
    teacher_temp: float = 0.07
    """Temperature of the targets after the warm-up."""
    teacher_temp_start: float = 0.04
    """Temperature of the targets at the beginning."""
    teacher_temp_warmup_epochs: float = 30.0
    """Epochs of the linear warm-up between them."""
    targets: Literal["sinkhorn", "centering"] = "sinkhorn"
    """How the teacher's logits become targets."""
    sinkhorn_iterations: int = 3
    """Iterations of Sinkhorn-Knopp."""
    center_momentum: float = 0.9
    """Momentum of the centre, for targets by centring."""

    def __post_init__(self) -> None:
        require_bounded(self, {"sinkhorn_iterations": 1_000}, "objective")
        require_probability("objective.intact_weight", self.intact_weight)
        for name in ("class_weight", "patch_weight", "distill_weight", "koleo_weight"):
            require_non_negative(f"objective.{name}", getattr(self, name))
        require(
            self.class_weight + self.patch_weight > 0,
            "objective.class_weight and objective.patch_weight",
            (self.class_weight, self.patch_weight),
            "not both 0",
        )
        for name in ("patch_start_epoch", "teacher_temp_warmup_epochs"):
            require_non_negative(f"objective.{name}", getattr(self, name))
        for name in ("student_temp", "teacher_temp", "teacher_temp_start", "sinkhorn_iterations"):
            require_positive(f"objective.{name}", getattr(self, name))
        require_probability("objective.center_momentum", self.center_momentum)
