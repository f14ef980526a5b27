"""The objective of POA: heads, targets, losses, the teacher's moving average, and how they come together."""

from poa.objective.ema import ema_update_
from poa.objective.heads import ProjectionHeads
from poa.objective.losses import StudentTerms, student_loss, student_shares
from poa.objective.poa import PoaModel, Views, student_terms

__all__ = [
    "PoaModel",
    "ProjectionHeads",
    "StudentTerms",
    "Views",
    "ema_update_",
    "student_loss",
    "student_shares",
    "student_terms",
]
