"""Parts of a table of vectors on disk: each there whole or not at all, then all of them in one file."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from poa.data import ImageSource
from poa.data.parquet import arrow
from poa.errors import CheckpointError, DataError
from poa.files import json_value

METADATA_KEY = b"poa.embed"
"""Where the schema's metadata, a JSON object, say what the vectors are of."""

SCRATCH_PREFIX = ".scratch-"


@dataclass(frozen=True)
class Columns:
    """The columns: `image_name`, `label` where there are labels, `vector` (a list of one size)."""

    num_features: int
    dtype: str
    has_labels: bool

    def schema(self, described: Mapping[str, Any]) -> Any:  # noqa: ANN401 (a pyarrow schema)
        """The schema, with a description in its metadata."""
        pa = arrow()
        kinds = {"float32": pa.float32(), "float16": pa.float16()}
        fields = [("image_name", pa.string())]
        fields += [("label", pa.int64())] if self.has_labels else []
        fields += [("vector", pa.list_(kinds[self.dtype], self.num_features))]
        return pa.schema(fields, metadata={METADATA_KEY: json.dumps(described).encode()})

    def table(self, source: ImageSource, indices: Sequence[int], vectors: Float[np.ndarray, "B C"]) -> Any:  # noqa: ANN401 (a pyarrow table)
        """The rows of some images.

        Raises:
            DataError: a vector is not finite, or not in this type.
        """
        pa, names = arrow(), [source.image_name(index) for index in indices]
        with np.errstate(over="ignore"):
            values = vectors.astype(self.dtype)
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if len(bad):
            fits = bool(np.isfinite(vectors[bad[0]]).all())
            raise DataError(
                f"the vector of {names[bad[0]]} "
                + (f"does not fit into {self.dtype}: use --dtype float32." if fits else "is not finite.")
            )
        columns: list[Any] = [pa.array(names, pa.string())]
        if source.labels is not None:
            columns.append(pa.array(source.labels[list(indices)], pa.int64()))
        columns.append(pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), self.num_features))
        return pa.table(columns, schema=self.schema({}))


@contextmanager
def opened_writer(path: Path, schema: Any, scratch: Path) -> Iterator[Any]:  # noqa: ANN401 (pyarrow)
    """A Parquet writer whose file, flushed to disk, becomes `path` when the block ends well.

    Vectors hardly compress, so nothing is compressed.

    Args:
        path: the file.
        schema: of pyarrow.
        scratch: a directory on the same file system, for the file until then.
    """
    handle, name = tempfile.mkstemp(prefix=SCRATCH_PREFIX, dir=scratch)
    try:
        options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
        with os.fdopen(handle, "wb") as file:
            with arrow().parquet.ParquetWriter(file, schema, **options) as writer:
                yield writer
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def description(path: Path) -> dict[str, Any]:
    """What a file of vectors says of itself; empty where it says nothing.

    Raises:
        FileNotFoundError: it is not there.
        CheckpointError: it is not Parquet, or cannot be read.
    """
    with _as_parquet(path):
        found = (arrow().parquet.read_schema(path).metadata or {}).get(METADATA_KEY)
        return {} if found is None else dict(json_value(found))


def num_rows(path: Path) -> int:
    """The vectors in a file.

    Raises:
        FileNotFoundError: it is not there.
        CheckpointError: it is damaged.
    """
    with _as_parquet(path):
        return int(arrow().parquet.read_metadata(path).num_rows)


def read_part(path: Path) -> Any:  # noqa: ANN401 (a pyarrow table)
    """The rows of a part.

    Raises:
        FileNotFoundError: it is not there.
        CheckpointError: it is damaged.
    """
    with _as_parquet(path):
        return arrow().parquet.ParquetFile(path).read()


@contextmanager
def _as_parquet(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except (arrow().ArrowException, OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path} cannot be read as Parquet: {reason}. Remove it and run the same command again."
        ) from error


def read_vectors(
    path: str | Path,
) -> tuple[list[str], Int64[np.ndarray, " images"] | None, Float[np.ndarray, "images C"]]:
    """The names, the labels (None where there are none) and the vectors that `poa embed` wrote.

    Args:
        path: the file, or the directory of parts.

    Raises:
        DataError: there are no such vectors.
    """
    pa = arrow()
    try:
        table = pa.dataset.dataset(str(path), format="parquet").to_table()
        vectors = table.column("vector").combine_chunks()
        width = vectors.type.list_size
    except (pa.ArrowException, OSError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} holds no vectors from `poa embed`: {reason}") from error
    labels = table.column("label").to_numpy() if "label" in table.column_names else None
    return table.column("image_name").to_pylist(), labels, vectors.flatten().to_numpy().reshape(-1, width)
