"""Fine-tuning of a whole family at once, with one classifier that every sub-network shares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from poa.backbones.base import Backbone
from poa.config import ElasticConfig, FinetuneConfig, FitConfig, to_dict
from poa.elastic import Subnet
from poa.elastic.layers import ElasticLinear
from poa.errors import ConfigError
from poa.family import Family
from poa.models import Candidate, FamilyMember
from poa.objective.losses import distillation_loss
from poa.randomness import derived_seed
from poa.task_head import TaskHead, head_cuts
from poa.tasks.classify import DEFAULT_DROP_PATH, ClassificationData, ClassificationTask, init_head_
from poa.tasks.images import LabelBatch


class ElasticClassifier(nn.Module):
    """A super-network with a classifier whose input is as elastic as the class vectors."""

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = ElasticLinear(*head_cuts(backbone.layout.features, num_classes))

    def forward(
        self, images: Float[Tensor, "B C S S"], subnet: Subnet, rows_rng: torch.Generator | None = None
    ) -> Float[Tensor, "B K"]:
        """The logits of a sub-network; `rows_rng` is for stochastic depth, see `Backbone.forward`."""
        vectors = self.backbone([images], subnet, None, rows_rng)[0].cls
        logits: Tensor = self.head(vectors, subnet.width)
        return logits


class ElasticFinetuneTask(ClassificationTask):
    """Each step trains the intact network and one sub-network, drawn as in pre-training, on the same images.

    The loss is λ · label(intact) + (1 − λ) · (label(sub-network) + weight · distillation), where the sub-network learns
    from the intact one's answer to the same mixed images, through which no gradient flows (POA eq. 4 and 5, with labels
    in the place of the teacher's targets). The best epoch is that of the largest mean figure of the smallest, the
    middle and the intact network.

    Args:
        candidate: a member of the family, of whose super-network a copy is trained.
        data: the images.
        config: stochastic depth, augmentation.
        elastic: λ and the distillation.
        fit_config: batch size and seed.

    Raises:
        ConfigError: the candidate is of no family, images of another size are asked for, or there is no stochastic
            depth that was asked for.
    """

    def __init__(
        self,
        candidate: Candidate,
        data: ClassificationData,
        config: FinetuneConfig,
        elastic: ElasticConfig,
        fit_config: FitConfig,
    ) -> None:
        if not isinstance(candidate, FamilyMember):
            raise ConfigError(f"--elastic is for families; {candidate.source} is a single network. Leave it out.")
        own = candidate.preprocessing.image_size
        if config.image_size not in (None, own):
            raise ConfigError(f"--elastic keeps the family's image size; got {config.image_size}, it is {own}.")
        super().__init__(data, config, candidate.preprocessing, fit_config)
        self.candidate, self.family, self.elastic = candidate, candidate.family, elastic
        self.drop_path = _drop_path(self.family, config.drop_path)
        self.model: ElasticClassifier = ElasticClassifier(_trainable(self.family, self.drop_path), self.num_classes)
        init_head_(self.model.head.weight, self._bias, fit_config.seed)
        space = self.family.space
        self.watched = tuple(dict.fromkeys((space.smallest, space.middle, space.intact)))
        card = self.family.card
        self.identity = f"elastic {candidate.fingerprint} {card.weights_sha256} {data.fingerprint} {config} {elastic}"

    @property
    def _bias(self) -> Tensor:
        bias = self.model.head.bias
        assert bias is not None  # noqa: S101 (head_cuts gives one)
        return bias

    def passes(self, model: nn.Module, batch: LabelBatch, device: torch.device) -> Iterator[dict[str, Tensor]]:
        """See `Task.passes`: the intact network's losses, then the sub-network's."""
        space, number, weight = self.family.space, batch.number, self.elastic.intact_weight
        images, shares = self.mixed(batch, device)
        subnet = space.draw(self.seed, number)
        intact = model(images, space.intact, self._rows_rng(number, 0))
        weight = weight if subnet is not None else 1.0
        yield {"intact": weight * self.label_loss(intact, shares)}
        if subnet is None:
            return
        logits = model(images, subnet, self._rows_rng(number, 1))
        losses = {"elastic": (1 - weight) * self.label_loss(logits, shares)}
        if self.elastic.distill_weight:
            distill = self.distillation(intact.detach(), logits)
            losses["distill"] = (1 - weight) * self.elastic.distill_weight * distill
        yield losses

    def loss(self, model: nn.Module, batch: LabelBatch, device: torch.device) -> dict[str, Tensor]:
        """All losses of a step at once."""
        return {name: value for part in self.passes(model, batch, device) for name, value in part.items()}

    def distillation(self, intact: Float[Tensor, "B K"], logits: Float[Tensor, "B K"]) -> Float[Tensor, ""]:
        """The sub-network's cross entropy, or binary ones, with the intact network's answer."""
        temp = self.elastic.distill_temp
        if self.data.is_multi_label:
            return F.binary_cross_entropy_with_logits(logits.float() / temp, torch.sigmoid(intact.float() / temp))
        return distillation_loss(intact, logits, temp)

    def _rows_rng(self, number: int, student: int) -> torch.Generator:
        return torch.Generator().manual_seed(derived_seed(self.seed, "finetune rows", number, student))

    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """See `Task.evaluate`: the means over the smallest, the middle and the intact network, and of each its own."""
        found = self.measure(model, device, self.watched)
        means = {name: sum(each[name] for each in found.values()) / len(found) for name in found[self.watched[0]]}
        return means | {f"{self.metric}/{subnet}": figures[self.metric] for subnet, figures in found.items()}

    def measure(
        self, model: nn.Module, device: torch.device, subnets: Sequence[Subnet]
    ) -> dict[Subnet, dict[str, float]]:
        """The figures of sub-networks with the shared classifier; every image is decoded once for all of them."""
        scores = {subnet: self.new_scores() for subnet in subnets}
        with torch.inference_mode():
            for batch in self.test_batches():
                images, targets = self.to_input(batch, device), batch.targets.to(device)
                for subnet, own in scores.items():
                    own.add(model(images, subnet), targets)
        return {subnet: own.figures() for subnet, own in scores.items()}

    def describe(self) -> dict[str, Any]:
        """See `ClassificationTask.describe`."""
        return {
            "network": self.candidate.name,
            "source": self.candidate.source,
            "drop_path": self.drop_path,
            "elastic": to_dict(self.elastic),
        }

    def result(self, described: Mapping[str, Any]) -> Family:
        """The fine-tuned family with its classifier, on the CPU.

        Args:
            described: kept in its provenance under `finetuned`.
        """
        model = self.model.cpu()
        card = self.family.card
        provenance = {**card.provenance, "finetuned": dict(described)}
        head = TaskHead(
            model.head.weight.detach(), self._bias.detach(), self.data.class_names, self.data.is_multi_label
        )
        return Family(replace(card, provenance=provenance), model.backbone, head)


def _drop_path(family: Family, asked: float | None) -> float:
    has_it = hasattr(family.card.config, "drop_path")
    if asked and not has_it:
        raise ConfigError(f"the {family.card.architecture.name} has no stochastic depth; give --drop-path 0 for it.")
    return (DEFAULT_DROP_PATH if has_it else 0.0) if asked is None else asked


def _trainable(family: Family, drop_path: float) -> Backbone:
    """A copy of the family's super-network with that rate of stochastic depth.

    Raises:
        ConfigError: no stock network could be cut from it.
    """
    config = family.card.config
    if hasattr(config, "drop_path"):
        config = replace(config, drop_path=drop_path)
    backbone: Backbone = family.card.architecture.build(config)
    backbone.load_state_dict(family.supernet.state_dict(), strict=True)
    backbone.timm_model(backbone.space.intact, family.card.preprocessing.image_size)
    return backbone
