"""How the teacher's logits become targets."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from poa.config import ObjectiveConfig
from poa.distributed import all_sum, logsumexp_over_ranks
from poa.objective.losses import at_least_float32


def sinkhorn_knopp(logits: Float[Tensor, "R K"], temp: float, iterations: int = 3) -> Float[Tensor, "R K"]:
    """Targets q: exp(logits / temp), rescaled so that all prototypes are used about equally; rows sum to 1.

    Sinkhorn-Knopp as in SwAV (Caron et al., 2020) and DINOv2: each iteration gives every prototype the same mass,
    then every row. Only the logarithms of the two scaling vectors are kept, so logits of any spread stay finite.
    With several processes the rows are those of all; each gets the targets of its own, which may be none.
    """
    scaled = at_least_float32(logits) / temp
    log_prototypes = -logsumexp_over_ranks(scaled)
    for _ in range(iterations - 1):
        log_rows = -torch.logsumexp(scaled + log_prototypes, dim=1, keepdim=True)
        log_prototypes = -logsumexp_over_ranks(scaled + log_rows)
    return torch.softmax(scaled + log_prototypes, dim=1)


class CenteredTargets(nn.Module):
    """Targets by centring: softmax((logits − centre) / temp), the centre a moving average of batch means (DINO).

    The batch is that of all processes.
    """

    center: Tensor

    def __init__(self, num_prototypes: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self._pending: list[Tensor] = []
        self.register_buffer("center", torch.zeros(1, num_prototypes))

    def forward(self, logits: Float[Tensor, "R K"], temp: float) -> Float[Tensor, "R K"]:
        """The targets. The batch's mean is kept until `update_center_` takes it in."""
        logits = at_least_float32(logits)
        total = all_sum(torch.cat([logits.sum(dim=0), logits.new_full((1,), logits.shape[0])]))
        if total[-1] > 0:
            self._pending.append((total[:-1] / total[-1]).unsqueeze(0))
        return torch.softmax((logits - self.center) / temp, dim=-1)

    def update_center_(self, *, keep: bool) -> None:
        """Moves the centre to the batches since the last update, in place; with `keep` False they are dropped."""
        for mean in self._pending if keep else ():
            self.center.mul_(self.momentum).add_(mean, alpha=1 - self.momentum)
        self._pending.clear()


class Targets(nn.Module):
    """The targets of all heads, for class vectors and, apart, for masked patches."""

    def __init__(self, config: ObjectiveConfig, num_prototypes: tuple[int, ...]) -> None:
        super().__init__()
        self.config = config
        self.cls_centers = nn.ModuleList()
        self.patch_centers = nn.ModuleList()
        if config.targets == "centering":
            for centers in (self.cls_centers, self.patch_centers):
                centers.extend(CenteredTargets(count, config.center_momentum) for count in num_prototypes)

    def update_centers_(self, *, keep: bool) -> None:
        """Ends a step: the centres take its batches in, or drop them where the step did not count."""
        for center in (*self.cls_centers, *self.patch_centers):
            center.update_center_(keep=keep)

    @torch.no_grad()
    def forward(self, logits: Float[Tensor, "R K"], head: int, temp: float, *, patches: bool) -> Float[Tensor, "R K"]:
        """The targets of one head's logits, of class vectors or of patches; no rows give no rows.

        All processes call it together.
        """
        if self.config.targets == "sinkhorn":
            return sinkhorn_knopp(logits, temp, self.config.sinkhorn_iterations)
        targets: Tensor = (self.patch_centers if patches else self.cls_centers)[head](logits, temp)
        return targets
