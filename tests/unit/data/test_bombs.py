"""Files that are small and would cost much to read: refused in bounded memory and time."""

import subprocess
import sys
import tarfile

import numpy as np
import pytest

from poa.config import DataConfig
from poa.data import BadImage, decode_image, open_source
from poa.data.decode import MAX_SCANS
from poa.errors import DataError
from tests.bombs import (
    COMMENT_WITH_ENDS,
    END,
    holes,
    image_bombs,
    in_base_256,
    jpeg_of_scans,
    member,
    pax,
    record,
    tar_bombs,
    tar_header,
)
from tests.hostile_images import encoded, picture

LENIENT = DataConfig(max_bad_share=1.0)
PNG = encoded(picture(), "PNG")
NUM_PIECES = 20_000
ROOM = 192
"""Mebibytes that reading any of them may take, beside the libraries."""

READ_ALL = f"""
import resource, sys
from pathlib import Path
from poa.config import DataConfig
from poa.data import BadImage, decode, open_source
from poa.errors import DataError

decode.MAX_READS = {NUM_PIECES}
open_source("digits", DataConfig(), 3).load(0)
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + {ROOM} * 2**20,) * 2)
for file in sorted(Path(sys.argv[1]).iterdir()):
    try:
        if file.suffix == ".tar":
            print(file.name, "listed", len(open_source(str(file), DataConfig(max_bad_share=1.0), 3)))
        else:
            print(file.name, "decoded", decode.decode_image(file, 3, 1_000_000, 64 * 2**20).size)
    except (BadImage, DataError) as error:
        print(file.name, "refused", *str(error).splitlines())
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What a process with little memory says of every bomb, by name."""
    folder = tmp_path_factory.mktemp("bombs")
    for name, content in image_bombs(1_200, NUM_PIECES).items():
        (folder / name).write_bytes(content)
    for name, content in tar_bombs().items():
        (folder / f"{name}.tar").write_bytes(content)
    holes(folder / "huge.png", (0, PNG), size=2**40)
    places = (0, member("good.png", PNG) + tar_header("huge.png", in_base_256(2**40)))
    holes(folder / "huge-member.tar", places, size=len(places[1]) + 2**40 + 1024)
    holes(folder / "nothing.tar", size=2**40)
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, str(folder)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert set(lines) == {file.name for file in folder.iterdir()}
    return lines


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory by /proc and RLIMIT_AS")
class TestInLittleMemory:
    def test_nothing_is_refused_for_want_of_memory(self, told):
        assert not {name: text for name, text in told.items() if "memory" in text}

    @pytest.mark.parametrize("name", sorted(tar_bombs()))
    def test_an_archive_with_a_bomb_is_refused_whole(self, told, name):
        assert told[f"{name}.tar"].startswith("refused")
        assert "cannot be read as a tar archive after" in told[f"{name}.tar"]

    def test_a_member_of_a_terabyte_is_left_out_and_the_others_stay(self, told):
        assert told["huge-member.tar"] == "listed 1"

    def test_files_of_a_terabyte_are_refused_unread(self, told):
        assert "data.max_bytes" in told["huge.png"]
        assert told["nothing.tar"].startswith("refused")

    @pytest.mark.parametrize(
        ("names", "reason"),
        [
            (("flat.png", "flat.gif", "flat.jpg", "flat.tif", "rgba.png", "flat.webp", "tile.tif"), "pixels"),
            (("text.png", "itext.png", "text-after.png", "profile.png"), "too large"),
            (("chunks.png", "chunks-after.png"), "pieces"),
            (("exif.jpg",), "metadata"),
        ],
    )
    def test_image_bombs_are_refused_with_the_reason(self, told, names, reason):
        for name in names:
            assert told[name].startswith("refused"), told[name]
            assert reason in told[name]


@pytest.mark.parametrize("before", [b"", COMMENT_WITH_ENDS, b"\xff\x01\xff\xff", b"\xff\xff\xff"])
def test_a_jpeg_of_very_many_scans_is_refused_and_one_of_a_few_is_read(before):
    assert decode_image(jpeg_of_scans(64, MAX_SCANS - 12), 1, 10_000).size == (64, 64)
    with pytest.raises(BadImage, match=f"more than {MAX_SCANS} scans"):
        decode_image(jpeg_of_scans(64, MAX_SCANS + 1, before), 1, 10_000)


def test_what_follows_a_jpeg_is_no_scan():
    content = encoded(picture(), "JPEG") + b"\xff\xda" * 1000
    assert decode_image(content, 3, 10_000).size == picture().size


@pytest.mark.parametrize("as_file", [False, True])
def test_an_image_of_more_bytes_than_allowed_is_refused(as_file, tmp_path):
    (tmp_path / "1.png").write_bytes(PNG)
    file = tmp_path / "1.png" if as_file else PNG
    assert decode_image(file, 3, 10_000, len(PNG)).size == picture().size
    with pytest.raises(BadImage, match=rf"{len(PNG)} bytes, more than {len(PNG) - 1} \(data.max_bytes\)"):
        decode_image(file, 3, 10_000, len(PNG) - 1)


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_every_source_refuses_larger_images_than_the_configuration_allows(kind, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    noise = encoded(picture().effect_spread(9), "PNG")
    assert len(noise) > len(PNG)
    contents = {"1.png": PNG, "2.png": noise}
    for name, content in contents.items():
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    archive = b"".join(member(name, content) for name, content in contents.items()) + END
    (tmp_path / "tar").mkdir()
    (tmp_path / "tar" / "1.tar").write_bytes(archive)
    (tmp_path / "parquet").mkdir()
    pyarrow.parquet.write_table(pa.table({"image": list(contents.values())}), tmp_path / "parquet" / "1.parquet")
    source = open_source(str(tmp_path / kind), DataConfig(max_bad_share=1.0, max_bytes=len(PNG)), 3)
    assert source.load(0).size == picture().size
    reasons = [reason for _, reason in source.skipped]
    if len(source) == 2:
        with pytest.raises(BadImage) as caught:
            source.load(1)
        reasons.append(caught.value.reason)
    assert len(reasons) == 1
    assert "data.max_bytes" in reasons[0]


def opened(tmp_path, *parts):
    (tmp_path / "1.tar").write_bytes(b"".join(parts) + END)
    return open_source(str(tmp_path / "1.tar"), LENIENT, 3)


def test_members_with_holes_are_left_out_however_they_are_written(tmp_path):
    sparse = [
        tar_header("old.png", 0, b"S", sparse=bytes(96) + b"\0" + b"00000001000\0"),
        pax(record("GNU.sparse.map", "0,5")) + member("01.png", PNG),
        pax(record("GNU.sparse.size", "10")) + member("00.png", PNG),
        pax(record("GNU.sparse.realsize", "999999")) + member("real.png", PNG),
    ]
    source = opened(tmp_path, member("good.png", PNG), *sparse)
    assert [source.image_name(index) for index in range(len(source))] == ["1.tar/good.png"]
    assert len(source.skipped) == 4
    assert {reason for _, reason in source.skipped} == {"is not a regular file"}


def test_a_name_of_a_megabyte_is_left_out_and_shown_short(tmp_path):
    name = "n" * 500_000 + ".png"
    long_name = tar_header("././@LongLink", len(name), b"L") + name.encode().ljust(500_224, b"\0")
    hostile = (long_name, member("x", PNG), pax(record("path", name)), member("y", PNG))
    source = opened(tmp_path, *hostile, member("good.png", PNG))
    assert len(source) == 1
    assert len(source.skipped) == 2
    for shown, reason in source.skipped:
        assert "name of more than 4096 bytes" in reason
        assert len(shown) < 300


def test_names_with_nul_and_control_characters_are_shown_escaped(tmp_path):
    source = opened(tmp_path, pax(record("path", "a\0b\x1b[31m\n.png")), member("x", PNG))
    assert source.image_name(0) == "1.tar/a\\x00b\\x1b[31m\\n.png"


def test_links_are_never_followed(tmp_path):
    (tmp_path / "secret.png").write_bytes(encoded(picture(9, 9), "PNG"))
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.png")
    source = opened(tmp_path, member("good.png", PNG), link.tobuf())
    assert len(source) == 1
    assert source.skipped[0].reason == "is a link"
    assert np.asarray(source.load(0)).shape == (*picture().size, 3)


def test_a_bomb_is_refused_after_the_members_before_it(tmp_path):
    with pytest.raises(DataError, match="after 1 members: the headers of a member have more than 1048576 bytes"):
        opened(tmp_path, member("good.png", PNG), tar_header("././@LongLink", 2**40, b"L"), member("x", PNG))
