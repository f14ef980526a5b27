import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from poa.deploy.export.accuracy import accuracy_drops, check_labelled
from poa.deploy.export.base import Exported, Exporter
from poa.deploy.export.compare import Timing, compare
from poa.errors import ConfigError, DataError, ExtractionError
from poa.evaluate import Knn, Loading, evaluate
from poa.evaluate.knn import knn_accuracies, knn_hits
from poa.evaluate.run import Splits
from poa.family import Family
from poa.models import FamilyMember
from poa.task_head import TaskHead
from tests.unit.test_evaluate import CountingSource
from tests.unit.test_extraction import TINY, make_family

SMALL = replace(TINY, image_size=8)
CLASSES = ("a", "b", "c")


@dataclass(frozen=True)
class Changed(Exporter):
    """The sub-network itself, changed."""

    name: ClassVar[str] = "changed"
    summary: ClassVar[str] = "for tests"
    weights_file: ClassVar[str] = "weights"
    hub_library: ClassVar[str] = "none"
    usage: ClassVar[str] = ""

    what: Exported
    change: object = staticmethod(lambda vectors: vectors)

    def write(self, what: Exported, directory: Path) -> None:
        del what
        (directory / "weights").write_bytes(bytes(1234))

    def open(self, directory: Path, num_threads: int | None = None):
        del directory
        assert num_threads == 1
        return lambda images: self.change(self.what.expected(torch.from_numpy(images))).numpy()


class Changed8(Changed):
    precision: ClassVar[str] = "int8"


def make_exported(has_head=False, **head):
    family = make_family(SMALL)
    if has_head:
        width = family.supernet.layout.features.size
        weight = torch.randn(len(CLASSES), width, generator=torch.Generator().manual_seed(2))
        family = Family(family.card, family.supernet, TaskHead(weight, torch.zeros(len(CLASSES)), CLASSES, **head))
    return Exported(family, family.space.smallest, 8)


def compared(what, change, tmp_path, kind=Changed, **options):
    exporter = kind(what, change)
    exporter.write(what, tmp_path)
    return compare(exporter, what, tmp_path, timing=Timing(num_runs=3), **options)


def test_the_figures_are_those_of_the_definitions(tmp_path):
    what = make_exported()
    images = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = what.expected(images).numpy()
    change = np.zeros_like(expected)
    change[:, 0] = 0.5

    found = compared(
        what, lambda vectors: vectors + torch.from_numpy(change[: len(vectors)]), tmp_path, Changed8, images=images
    )
    norms = np.linalg.norm(expected + change, axis=1) * np.linalg.norm(expected, axis=1)
    cosines = ((expected + change) * expected).sum(axis=1) / norms
    assert found.max_abs_difference == pytest.approx(0.5)
    assert found.relative_difference == pytest.approx(np.linalg.norm(change) / np.linalg.norm(expected))
    assert found.cosine_similarity == pytest.approx(cosines.mean())
    assert found.min_cosine_similarity == pytest.approx(cosines.min())
    assert (found.num_bytes, found.num_images, found.is_noise) == (1234, 20, False)
    assert (found.subnet, found.format, found.precision) == (str(what.subnet), "changed", "int8")
    assert (found.num_threads, found.num_runs) == (1, 3)
    assert found.latency_ms > 0
    assert found.processor
    assert found.accuracy is None


def test_without_images_noise_is_compared(tmp_path):
    found = compared(make_exported(), lambda vectors: vectors, tmp_path)
    assert (found.is_noise, found.num_images, found.max_abs_difference) == (True, 8, 0.0)


def test_float32_formats_must_agree_and_formats_of_8_bits_are_reported(tmp_path):
    what = make_exported()
    scale = max(1.0, float(what.expected(what.probe_images(8)).abs().max()))
    compared(what, lambda vectors: vectors + 0.8e-4 * scale, tmp_path)
    with pytest.raises(ExtractionError, match=r"differs from the sub-network by 1\.2e-04"):
        compared(what, lambda vectors: vectors + 1.2e-4 * scale, tmp_path)
    found = compared(what, lambda vectors: vectors + 1.0, tmp_path, Changed8)
    assert found.max_abs_difference == pytest.approx(1.0)


@pytest.mark.parametrize("kind", [Changed, Changed8])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda vectors: vectors * math.nan, "not all finite"),
        (lambda vectors: vectors[:, 1:], r"gives \[8, 31\]"),
        (lambda vectors: vectors.double(), "torch.float64"),
    ],
)
def test_outputs_that_are_none_are_refused(kind, change, message, tmp_path):
    with pytest.raises(ExtractionError, match=message):
        compared(make_exported(), change, tmp_path, kind)


def test_an_export_that_is_the_sub_network_loses_nothing_and_has_the_accuracy_of_poa_evaluate():
    what, train, test = make_exported(), CountingSource("train", size=60), CountingSource("test", size=30, bad=[4])
    loading = Loading(batch_size=7, max_bad_share=0.1)
    data = Splits(train, test)
    found = accuracy_drops(what, {"same": Changed(what).open(Path(), 1)}, data, loading)["same"]
    assert train.loads.max() == test.loads.max() == 1
    member = FamilyMember(what.family, what.subnet)
    expected = evaluate([Knn(k=(10, 20))], [member], data, loading=loading).results[0].figures
    assert found.subnet == found.export == expected["accuracy"]
    assert (found.drop, found.standard_error, found.num_train, found.num_test) == (0.0, 0.0, 60, 29)
    assert found.protocol in ("k-NN, k = 10", "k-NN, k = 20")


def test_the_drop_of_a_classifier_and_its_paired_standard_error():
    what, test = make_exported(has_head=True), CountingSource("test", size=30, classes=CLASSES)
    images = (torch.from_numpy(test.pixels).unsqueeze(1).float() / 255 - 0.5) / 0.25
    logits = what.expected(images)
    found = accuracy_drops(
        what, {"rolled": Changed(what, lambda each: each.roll(1, dims=1)).open(Path(), 1)}, Splits(test, test)
    )["rolled"]
    labels = torch.from_numpy(test.labels)
    own, rolled = (part.argmax(dim=1) == labels for part in (logits, logits.roll(1, dims=1)))
    difference = own.double().numpy() - rolled.double().numpy()
    assert found.protocol == "classifier"
    assert (found.subnet, found.export) == pytest.approx((float(own.double().mean()), float(rolled.double().mean())))
    assert found.drop == pytest.approx(difference.mean())
    assert found.standard_error == pytest.approx(difference.std(ddof=1) / math.sqrt(30))
    assert found.standard_error > 0


def test_labelled_images_that_do_not_do_are_refused_before_work_starts():
    source, plain = CountingSource("photos"), CountingSource("plain", classes=None)
    what = make_exported()
    for data in (Splits(source, None), Splits(plain, source), Splits(source, plain)):
        with pytest.raises(DataError, match="needs labelled images"):
            check_labelled(what, data)
    with pytest.raises(DataError, match="at least 10 training images; got 9"):
        check_labelled(what, Splits(source, source, train_indices=np.arange(9)))
    with pytest.raises(DataError, match="two test images or more"):
        check_labelled(what, Splits(source, source, test_indices=np.arange(1)))
    others = CountingSource("others", classes=("a", "b", "d"))
    with pytest.raises(DataError, match="others has other classes than the family's classifier"):
        check_labelled(make_exported(has_head=True), Splits(others, others))
    with pytest.raises(ConfigError, match="any number of classes"):
        check_labelled(make_exported(has_head=True, multi_label=True), Splits(source, source))


def test_hits_of_knn_are_those_of_each_image():
    train = torch.eye(4).repeat_interleave(3, dim=0)
    test = torch.eye(4)
    labels = torch.arange(4).repeat_interleave(3)
    hits = knn_hits(train, labels, test, torch.tensor([0, 1, 3, 3]), ks=(1, 3), chunk=8)
    assert hits[1].tolist() == hits[3].tolist() == [True, True, False, True]
    assert knn_accuracies(train, labels, test, torch.tensor([0, 1, 3, 3]), ks=(1, 3)) == {1: 0.75, 3: 0.75}
