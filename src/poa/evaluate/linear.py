"""Linear probe of frozen features: a grid of learning rates and inputs, trained together (DINOv2's protocol)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from poa.config.checks import require, require_non_negative, require_positive
from poa.errors import DataError
from poa.evaluate.base import Evaluator, Vectors, with_labels
from poa.evaluate.splits import require_classes, stratified_holdout
from poa.randomness import derived_seed, generator

LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
"""DINOv2's grid, for a batch of 256 images."""
HELD_OUT = 0.1
MOMENTUM = 0.9
INIT_STD = 0.01
_CHUNK = 4096


class LinearInput(NamedTuple):
    """What a classifier sees: class vectors of the last `num_blocks` side by side, then the mean patch vector."""

    num_blocks: int
    pooled: bool


@dataclass(frozen=True)
class LinearProbe(Evaluator):
    """Linear classifiers on frozen vectors (Oquab et al., 2023, DINOv2): every input with every learning rate.

    As there: SGD with momentum 0.9 and no weight decay, a cosine from the learning rate to 0, fresh weights from
    N(0, 0.01²), vectors as they are. All classifiers see the same batches, in one run over the vectors.

    Otherwise than there: the training images are not augmented, for their vectors are computed once; the classifier
    is chosen on training images that are held out, unless `select` is "test", and the chosen one is then trained once
    more on all of them; small sets are gone through more often than ten times.
    """

    name: ClassVar[str] = "linear"
    summary: ClassVar[str] = "linear probe, a grid of learning rates in one pass (DINOv2)"
    headline: ClassVar[str] = "accuracy"

    last_blocks: tuple[int, ...] = (1, 4)
    """Numbers of last blocks whose class vectors are the input; those that a network lacks are as many as it has."""
    pooled: bool = True
    """Try every input with the mean patch vector of the last block too."""
    learning_rates: tuple[float, ...] = LEARNING_RATES
    """For a batch of 256; the ones used are in proportion to it. If the largest is chosen, give larger ones too."""
    vectors_per_step: int = 256
    """The batch; all vectors where there are fewer."""
    num_epochs: float = 10.0
    """Passes over the vectors."""
    min_steps: int = 1250
    """Steps at the least, whatever the number of vectors."""
    select: Literal["held-out", "test"] = "held-out"
    """What the classifier is chosen on: a tenth of the training images, or the test images, as DINOv2 does."""
    seed: int = 0
    """Of fresh weights, order and the held-out tenth."""

    def __post_init__(self) -> None:
        require(bool(self.last_blocks) and min(self.last_blocks) >= 1, "last_blocks", self.last_blocks, "1 or more")
        require(bool(self.learning_rates), "learning_rates", self.learning_rates, "one or more")
        for rate in self.learning_rates:
            require_positive("learning_rates", rate)
        require(self.vectors_per_step >= 1, "vectors_per_step", self.vectors_per_step, "1 or more")
        require_positive("num_epochs", self.num_epochs)
        require(self.min_steps >= 1, "min_steps", self.min_steps, "1 or more")
        require_non_negative("seed", self.seed)

    @property
    def num_blocks(self) -> int:
        """The number of depths; at least 2 where the mean patch vector is wanted."""
        return max(1 + self.pooled, *self.last_blocks)

    def check(self, train: Int[Tensor, "N"] | None, test: Int[Tensor, "M"] | None, num_classes: int) -> None:
        """See `Evaluator.check`."""
        del num_classes
        require_classes(self.name, train, test, least=2 if self.select == "held-out" else 1)

    def evaluate(self, train: Vectors, test: Vectors | None, reference: Vectors | None = None) -> dict[str, float]:
        """`accuracy` of the chosen classifier on the test images, and `accuracy_top5` from 6 classes on.

        Also what was chosen: `learning_rate`, `num_blocks` and `pooled` (1: with the mean patch vector). Of
        classifiers that get as many right the one with the larger likelihood is chosen.
        """
        del reference
        (_, labels), (_, truth) = with_labels(train), with_labels(test)
        unseen, everything = train if test is None else test, torch.arange(len(train))
        num_classes = max(train.num_classes, unseen.num_classes, int(labels.max()) + 1, int(truth.max()) + 1)
        inputs = self.inputs(train)
        if self.select == "test":
            trained = self.trained(train, everything, inputs, self.learning_rates, num_classes)
            which, rate = self._best(trained, unseen)
            head = trained[which].only(self.learning_rates.index(rate))
        else:
            kept, held = stratified_holdout(labels, HELD_OUT, self.seed)
            trained = self.trained(train, kept, inputs, self.learning_rates, num_classes)
            which, rate = self._best(trained, train, held)
            head = self.trained(train, everything, [which], [rate], num_classes)[which]
        score = scores(head, which, unseen)[0]
        figures = {"accuracy": score.accuracy}
        if num_classes > 5:
            figures["accuracy_top5"] = score.accuracy_top5
        return {**figures, "learning_rate": rate, "num_blocks": float(which.num_blocks), "pooled": float(which.pooled)}

    def inputs(self, vectors: Vectors) -> list[LinearInput]:
        """The inputs that are tried on a network."""
        counts = sorted({min(count, len(vectors.blocks) or 1) for count in self.last_blocks})
        with_patches = (False, True) if self.pooled else (False,)
        return [LinearInput(count, pooled) for count in counts for pooled in with_patches]

    def trained(
        self,
        train: Vectors,
        rows: Int[Tensor, "R"],
        inputs: Sequence[LinearInput],
        rates: Sequence[float],
        num_classes: int,
    ) -> dict[LinearInput, Heads]:
        """Classifiers for every input with every learning rate, trained on the vectors at those rows."""
        _, labels = with_labels(train)
        widest = LinearInput(max(each.num_blocks for each in inputs), any(each.pooled for each in inputs))
        scaled = [rate * self.vectors_per_step / 256 for rate in rates]
        spans = {each: span(train, each, widest) for each in inputs}
        heads = {
            each: Heads(fresh_weight(num_classes, where.stop - where.start, self.seed, each).to(train.device), scaled)
            for each, where in spans.items()
        }
        num_steps = self.num_steps(len(rows))
        for step, batch in enumerate(batches(rows, self.vectors_per_step, num_steps, self.seed)):
            vectors = joined(train, widest, batch).to(train.device)
            wanted = F.one_hot(labels[batch].to(train.device), num_classes).T
            share = 0.5 * (1 + math.cos(math.pi * step / num_steps))
            for each, where in spans.items():
                heads[each].step(vectors[:, where], wanted, share)
        return heads

    def num_steps(self, num_vectors: int) -> int:
        """Steps of a run over that many vectors."""
        return max(self.min_steps, round(self.num_epochs * num_vectors / self.vectors_per_step))

    def _best(
        self, trained: dict[LinearInput, Heads], vectors: Vectors, rows: Int[Tensor, "R"] | None = None
    ) -> tuple[LinearInput, float]:
        """The input and the learning rate of the classifier that does best on those images."""
        found = {
            (each, rate): score
            for each, heads in trained.items()
            for rate, score in zip(self.learning_rates, scores(heads, each, vectors, rows), strict=True)
        }
        return max(found, key=lambda key: found[key])


class Score(NamedTuple):
    """How a classifier does, in the order of what counts for the choice."""

    accuracy: float
    log_likelihood: float
    """Mean over the images."""
    accuracy_top5: float


class Heads:
    """Linear classifiers on the same input, all from the same weights, each with its own learning rate."""

    def __init__(self, weight: Float[Tensor, "K D"], rates: Sequence[float]) -> None:
        self.rates = torch.tensor(rates, device=weight.device)
        self.weight = weight.repeat(len(rates), 1, 1)
        self.bias = weight.new_zeros(self.weight.shape[:2])
        self.velocity = torch.zeros_like(self.weight), torch.zeros_like(self.bias)

    def logits(self, inputs: Float[Tensor, "B D"]) -> Float[Tensor, "L K B"]:
        """Of every classifier; the images are last, where softmax is fastest for few classes."""
        flat: Tensor = torch.addmm(self.bias.view(-1, 1), self.weight.flatten(0, 1), inputs.T)
        return flat.view(*self.bias.shape, -1)

    def step(self, inputs: Float[Tensor, "B D"], wanted: Int[Tensor, "K B"], share: float) -> None:
        """A step of SGD on the mean cross-entropy, at `share` of the learning rates.

        Args:
            inputs: the vectors.
            wanted: their classes, one-hot.
            share: of the learning rates.
        """
        errors = (self.logits(inputs).softmax(dim=1) - wanted) / len(inputs)
        gradients = (errors.flatten(0, 1) @ inputs).view_as(self.weight), errors.sum(dim=2)
        rates = share * self.rates
        for parameter, velocity, gradient in zip((self.weight, self.bias), self.velocity, gradients, strict=True):
            velocity.mul_(MOMENTUM).add_(gradient)
            parameter.sub_(velocity * rates.view(-1, *[1] * (parameter.ndim - 1)))

    def only(self, index: int) -> Heads:
        """One of them."""
        found = Heads(self.weight[index], self.rates[index : index + 1].tolist())
        found.bias = self.bias[index : index + 1]
        return found


def fresh_weight(num_classes: int, num_inputs: int, seed: int, which: LinearInput) -> Float[Tensor, "K D"]:
    """The weights that the classifiers on one input begin with; the biases are 0."""
    rng = torch.Generator().manual_seed(derived_seed(seed, "linear weight", *which))
    return torch.empty(num_classes, num_inputs).normal_(std=INIT_STD, generator=rng)


def batches(rows: Int[Tensor, "R"], size: int, num_steps: int, seed: int) -> Iterator[Int[Tensor, "B"]]:
    """`num_steps` batches of rows, each in rising order: a fresh shuffle in every pass, what is left over left out."""
    per_pass = max(1, len(rows) // size)
    for step in range(num_steps):
        position = step % per_pass
        if position == 0:
            order = rows[torch.from_numpy(generator(seed, "linear order", step // per_pass).permutation(len(rows)))]
        yield order[position * size : (position + 1) * size].sort().values


def joined(vectors: Vectors, which: LinearInput, rows: Int[Tensor, "B"]) -> Float[Tensor, "B D"]:
    """The input of the images at those rows.

    Raises:
        DataError: the mean patch vectors are not there.
    """
    return torch.cat([part[rows].float() for part in _parts(vectors, which)], dim=1)


def span(vectors: Vectors, which: LinearInput, widest: LinearInput) -> slice:
    """Where one input stands within another that has all its blocks, and the mean patch vector if it has."""
    start = sum(part.shape[1] for part in _parts(vectors, LinearInput(widest.num_blocks, pooled=False)))
    width = sum(part.shape[1] for part in _parts(vectors, which))
    start -= sum(part.shape[1] for part in _parts(vectors, LinearInput(which.num_blocks, pooled=False)))
    return slice(start, start + width)


def _parts(vectors: Vectors, which: LinearInput) -> list[Tensor]:
    parts = list(vectors.blocks[-which.num_blocks :]) or [vectors.cls]
    if which.pooled:
        if vectors.pooled is None:
            raise DataError("the mean patch vectors are not there; compute the features of 2 blocks or more.")
        parts.append(vectors.pooled)
    return parts


def scores(heads: Heads, which: LinearInput, vectors: Vectors, rows: Int[Tensor, "R"] | None = None) -> list[Score]:
    """How each classifier does on the images, on those at `rows` if given."""
    _, labels = with_labels(vectors)
    chosen = torch.arange(len(labels)) if rows is None else rows
    found = torch.zeros(3, len(heads.rates), dtype=torch.float64)
    for part in chosen.split(_CHUNK):
        logits = heads.logits(joined(vectors, which, part).to(heads.weight.device))
        truth = labels[part].to(logits.device).expand(1, 1, -1)
        found[0] += (logits.argmax(dim=1) == truth[0]).sum(dim=1).cpu()
        found[1] += logits.log_softmax(dim=1).take_along_dim(truth, dim=1).cpu().double().sum(dim=(1, 2))
        found[2] += (logits.topk(min(5, logits.shape[1]), dim=1).indices == truth).sum(dim=(1, 2)).cpu()
    means = (found / len(chosen)).nan_to_num(nan=-torch.inf)
    return [Score(*each) for each in means.T.tolist()]
