import errno
import io
import os

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from poa import patient_file
from poa.errors import PoaWarning
from poa.patient_file import PatientFile, PatientStream
from poa.train.curves import Curves


class Disk:
    """Takes so many bytes, then says that it is full."""

    def __init__(self, monkeypatch, space):
        self.space, self.take = space, os.write
        monkeypatch.setattr(patient_file.os, "write", self.write)

    def write(self, handle, content):
        if not self.space:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self.take(handle, content[: self.space])
        self.space -= written
        return written


def write_each(file, *lines):
    for line in lines:
        file.write(line)


def write_and_close(file):
    file.write(b"twelve bytes")
    file.close()


def add_steps(curves, num_steps):
    for step in range(1, num_steps + 1):
        curves.add({"loss": float(step), "speed": 2}, step)


def test_what_a_full_disk_does_not_take_is_written_when_there_is_space_again(tmp_path, monkeypatch):
    disk = Disk(monkeypatch, space=8)
    file = PatientFile(tmp_path / "log")
    file.write(b"first\n")
    with pytest.warns(PoaWarning, match="log cannot be written: No space left on device") as told:
        write_each(file, b"second\n", b"third\n")
    assert len(told) == 1
    assert (tmp_path / "log").read_bytes() == b"first\nse"
    disk.space = 100
    file.write(b"fourth\n")
    assert (tmp_path / "log").read_bytes() == b"first\nsecond\nthird\nfourth\n"
    disk.space = 0
    with pytest.warns(PoaWarning, match="cannot be written"):
        file.write(b"fifth\n")
    disk.space = 100
    file.close()
    assert (tmp_path / "log").read_bytes().endswith(b"fifth\n")


def test_what_could_not_be_written_until_the_end_is_told(tmp_path, monkeypatch):
    Disk(monkeypatch, space=4)
    file = PatientFile(tmp_path / "log")
    with pytest.warns(PoaWarning) as told:
        write_and_close(file)
    assert "8 bytes of" in str(told[-1].message)
    assert "are lost" in str(told[-1].message)


def points(folder, name):
    found = EventAccumulator(str(folder))
    found.Reload()
    return [(event.step, event.value) for event in found.Scalars(name)]


def test_curves_are_read_by_tensorboard_and_a_resumed_run_replaces_what_it_runs_again(tmp_path):
    first = Curves(tmp_path / "tensorboard", 0)
    add_steps(first, 5)
    first.close()
    assert points(tmp_path / "tensorboard", "loss") == [(step, float(step)) for step in range(1, 6)]
    second = Curves(tmp_path / "tensorboard", 3)
    second.add({"loss": -4.0}, 4)
    second.close()
    assert points(tmp_path / "tensorboard", "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, -4.0)]
    assert points(tmp_path / "tensorboard", "speed") == [(1, 2.0), (2, 2.0), (3, 2.0)]


def test_curves_written_to_a_disk_that_was_full_are_whole(tmp_path, monkeypatch):
    disk = Disk(monkeypatch, space=100)
    curves = Curves(tmp_path, 0)
    with pytest.warns(PoaWarning, match="cannot be written"):
        add_steps(curves, 4)
    disk.space = 10_000
    curves.close()
    assert points(tmp_path, "loss") == [(step, float(step)) for step in range(1, 5)]


class FullDisk(io.RawIOBase):
    """A device that is full until it is not."""

    def __init__(self):
        self.is_full, self.written = True, b""

    def writable(self):
        return True

    def write(self, content):
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.written += bytes(content)
        return len(content)


def test_a_stream_on_a_full_disk_is_written_when_there_is_space_again():
    disk = FullDisk()
    stream = PatientStream(io.TextIOWrapper(io.BufferedWriter(disk), encoding="utf-8", line_buffering=True))
    print("step 1", file=stream, flush=True)
    assert disk.written == b""
    disk.is_full = False
    print("step 2", file=stream, flush=True)
    assert disk.written == b"step 1\nstep 2\n"
    assert stream.encoding == "utf-8"


def test_other_errors_of_a_stream_are_not_hidden():
    class Broken(io.StringIO):
        def write(self, _):
            raise OSError(errno.EIO, "Input/output error")

    stream = PatientStream(Broken())
    with pytest.raises(OSError, match="Input/output"):
        stream.write("step 1")
