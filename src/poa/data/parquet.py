"""Images in Parquet files, as Hugging Face's data sets store them."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Int64
from PIL import Image

from poa.config import DataConfig
from poa.data.base import ImageSource, SkippedImage, checked_index, printable
from poa.data.decode import decode_image, mode_of_channels
from poa.errors import DataError
from poa.files import json_value


class ParquetSource(ImageSource):
    """The encoded images of a column of one Parquet file, or of all files of a folder in order of name.

    The column stays encoded in memory. Rows without an image are skipped. Labels are absent when the label
    column is, or when a row has none (null, or negative as in unlabelled test splits).
    """

    def __init__(self, spec: str, config: DataConfig, num_channels: int) -> None:
        mode_of_channels(num_channels)
        self.spec = spec
        self.num_channels = num_channels
        self.max_pixels, self.max_bytes = config.max_pixels, config.max_bytes
        self._files = _parquet_files(Path(spec).expanduser())
        starts, present, tables = [], [np.zeros(0, bool)], []
        self._column = self._empty_column(config)
        for file in self._files:
            starts.append(self._column.num_rows)
            for table in self._column.read(file, config):
                column = _encoded(table.column(config.image_column), config.image_column)
                self._column.append(column)
                present.append(has_bytes(column))
                tables.append(table.select([name for name in table.column_names if name == config.label_column]))
        self._starts, has_image = np.array(starts), np.concatenate(present)
        self._rows = np.flatnonzero(has_image)
        self.skipped = tuple(
            SkippedImage(self._row_name(int(row)), "has no image bytes") for row in np.flatnonzero(~has_image)
        )
        labels = labels_of([table for table in tables if table.num_rows], config.label_column)
        self.labels = None if labels is None else labels[self._rows]
        schema = arrow().parquet.read_schema(self._files[0])
        self.class_names = class_names_of(schema, config.label_column) if labels is not None else None
        check_class_names(spec, self.labels, self.class_names)

    def _empty_column(self, config: DataConfig) -> _Column:
        """What will hold the images."""
        del config
        return _Column()

    @classmethod
    def accepts(cls, spec: str) -> bool:
        """Whether it is a .parquet file, or a folder with nothing but .parquet files."""
        path = Path(spec).expanduser()
        if path.is_dir():
            names = [entry.name for entry in path.iterdir()]
            return bool(names) and all(name.lower().endswith(".parquet") for name in names)
        return path.is_file() and path.suffix.lower() == ".parquet"

    def __len__(self) -> int:
        return len(self._rows)

    def load(self, index: int) -> Image.Image:
        """See `ImageSource.load`."""
        return decode_image(self.encoded(index), self.num_channels, self.max_pixels, self.max_bytes)

    def encoded(self, index: int) -> bytes:
        """See `ImageSource.encoded`."""
        content: bytes = self._column[int(self._rows[checked_index(index, len(self))])].as_py()
        return content

    def image_name(self, index: int) -> str:
        """The file and the row in it, for example `train-0.parquet:17`."""
        return self._row_name(int(self._rows[checked_index(index, len(self))]))

    def column(self, name: str) -> tuple[list[Any], tuple[str, ...] | None]:
        """Another column's value for every image, and the names of the classes in it where the metadata tells them.

        Raises:
            DataError: a file lacks the column.
        """
        pa = arrow()
        values: list[Any] = []
        for file in self._files:
            schema = pa.parquet.read_schema(file)
            if name not in schema.names:
                raise DataError(f"{file} has no column {name!r}; its columns are {', '.join(schema.names)}.")
            values += pa.parquet.ParquetFile(file).read(columns=[name]).column(name).to_pylist()
        first = pa.parquet.read_schema(self._files[0])
        return [values[row] for row in self._rows.tolist()], class_names_of(first, name)

    @cached_property
    def fingerprint(self) -> str:
        """Over the encoded images and the labels."""
        digest = hashlib.sha256()
        for row in self._rows.tolist():
            content = self._column[row].as_buffer()
            digest.update(content.size.to_bytes(8, "little"))
            digest.update(content)
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        return digest.hexdigest()

    def _row_name(self, row: int) -> str:
        file = int(np.searchsorted(self._starts, row, side="right")) - 1
        return f"{printable(self._files[file].name)}:{row - int(self._starts[file])}"


class ParquetInOrder(ParquetSource):
    """The same images, names and fingerprint with one row group in memory at a time, for loading in order.

    An image of another row group than the one before makes that whole group be read.
    """

    def _empty_column(self, config: DataConfig) -> _Column:
        return _RowGroups(config)


class _Column:
    """Encoded images, all in memory."""

    def __init__(self) -> None:
        self._parts: list[Any] = []
        self._ends = [0]

    @property
    def num_rows(self) -> int:
        """Rows so far."""
        return self._ends[-1]

    def read(self, file: Path, config: DataConfig) -> Iterator[Any]:
        """The tables to look at, one after the other."""
        yield _read(file, config)

    def append(self, column: Any) -> None:  # noqa: ANN401 (a pyarrow chunked array)
        """Takes the images of the table that `read` gave last."""
        self._parts.append(column)
        self._ends.append(self._ends[-1] + len(column))

    def __getitem__(self, row: int) -> Any:  # noqa: ANN401 (a pyarrow scalar)
        place = bisect_right(self._ends, row) - 1
        return self._part(place)[row - self._ends[place]]

    def _part(self, place: int) -> Any:  # noqa: ANN401 (a pyarrow chunked array)
        return self._parts[place]


class _RowGroups(_Column):
    """Encoded images, those of the row group that was asked for last in memory."""

    def __init__(self, config: DataConfig) -> None:
        super().__init__()
        self._config = config
        self._open: tuple[int, Any] = (-1, None)

    def read(self, file: Path, config: DataConfig) -> Iterator[Any]:
        """See `_Column.read`."""
        with _opened(file, config) as opened:
            num_groups = opened.num_row_groups
        for group in range(num_groups):
            self._parts.append((file, group))
            yield _read(file, config, group)

    def append(self, column: Any) -> None:  # noqa: ANN401 (a pyarrow chunked array)
        """See `_Column.append`."""
        self._ends.append(self._ends[-1] + len(column))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": (-1, None)}

    def _part(self, place: int) -> Any:  # noqa: ANN401 (a pyarrow chunked array)
        if self._open[0] != place:
            self._open = (-1, None)
            file, group = self._parts[place]
            table = _read(file, self._config, group)
            self._open = (place, _encoded(table.column(self._config.image_column), self._config.image_column))
        return self._open[1]


def arrow() -> ModuleType:
    """The library that reads and writes Parquet.

    Raises:
        DataError: it is not installed.
    """
    try:
        import pyarrow.compute
        import pyarrow.dataset
        import pyarrow.parquet
    except ImportError as error:
        raise DataError('Parquet files need pyarrow, which is not installed: pip install "poa[parquet]"') from error
    module: ModuleType = pyarrow
    return module


def _parquet_files(path: Path) -> list[Path]:
    return sorted(path.iterdir(), key=lambda file: file.name) if path.is_dir() else [path]


def _read(file: Path, config: DataConfig, group: int | None = None) -> Any:  # noqa: ANN401 (a pyarrow table)
    """The columns of images and labels, of one row group or of all."""
    with _opened(file, config) as opened:
        names = opened.schema_arrow.names
        wanted = list(dict.fromkeys(name for name in (config.image_column, config.label_column) if name in names))
        return opened.read(columns=wanted) if group is None else opened.read_row_group(group, columns=wanted)


@contextmanager
def _opened(file: Path, config: DataConfig) -> Iterator[Any]:
    """The open file, which has a column of images; what goes wrong within is a `DataError`."""
    pa = arrow()
    try:
        with pa.parquet.ParquetFile(file) as opened:
            names = opened.schema_arrow.names
            if config.image_column not in names:
                raise DataError(
                    f"{file} has no column {config.image_column!r}; its columns are {', '.join(names)}. "
                    f"Name the one with the images by --data.image-column."
                )
            yield opened
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read as Parquet: {' '.join(str(error).split())}") from error


def row_groups(file: Path, config: DataConfig) -> Iterator[tuple[Any, Any]]:
    """Of every row group the columns of images and labels as a table, and the encoded images; one at a time in memory.

    Raises:
        DataError: the file cannot be read, or has no such column of images.
    """
    with _opened(file, config) as opened:
        num_groups = opened.num_row_groups
    for group in range(num_groups):
        table = _read(file, config, group)
        yield table, _encoded(table.column(config.image_column), config.image_column)


def write_encoded(file: Path, column: str, target: Path) -> None:
    """Writes the encoded images of a Parquet file one after the other, with a row group in memory at a time.

    Raises:
        DataError: as `row_groups`.
    """
    with target.open("wb") as output:
        for _, images in row_groups(file, DataConfig(image_column=column, label_column="")):
            for image in images:
                if content := image.as_buffer():
                    output.write(content)


def _encoded(column: Any, name: str) -> Any:  # noqa: ANN401 (pyarrow chunked arrays)
    """The column's bytes, taken out of the structs where it holds structs."""
    pa = arrow()
    kind = column.type
    if pa.types.is_struct(kind) and "bytes" in [field.name for field in kind]:
        column = pa.compute.struct_field(column, "bytes")
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise DataError(
            f"the column {name!r} holds {kind}; images must be bytes, or a struct with a field `bytes`. "
            f"Name another column by --data.image-column."
        )
    return column.cast(pa.large_binary())


def has_bytes(column: Any) -> np.ndarray:  # noqa: ANN401 (a pyarrow chunked array)
    """Of every row of `row_groups` whether it has an image: bytes, one or more."""
    compute = arrow().compute
    lengths = compute.fill_null(compute.binary_length(column), 0)
    return np.asarray(lengths.to_numpy()) > 0


def labels_of(tables: list[Any], name: str) -> Int64[np.ndarray, " rows"] | None:
    """The labels of all rows; None when a table lacks the column or a row has no label."""
    pa = arrow()
    if not tables or any(name not in table.column_names for table in tables):
        return None
    columns = [table.column(name) for table in tables]
    for column in columns:
        if not pa.types.is_integer(column.type):
            raise DataError(
                f"the column {name!r} holds {column.type}; labels must be integers. Name another column by "
                f"--data.label-column (one that does not exist leaves labels out)."
            )
    if any(column.null_count for column in columns):
        return None
    labels = np.concatenate([column.to_numpy() for column in columns]).astype(np.int64)
    return labels if labels.min() >= 0 else None


def class_names_of(schema: Any, column: str) -> tuple[str, ...] | None:  # noqa: ANN401 (a pyarrow schema)
    """The names that Hugging Face's metadata give the classes, or the classes in lists; None without metadata."""
    try:
        feature = json_value((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        feature = feature[0] if isinstance(feature, list) else feature.get("feature", feature)
        names = feature["names"]
        return tuple(printable(str(name)) for name in names) if isinstance(names, list) else None
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return None


def check_class_names(
    where: str, labels: Int64[np.ndarray, " images"] | None, class_names: tuple[str, ...] | None
) -> None:
    """Raises `DataError` if a label has no name although there are names; `where` says what has them."""
    if class_names is None or labels is None or not len(labels):
        return
    highest = int(labels.max())
    if highest >= len(class_names):
        raise DataError(
            f"{where} has labels up to {highest} but names only {len(class_names)} classes in its metadata. Mend the "
            f"file, or name another column by --data.label-column."
        )
