"""The evaluators that poa knows, by name."""

from __future__ import annotations

from poa.evaluate.base import Evaluator
from poa.evaluate.clustering import Clustering
from poa.evaluate.fewshot import FewShot
from poa.evaluate.health import Health
from poa.evaluate.knn import Knn
from poa.evaluate.linear import LinearProbe
from poa.evaluate.logistic import Logistic
from poa.evaluate.retrieval import Retrieval
from poa.evaluate.robustness import Robustness

EVALUATORS: dict[str, type[Evaluator]] = {
    evaluator.name: evaluator
    for evaluator in (Knn, LinearProbe, Logistic, FewShot, Retrieval, Clustering, Health, Robustness)
}
"""`poa evaluate NAME` runs one, `poa evaluate sweep` several; `tests/contract` holds what all of them do."""
