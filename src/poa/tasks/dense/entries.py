"""Entries of a COCO annotation file, which may hold anything."""

from __future__ import annotations

from typing import Any

import numpy as np

from poa.tasks.dense.extras import mask_api

LARGEST = 100_000
"""The largest coordinate that is read, in pixels; the library that draws polygons takes memory by their length."""


class BadEntry(Exception):  # noqa: N818 (a finding about an entry, reported and skipped; not a PoaError)
    """An entry that cannot be used, and why."""


def as_object(entry: object) -> dict[str, Any]:
    """The entry itself.

    Raises:
        BadEntry: it is no JSON object.
    """
    if not isinstance(entry, dict):
        raise BadEntry("it is no JSON object")
    return entry


def entry_field(entry: dict[str, Any], name: str) -> Any:  # noqa: ANN401
    """The entry's value; ids are whole numbers or words.

    Raises:
        BadEntry: there is none, or an id is something else.
    """
    if name not in entry:
        raise BadEntry(f"it has no {name}")
    value = entry[name]
    if name.endswith("id") and not isinstance(value, int | str):
        raise BadEntry(f"its {name} is {str(value)[:40]!r}")
    return value


def entry_box(bbox: Any) -> tuple[float, float, float, float]:  # noqa: ANN401
    """Left, top, right, bottom of COCO's left, top, width, height.

    Raises:
        BadEntry: these are not four finite numbers, or the box has no area.
    """
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(isinstance(value, int | float) for value in bbox):
        raise BadEntry(f"its bbox is {str(bbox)[:80]}, not four numbers")
    if not all(_is_within(value, LARGEST) for value in bbox):
        raise BadEntry(f"its box {str(bbox)[:80]} has a number that is not finite, or beyond {LARGEST:,}")
    left, top, width, height = map(float, bbox)
    if width <= 0 or height <= 0:
        raise BadEntry(f"its box {bbox} has no area")
    return left, top, left + width, top + height


def entry_area(entry: dict[str, Any], box: tuple[float, float, float, float]) -> float:
    """The stated area, or the box's where none is stated."""
    stated: Any = entry.get("area")
    if _is_within(stated, LARGEST**2) and stated > 0:
        return float(stated)
    return (box[2] - box[0]) * (box[3] - box[1])


def run_lengths(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:  # noqa: ANN401
    """Compressed run lengths of polygons or of run lengths.

    Raises:
        BadEntry: there is no segmentation, it is broken, or covers no pixel.
    """
    api = mask_api()
    try:
        if isinstance(segmentation, list) and segmentation:
            if not all(_is_polygon(polygon) for polygon in segmentation):
                raise BadEntry("its segmentation has a polygon of less than three points or of no finite numbers")
            found = api.merge(api.frPyObjects(segmentation, *size))
        elif isinstance(segmentation, dict) and list(segmentation.get("size", ())) == list(size):
            counts = segmentation.get("counts")
            found = api.frPyObjects(segmentation, *size) if isinstance(counts, list) else dict(segmentation)
        else:
            what = "of another size than its image" if isinstance(segmentation, dict) else "missing"
            raise BadEntry(f"its segmentation is {what}")
        is_empty = not np.any(api.decode(found))
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise BadEntry(f"its segmentation is broken: {' '.join(str(error).split())}") from error
    if is_empty:
        raise BadEntry("its segmentation covers no pixel of its image")
    return dict(found)


def _is_polygon(polygon: Any) -> bool:  # noqa: ANN401
    return (
        isinstance(polygon, list)
        and len(polygon) >= 6
        and len(polygon) % 2 == 0
        and all(_is_within(value, LARGEST) for value in polygon)
    )


def _is_within(value: Any, most: int) -> bool:  # noqa: ANN401
    return isinstance(value, int | float) and abs(value) <= most
