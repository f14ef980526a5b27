"""Protocols over networks: checks first, then every image once, then the figures."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from poa.data import ImageSource
from poa.errors import ConfigError, DataError
from poa.evaluate.base import Evaluator, Vectors
from poa.evaluate.features import DEFAULT_LOADING, Extraction, Loading, extract_features, num_classes
from poa.evaluate.intact import intact_of, with_intact
from poa.evaluate.looks import PLAIN, AnyLook, RandomView
from poa.evaluate.report import Report, Result
from poa.evaluate.splits import stratified_holdout
from poa.models import Candidate

HELD_OUT = 0.2
"""The share of each class that is tested on where no test images are given."""

Plan = Mapping[AnyLook, np.ndarray | None]
"""Looks, each with the positions of the images that it is for; None: all."""
OnProgress = Callable[[str, int], None]
"""Called with ("train" or "test", images done)."""
OnResult = Callable[[Result], None]
"""Called with every result as soon as it is there."""


@dataclass(frozen=True)
class Splits:
    """The images of an evaluation: positions in one or two sources."""

    train: ImageSource
    test: ImageSource | None
    train_indices: np.ndarray | None = None
    test_indices: np.ndarray | None = None

    @property
    def num_train(self) -> int:
        """Training images."""
        return len(self.train) if self.train_indices is None else len(self.train_indices)

    @property
    def num_test(self) -> int:
        """Test images."""
        if self.test is None:
            return 0
        return len(self.test) if self.test_indices is None else len(self.test_indices)

    def labels(self) -> tuple[Tensor | None, Tensor | None]:
        """The classes of the training and of the test images."""
        test = None if self.test is None else _labels(self.test, self.test_indices)
        return _labels(self.train, self.train_indices), test


def split(train: ImageSource, test: ImageSource | None, protocols: Sequence[Evaluator], seed: int = 0) -> Splits:
    """The images to train and to test on.

    Without `test`, where a protocol needs one, a fifth of every class of `train` is held out.

    Raises:
        DataError: labels are missing or do not fit together, or a protocol cannot work on them.
    """
    if any(protocol.needs_labels for protocol in protocols):
        _require_labels(train)
    found = Splits(train, test)
    if any(protocol.needs_test for protocol in protocols):
        if test is None:
            labels = torch.from_numpy(np.asarray(train.labels))
            kept, held = stratified_holdout(labels, HELD_OUT, seed)
            found = Splits(train, train, kept.numpy(), held.numpy())
        else:
            _require_labels(test)
            _require_same_classes(train, test)
    truth = found.labels()
    for protocol in protocols:
        protocol.check(truth[0], truth[1], num_classes(train))
        if protocol.needs_test and found.test is not None:
            protocol.check_images(found.test, positions(found.test, found.test_indices))
    return found


def evaluate(
    protocols: Sequence[Evaluator],
    networks: Sequence[Candidate],
    data: Splits,
    *,
    loading: Loading = DEFAULT_LOADING,
    store: Path | None = None,
    on_progress: OnProgress | None = None,
    on_result: OnResult | None = None,
    is_due: Callable[[Candidate, Evaluator], bool] = lambda network, protocol: True,  # noqa: ARG005
) -> Report:
    """The figures of every network under every protocol.

    Args:
        protocols: what to measure.
        networks: what is measured, each on the device that it is on. Where a protocol compares with the intact network
            of a family and it is not among them, its vectors are computed too.
        data: the images, from `split`.
        loading: batch size and workers.
        store: a directory in which vectors are kept, so that a stopped evaluation goes on.
        on_progress: called after every batch of images.
        on_result: called with every result as soon as it is there.
        is_due: which protocols are run on which networks; all by default.

    Raises:
        DataError: too many images could not be read.
        ConfigError: a protocol cannot work on images of the networks' size or channels.
    """
    damaged = test_plan([each for each in protocols if any(is_due(network, each) for network in networks)], data)
    for look, network in itertools.product(damaged, networks):
        look.check(network.preprocessing)
    present = with_intact(networks) if any(protocol.needs_intact for protocol in protocols) else list(networks)
    views: Plan = {RandomView(): None} if any(protocol.needs_views for protocol in protocols) else {}
    num_blocks = max(protocol.num_blocks for protocol in protocols)

    extract = partial(extract_features, num_blocks=num_blocks, loading=loading, store=store)

    def extracted(
        members: Sequence[Candidate], source: ImageSource, indices: np.ndarray | None, looks: Plan, phase: str
    ) -> AbstractContextManager[Extraction]:
        report = None if on_progress is None else partial(on_progress, phase)
        return extract(members, source, looks={PLAIN: None, **looks}, indices=indices, on_progress=report)

    with ExitStack() as stack:
        train = stack.enter_context(extracted(present, data.train, data.train_indices, views, "train"))
        test = None
        if data.test is not None and any(protocol.needs_test for protocol in protocols):
            test = stack.enter_context(extracted(networks, data.test, data.test_indices, damaged, "test"))
        results = []
        for network in networks:
            for protocol in protocols:
                if not is_due(network, protocol):
                    continue
                results.append(_result(protocol, network, present, train, test))
                if on_result is not None:
                    on_result(results[-1])
        skipped = train.skipped + (test.skipped if test is not None else ())
        return Report(tuple(results), len(train.indices), 0 if test is None else len(test.indices), skipped)


def _result(
    protocol: Evaluator,
    network: Candidate,
    networks: Sequence[Candidate],
    train: Extraction,
    test: Extraction | None,
) -> Result:
    reference = None
    if protocol.needs_intact:
        reference = train.of(intact_of(network, networks).name)
    seen = replace(train.of(network.name), device=network.device)
    if protocol.needs_views:
        seen = replace(seen, second=train.of(network.name, RandomView().name).cls)
    unseen: Vectors | None = None
    if test is not None and protocol.needs_test:
        unseen = test.of(network.name)
        names = {name: look.name for name, look in protocol.test_looks.items()}
        if names:
            under = {name: test.of(network.name, look).cls for name, look in names.items()}
            unseen = replace(unseen, under=under, under_rows=test.rows(next(iter(names.values()))))
    return Result(
        protocol=protocol.name,
        network=network.name,
        source=network.source,
        num_params=network.num_params,
        flops=network.flops,
        figures=protocol.evaluate(seen, unseen, reference),
        headline=protocol.headline,
        key=result_key(network, protocol),
    )


def test_plan(protocols: Sequence[Evaluator], data: Splits) -> Plan:
    """The looks at test images that the protocols need beside the plain one.

    Raises:
        ConfigError: two protocols need the same look at other images.
    """
    plan: dict[AnyLook, np.ndarray | None] = {}
    _, labels = data.labels()
    if data.test is None or labels is None:
        return plan
    for protocol in protocols:
        rows = protocol.test_sample(labels) if protocol.test_looks else None
        chosen = None if rows is None else positions(data.test, data.test_indices)[rows.numpy()]
        for name, look in protocol.test_looks.items():
            if look in plan and not np.array_equal(plan[look], chosen):  # type: ignore[arg-type]
                raise ConfigError(f"two protocols need {name} of other images. Run them one after the other.")
            plan[look] = chosen
    return plan


def positions(source: ImageSource, indices: np.ndarray | None) -> np.ndarray:
    """Positions of the images in the source."""
    return np.arange(len(source)) if indices is None else indices


def result_key(network: Candidate, protocol: Evaluator) -> str:
    """What tells results apart: the network's name and weights, its preprocessing, the protocol's numbers."""
    parts = (network.name, network.source, network.fingerprint, network.preprocessing, protocol)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _labels(source: ImageSource, indices: np.ndarray | None) -> Int[Tensor, "N"] | None:
    if source.labels is None:
        return None
    labels = torch.from_numpy(np.asarray(source.labels))
    return labels if indices is None else labels[torch.from_numpy(indices)]


def _require_labels(source: ImageSource) -> None:
    if source.labels is None:
        raise DataError(
            f"{source.spec} has no labels. Give one folder for each class, or a parquet file with a label column."
        )


def _require_same_classes(train: ImageSource, test: ImageSource) -> None:
    if train.class_names and test.class_names and train.class_names != test.class_names:
        only = sorted(set(train.class_names) ^ set(test.class_names))[:5]
        raise DataError(
            f"{train.spec} and {test.spec} have different classes; only one of them has: {', '.join(only)}."
        )
