"""The record of images that could not be used in a run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from poa.data.base import SkippedImage
from poa.data.sources import check_bad_share
from poa.errors import DataError
from poa.files import json_value
from poa.patient_file import PatientFile


class BadImageLog:
    """A file with one JSON object {"name", "reason"} per unusable image, each image once.

    An existing file is read first, so a resumed run keeps its count. What a full disk does not take is written later.

    Args:
        path: the JSON-lines file; made (with its folder) when the first image is recorded.
        num_images: images of the source, the unusable ones included.
        max_share: the greatest accepted share of unusable images (`data.max_bad_share`).
        already: unusable images found while listing.

    Raises:
        DataError: the file is damaged, or more than `max_share` of the images are unusable.
    """

    def __init__(self, path: Path, num_images: int, max_share: float, already: Sequence[SkippedImage] = ()) -> None:
        self.path = path
        self.num_images = num_images
        self.max_share = max_share
        self._bad = _loaded(path)
        self._file: PatientFile | None = None
        self.add(already)

    @property
    def count(self) -> int:
        """Unusable images so far, each counted once."""
        return len(self._bad)

    def add(self, skipped: Iterable[tuple[str, str]]) -> None:
        """Records (name, reason) pairs; names known already are left out.

        Raises:
            DataError: more than `max_share` of the images are unusable (they are recorded nevertheless).
        """
        lines = []
        for name, reason in skipped:
            if name not in self._bad:
                self._bad[name] = reason
                lines.append(json.dumps({"name": name, "reason": reason}) + "\n")
        if lines:
            self._opened().write("".join(lines).encode())
        self._check()

    def _opened(self) -> PatientFile:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = PatientFile(self.path)
        return self._file

    def _check(self) -> None:
        if self.count <= self.max_share * self.num_images:
            return
        bad = tuple(SkippedImage(name, reason) for name, reason in self._bad.items())
        check_bad_share(bad, self.num_images, self.max_share, where=f"All are listed in {self.path}.\n")


def _loaded(path: Path) -> dict[str, str]:
    """The recorded images; a last line cut short by a crash is removed from the file."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        path.write_bytes(whole)
    try:
        records = [json_value(line) for line in whole.splitlines()]
        return {str(record["name"]): str(record["reason"]) for record in records}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} must hold one JSON object with `name` and `reason` per line; got {error}. "
            f"Mend the file, or remove it to count anew."
        ) from error
