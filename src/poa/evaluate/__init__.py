"""Evaluation of sub-networks: features once for all of them, then protocols on the features."""

from poa.evaluate.features import Features, Loading, extract_features
from poa.evaluate.knn import KnnConfig, KnnReport, KnnResult, evaluate_knn, knn_accuracies
from poa.evaluate.rankme import rankme

__all__ = [
    "Features",
    "KnnConfig",
    "KnnReport",
    "KnnResult",
    "Loading",
    "evaluate_knn",
    "extract_features",
    "knn_accuracies",
    "rankme",
]
