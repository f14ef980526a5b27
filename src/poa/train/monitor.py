"""A look at a few sub-networks while training: k-NN where labels exist, RankMe always."""

from __future__ import annotations

import warnings

import numpy as np
import torch

from poa.backbones.base import Backbone
from poa.config import PretrainConfig
from poa.data import ImageSource, some_images
from poa.elastic import SearchSpace, Subnet
from poa.errors import PoaWarning
from poa.evaluate import Loading, extract_features, knn_accuracies, rankme
from poa.family import Preprocessing
from poa.models import RunningMember
from poa.randomness import generator

KNN_K = 20
"""Neighbours of the monitor's k-NN; fewer where there are fewer images."""


class Monitor:
    """Looks at the smallest, the middle and the largest sub-network of the teacher.

    The images are a fixed random sample of the training source; a fifth of them are the k-NN queries. Of several
    processes each looks at all of them: the teacher may be divided among them.

    Args:
        config: the run.
        source: its images.
        space: its sub-networks.
        speaks: whether this process warns.
    """

    def __init__(self, config: PretrainConfig, source: ImageSource, space: SearchSpace, *, speaks: bool = True) -> None:
        self.config = config.monitor
        self.speaks = speaks
        self.source = source
        self.how = preprocessing_of(config)
        self.subnets: list[Subnet] = space.parse_all(["smallest", "middle", "intact"])
        self.indices: np.ndarray = some_images(source, self.config.num_images, generator(config.train.seed, "monitor"))
        self.is_query = generator(config.train.seed, "monitor queries").random(len(self.indices)) < 0.2

    def is_due(self, step: int, num_steps: int) -> bool:
        """Whether to look after `step` steps."""
        return self.config.every > 0 and (step % self.config.every == 0 or step == num_steps)

    def look(self, backbone: Backbone, *, warn: bool = True) -> dict[str, dict[str, float]]:
        """For each of the three sub-networks `rankme`, and `knn` where labels exist; with `warn` warns of collapse.

        Fresh weights give features of a very low rank too: while the learning rate warms up there is nothing to warn
        of.
        """
        training = backbone.training
        backbone.eval()
        networks = [RunningMember(backbone, subnet, self.how) for subnet in self.subnets]
        with extract_features(networks, self.source, indices=self.indices, loading=Loading(max_bad_share=1.0)) as seen:
            found = {each.name: self._figures(seen.of(each.name).cls, seen.indices) for each in networks}
        backbone.train(training)
        for subnet, figures in found.items() if warn and self.speaks else ():
            if figures["rankme"] < self.config.collapse_rank:
                warnings.warn(
                    f"the features of {subnet} have an effective rank of {figures['rankme']:.2f}: they are collapsing. "
                    "A lower --optim.base-lr, a longer --optim.warmup-epochs or larger batches may help.",
                    PoaWarning,
                    stacklevel=2,
                )
        return found

    def _figures(self, features: torch.Tensor, indices: np.ndarray) -> dict[str, float]:
        figures = {"rankme": rankme(features)}
        labels = self.source.labels
        query = torch.from_numpy(self.is_query[np.searchsorted(self.indices, indices)])
        if labels is not None and query.any() and not query.all():
            truth = torch.from_numpy(labels[indices])
            k = min(KNN_K, int((~query).sum()))
            found = knn_accuracies(features[~query], truth[~query], features[query], truth[query], ks=[k])
            figures["knn"] = found[k]
        return figures


def preprocessing_of(config: PretrainConfig) -> Preprocessing:
    """How images become the input of the family that this run makes."""
    return Preprocessing(config.model.image_size, config.model.num_channels, config.augment.mean, config.augment.std)
