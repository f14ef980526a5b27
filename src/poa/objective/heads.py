"""The projection heads (POA §3.4, multiple projection heads; each is DINO's head)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from poa.config import HeadsConfig
from poa.elastic import Axis, Cut, fixed
from poa.elastic.layers import ElasticLinear


class PrototypeLayer(nn.Module):
    """A weight-normalised linear layer without bias: prototype k is g_k · v_k / ‖v_k‖."""

    def __init__(self, bottleneck_dim: int, num_prototypes: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(num_prototypes, 1))
        self.weight_v = nn.Parameter(torch.empty(num_prototypes, bottleneck_dim))

    def forward(self, x: Float[Tensor, "R D"]) -> Float[Tensor, "R K"]:
        """The logits of normalised bottleneck vectors."""
        weight = self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True))
        return F.linear(x, weight)


class ProjectionHead(nn.Module):
    """An MLP of three layers with GELU, L2 normalisation, then a `PrototypeLayer`.

    Only the first layer's input is elastic: it takes the leading channels with POA's factor for fewer inputs.
    """

    def __init__(self, features: Axis, config: HeadsConfig, num_prototypes: int) -> None:
        super().__init__()
        hidden, bottleneck = config.hidden_dim, config.bottleneck_dim
        weight = Cut((fixed(hidden), features), fan_in=1)
        self.fc1 = ElasticLinear(weight, Cut((fixed(hidden),)))
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, bottleneck)
        self.last_layer = PrototypeLayer(bottleneck, num_prototypes)

    def forward(self, x: Float[Tensor, "R C"], width: int) -> Float[Tensor, "R K"]:
        """The logits of class or patch vectors from a sub-network of that width."""
        x = F.gelu(self.fc1(x, width))
        x = self.fc3(F.gelu(self.fc2(x)))
        logits: Tensor = self.last_layer(F.normalize(x, dim=-1))
        return logits


class ProjectionHeads(nn.Module):
    """All heads; class vectors and patch vectors, whose channels are `features`, go through the same ones."""

    def __init__(self, features: Axis, config: HeadsConfig) -> None:
        super().__init__()
        self.heads = nn.ModuleList(ProjectionHead(features, config, count) for count in config.num_prototypes)

    def forward(self, x: Float[Tensor, "R C"], width: int) -> list[Float[Tensor, "R K"]]:
        """The logits of every head."""
        return [head(x, width) for head in self.heads]

    def init_weights_(self, generator: torch.Generator) -> None:
        """Draws fresh weights as the reference does: MLPs trunc-normal, prototypes uniform with g = 1."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith("weight_g"):
                    parameter.fill_(1.0)
                elif name.endswith("weight_v"):
                    bound = parameter.shape[1] ** -0.5
                    parameter.uniform_(-bound, bound, generator=generator)
                elif name.endswith("bias"):
                    parameter.zero_()
                else:
                    nn.init.trunc_normal_(parameter, std=0.02, generator=generator)
