"""The objective of POA: heads, targets, losses, the teacher's moving average, and how they come together."""

from poa.objective.ema import ema_update_
from poa.objective.heads import ProjectionHeads
from poa.objective.losses import LossTerms, total_loss
from poa.objective.poa import PoaModel, Views, poa_losses

__all__ = ["LossTerms", "PoaModel", "ProjectionHeads", "Views", "ema_update_", "poa_losses", "total_loss"]
