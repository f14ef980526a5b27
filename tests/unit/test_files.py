import errno
import os

import pytest

from poa.errors import CheckpointError
from poa.files import replace_directory, write_json, write_text


class CutError(Exception):
    pass


def begin_and_raise(path, error):
    with replace_directory(path, overwrite=True) as scratch:
        (scratch / "part").write_text("1")
        raise error


def test_written_text_is_there_whole_and_replaces_the_old(tmp_path):
    write_text(tmp_path / "deep" / "file.txt", "žluťoučký\n")
    write_text(tmp_path / "deep" / "file.txt", "new\n")
    assert (tmp_path / "deep" / "file.txt").read_bytes() == b"new\n"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file.txt"]


def test_failed_writing_leaves_the_old_text_and_nothing_else(tmp_path, monkeypatch):
    write_text(tmp_path / "file.txt", "old")

    def fail(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "file.txt", "new")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "file.txt", "\udcff")
    assert (tmp_path / "file.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


def test_json_that_others_cannot_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "file.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_directory_appears_when_its_block_ends(tmp_path):
    with replace_directory(tmp_path / "a" / "net") as scratch:
        (scratch / "part").write_text("1")
        assert not (tmp_path / "a" / "net").exists()
    assert (tmp_path / "a" / "net" / "part").read_text() == "1"
    assert (tmp_path / "a" / "net").stat().st_mode & 0o777 == 0o755
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["net"]


@pytest.mark.parametrize("error", [CutError, KeyboardInterrupt])
def test_exception_in_the_block_leaves_nothing(tmp_path, error):
    with pytest.raises(error):
        begin_and_raise(tmp_path / "net", error)
    assert list(tmp_path.iterdir()) == []


def test_exception_in_the_block_leaves_what_was_to_be_overwritten(tmp_path):
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "old").write_text("1")
    with pytest.raises(CutError):
        begin_and_raise(tmp_path / "net", CutError)
    assert [path.name for path in tmp_path.rglob("*")] == ["net", "old"]


def test_existing_directory_is_refused_or_replaced_as_asked(tmp_path):
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "old").write_text("1")
    with pytest.raises(CheckpointError, match="is there already"), replace_directory(tmp_path / "net"):
        pytest.fail("the block must not run")
    assert (tmp_path / "net" / "old").exists()
    with replace_directory(tmp_path / "net", overwrite=True) as scratch:
        (scratch / "new").write_text("2")
    assert [path.name for path in (tmp_path / "net").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["net"]


def test_an_empty_directory_may_be_filled(tmp_path):
    (tmp_path / "net").mkdir()
    with replace_directory(tmp_path / "net") as scratch:
        (scratch / "new").write_text("2")
    assert [path.name for path in (tmp_path / "net").iterdir()] == ["new"]


def test_a_file_in_the_place_of_a_directory_is_refused(tmp_path):
    (tmp_path / "net").write_text("mine")
    with pytest.raises(CheckpointError, match="is there already"), replace_directory(tmp_path / "net"):
        pytest.fail("the block must not run")
    with pytest.raises(CheckpointError, match="cannot write"), replace_directory(tmp_path / "net" / "deeper"):
        pytest.fail("the block must not run")
    assert (tmp_path / "net").read_text() == "mine"


def test_full_disk_is_said_and_nothing_is_left_behind(tmp_path):
    with pytest.raises(CheckpointError, match=r"No space left on device\. Nothing of it"):
        begin_and_raise(tmp_path / "net", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert not any(tmp_path.iterdir())
