"""How a checkpoint lies on disk, and what makes `torch.distributed.checkpoint` write it so.

`step-00000500/` has a `rank-00000.safetensors` for each process that wrote something, and `state.json`. The files of
tensors are those of torch's `HuggingFaceStorageWriter(save_distributed=True)`: each names in its header where its
pieces lie in the whole tensors. They are read by torch's own reader, on any number of processes. No file is a pickle.
"""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from poa.config import from_dict
from poa.distributed import Ranks, own_part
from poa.errors import CheckpointError, ConfigError
from poa.files import file_sha256, read_json, sync_path
from poa.tensor_file import Part, write_safetensors

STATE_FILE = "state.json"
FORMAT = "poa-checkpoint"
FORMAT_VERSION = 2
_TENSORS_FILE = re.compile(r"rank-\d{5,}\.safetensors")


@dataclass(frozen=True)
class TensorInfo:
    """A whole tensor of a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class FileInfo:
    """What a file must be."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Record:
    """`state.json`: what the checkpoint consists of, and the state that is no tensor."""

    format: str
    version: int
    step: int
    files: dict[str, FileInfo]
    state: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """As `read_record` reads it, with its own checksum."""
        body = dataclasses.asdict(self)
        return {**body, "sha256": json_sha256(body)}


def read_record(folder: Path, step: int) -> Record:
    """The record of the checkpoint in `folder`, every field checked; its files are not.

    Raises:
        CheckpointError: it is missing, damaged, or of another format or step.
    """
    file = folder / STATE_FILE
    values = read_json(file, remedy="")
    version = values.get("version", 1)
    if values.get("format", FORMAT) != FORMAT or version != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} is of format version {str(version)[:20]}; this poa reads version {FORMAT_VERSION} of {FORMAT}. "
            "Go on with the poa that wrote it."
        )
    sha256 = values.pop("sha256", None)
    try:
        if sha256 != json_sha256(values):
            raise CheckpointError(f"{file} is damaged: its checksum differs.")
        record = from_dict(Record, values, str(file))
    except (ConfigError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if record.step != step or not all(_TENSORS_FILE.fullmatch(name) for name in record.files):
        raise CheckpointError(f"{file} is damaged: it is of step {record.step} with the files {sorted(record.files)}.")
    return record


def check_file(path: Path, info: FileInfo) -> None:
    """Raises `CheckpointError` unless the file has its size and its SHA-256."""
    try:
        size = path.stat().st_size
        if size != info.num_bytes:
            raise CheckpointError(f"{path} is damaged: it has {size} bytes instead of {info.num_bytes}.")
        if file_sha256(path) != info.sha256:
            raise CheckpointError(f"{path} is damaged: its checksum differs.")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error


def read_tensor_infos(folder: Path, files: Mapping[str, FileInfo]) -> dict[str, TensorInfo]:
    """The whole tensors of the checkpoint in `folder`, by name.

    Raises:
        CheckpointError: its files are not those that its record lists, or cannot be read.
    """
    found = {path.name for path in folder.glob("*.safetensors")}
    if found != set(files):
        raise CheckpointError(f"{folder} is damaged: its files are {sorted(found)} instead of {sorted(files)}.")
    try:
        metadata = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        return {
            name: TensorInfo(tuple(entry.size), entry.properties.dtype)
            for name, entry in metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
    except (
        SafetensorError,
        OSError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise CheckpointError(f"{folder} is damaged: {str(error)[:200]!r}.") from error


@dataclass(frozen=True)
class Piece:
    """What this process may write of a tensor: a box of it, in CPU memory."""

    box: Tensor
    offsets: torch.Size
    """Where the box begins in the whole tensor."""
    shape: torch.Size
    """That of the whole tensor."""


@dataclass(frozen=True)
class Copied:
    """A copy of this process's part of the tensors."""

    pieces: dict[str, Piece]
    signature: str
    """Equal on all processes that hold the same tensors."""
    ready: Callable[[], None]
    """Waits until the copy is there."""


class Staging:
    """Copies tensors into CPU memory, which is used again for the next copy.

    A process copies its part of a `DTensor`; of the others, which are equal on all processes, those that are its turn.
    On CUDA the copy is queued before the work that follows, and nothing is waited for.
    """

    def __init__(self) -> None:
        self._boxes: dict[str, Tensor] = {}

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor], ranks: Ranks) -> Copied:
        """The copy; it holds until the next."""
        turns = writers({name: t for name, t in tensors.items() if not isinstance(t, DTensor)}, ranks.num_ranks)
        pieces, on_cuda = {}, False
        for name, tensor in tensors.items():
            part = own_part(tensor)
            # A DTensor's part may be empty, where there are more processes than rows.
            if turns.get(name, ranks.rank) == ranks.rank and (part.numel() or not tensor.numel()):
                pieces[name] = Piece(self._copied(name, part), _offsets(tensor), tensor.shape)
                on_cuda = on_cuda or part.is_cuda
        self._boxes = {name: piece.box for name, piece in pieces.items()}
        names = sorted((name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors.items())
        return Copied(pieces, hashlib.sha256(repr(names).encode()).hexdigest(), _done(on_cuda))

    def _copied(self, name: str, part: Tensor) -> Tensor:
        box = self._boxes.get(name)
        if box is None or box.shape != part.shape or box.dtype != part.dtype:
            box = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
        return box.copy_(part, non_blocking=part.is_cuda)


def writers(tensors: Mapping[str, Tensor], num_ranks: int) -> dict[str, int]:
    """Which process writes which tensor, so that each writes about as many bytes; equal on all processes."""
    loads = [(0, rank) for rank in range(num_ranks)]
    found = {}
    for name in sorted(tensors, key=lambda name: (-tensors[name].nbytes, name)):
        load, found[name] = loads[0]
        heapq.heapreplace(loads, (load + tensors[name].nbytes, found[name]))
    return found


class PiecePlanner(DefaultSavePlanner):
    """Plans the writing of pieces, which stand for torch's state dict. Of those that several have, one writes each."""

    def __init__(self, pieces: Mapping[str, Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces = pieces

    def create_local_plan(self) -> SavePlan:
        """What this process could write."""
        self.plan = SavePlan([_write_item(name, piece) for name, piece in self.pieces.items()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The box that is written."""
        return self.pieces[index.fqn].box


class PieceWriter(StorageWriter):
    """Writes one file for each process, flushed to disk, with its size and SHA-256.

    Args:
        scratch: the directory they are written in.
        rank: this process.
        signature: as in `Copied`; it must be equal on all processes.
        begin: makes the directory; called on the main process before any file is written.
        end: takes the files; called on the main process when all are written.
    """

    def __init__(
        self,
        scratch: Path,
        rank: int,
        signature: str,
        begin: Callable[[], None],
        end: Callable[[dict[str, FileInfo]], None],
    ) -> None:
        self.scratch = scratch
        self.rank = rank
        self.signature = signature
        self.begin = begin
        self.end = end

    def reset(self, checkpoint_id: object = None) -> None:
        """Nothing: a writer writes one checkpoint."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:  # noqa: ARG003 (the signature of StorageWriter)
        """False: a writer is made for its directory, not found by a name."""
        return False

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401, ARG002
        """Makes the directory."""
        if is_coordinator:
            self.begin()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan with this process's signature."""
        return dataclasses.replace(plan, storage_data=self.signature)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """The plans as they are."""
        if {plan.storage_data for plan in plans} != {self.signature}:
            raise ValueError("the processes do not hold the same tensors")
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this process's file, if there is anything to write."""
        written: Future[list[WriteResult]] = Future()
        written.set_result([self._write(plan, planner)] if plan.items else [])
        return written

    def _write(self, plan: SavePlan, planner: SavePlanner) -> WriteResult:
        found = {item.index.fqn: planner.resolve_data(item) for item in plan.items}
        boxes = {name: box for name, box in found.items() if isinstance(box, Tensor)}
        offsets = {item.index.fqn: {"saved_offsets": list(item.index.offset or ())} for item in plan.items}
        path = self.scratch / f"rank-{self.rank:05d}.safetensors"
        write_safetensors(
            {name: Part(tuple(box.shape), box.dtype, partial(boxes.__getitem__, name)) for name, box in boxes.items()},
            path,
            {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets)},
        )
        sync_path(path)
        info = FileInfo(path.stat().st_size, file_sha256(path))
        return WriteResult(MetadataIndex(path.name), info.num_bytes, info)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:  # noqa: ARG002 (its signature)
        """Hands the files over."""
        self.end({result.index.fqn: result.storage_data for own in results for result in own})


def _write_item(name: str, piece: Piece) -> WriteItem:
    chunk = ChunkStorageMetadata(piece.offsets, piece.box.shape)
    data = TensorWriteData(chunk, TensorProperties.create_from_tensor(piece.box), piece.shape)
    return WriteItem(MetadataIndex(name, piece.offsets), WriteItemType.SHARD, tensor_data=data)


def _offsets(tensor: Tensor) -> torch.Size:
    if not isinstance(tensor, DTensor):
        return torch.Size([0] * tensor.ndim)
    (chunk,) = tensor.__create_chunk_list__()
    return torch.Size(chunk.offsets)


def _done(on_cuda: bool) -> Callable[[], None]:
    if not on_cuda:
        return lambda: None
    event = torch.cuda.Event()
    event.record()
    return event.synchronize


def json_sha256(value: Any) -> str:  # noqa: ANN401 (JSON)
    """The SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
