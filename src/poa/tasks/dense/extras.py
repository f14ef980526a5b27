"""The optional libraries of detection."""

from __future__ import annotations

import importlib
from typing import Any

from poa.errors import DataError


def require_metric_libraries() -> None:
    """Raises `DataError` unless what COCO's metric is computed with is installed."""
    for name in ("torchmetrics.detection", "faster_coco_eval"):
        _imported(name)


def mask_api() -> Any:  # noqa: ANN401
    """COCO's functions on masks.

    Raises:
        DataError: the library is not installed.
    """
    return _imported("faster_coco_eval.core.mask")


def _imported(name: str) -> Any:  # noqa: ANN401
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise DataError(
            f'detection needs {name.partition(".")[0]}, which is not installed. Run: pip install "poa[dense]"'
        ) from error
