"""The evaluators that poa knows, by name."""

from __future__ import annotations

from poa.evaluate.base import Evaluator
from poa.evaluate.knn import Knn

EVALUATORS: dict[str, type[Evaluator]] = {evaluator.name: evaluator for evaluator in (Knn,)}
"""`poa evaluate NAME` runs one, `poa evaluate sweep` several; `tests/contract` holds what all of them do."""
