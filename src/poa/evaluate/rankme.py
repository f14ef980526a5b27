"""RankMe: the effective rank of features, a measure of their health that needs no labels."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def rankme(features: Float[Tensor, "N C"]) -> float:
    """Exp of the entropy of the normalised singular values (Garrido et al., ICML 2023, eq. 1).

    Between 1 (all features on one line: collapse) and min(N, C).
    """
    values = torch.linalg.svdvals(features.double().cpu())
    share = values / values.sum().clamp_min(1e-300) + 1e-7
    return float(torch.exp(-(share * share.log()).sum()))
