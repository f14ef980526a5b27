"""Images in tar archives."""

import contextlib
import gzip
import io
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poa.config import DataConfig
from poa.data import BadImage, make_loader, open_source
from poa.data.folder import FolderSource
from poa.data.tar import TarSource
from poa.errors import DataError
from tests.hostile_images import encoded, picture
from tests.unit.data.test_loader import assert_same, folder_source, make_batches

LENIENT = DataConfig(max_bad_share=1.0)
PNG = encoded(picture(), "PNG")


def pack(path, *members, modified=0):
    """Each member a name, or (name, content), or a `TarInfo` of another kind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for each in members:
            name, content = (each, PNG) if isinstance(each, str) else (each if isinstance(each, tuple) else (None, b""))
            member = tarfile.TarInfo(name) if name is not None else each
            member.size, member.mtime = len(content), modified
            archive.addfile(member, io.BytesIO(content))
    return path


def special(name, kind, target=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def opened(path, config=LENIENT):
    return open_source(str(path), config, 3)


def names_of(source):
    return [source.image_name(index) for index in range(len(source))]


def test_an_archive_of_a_folder_has_the_folders_images_and_labels(tmp_path):
    for index, name in enumerate(("cat/1.png", "cat/deep/2.png", "dog/3.jpg", "dog/ž\n4.png")):
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(encoded(picture(20 + index), "PNG"))
    (tmp_path / "folder" / "notes.txt").write_text("not an image")
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        archive.add(tmp_path / "folder", ".")
    folder, tar = opened(tmp_path / "folder"), opened(tmp_path / "all.tar")
    order = {name: index for index, name in enumerate(names_of(tar))}
    places = [order[f"all.tar/{name}"] for name in names_of(folder)]
    assert sorted(places) == list(range(4))
    assert [tar.load(place).tobytes() for place in places] == [folder.load(index).tobytes() for index in range(4)]
    assert tar.labels[places].tolist() == folder.labels.tolist()
    assert tar.class_names == folder.class_names


def test_shards_come_in_order_of_name_and_images_in_order_of_the_archive(tmp_path):
    pack(tmp_path / "shards" / "b.tar", "z.png", "a.png")
    pack(tmp_path / "shards" / "a.tar", "z.png")
    (tmp_path / "shards" / "sizes.json").write_text("{}")
    assert names_of(opened(tmp_path / "shards")) == ["a.tar/z.png", "b.tar/z.png", "b.tar/a.png"]


def test_a_folder_with_archives_and_images_is_a_folder_of_images(tmp_path):
    pack(tmp_path / "a.tar", "1.png")
    (tmp_path / "2.png").write_bytes(PNG)
    assert isinstance(opened(tmp_path), FolderSource)


@pytest.mark.parametrize(
    ("classes", "labels", "names"),
    [
        (("2", "0\n"), [2, 0], None),
        (("zebra", "ant"), [1, 0], ("ant", "zebra")),
        (("2", "ant"), [0, 1], ("2", "ant")),
        (("-1", "3"), None, None),
        (("7", None), [1, 0], ("a", "b")),
    ],
)
def test_labels_are_cls_members_if_every_image_has_one_and_folders_otherwise(tmp_path, classes, labels, names):
    members = []
    for folder, word in zip("ba", classes, strict=True):
        members += [(f"{folder}/1.cls", word.encode())] if word is not None else []
        members += [f"{folder}/1.left.png"]
    source = opened(pack(tmp_path / "1.tar", *members))
    assert (None if source.labels is None else source.labels.tolist()) == labels
    assert source.class_names == names


@pytest.mark.parametrize("content", [b"", b" \n", b"x" * 300])
def test_a_cls_member_that_holds_no_class_is_named(tmp_path, content):
    with pytest.raises(DataError, match=r"1\.tar/a\.cls must hold a class"):
        opened(pack(tmp_path / "1.tar", "a.png", ("a.cls", content)))


def test_members_that_cannot_be_used_are_skipped_and_reported(tmp_path):
    members = [
        "../up.png",
        "a/../../up.png",
        "/root.png",
        special("link.png", tarfile.SYMTYPE, "good.png"),
        special("hard.png", tarfile.LNKTYPE, "good.png"),
        special("device.png", tarfile.CHRTYPE),
        special("pipe.png", tarfile.FIFOTYPE),
        ("empty.png", b""),
        ("twice.png", b"an older one"),
        "twice.png",
        "./good.png",
        "notes.txt",
        special("folder.png", tarfile.DIRTYPE),
    ]
    source = opened(pack(tmp_path / "1.tar", *members))
    assert names_of(source) == ["1.tar/twice.png", "1.tar/good.png"]
    assert source.load(0).size == source.load(1).size == picture().size
    found = {name.partition(" at byte ")[0].removeprefix("1.tar/"): reason for name, reason in source.skipped}
    assert len(source.skipped) == 9
    assert {name for name, reason in found.items() if "leads out" in reason} == {
        "../up.png",
        "a/../../up.png",
        "/root.png",
    }
    assert {name for name, reason in found.items() if "link" in reason} == {"link.png", "hard.png"}
    assert {name for name, reason in found.items() if "regular" in reason} == {"device.png", "pipe.png"}
    assert "empty" in found["empty.png"]
    assert "again" in found["twice.png"]
    with pytest.raises(DataError, match="9 of 11 images cannot be used"):
        opened(tmp_path / "1.tar", DataConfig(max_bad_share=0.5))


@pytest.mark.parametrize("name", ["1.tar.gz", "1.tgz", "really-compressed.tar", "folder/1.tar.gz"])
def test_compressed_archives_are_refused_with_the_way_out(tmp_path, name):
    plain = pack(tmp_path / "plain.tar", "1.png").read_bytes()
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(gzip.compress(plain))
    spec = tmp_path / name
    with pytest.raises(DataError, match="gunzip"):
        opened(spec.parent if "folder" in name else spec)


def test_an_archive_cut_short_anywhere_is_refused(tmp_path):
    whole = pack(tmp_path / "whole.tar", "1.png", "2.png").read_bytes()
    member = tarfile.BLOCKSIZE * (1 + -(-len(PNG) // tarfile.BLOCKSIZE))
    for length in (0, 100, 512, member - 10, member, member + 300, 2 * member - 1, 2 * member, 2 * member + 100):
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        with pytest.raises(DataError, match="cut short"):
            opened(tmp_path / "cut.tar")
    (tmp_path / "cut.tar").write_bytes(whole[: 2 * member + 512])
    assert len(opened(tmp_path / "cut.tar")) == 2


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    whole = bytearray(pack(tmp_path / "1.tar", "1.png", "2.png").read_bytes())
    member = tarfile.BLOCKSIZE * (1 + -(-len(PNG) // tarfile.BLOCKSIZE))
    whole[member + 20] ^= 0xFF
    (tmp_path / "1.tar").write_bytes(whole)
    with pytest.raises(DataError, match="after 1 members: it is damaged"):
        opened(tmp_path / "1.tar")


@settings(max_examples=150, deadline=None)
@given(flips=st.dictionaries(st.integers(0, 4 * 512 - 1), st.integers(0, 255), min_size=1, max_size=20))
def test_damage_anywhere_is_a_data_error_or_a_bad_image(tmp_path_factory, flips):
    path = tmp_path_factory.mktemp("fuzz") / "1.tar"
    whole = bytearray(pack(path, "a/1.png", ("a/1.cls", b"1")).read_bytes())
    for place, value in flips.items():
        whole[place] = value
    path.write_bytes(whole)
    with contextlib.suppress(DataError, BadImage):
        opened(path).load(0)


def test_a_pattern_names_its_archives_and_says_which_is_missing(tmp_path):
    for number in (8, 9, 10):
        pack(tmp_path / f"s-{number:03d}.tar", "1.png")
    assert names_of(opened(tmp_path / "s-{008..010}.tar")) == ["s-008.tar/1.png", "s-009.tar/1.png", "s-010.tar/1.png"]
    with pytest.raises(DataError, match=r"s-011\.tar, which is not there"):
        opened(tmp_path / "s-{008..011}.tar")
    with pytest.raises(DataError, match="smaller number first"):
        opened(tmp_path / "s-{010..008}.tar")


def test_an_archive_without_images_says_what_it_saw(tmp_path):
    with pytest.raises(DataError, match="2 files were seen"):
        opened(pack(tmp_path / "1.tar", ("a.txt", b"a"), ("b.cls", b"1")))


def test_the_fingerprint_changes_with_times_labels_and_names(tmp_path):
    plain = (("a.cls", b"1"), "a.png")
    variants = [
        pack(tmp_path / "1" / "1.tar", *plain),
        pack(tmp_path / "2" / "1.tar", *plain, modified=1),
        pack(tmp_path / "3" / "1.tar", ("a.cls", b"2"), "a.png"),
        pack(tmp_path / "4" / "1.tar", "a.png"),
        pack(tmp_path / "5" / "1.tar", ("b.cls", b"1"), "b.png"),
    ]
    assert len({opened(path).fingerprint for path in variants}) == len(variants)
    assert opened(variants[0]).fingerprint == opened(pack(tmp_path / "6" / "1.tar", *plain)).fingerprint


def test_an_archive_that_shrank_since_gives_bad_images(tmp_path):
    path = pack(tmp_path / "1.tar", "1.png", "2.png")
    source = opened(path)
    path.write_bytes(path.read_bytes()[:1024])
    with pytest.raises(BadImage, match="shorter"):
        source.load(1)
    path.unlink()
    with pytest.raises(BadImage, match="cannot be read"):
        source.load(0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_pre_training_sees_in_an_archive_what_it_sees_in_the_folder(num_workers, tmp_path):
    folder = folder_source(tmp_path / "folder", 12)
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        for name in names_of(folder):
            archive.add(tmp_path / "folder" / name, name)
    batches = make_batches(opened(tmp_path / "all.tar"))
    for index, found in enumerate(make_loader(batches, 0, 3, num_workers, pin_memory=False)):
        assert_same(found, make_batches(folder)[index])


def test_the_index_keeps_little_more_than_the_names(tmp_path):
    import pickle

    source = opened(pack(tmp_path / "1.tar", *(f"{index:06d}.png" for index in range(1000))))
    assert len(source) == 1000
    assert len(pickle.dumps(source)) < 1000 * (len("000000.png") + 40)
    assert isinstance(source, TarSource)
    assert np.array_equal(np.asarray(source.load(999)), np.asarray(picture()))
