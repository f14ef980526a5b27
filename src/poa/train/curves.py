"""Curves for TensorBoard, in a file that outlives a full disk (torch's writer does not, and needs a thread)."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from poa.patient_file import PatientFile


class Curves:
    """A file of TensorBoard events in `folder`; what it shows of later steps than `first_step` from before is dropped.

    Args:
        folder: where they are; made if it is not there.
        first_step: steps done before.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{first_step}"
        self._file = PatientFile(folder / name)
        self._records = RecordWriter(self._file)
        self._add(file_version="brain.Event:2")
        self._add(step=first_step + 1, session_log=SessionLog(status=SessionLog.START))

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Adds a point to the curve of every name."""
        from torch.utils.tensorboard.summary import scalar

        for name, value in values.items():
            self._add(step=step, summary=scalar(name, value))

    def close(self) -> None:
        """No more points."""
        self._file.close()

    def _add(self, **parts: Any) -> None:  # noqa: ANN401 (the fields of a protocol buffer)
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.write(Event(wall_time=time.time(), **parts).SerializeToString())
