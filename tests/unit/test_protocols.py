import numpy as np
import pytest
import torch
from sklearn import metrics
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize
from torch.nn import functional as F
from torchmetrics.functional.retrieval import retrieval_average_precision, retrieval_hit_rate

from poa.errors import ConfigError, DataError, PoaWarning
from poa.evaluate import Vectors, knn_accuracies
from poa.evaluate.clustering import Clustering, agreement, clusters
from poa.evaluate.fewshot import FewShot, nearest_mean
from poa.evaluate.health import Health, alignment, cka, neighbour_overlap, uniformity
from poa.evaluate.logistic import Logistic, predicted
from poa.evaluate.rankme import rankme
from poa.evaluate.repeats import mean_and_sd
from poa.evaluate.retrieval import Retrieval, retrieval_figures
from poa.evaluate.splits import stratified_draw, stratified_holdout
from poa.randomness import derived_seed


def task(seed, num_train=240, num_test=90, width=12, num_classes=3, spread=1.0, distance=1.0):
    """Vectors of classes that overlap the more, the larger `spread` and the smaller `distance`."""
    rng = torch.Generator().manual_seed(seed)
    means = distance * torch.randn(num_classes, width, generator=rng)

    def vectors(count):
        labels = torch.arange(count) % num_classes
        rows = means[labels] + spread * torch.randn(count, width, generator=rng)
        lower = torch.randn(count, 5, generator=rng)
        return Vectors(rows, labels, num_classes, (lower, rows), rows.roll(1, dims=1))

    return vectors(num_train), vectors(num_test)


@pytest.mark.parametrize("seed", range(5))
def test_knn_with_tied_votes_equals_scikit_learn_to_the_last_image(seed):
    rng = np.random.default_rng(seed)
    rows, labels = np.eye(4, dtype=np.float32).repeat(6, axis=0), rng.permutation(np.arange(24) % 3)
    theirs = KNeighborsClassifier(24, metric="cosine", algorithm="brute", weights=lambda distance: np.exp(1 - distance))
    expected = theirs.fit(rows, labels).predict(np.eye(4))
    unseen = torch.eye(4)
    for label in range(3):
        truth = torch.full((4,), label)
        found = knn_accuracies(torch.from_numpy(rows), torch.from_numpy(labels), unseen, truth, ks=[24], temp=1.0)
        assert found[24] == (expected == label).mean()


def test_knn_of_many_classes_and_a_small_temperature_is_finite_and_right():
    rng = torch.Generator().manual_seed(0)
    rows, labels = torch.randn(300, 16, generator=rng), torch.arange(300)
    assert knn_accuracies(rows, labels, rows, labels, ks=[1, 50], temp=1e-4) == {1: 1.0, 50: 1.0}


def test_logistic_regression_is_scikit_learns_to_the_last_image():
    train, test = task(5, spread=1.5)
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(train.cls, train.labels)
    assert torch.equal(predicted(train.cls, train.labels, test.cls, 0.1), torch.from_numpy(theirs.predict(test.cls)))
    figures = Logistic(strengths=(0.1,)).evaluate(train, test)
    assert figures["accuracy"] == theirs.score(test.cls, test.labels)
    expected = metrics.balanced_accuracy_score(test.labels, theirs.predict(test.cls))
    assert figures["mean_class_accuracy"] == pytest.approx(expected)
    assert figures["c"] == 0.1


def test_the_penalty_is_chosen_on_training_images_only():
    train, test = task(6, spread=2.0)
    chosen = Logistic().evaluate(train, test)["c"]
    assert chosen == Logistic().evaluate(train, Vectors(test.cls, test.labels.flip(0), 3))["c"]
    assert chosen in Logistic().strengths


def test_a_regression_that_has_not_converged_is_told():
    train, test = task(7)
    with pytest.warns(PoaWarning, match="stopped after 1 iterations"):
        Logistic(strengths=(1.0,), max_iter=1).evaluate(train, test)


@pytest.mark.parametrize("classifier", ["logistic", "knn", "centroid"])
def test_few_shots_are_classified_from_the_drawn_images_alone(classifier):
    train, test = task(8, spread=0.5)
    protocol = FewShot(shots=(1, 5), shares=(0.1,), num_repeats=3, classifier=classifier)
    figures = protocol.evaluate(train, test)
    assert list(figures)[:3] == ["accuracy", "accuracy_1shot", "accuracy_1shot_sd"]
    assert figures["accuracy"] == figures["accuracy_10pct"]
    assert figures["accuracy_5shot"] > 0.8
    found = [protocol._accuracy(train, test, {0: 5, 1: 5, 2: 5}, draw) for draw in range(3)]
    assert figures["accuracy_5shot"] == pytest.approx(np.mean(found))
    assert figures["accuracy_5shot_sd"] == pytest.approx(np.std(found, ddof=1))


def test_the_nearest_mean_is_scikit_learns():
    train, test = task(9)
    theirs = NearestCentroid().fit(normalize(train.cls), train.labels)
    theirs.centroids_ = normalize(theirs.centroids_)
    expected = torch.from_numpy(theirs.predict(normalize(test.cls)))
    assert torch.equal(nearest_mean(train.cls, train.labels, test.cls), expected)


def test_more_shots_than_a_class_has_are_refused_with_the_nearest_number():
    labels = torch.tensor([0] * 10 + [1] * 4)
    with pytest.raises(DataError, match=r"class 1 has 4 training images\. Give --shots of at most 4"):
        FewShot(shots=(5,)).check(labels, labels, 2)
    FewShot(shots=(4,)).check(labels, labels, 2)


def test_the_shots_by_default_are_those_that_the_smallest_class_has():
    labels = torch.tensor([0] * 30 + [1] * 7)
    FewShot().check(labels, labels, 2)
    assert FewShot(shares=(0.1, 1.0)).settings(labels) == {
        "1shot": {0: 1, 1: 1},
        "5shot": {0: 5, 1: 5},
        "10pct": {0: 3, 1: 1},
        "100pct": {0: 30, 1: 7},
    }
    assert list(FewShot(shots=()).settings(labels)) == ["1pct", "10pct"]


@pytest.mark.parametrize("budget", [1, 500, 1 << 24])
def test_retrieval_equals_torchmetrics_and_scikit_learn(budget):
    gallery, queries = task(10, num_train=80, num_test=20)
    found = retrieval_figures(queries.cls, queries.labels, gallery.cls, gallery.labels, ks=(1, 5), budget=budget)
    similarity = F.normalize(queries.cls, dim=1) @ F.normalize(gallery.cls, dim=1).T
    relevant = queries.labels.unsqueeze(1) == gallery.labels
    pairs = list(zip(similarity + 1.0, relevant, strict=True))  # torchmetrics leaves out what is not above 0
    theirs = [metrics.average_precision_score(truth, scores) for scores, truth in pairs]
    assert found["map"] == pytest.approx(np.mean(theirs), rel=1e-9)
    assert found["map"] == pytest.approx(np.mean([float(retrieval_average_precision(*pair)) for pair in pairs]))
    for k in (1, 5):
        assert found[f"recall_at_{k}"] == np.mean([float(retrieval_hit_rate(*pair, top_k=k)) for pair in pairs])


@pytest.mark.parametrize("budget", [1, 1 << 24])
def test_every_image_is_looked_for_among_all_the_others(budget):
    images, _ = task(14, num_train=60, spread=2.0)
    labels = images.labels.clone()
    labels[7] = 9
    found = retrieval_figures(images.cls, labels, images.cls, labels, ks=(1, 5), leave_one_out=True, budget=budget)
    unit = F.normalize(images.cls, dim=1)
    others = [[row for row in range(60) if row != query] for query in range(60) if query != 7]
    queries = [query for query in range(60) if query != 7]
    pairs = [
        (unit[query] @ unit[rest].T + 1.0, labels[rest] == labels[query])
        for query, rest in zip(queries, others, strict=True)
    ]
    theirs = [metrics.average_precision_score(truth, scores) for scores, truth in pairs]
    assert found["map"] == pytest.approx(np.mean(theirs), rel=1e-9)
    assert found["recall_at_5"] == np.mean([float(retrieval_hit_rate(*pair, top_k=5)) for pair in pairs])
    assert found["queries_left_out"] == 1.0
    protocol = Retrieval(k=(1, 5), queries="train")
    assert not protocol.needs_test
    assert protocol.evaluate(Vectors(images.cls, labels, 10), None) == pytest.approx(found, rel=1e-9)


def test_equally_similar_images_count_against_the_query_whatever_their_order():
    labels = torch.tensor([0, 0, 1, 1, 1, 1])
    same = torch.ones(6, 3)
    found = retrieval_figures(same[:1], labels[:1], same, labels, ks=(1, 4, 5))
    assert (
        found["map"] == pytest.approx(metrics.average_precision_score(labels == 0, np.ones(6))) == pytest.approx(1 / 3)
    )
    assert [found[f"recall_at_{k}"] for k in (1, 4, 5)] == [0.0, 0.0, 1.0]
    assert found["map_at_r"] == 0.0


def test_average_precision_at_r_is_musgraves():
    labels = torch.tensor([0, 1, 0, 0, 1])
    gallery = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.3], [0.0, 1.0], [1.0, 2.0]])
    found = retrieval_figures(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), gallery, labels, ks=(1,))
    assert found["map_at_r"] == pytest.approx((1 / 1 + 2 / 3) / 3)
    assert found["map"] == pytest.approx((1 / 1 + 2 / 3 + 3 / 5) / 3)


def test_queries_of_a_class_that_the_gallery_lacks_are_left_out_told_and_counted():
    gallery, queries = task(11)
    labels = queries.labels.clone()
    labels[:4] = 9
    with pytest.warns(PoaWarning, match="4 of 90 queries have no image of their class"):
        Retrieval().check(gallery.labels, labels, 10)
    found = retrieval_figures(queries.cls, labels, gallery.cls, gallery.labels)
    assert found.pop("queries_left_out") == 4.0
    expected = retrieval_figures(queries.cls[4:], labels[4:], gallery.cls, gallery.labels)
    assert found == {name: expected[name] for name in found}
    for search in (
        lambda: Retrieval().check(gallery.labels, labels[:4], 10),
        lambda: retrieval_figures(queries.cls[:4], labels[:4], gallery.cls, gallery.labels),
    ):
        with pytest.raises(DataError, match="no query has another image of its class"):
            search()


def test_lists_longer_than_the_gallery_are_refused():
    labels = torch.arange(10) % 2
    Retrieval(k=(10,)).check(labels, labels, 2)
    with pytest.raises(DataError, match="--k 10 is more than there are in the gallery: 9"):
        Retrieval(k=(10,), queries="train").check(labels, None, 2)


def test_clustering_agreement_is_scikit_learns_and_blind_to_the_clusters_numbers():
    rng = torch.Generator().manual_seed(0)
    labels, found = (torch.randint(0, 4, (200,), generator=rng) for _ in range(2))
    figures = agreement(labels, found)
    assert figures["nmi"] == metrics.normalized_mutual_info_score(labels, found)
    assert figures["ari"] == metrics.adjusted_rand_score(labels, found)
    assert figures["fmi"] == metrics.fowlkes_mallows_score(labels, found)
    assert agreement(labels, (labels + 1) % 4) == {
        "nmi": pytest.approx(1),
        "ari": 1,
        "fmi": pytest.approx(1),
        "accuracy": 1,
    }


@pytest.mark.parametrize("num_clusters", [0, 2, 5])
def test_clusters_of_separate_classes_are_the_classes(num_clusters):
    train, _ = task(12, spread=0.05)
    figures = Clustering(num_clusters=num_clusters).evaluate(train, None)
    assert set(figures) == {f"{name}{end}" for name in ("nmi", "ari", "fmi", "accuracy") for end in ("", "_sd")}
    if num_clusters == 0:
        assert figures["accuracy"] == figures["nmi"] == 1.0
    else:
        assert 0.3 < figures["accuracy"] < 1.0


def test_clusters_are_those_of_scikit_learns_k_means_of_normalised_vectors():
    train, _ = task(15)
    found = clusters(train.cls, 4, 3, (0, 1))
    seed = derived_seed(0, "clusters", 1) % 2**32
    theirs = KMeans(4, n_init=3, random_state=seed).fit_predict(normalize(train.cls))
    assert metrics.adjusted_rand_score(theirs, found) == 1.0
    small = Clustering(mini_batch_from=100).evaluate(task(15, spread=0.05)[0], None)
    assert small["accuracy"] > 0.6


def test_a_collapsed_network_fills_few_clusters_and_is_told():
    labels = torch.arange(30) % 3
    with pytest.warns(PoaWarning, match="filled 1 of 3 clusters"):
        figures = Clustering().evaluate(Vectors(torch.ones(30, 4), labels, 3), None)
    assert figures["accuracy"] == pytest.approx(1 / 3)
    assert figures["nmi"] == 0.0


def gram_cka(a, b):
    """The unbiased estimator by its definition, with N × N matrices."""
    n = len(a)

    def hsic(k, ell):
        k, ell = k - np.diag(np.diag(k)), ell - np.diag(np.diag(ell))
        one = np.ones(n)
        total = np.trace(k @ ell) + (one @ k @ one) * (one @ ell @ one) / ((n - 1) * (n - 2))
        return (total - 2 / (n - 2) * (one @ k @ ell @ one)) / (n * (n - 3))

    kernels = [part.double().numpy() @ part.double().numpy().T for part in (a, b)]
    return hsic(*kernels) / np.sqrt(hsic(kernels[0], kernels[0]) * hsic(kernels[1], kernels[1]))


def test_cka_is_its_definition_and_blind_to_rotation_and_scale():
    rng = torch.Generator().manual_seed(0)
    a, noise = torch.randn(60, 8, generator=rng), torch.randn(60, 5, generator=rng)
    b = a[:, :5] + noise + 3.0
    assert cka(a, b) == pytest.approx(gram_cka(a, b), rel=1e-9)
    rotation, _ = torch.linalg.qr(torch.randn(8, 8, generator=rng))
    assert cka(a, 7.0 * a @ rotation + 2.0) == pytest.approx(1.0, abs=1e-6)
    assert abs(cka(torch.randn(500, 64, generator=rng), torch.randn(500, 64, generator=rng))) < 0.05


def test_neighbours_alignment_and_uniformity_have_their_known_values():
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(70, 6, generator=rng)
    assert neighbour_overlap(a, 5.0 * a, 7, chunk=9) == 1.0
    assert neighbour_overlap(a, torch.randn(70, 6, generator=rng), 7) < 0.4
    assert alignment(a, 3.0 * a) == pytest.approx(0.0, abs=1e-9)
    assert alignment(a, -a) == pytest.approx(4.0)
    assert uniformity(torch.ones(10, 3)) == pytest.approx(0.0, abs=1e-9)
    pairs = torch.pdist(F.normalize(a.double(), dim=1)).square()
    assert uniformity(a, chunk=11) == pytest.approx(float((-2 * pairs).exp().mean().log()), rel=1e-9)


def test_health_of_the_intact_network_agrees_with_itself():
    train, _ = task(13)
    figures = Health().evaluate(Vectors(train.cls, second=train.cls), None, train)
    assert figures["cka"] == pytest.approx(1.0)
    assert figures["neighbour_overlap"] == 1.0
    assert figures["rankme"] == rankme(train.cls)
    assert figures["alignment"] == pytest.approx(0.0, abs=1e-9)


def test_means_and_deviations_are_over_the_runs():
    found = mean_and_sd([{"a": 1.0, "b": 0.5}, {"a": 2.0, "b": 0.5}, {"a": 6.0, "b": 0.5}])
    assert found == {"a": 3.0, "a_sd": pytest.approx(7.0**0.5), "b": 0.5, "b_sd": 0.0}
    assert mean_and_sd([{"a": 1.0}]) == {"a": 1.0, "a_sd": 0.0}


def test_parts_are_drawn_class_by_class_and_are_a_function_of_the_seed():
    labels = torch.tensor([0] * 50 + [1] * 21 + [2] * 2)
    kept, held = stratified_holdout(labels, 0.2, 0)
    assert torch.bincount(labels[held]).tolist() == [10, 4, 1]
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(73))
    assert torch.equal(held, stratified_holdout(labels, 0.2, 0)[1])
    assert not torch.equal(held, stratified_holdout(labels, 0.2, 1)[1])
    drawn = stratified_draw(labels, {0: 5, 1: 2, 2: 1}, 0, 0)
    assert torch.bincount(labels[drawn]).tolist() == [5, 2, 1]
    assert not torch.equal(drawn, stratified_draw(labels, {0: 5, 1: 2, 2: 1}, 0, 1))
    with pytest.raises(DataError, match="class 1 has 1 image only"):
        stratified_holdout(torch.tensor([0, 0, 1]), 0.5, 0)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Logistic, {"strengths": ()}),
        (FewShot, {"shots": (0,)}),
        (FewShot, {"shots": (), "shares": ()}),
        (Retrieval, {"k": ()}),
        (FewShot, {"shares": (0.0,)}),
        (Clustering, {"num_clusters": 1}),
        (Health, {"k": 0}),
    ],
)
def test_numbers_that_make_no_sense_are_refused(kind, options):
    with pytest.raises(ConfigError, match="must be"):
        kind(**options)
