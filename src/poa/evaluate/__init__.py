"""Evaluation of frozen networks: vectors once for all of them, then protocols on the vectors."""

from poa.evaluate.base import Evaluator, Vectors
from poa.evaluate.features import Extraction, Loading, extract_features
from poa.evaluate.knn import Knn, knn_accuracies
from poa.evaluate.rankme import rankme
from poa.evaluate.report import Report, Result
from poa.evaluate.run import Splits, evaluate, split
from poa.evaluate.sweep import SweepResult, sweep

__all__ = [
    "Evaluator",
    "Extraction",
    "Knn",
    "Loading",
    "Report",
    "Result",
    "Splits",
    "SweepResult",
    "Vectors",
    "evaluate",
    "extract_features",
    "knn_accuracies",
    "rankme",
    "split",
    "sweep",
]
