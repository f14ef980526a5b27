import json

import pytest

from poa.data import BadImageLog, SkippedImage
from poa.errors import DataError


def test_each_image_is_recorded_once(tmp_path):
    log = BadImageLog(tmp_path / "run" / "bad.jsonl", 100, 0.5, [SkippedImage("a", "empty")])
    log.add([("b", "truncated"), ("a", "empty"), ("b", "again")])
    log.add([])
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert lines == [{"name": "a", "reason": "empty"}, {"name": "b", "reason": "truncated"}]
    assert log.count == 2


def test_without_unusable_images_there_is_no_file(tmp_path):
    assert BadImageLog(tmp_path / "bad.jsonl", 10, 0.0).count == 0
    assert not (tmp_path / "bad.jsonl").exists()


def test_a_resumed_run_keeps_its_count(tmp_path):
    path = tmp_path / "bad.jsonl"
    BadImageLog(path, 4, 0.5).add([("a", "x"), ("b", "x")])
    resumed = BadImageLog(path, 4, 0.5, [SkippedImage("a", "x")])
    assert resumed.count == 2
    with pytest.raises(DataError):
        resumed.add([("c", "x")])


def test_exactly_the_share_is_accepted_and_one_more_is_not(tmp_path):
    log = BadImageLog(tmp_path / "bad.jsonl", 10, 0.2)
    log.add([("a", "reason a"), ("b", "reason b")])
    with pytest.raises(DataError, match=r"3 of 10.*--data\.max-bad-share") as caught:
        log.add([("c", "reason c")])
    message = str(caught.value)
    assert str(log.path) in message
    assert all(f"{name}: reason {name}" in message for name in "abc")
    assert len(log.path.read_text().splitlines()) == 3


def test_a_share_of_zero_accepts_no_unusable_image(tmp_path):
    with pytest.raises(DataError):
        BadImageLog(tmp_path / "bad.jsonl", 1000, 0.0, [SkippedImage("a", "x")])


def test_a_line_cut_short_by_a_crash_is_dropped(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"name": "a", "reason": "x"}\n{"name": "b", "rea')
    log = BadImageLog(path, 10, 1.0)
    assert log.count == 1
    log.add([("c", "y")])
    assert BadImageLog(path, 10, 1.0).count == 2


@pytest.mark.parametrize("content", ["garbage\n", '["a"]\n', '{"name": "a"}\n'])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"bad\.jsonl must hold one JSON object"):
        BadImageLog(path, 10, 1.0)
