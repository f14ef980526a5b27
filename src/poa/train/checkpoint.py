"""Checkpoints of one or many processes: written beside the training, whole or not there, verified when read."""

from __future__ import annotations

import json
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from poa.distributed import ONE, Ranks
from poa.errors import CheckpointError, PoaWarning
from poa.files import swap_directory, sync_path, write_json
from poa.objective import PoaModel
from poa.train.checkpoint_storage import (
    FORMAT,
    FORMAT_VERSION,
    STATE_FILE,
    Copied,
    FileInfo,
    PiecePlanner,
    PieceWriter,
    Record,
    Staging,
    TensorInfo,
    check_file,
    read_record,
    read_tensor_infos,
)

CLOSE_SECONDS = 60.0
"""How long `close` waits for what is still being written."""
_NAME = re.compile(r"step-(\d{8,})")
_MAX_LISTED = 5

ValueT = TypeVar("ValueT")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole.

    Attributes:
        path: its directory.
        step: steps done.
        state: what was saved beside the tensors.
        tensors: the whole tensors, by name.
        group: the processes that read it together; None is one process alone.
    """

    path: Path
    step: int
    state: dict[str, Any]
    tensors: dict[str, TensorInfo]
    group: dist.ProcessGroup | None = field(default=None, repr=False, compare=False)

    @torch.no_grad()
    def load_(self, tensors: Mapping[str, Tensor]) -> None:
        """Fills the tensors, in place; all processes together.

        They may be divided otherwise than when they were saved. Floating-point types are converted.

        Raises:
            CheckpointError: the checkpoint lacks one or has it in another shape; they are named. Or it cannot be read.
        """
        misfits = list(self._misfits(tensors))
        if misfits:
            raise self.misfit(misfits)
        try:
            load(
                dict(tensors),
                storage_reader=HuggingFaceStorageReader(str(self.path)),
                planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                process_group=self.group,
                no_dist=self.group is None,
            )
        except CheckpointException as error:
            raise CheckpointError(f"the checkpoint {self.path} cannot be read: {_reasons(error)}.") from error

    def tensors_of(self, module: nn.Module, prefix: str) -> dict[str, Tensor]:
        """The module's tensors by their names in the checkpoint, which begin with `prefix`.

        Raises:
            CheckpointError: the checkpoint has others of that prefix.
        """
        own = {f"{prefix}{name}": tensor.detach() for name, tensor in module.state_dict().items()}
        others = [name for name in self.tensors if name.startswith(prefix) and name not in own]
        if others:
            raise self.misfit([f"{name} is in the checkpoint alone" for name in others])
        return own

    def misfit(self, reasons: list[str]) -> CheckpointError:
        """The error that says so."""
        listed = "; ".join(reasons[:_MAX_LISTED])
        more = f"; and {len(reasons) - _MAX_LISTED} more" if len(reasons) > _MAX_LISTED else ""
        return CheckpointError(f"the checkpoint {self.path} does not fit this configuration: {listed}{more}.")

    def _misfits(self, tensors: Mapping[str, Tensor]) -> Iterator[str]:
        for name, tensor in tensors.items():
            info = self.tensors.get(name)
            if info is None:
                yield f"it lacks {name}"
            elif info.shape != tuple(tensor.shape):
                yield f"{name} has the shape {info.shape}, wanted is {tuple(tensor.shape)}"
            elif info.dtype != tensor.dtype and not (info.dtype.is_floating_point and tensor.is_floating_point()):
                yield f"{name} is of type {info.dtype}, wanted is {tensor.dtype}"


class CheckpointStore:
    """The checkpoints of a run: `step-00000500/` holds the state after 500 steps.

    All processes make one together, and call `save`, `newest` and `close` together.

    A checkpoint is written in a scratch directory and gets its name when the files of all processes are complete and
    flushed to disk; only then are older ones removed. What fails leaves the older ones as they are.

    Args:
        folder: where they are.
        keep: the newest that are kept.
        keep_every: those at multiples of this are kept for good; 0 keeps none.
        ranks: the processes that share the run.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int = 0, ranks: Ranks = ONE) -> None:
        self.folder = folder
        self.keep = keep
        self.keep_every = keep_every
        self.ranks = ranks
        self._staging = Staging()
        self._writing: _Writing | None = None
        self._untold: list[str] = []
        self._damaged: set[int] = set()
        # One process alone is the usual case here; torch warns of it at every save and load.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)

    def steps(self) -> list[int]:
        """The steps of all checkpoints, in rising order."""
        if not self.folder.is_dir():
            return []
        found = (_NAME.fullmatch(item.name) for item in self.folder.iterdir() if item.is_dir())
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        """The directory of that step's checkpoint."""
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], *, wait: bool = False) -> None:
        """Copies the tensors, then writes a checkpoint beside the training.

        An earlier one that is still being written is waited for. Whether it went well is told by `poll` and `wait`.

        Args:
            step: steps done.
            tensors: by name, the same names on all processes. `DTensor`s are written in their parts; all others must
                be equal on all processes.
            state: what JSON holds.
            wait: whether to come back only when it is written.
        """
        self._join()
        self._harvest()
        copied = self._staging.copy(tensors, self.ranks)
        state = json.loads(json.dumps(state, allow_nan=False))
        self._writing = _Writing(step, partial(self._write, step, copied, state, self._group))
        self._writing.start()
        if wait:
            self._join()

    @property
    def is_writing(self) -> bool:
        """Whether this process is at work on a checkpoint."""
        return self._writing is not None and self._writing.is_alive()

    def poll(self) -> str | None:
        """Why the last checkpoint could not be written, told once; None if it was, or is not finished yet."""
        if not self.is_writing:
            self._harvest()
        message = "\n".join(self._untold) or None
        self._untold.clear()
        return message

    def wait(self) -> str | None:
        """As `poll`, when nothing is being written any more."""
        self._join()
        return self.poll()

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint whose files all have their size and SHA-256; None if there is no checkpoint.

        A damaged one is passed over with a warning. The processes share the reading and all give the same answer.

        Raises:
            CheckpointError: there are checkpoints and every one is damaged.
        """
        self._join()
        steps = self._from_main(self._present)
        for step in reversed(steps):
            try:
                return self._verified(step)
            except CheckpointError as error:
                self._damaged.add(step)
                if self.ranks.is_main:
                    warnings.warn(f"{error} {self.path(step)} is passed over.", PoaWarning, stacklevel=2)
        if steps:
            raise CheckpointError(
                f"all checkpoints in {self.folder} are damaged or of another format. Start the run again elsewhere."
            )
        return None

    def close(self) -> None:
        """Waits for what is being written, for a minute at most, and leaves the other processes."""
        if self._writing is not None:
            self._writing.join(CLOSE_SECONDS)
        if self.is_writing:
            return
        group = self.__dict__.pop("_group", None)
        if group is not None and dist.is_initialized():
            dist.destroy_process_group(group)

    # In the background.

    def _write(self, step: int, copied: Copied, state: dict[str, Any], group: dist.ProcessGroup | None) -> None:
        scratch = self.folder / f".{self.path(step).name}.partial"
        writer = PieceWriter(
            scratch,
            self.ranks.rank,
            copied.signature,
            begin=partial(self._begin, scratch),
            end=partial(self._publish, step, state, scratch),
        )
        copied.ready()
        try:
            save(
                {},
                storage_writer=writer,
                planner=PiecePlanner(copied.pieces),
                process_group=group,
                no_dist=group is None,
            )
        except BaseException:
            if self.ranks.is_main:
                shutil.rmtree(scratch, ignore_errors=True)
            raise

    def _begin(self, scratch: Path) -> None:
        self._restore_replaced()
        # What cannot be removed now (a file that another machine still holds open) is tried again the next time.
        for leftover in self.folder.glob(".step-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        scratch.mkdir(parents=True)
        sync_path(self.folder.parent)

    def _publish(self, step: int, state: dict[str, Any], scratch: Path, files: dict[str, FileInfo]) -> None:
        write_json(scratch / STATE_FILE, Record(FORMAT, FORMAT_VERSION, step, files, state).to_json())
        sync_path(scratch)
        swap_directory(scratch, self.path(step))
        self._damaged.discard(step)
        for old in self._superseded(step):
            # Without its name first: a kill in between leaves no part of a checkpoint that looks like one.
            removed = self.folder / f".{self.path(old).name}.removed"
            self.path(old).rename(removed)
            shutil.rmtree(removed, ignore_errors=True)

    def _superseded(self, step: int) -> list[int]:
        """Those that the policy does not keep. Later ones are of a run that fell back: they are left to be replaced."""
        earlier = [old for old in self.steps() if old <= step]
        good = [old for old in earlier if old not in self._damaged]
        kept = set(good[-self.keep :]) | {old for old in good if self.keep_every and old % self.keep_every == 0}
        return [old for old in earlier if old not in kept]

    # In the foreground.

    @cached_property
    def _group(self) -> dist.ProcessGroup | None:
        """A group of the store's own, so that it can talk while the training does; made when all first save or read."""
        if self.ranks.num_ranks == 1:
            return None
        group = dist.new_group(backend="gloo")
        if isinstance(group, int):  # torch's mark for a process outside the group
            raise TypeError("a group of all processes lacks this one")
        return group

    def _join(self) -> None:
        if self._writing is not None:
            self._writing.join()

    def _harvest(self) -> None:
        writing, self._writing = self._writing, None
        if writing is None or writing.error is None:
            return
        if not isinstance(writing.error, CheckpointException):
            raise writing.error
        if not _is_expected(writing.error):
            raise RuntimeError(f"the checkpoint of step {writing.step} could not be written") from writing.error
        good = [step for step in self.steps() if step not in self._damaged]
        newest = f"The newest complete one is {self.path(good[-1])}." if good else "There is no older one."
        self._untold.append(
            f"The checkpoint of step {writing.step} could not be written: {_reasons(writing.error)}. {newest}"
        )

    def _present(self) -> list[int]:
        self._restore_replaced()
        return self.steps()

    def _restore_replaced(self) -> None:
        """Gives a checkpoint its name back that a killed process was about to replace."""
        for replaced in self.folder.glob(".step-*.old-*"):
            path = self.folder / replaced.name[1:].split(".")[0]
            if not path.exists():
                replaced.rename(path)

    def _verified(self, step: int) -> Checkpoint:
        path = self.path(step)
        record = self._from_main(lambda: read_record(path, step))

        def check_own_files() -> None:
            for name in sorted(record.files)[self.ranks.rank :: self.ranks.num_ranks]:
                check_file(path / name, record.files[name])

        self._on_all(check_own_files)
        tensors = self._from_main(lambda: read_tensor_infos(path, record.files))
        return Checkpoint(path, step, record.state, tensors, self._group)

    def _from_main(self, make: Callable[[], ValueT]) -> ValueT:
        """What the main process makes, on all."""
        found: ValueT = self._on_all(lambda: make() if self.ranks.is_main else None)[0]
        return found

    def _on_all(self, make: Callable[[], Any]) -> list[Any]:
        """What every process makes, on all. That one cannot read, or what it reads is damaged, is raised on all."""
        found: Any
        try:
            found = make()
        except CheckpointError as error:
            found = error
        except OSError as error:
            found = CheckpointError(f"{error.filename or self.folder} cannot be read: {error.strerror}.")
        everyone: list[Any] = [found]
        if self._group is not None:
            everyone = [None] * self.ranks.num_ranks
            dist.all_gather_object(everyone, found, group=self._group)
        for each in everyone:
            if isinstance(each, CheckpointError):
                raise each
        return everyone


class _Writing(threading.Thread):
    """One checkpoint that is being written. It does not keep a process alive that has failed."""

    def __init__(self, step: int, work: Callable[[], None]) -> None:
        super().__init__(name=f"checkpoint-{step}", daemon=True)
        self.step = step
        self.error: BaseException | None = None
        self._work = work

    def run(self) -> None:
        """Writes it, and keeps the error if that fails."""
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001 (it is raised in the training's thread)
            self.error = error


def _is_expected(error: CheckpointException) -> bool:
    return all(isinstance(cause, OSError | CheckpointError) for cause, _ in error.failures.values())


def _reasons(error: CheckpointException) -> str:
    causes = [cause for cause, _ in error.failures.values()]
    texts = [(cause.strerror if isinstance(cause, OSError) else None) or str(cause) for cause in causes]
    return "; ".join(dict.fromkeys(text.rstrip(".") for text in texts))


def pack_state(model: PoaModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor that training needs to go on: model, teacher, centres, and the optimiser's by parameter name.

    A parameter that never had a gradient has no optimiser state.
    """
    tensors = {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    for name, parameter in model.student.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def unpack_state_(checkpoint: Checkpoint, model: PoaModel, optimizer: torch.optim.Optimizer) -> None:
    """Puts the tensors of `pack_state` back, in place; divided as the model is.

    Raises:
        CheckpointError: names or shapes do not fit the model; they are named.
    """
    parameters = dict(model.student.named_parameters())
    fused = bool(optimizer.param_groups[0].get("fused"))
    tensors = checkpoint.tensors_of(model, "model.")
    states: dict[Tensor, dict[str, Tensor]] = {}
    for full in checkpoint.tensors:
        if full.startswith("optimizer."):
            key, _, name = full.removeprefix("optimizer.").partition(".")
            if name not in parameters:
                raise checkpoint.misfit([f"it has optimiser state for {name}, which this model lacks"])
            parameter = parameters[name]
            if key == "step":
                value = torch.zeros((), device=parameter.device if fused else None)
            else:
                value = torch.zeros_like(parameter)
            states.setdefault(parameter, {})[key] = tensors[full] = value
    checkpoint.load_(tensors)
    optimizer.state.update(states)
