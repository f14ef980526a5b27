import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

import poa.evaluate.features as features_module
from poa.backbones import architecture
from poa.config import DataConfig, ViTConfig
from poa.data import BadImage, ImageSource, open_source
from poa.errors import DataError, PoaWarning
from poa.evaluate import Knn, Loading, evaluate, extract_features, knn_accuracies, rankme, split
from poa.family import Family, FamilyCard, Preprocessing
from poa.models import family_members

CONFIG = ViTConfig(widths=(16, 32), depths=(1, 2), head_dim=16, patch_size=4, image_size=8, num_channels=1)
HOW = Preprocessing(8, 1, (0.3,), (0.35,))


@pytest.fixture(scope="module")
def family():
    kind = architecture(CONFIG)
    backbone = kind.build(CONFIG)
    rng = torch.Generator().manual_seed(0)
    backbone.init_weights_(rng)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng), alpha=0.2)
    return Family(FamilyCard(kind, CONFIG, HOW), backbone)


class CountingSource(ImageSource):
    """Random images in memory; counts how often each is loaded."""

    def __init__(self, spec, *, size=30, bad=(), classes=("a", "b", "c")):
        self.spec = spec
        self.skipped = ()
        self.pixels = np.random.default_rng(0).integers(0, 256, (size, 8, 8), dtype=np.uint8)
        self.bad = set(bad)
        self.loads = np.zeros(size, dtype=int)
        self.labels = None if classes is None else np.arange(size) % len(classes)
        self.class_names = classes

    @classmethod
    def accepts(cls, spec):
        return spec == cls.__name__

    def __len__(self):
        return len(self.pixels)

    def load(self, index):
        self.loads[index] += 1
        if index in self.bad:
            raise BadImage("is broken")
        return Image.fromarray(self.pixels[index])

    def image_name(self, index):
        return f"image-{index}"

    @property
    def fingerprint(self):
        return "none"


def random_task(seed, num_train=300, num_test=120, width=8, num_classes=5):
    rng = np.random.default_rng(seed)
    train, test = rng.normal(size=(num_train, width)), rng.normal(size=(num_test, width))
    labels = rng.integers(0, num_classes, num_train), rng.integers(0, num_classes, num_test)
    return [torch.from_numpy(part) for part in (train, labels[0], test, labels[1])]


@pytest.mark.parametrize("temp", [0.07, 1.0])
@pytest.mark.parametrize("k", [1, 5, 20, 300])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_knn_equals_scikit_learn_to_the_last_image(seed, k, temp):
    train, labels, test, truth = random_task(seed)
    theirs = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temp)
    )
    expected = theirs.fit(train, labels).predict(test) == truth.numpy()
    found = knn_accuracies(train, labels, test, truth, ks=[k], temp=temp)
    assert list(found) == [k]
    assert round(found[k] * len(test)) == expected.sum()


def test_knn_of_many_numbers_of_neighbours_equals_one_at_a_time():
    task = random_task(3)
    together = knn_accuracies(*task, ks=[20, 1, 7, 20])
    assert list(together) == [1, 7, 20]
    assert together == {k: knn_accuracies(*task, ks=[k])[k] for k in (1, 7, 20)}


@pytest.mark.parametrize("chunk", [8, 16, 64, 299, 300, 10_000])
def test_knn_does_not_depend_on_the_chunks(chunk):
    task = random_task(4)
    assert knn_accuracies(*task, ks=[1, 50, 200], chunk=chunk) == knn_accuracies(*task, ks=[1, 50, 200])


def test_knn_does_not_depend_on_the_lengths_of_the_features():
    train, labels, test, truth = random_task(5)
    scaled = train * torch.rand(len(train), 1).add(0.1), test * 1000.0
    assert knn_accuracies(train, labels, test, truth, ks=[10]) == knn_accuracies(
        scaled[0], labels, scaled[1], truth, ks=[10]
    )


def test_knn_of_the_training_images_themselves_is_perfect_for_one_neighbour():
    train, labels, _, _ = random_task(6)
    assert knn_accuracies(train, labels, train, labels, ks=[1]) == {1: 1.0}


def test_classes_that_only_the_test_images_have_are_wrong_and_no_error():
    train, labels, test, truth = random_task(7)
    assert knn_accuracies(train, labels, test, truth + 10, ks=[5]) == {5: 0.0}


def test_more_neighbours_than_images_are_left_out_with_a_warning():
    task = random_task(8, num_train=15)
    with pytest.warns(PoaWarning, match="k = 20, 200 left out: there are 15"):
        found = knn_accuracies(*task, ks=[5, 20, 200])
    assert list(found) == [5]
    with pytest.raises(DataError, match="at least 20 training images"):
        knn_accuracies(*task, ks=[20, 200])


@pytest.mark.parametrize("ks", [[0], [-3], []])
def test_numbers_of_neighbours_that_are_no_numbers_are_refused_in_words_that_fit(ks):
    with pytest.raises(DataError, match="1 or more"):
        knn_accuracies(*random_task(8), ks=ks)


@pytest.mark.parametrize("width", [1, 4, 16])
def test_rankme_of_orthonormal_features_is_their_number(width):
    basis, _ = torch.linalg.qr(torch.randn(64, width, generator=torch.Generator().manual_seed(0)))
    assert rankme(basis) == pytest.approx(width, rel=1e-4)
    assert rankme(1000.0 * basis) == pytest.approx(width, rel=1e-4)


def test_rankme_of_features_on_one_line_is_one():
    line = torch.randn(50, 1) @ torch.randn(1, 32)
    assert rankme(line) == pytest.approx(1.0, abs=1e-3)
    assert rankme(torch.ones(50, 32)) == pytest.approx(1.0, abs=1e-3)


def test_rankme_of_a_known_spectrum_is_the_exponential_of_its_entropy():
    left, _ = torch.linalg.qr(torch.randn(40, 3, dtype=torch.float64))
    values = torch.tensor([4.0, 2.0, 2.0], dtype=torch.float64)
    assert rankme(left * values) == pytest.approx(2 ** (0.5 * 1 + 2 * 0.25 * 2), rel=1e-4)


def test_rankme_of_nothing_but_zeros_is_finite():
    assert rankme(torch.zeros(10, 4)) == pytest.approx(1.0, abs=0.01)


def test_every_image_is_loaded_once_for_all_subnets_and_features_are_the_subnets_own(family):
    source = CountingSource("counting")
    with extract_features(family_members(family), source, loading=Loading(batch_size=7)) as features:
        found = {subnet: features.of(str(subnet)).cls.clone() for subnet in family.subnets}
        assert features.indices.tolist() == list(range(30))
        assert features.skipped == ()
    assert source.loads.tolist() == [1] * 30
    images = torch.from_numpy(source.pixels).unsqueeze(1) / 255.0
    images = (images - 0.3) / 0.35
    for subnet in family.subnets:
        assert found[subnet].shape == (30, subnet.width)
        torch.testing.assert_close(found[subnet], family.features(images, subnet), rtol=1e-4, atol=1e-5)


def test_several_depths_come_with_the_mean_patch_vector(family):
    with extract_features(family_members(family), CountingSource("counting"), num_blocks=4) as features:
        for subnet in family.subnets:
            found = features.of(str(subnet))
            assert len(found.blocks) == subnet.depths[0]
            assert torch.equal(found.blocks[-1], found.cls)
            assert found.pooled.shape == found.cls.shape
            assert (found.labels.tolist(), found.num_classes) == ([0, 1, 2] * 10, 3)


def test_only_the_chosen_images_are_loaded_and_progress_is_told(family):
    source, told = CountingSource("counting"), []
    chosen = np.array([3, 8, 21, 29])
    with extract_features(
        family_members(family)[:1],
        source,
        indices=chosen,
        loading=Loading(batch_size=3),
        on_progress=told.append,
    ) as features:
        assert features.indices.tolist() == chosen.tolist()
    assert np.flatnonzero(source.loads).tolist() == chosen.tolist()
    assert told == [3, 4]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_features_beyond_the_budget_live_in_files_and_are_the_same(family, monkeypatch, tmp_path, num_workers):
    loading = Loading(batch_size=8, num_workers=num_workers)

    def extracted():
        source = CountingSource("counting", bad=[4])
        allowing = Loading(loading.batch_size, loading.num_workers, max_bad_share=0.5)
        with extract_features(family_members(family), source, loading=allowing) as features:
            in_files = all(isinstance(slot.arrays[0], np.memmap) for slot in features.slots.values())
            files = len(list(tmp_path.rglob("*.npy")))
            return in_files, files, {str(subnet): features.of(str(subnet)).cls.clone() for subnet in family.subnets}

    monkeypatch.setattr(features_module.tempfile, "tempdir", str(tmp_path))
    in_files, num_files, expected = extracted()
    assert (in_files, num_files) == (False, 0)
    monkeypatch.setattr(features_module, "MEMORY_BUDGET", 1000)
    in_files, num_files, found = extracted()
    assert (in_files, num_files) == (True, len(family.subnets))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert list(tmp_path.iterdir()) == []


def test_unreadable_images_are_left_out_and_reported(family):
    bad = [0, 7, 8, 9, 10, 11, 12, 13, 29]
    source = CountingSource("counting", bad=bad)
    whole = CountingSource("counting")
    loading = Loading(batch_size=6, max_bad_share=0.3)
    members = family_members(family)
    with extract_features(members, source, loading=loading) as features, extract_features(members, whole) as expected:
        good = [index for index in range(30) if index not in bad]
        assert features.indices.tolist() == good
        assert [tuple(image) for image in features.skipped] == [(f"image-{index}", "is broken") for index in bad]
        for name in map(str, family.subnets):
            torch.testing.assert_close(features.of(name).cls, expected.of(name).cls[good], rtol=1e-5, atol=1e-6)
            assert features.of(name).labels.tolist() == expected.of(name).labels[good].tolist()


@pytest.mark.parametrize(("bad", "share"), [([1], 0.01), (range(16), 0.5), (range(30), 1.0)])
def test_too_many_unreadable_images_are_refused_with_examples(family, bad, share):
    source = CountingSource("counting", bad=bad)
    features = extract_features(family_members(family), source, loading=Loading(max_bad_share=share))
    with pytest.raises(DataError, match=rf"{len(bad)} of the 30 images .*image-1: is broken"), features:
        pytest.fail("the block must not run")


def digits(split):
    return open_source(f"digits:{split}", DataConfig(), 1)


def evaluated_knn(family, train, test, subnets=None, k=(1, 10), **options):
    knn = Knn(k=k)
    return evaluate([knn], family_members(family, subnets), split(train, test, [knn]), **options)


def test_knn_of_a_random_family_on_digits_is_between_chance_and_perfect(family):
    told = []
    report = evaluated_knn(
        family, digits("train"), digits("test"), on_progress=lambda name, done: told.append((name, done))
    )
    assert (report.num_train, report.num_test, report.skipped) == (1437, 360, ())
    assert [result.network for result in report.results] == ["w16-d1", "w16-d2", "w32-d1", "w32-d2"]
    for result, subnet in zip(report.results, family.subnets, strict=True):
        assert list(result.figures) == ["accuracy", "accuracy_k1", "accuracy_k10"]
        assert 0.3 < result.value < 0.999
        assert result.value == max(result.figures.values())
        assert (result.num_params, result.flops) == (family.card.num_params(subnet), family.card.flops(subnet))
    assert told[-1] == ("test", 360)
    assert ("train", 1437) in told


def test_knn_of_a_subnet_equals_that_of_its_extracted_model(family):
    subnet = family.subnets[1]
    report = evaluated_knn(family, digits("train"), digits("test"), [subnet], k=(10,))
    model = family.extract(subnet)
    features, labels = [], []
    for part in ("train", "test"):
        source = digits(part)
        pixels = np.stack([np.asarray(source.load(index)) for index in range(len(source))])
        with torch.inference_mode():
            features.append(model((torch.from_numpy(pixels).unsqueeze(1) / 255.0 - 0.3) / 0.35))
        labels.append(torch.from_numpy(source.labels))
    found = knn_accuracies(features[0], labels[0], features[1], labels[1], ks=[10])
    assert abs(found[10] - report.results[0].value) <= 1 / 360


def test_labels_follow_their_images_when_some_are_left_out(family):
    train = CountingSource("train", bad=range(0, 30, 3))
    loading = Loading(max_bad_share=0.5)
    report = evaluated_knn(family, train, CountingSource("train"), family.subnets[:1], k=(1,), loading=loading)
    assert (report.num_train, report.num_test, len(report.skipped)) == (20, 30, 10)
    assert report.results[0].value == pytest.approx(20 / 30)


def test_without_test_images_a_fifth_of_every_class_is_held_out(family):
    source = CountingSource("counting")
    report = evaluated_knn(family, source, None, k=(1,))
    assert (report.num_train, report.num_test) == (24, 6)
    assert source.loads.tolist() == [1] * 30
    data = split(source, None, [Knn(k=(1,))])
    assert np.bincount(source.labels[data.test_indices]).tolist() == [2, 2, 2]
    assert set(data.train_indices) | set(data.test_indices) == set(range(30))


def test_sources_of_other_classes_are_refused_with_their_names():
    with pytest.raises(DataError, match="different classes; only one of them has: c, d"):
        split(CountingSource("one"), CountingSource("two", classes=("a", "b", "d")), [Knn()])


def test_a_source_without_labels_is_refused():
    unlabelled = CountingSource("plain", classes=None)
    for train, test in ((unlabelled, CountingSource("x")), (CountingSource("x"), unlabelled)):
        with pytest.raises(DataError, match="plain has no labels"):
            split(train, test, [Knn(k=(1,))])
