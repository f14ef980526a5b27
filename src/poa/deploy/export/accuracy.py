"""How much accuracy an export costs: it and the sub-network, image by image, on the same labelled images."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from poa.backbones.base import Features
from poa.deploy.export.base import Exported, Inference
from poa.errors import ConfigError, DataError
from poa.evaluate import Loading, extract_features
from poa.evaluate.base import with_labels
from poa.evaluate.features import DEFAULT_LOADING
from poa.evaluate.knn import DEFAULT_KS, knn_hits
from poa.evaluate.run import Splits
from poa.models import Candidate

SUBNET = "sub-network"

_Labelled = tuple[Tensor, Tensor]
"""Class vectors or logits, and classes."""


@dataclass(frozen=True)
class AccuracyDrop:
    """The top-1 accuracy of an export beside that of the float32 sub-network it was made of.

    Attributes:
        protocol: `k-NN, k = 20` (weighted, Wu et al., 2018) with the k that is best for the sub-network, or
            `classifier`: the family's own.
        num_train: labelled images that k-NN compares with; 0 for a classifier.
        num_test: images that are classified.
        subnet: the share that the sub-network gets right.
        export: the share that the export gets right.
        standard_error: of `drop`, from the differences on each image: s / √N.
    """

    protocol: str
    num_train: int
    num_test: int
    subnet: float
    export: float
    standard_error: float

    @property
    def drop(self) -> float:
        """What the export gets right less, as a share; negative where it gets more right."""
        return self.subnet - self.export


def check_labelled(what: Exported, data: Splits) -> None:
    """Refuses images on which the accuracy of an export cannot be found, before work starts.

    Raises:
        DataError: there are no labels, no test images, or other classes than the classifier's.
        ConfigError: the classifier gives any number of classes to an image: top-1 accuracy says nothing of it.
    """
    head = what.family.head
    if data.test is None or data.test.labels is None or (head is None and data.train.labels is None):
        raise DataError("the accuracy of an export needs labelled images to train k-NN with and to test on.")
    if data.num_test < 2:
        raise DataError("the accuracy of an export needs two test images or more.")
    if head is None:
        if data.num_train < min(DEFAULT_KS):
            raise DataError(f"k-NN needs at least {min(DEFAULT_KS)} training images; got {data.num_train}.")
        return
    if head.multi_label:
        raise ConfigError("the family's classifier gives images any number of classes; leave the labelled images out.")
    if data.test.class_names != head.class_names:
        raise DataError(
            f"{data.test.spec} has other classes than the family's classifier ({', '.join(head.class_names[:5])}…)."
        )


def accuracy_drops(
    what: Exported, exports: Mapping[str, Inference], data: Splits, loading: Loading = DEFAULT_LOADING
) -> dict[str, AccuracyDrop]:
    """What each of some exports of one sub-network costs. Every image is decoded once for all of them.

    Args:
        what: the sub-network.
        exports: the opened exports, by name.
        data: labelled images; see `check_labelled`.
        loading: how they are read; those that cannot be read are left out for all.

    Raises:
        DataError, ConfigError: see `check_labelled`; or too many images cannot be read.
    """
    check_labelled(what, data)
    assert data.test is not None  # noqa: S101 (just checked)
    networks = [_Computed(SUBNET, what, what.expected)]
    networks += [_Computed(name, what, _in_torch(run)) for name, run in exports.items()]
    with extract_features(networks, data.test, indices=data.test_indices, loading=loading) as test:
        unseen = {network.name: with_labels(test.of(network.name)) for network in networks}
        if what.family.head is not None:
            return _drops("classifier", 0, {name: cls.argmax(dim=1) == truth for name, (cls, truth) in unseen.items()})
        with extract_features(networks, data.train, indices=data.train_indices, loading=loading) as train:
            seen = {network.name: with_labels(train.of(network.name)) for network in networks}
            return _drops(*_knn(seen, unseen))


def _knn(seen: Mapping[str, _Labelled], unseen: Mapping[str, _Labelled]) -> tuple[str, int, Mapping[str, Tensor]]:
    """The protocol, the training images and, by network, which test images it gets right."""
    num_train = len(seen[SUBNET][1])
    ks = [k for k in DEFAULT_KS if k <= num_train]
    found = {name: knn_hits(*seen[name], *unseen[name], ks=ks) for name in seen}
    best = max(ks, key=lambda k: int(found[SUBNET][k].sum()))
    return f"k-NN, k = {best}", num_train, {name: hits[best] for name, hits in found.items()}


def _drops(protocol: str, num_train: int, hits: Mapping[str, Tensor]) -> dict[str, AccuracyDrop]:
    own = hits[SUBNET].double()
    found = {}
    for name, right in hits.items():
        if name == SUBNET:
            continue
        spread = float((own - right.double()).std())
        shares = (float(own.mean()), float(right.double().mean()))
        found[name] = AccuracyDrop(protocol, num_train, len(own), *shares, spread / math.sqrt(len(own)))
    return found


def _in_torch(run: Inference) -> Callable[[Tensor], Tensor]:
    return lambda images: torch.from_numpy(run(images.numpy()))


class _Computed(Candidate):
    """Class vectors, or logits, that something computes for images of the exported size."""

    def __init__(self, name: str, what: Exported, compute: Callable[[Tensor], Tensor]) -> None:
        card = what.family.card
        self.name, self.source, self.compute = name, name, compute
        self.preprocessing = replace(card.preprocessing, image_size=what.image_size)
        self.num_params, self.flops = card.num_params(what.subnet), None
        self.num_features = what.family.supernet.layout.features.active(what.subnet.width)
        self.fingerprint = f"{card.weights_sha256}/{what.subnet}/{name}"
        self.is_intact = False

    def features(self, images: Float[Tensor, "B c h w"]) -> Features:
        """See `Candidate.features`; there are no patch vectors."""
        found = self.compute(images)
        return Features(found, found.new_empty(len(found), 0, found.shape[1]))

    def last_blocks(self, images: Float[Tensor, "B c h w"], num_blocks: int) -> list[Features]:
        """See `Candidate.last_blocks`."""
        del num_blocks
        return [self.features(images)]

    def network(self, image_size: int | tuple[int, int] | None = None, *, drop_path: float = 0.0) -> nn.Module:
        """See `Candidate.network`."""
        del image_size, drop_path
        raise ConfigError(f"{self.name} cannot be trained.")

    def to(self, device: torch.device) -> None:
        """See `Candidate.to`: it stays on the CPU."""
        del device

    @property
    def device(self) -> torch.device:
        """See `Candidate.device`."""
        return torch.device("cpu")
