"""Writing one shard: a tar archive as webdataset reads it, or Parquet as Hugging Face's data sets are."""

from __future__ import annotations

import io
import json
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, BinaryIO, ClassVar, NamedTuple

from poa.data.parquet import arrow

ROW_GROUP_BYTES = 16_000_000
"""Of the images in a row group of Parquet: as much is read at a time."""


class Sample(NamedTuple):
    """An image to write.

    Attributes:
        key: its name in the shards, without a dot.
        extension: the ending of its file's name.
        content: its file's content.
        label: its class, or None.
        origin: its name in the source.
    """

    key: str
    extension: str
    content: bytes
    label: int | None
    origin: str


class ShardWriter(ABC):
    """Writes a shard; the same samples give the same bytes.

    Attributes:
        suffix: of the file's name.
        separator: what stands between its name and an image's in `ImageSource.image_name`.
    """

    suffix: ClassVar[str]
    separator: ClassVar[str]

    @abstractmethod
    def __init__(self, file: BinaryIO, class_names: Sequence[str] | None, has_labels: bool) -> None: ...

    @staticmethod
    @abstractmethod
    def num_bytes(size: int, has_labels: bool) -> int:
        """Bytes in the shard, about, of an image with that many bytes."""

    @abstractmethod
    def add(self, sample: Sample) -> str:
        """Writes an image; gives back its name in the shard."""

    @abstractmethod
    def close(self) -> None:
        """Writes what is left."""


class TarWriter(ShardWriter):
    """A tar archive (POSIX ustar) with `KEY.jpg` and, where there are labels, `KEY.cls`: a number in ASCII.

    Owner and time are zero.
    """

    suffix, separator = ".tar", "/"

    def __init__(self, file: BinaryIO, class_names: Sequence[str] | None, has_labels: bool) -> None:
        del class_names, has_labels
        self._archive = tarfile.TarFile(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)

    @staticmethod
    def num_bytes(size: int, has_labels: bool) -> int:
        """See `ShardWriter.num_bytes`."""
        whole = -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        return tarfile.BLOCKSIZE + whole + (2 * tarfile.BLOCKSIZE if has_labels else 0)

    def add(self, sample: Sample) -> str:
        """See `ShardWriter.add`."""
        name = f"{sample.key}.{sample.extension}"
        self._add(name, sample.content)
        if sample.label is not None:
            self._add(f"{sample.key}.cls", str(sample.label).encode())
        return name

    def close(self) -> None:
        """See `ShardWriter.close`."""
        self._archive.close()

    def _add(self, name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        self._archive.addfile(member, io.BytesIO(content))


class ParquetWriter(ShardWriter):
    """A table with the columns `image`, a struct of `bytes` and `path` (the name in the source), and `label`.

    The metadata are those of `datasets`: the features Image and ClassLabel. Nothing is compressed; images are already.
    """

    suffix, separator = ".parquet", ":"

    def __init__(self, file: BinaryIO, class_names: Sequence[str] | None, has_labels: bool) -> None:
        self._has_labels = has_labels
        self._schema = _schema(class_names, has_labels)
        options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
        self._writer = arrow().parquet.ParquetWriter(file, self._schema, **options)
        self._rows: list[dict[str, Any]] = []
        self._num_bytes = self._num_rows = 0

    @staticmethod
    def num_bytes(size: int, has_labels: bool) -> int:
        """See `ShardWriter.num_bytes`."""
        return size + (8 if has_labels else 0)

    def add(self, sample: Sample) -> str:
        """See `ShardWriter.add`."""
        row: dict[str, Any] = {"image": {"bytes": sample.content, "path": sample.origin}}
        if self._has_labels:
            row["label"] = sample.label
        self._rows.append(row)
        self._num_rows += 1
        self._num_bytes += len(sample.content)
        if self._num_bytes >= ROW_GROUP_BYTES:
            self._flush()
        return str(self._num_rows - 1)

    def close(self) -> None:
        """See `ShardWriter.close`."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(arrow().Table.from_pylist(self._rows, schema=self._schema))
        self._rows, self._num_bytes = [], 0


def _schema(class_names: Sequence[str] | None, has_labels: bool) -> Any:  # noqa: ANN401 (a pyarrow schema)
    pa = arrow()
    fields = [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))]
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    if has_labels:
        fields.append(("label", pa.int64()))
        named = {"names": list(class_names), "_type": "ClassLabel"} if class_names else None
        features["label"] = named or {"dtype": "int64", "_type": "Value"}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema(fields, metadata=metadata)


WRITERS: dict[str, type[ShardWriter]] = {"tar": TarWriter, "parquet": ParquetWriter}
"""By the name of the format."""
