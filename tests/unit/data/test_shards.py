"""The index of shards, and images read through it."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from poa.config import DataConfig
from poa.data import BadImage, open_source
from poa.data.shards import INDEX_NAME, ShardSource, build_index, locate, open_index
from poa.data.shards.location import redacted
from poa.data.tar import TarSource
from poa.errors import ConfigError, DataError
from tests.hostile_images import encoded, picture
from tests.shard_server import parquet_of, serving, tar_of, write_index, write_tars

LENIENT = DataConfig(max_bad_share=1.0)


@pytest.fixture
def config(tmp_path):
    return DataConfig(cache_dir=str(tmp_path / "cache"), max_bad_share=1.0, retries=1, retry_seconds=0.01)


def contents_of(source):
    return [source.encoded(index) for index in range(len(source))]


def names_of(source):
    return [source.image_name(index) for index in range(len(source))]


def test_indexed_archives_are_the_same_source_here_and_behind_a_url(tmp_path, config):
    folder = write_tars(tmp_path / "shards", [3, 1, 4])
    plain = open_source(str(folder), config, 3)
    assert isinstance(plain, TarSource)
    write_index(folder)
    with serving(folder) as server:
        specs = (
            str(folder),
            f"file://{folder}",
            f"{folder}/s-{{0000..0002}}.tar",
            f"{server.url}/s-{{0000..0002}}.tar",
        )
        sources = [open_source(spec, config, 3) for spec in (*specs, f"{server.url}/")]
        for source in sources:
            assert isinstance(source, ShardSource)
            assert contents_of(source) == contents_of(plain)
            assert names_of(source) == names_of(plain)
            assert source.labels.tolist() == plain.labels.tolist()
            assert source.class_names == plain.class_names
            assert source.block_sizes.tolist() == [3, 1, 4]
        assert len({source.fingerprint for source in sources}) == 1
        assert server.requests["s-0000.tar"] == 1


def test_indexed_parquet_files_are_the_same_source_here_and_behind_a_url(tmp_path, config):
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(2):
        (folder / f"p-{number}.parquet").write_bytes(parquet_of(5, shift=10 * number))
    plain = open_source(str(folder), config, 3)
    write_index(folder)
    (tmp_path / "away").mkdir()
    index = (folder / INDEX_NAME).rename(tmp_path / "away" / INDEX_NAME)
    with serving(folder) as server:
        named = dataclasses.replace(config, index=str(index))
        for spec in (str(folder), f"{server.url}/p-{{0..1}}.parquet"):
            source = open_source(spec, named, 3)
            assert contents_of(source) == contents_of(plain)
            assert (
                names_of(source)
                == names_of(plain)
                == [f"p-{n}.parquet:{row}" for n in range(2) for row in (0, 2, 3, 4, 5)]
            )
            assert source.labels.tolist() == plain.labels.tolist()
            assert source.skipped == plain.skipped
    assert sum((tmp_path / "cache" / name).stat().st_size for name in cached(tmp_path)) == sum(
        map(len, contents_of(plain))
    )


def cached(tmp_path):
    return [entry.name for entry in (tmp_path / "cache").iterdir() if not entry.name.startswith(".")]


def test_a_part_of_the_shards_has_a_part_of_the_images(tmp_path, config):
    folder = write_tars(tmp_path / "shards", [3, 2, 4, 1])
    write_index(folder)
    whole = open_source(str(folder), config, 3)
    part = open_source(f"{folder}/s-{{0001..0002}}.tar", config, 3)
    single = open_source(f"{folder}/s-0003.tar", config, 3)
    assert names_of(part) == names_of(whole)[3:9]
    assert names_of(single) == names_of(whole)[9:]
    assert part.labels.tolist() == whole.labels[3:9].tolist()
    assert part.block_sizes.tolist() == [2, 4]
    assert contents_of(pickle.loads(pickle.dumps(part))) == contents_of(whole)[3:9]  # noqa: S301
    assert len({source.fingerprint for source in (whole, part, single)}) == 3


def test_what_a_worker_is_given_does_not_grow_with_the_images(tmp_path, config):
    sizes = []
    for count in (2, 200):
        folder = write_tars(tmp_path / str(count), [count])
        write_index(folder)
        sizes.append(len(pickle.dumps(open_source(str(folder), config, 3))))
    assert sizes[1] - sizes[0] < 50


def test_an_index_that_is_replaced_while_it_is_in_use_is_noticed(tmp_path, config):
    folder = write_tars(tmp_path / "shards", [3])
    write_index(folder)
    sent = pickle.dumps(open_source(str(folder), config, 3))
    write_tars(folder, [4])
    write_index(folder)
    with pytest.raises(DataError, match="was replaced"):
        pickle.loads(sent)  # noqa: S301


def test_an_index_is_the_same_whenever_and_from_wherever_it_is_made(tmp_path, config):
    folder = write_tars(tmp_path / "shards", [3, 2])
    seen = []
    with serving(folder) as server:
        remote = build_index(f"{server.url}/s-{{0000..0001}}.tar", config, lambda *done: seen.append(done))
        listed = build_index(f"{server.url}/", config)
    local = write_index(folder)
    assert remote.fingerprint == local.fingerprint == listed.fingerprint == open_index(folder / INDEX_NAME).fingerprint
    assert seen == [("s-0000.tar", 0, 2), ("s-0001.tar", 1, 2), ("", 2, 2)]
    assert cached(tmp_path) == []


def test_members_that_cannot_be_used_are_reported_from_the_index(tmp_path, config):
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "a.tar").write_bytes(tar_of(["1.png", "../2.png", "3.png"]))
    write_index(folder, max_bad_share=1.0)
    source = open_source(str(folder), config, 3)
    assert names_of(source) == ["a.tar/1.png", "a.tar/3.png"]
    assert "leads out" in source.skipped[0].reason
    with pytest.raises(DataError, match="1 of 3 images"):
        open_source(str(folder), DataConfig(), 3)


def test_images_of_more_bytes_than_allowed_are_bad(tmp_path):
    folder = write_tars(tmp_path / "shards", [2])
    write_index(folder)
    source = open_source(str(folder), DataConfig(max_bytes=10), 3)
    with pytest.raises(BadImage, match=r"data\.max_bytes"):
        source.load(1)


def test_a_local_shard_that_vanishes_makes_its_images_bad(tmp_path):
    folder = write_tars(tmp_path / "shards", [2, 2])
    write_index(folder)
    source = open_source(str(folder), LENIENT, 3)
    (folder / "s-0000.tar").unlink()
    assert source.load(2).size
    with pytest.raises(BadImage, match="No such file"):
        source.load(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "s-0001.tar").write_bytes(b"1"), r"s-0001\.tar has 1 bytes.*poa data index"),
        (lambda folder: (folder / "s-0001.tar").unlink(), r"s-0001\.tar, which the index names, cannot be read"),
        (lambda folder: (folder / "t.tar").write_bytes(tar_of(["1.png"])), r"does not have 1 of the shards, t\.tar"),
        (lambda folder: (folder / INDEX_NAME).write_bytes(b"no index"), "no index of shards, or a damaged one"),
    ],
)
def test_a_folder_that_its_index_does_not_fit_is_refused_before_work(tmp_path, change, message):
    folder = write_tars(tmp_path / "shards", [2, 2])
    write_index(folder)
    change(folder)
    with pytest.raises(DataError, match=message):
        open_source(str(folder), LENIENT, 3)


def test_shards_without_an_index_are_refused_with_the_command_that_makes_one(tmp_path, config):
    folder = write_tars(tmp_path / "shards", [1])
    with serving(folder) as server, pytest.raises(DataError, match=r"poa data index 'http.*' --out poa-index"):
        open_source(f"{server.url}/s-0000.tar", config, 3)
    with pytest.raises(DataError, match=r"poa data index .*--out poa-index"):
        open_source(f"{folder}/p-{{0..3}}.parquet", config, 3)


def test_a_folder_that_is_none_is_refused_although_there_is_an_index(tmp_path, config):
    write_index(write_tars(tmp_path / "shards", [1]))
    named = dataclasses.replace(config, index=str(tmp_path / "shards" / INDEX_NAME))
    for spec in ("digits", str(tmp_path / "nothing")):
        with pytest.raises(DataError, match="is no folder of shards"):
            open_source(spec, named, 3)


def test_a_missing_shard_is_told_when_it_is_read(tmp_path, config):
    folder = write_tars(tmp_path / "shards", [1, 1])
    write_index(folder)
    (folder / "s-0001.tar").unlink()
    with serving(folder) as server:
        source = open_source(f"{server.url}/s-{{0000..0001}}.tar", config, 3)
        assert source.load(0).size
        with pytest.raises(DataError, match=r"there is no http.*s-0001\.tar"):
            source.load(1)


def test_a_shard_that_does_not_fit_the_cache_is_refused_before_work(tmp_path, config):
    folder = write_tars(tmp_path / "shards", [1])
    write_index(folder)
    small = dataclasses.replace(config, cache_gb=1e-6)
    with serving(folder) as server, pytest.raises(DataError, match=r"the largest shard .*--data\.cache-gb"):
        open_source(f"{server.url}/s-0000.tar", small, 3)


def test_the_column_is_the_indexs_and_another_one_is_refused(tmp_path, config):
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "p.parquet").write_bytes(parquet_of(3))
    write_index(folder)
    with pytest.raises(DataError, match=r"of the column 'image', and data\.image_column is 'photo'"):
        open_source(str(folder), dataclasses.replace(config, image_column="photo"), 3)


@pytest.mark.parametrize(
    "spec",
    [
        "https://user:secret@host/s-{0..1}.tar",
        "https://secret@host/s.tar",
        "s3://key:secret@bucket/s.tar",
        "https://host/s-{0..1}.tar?X-Amz-Signature=secret",
        "https://host/s.tar?token=secret",
        "https://host/s.tar#secret",
    ],
)
def test_urls_with_secrets_are_refused_without_repeating_them(spec):
    with pytest.raises(DataError, match="access is granted by") as caught:
        open_source(spec, DataConfig(), 3)
    assert "secret" not in str(caught.value).replace("no secret", "")
    assert "secret" not in redacted(spec.replace("#", "?"))
    with pytest.raises(DataError, match="access is granted by"):
        open_source("shards.tar", DataConfig(index=spec), 3)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("http://host/s-{9..1}.tar", "Give the smaller number first"),
        ("http://host/s-{0..9999999}.tar", "at most 1,000,000"),
        ("simplecache::s3://bucket/s.tar", "several URLs in one|is not a folder|there is no"),
        ("s3://bucket/s.tar::zip://x", "several URLs in one"),
        ("nosuch://host/s.tar", "Protocol not known"),
        ("http://host/{0..1}/../s.tar", "A shard's name is a path below its folder"),
    ],
)
def test_urls_that_cannot_be_are_refused(spec, message, config):
    with pytest.raises(DataError, match=message):
        open_source(spec, config, 3)


@pytest.mark.parametrize(
    ("spec", "base", "names"),
    [
        ("https://host/a/s-{08..10}.tar", "https://host/a", ("s-08.tar", "s-09.tar", "s-10.tar")),
        ("s3://bucket/part-{0..1}/x.parquet", "s3://bucket", ("part-0/x.parquet", "part-1/x.parquet")),
        ("gs://bucket/folder/", "gs://bucket/folder", ()),
        ("file:///data/my%20shards/s.tar", "/data/my shards", ("s.tar",)),
        ("shards/s.tar", "shards", ("s.tar",)),
        ("s.tar", "", ("s.tar",)),
    ],
)
def test_specs_are_taken_apart(spec, base, names):
    found = locate(spec)
    assert (found.base, found.names) == (base, names)


def test_mixed_and_empty_folders_have_no_index(tmp_path):
    with pytest.raises(DataError, match="there are no"):
        build_index(str(tmp_path), DataConfig())
    (tmp_path / "a.tar").write_bytes(tar_of(["notes.txt"]))
    with pytest.raises(DataError, match="no images found in the 1 shards"):
        build_index(str(tmp_path), DataConfig())
    (tmp_path / "b.parquet").write_bytes(parquet_of(1))
    with pytest.raises(DataError, match="of one kind at a time"):
        build_index(str(tmp_path), DataConfig())


@pytest.fixture(scope="module")
def index_file(tmp_path_factory):
    folder = write_tars(tmp_path_factory.mktemp("index"), [3, 0, 2])
    write_index(folder)
    return folder / INDEX_NAME


def changed(index_file, tmp_path, arrays=None, **header):
    """A copy of the index with other arrays, or other values in its JSON object."""
    content = index_file.read_bytes()
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    value = {**json.loads(metadata["poa-index"]), **header}
    path = tmp_path / "changed.safetensors"
    save_file({**load_file(index_file), **(arrays or {})}, path, {"poa-index": json.dumps(value)})
    return path


def test_what_is_written_is_read(index_file, tmp_path):
    assert open_index(changed(index_file, tmp_path)).fingerprint == open_index(index_file).fingerprint


HOSTILE_ARRAYS = {
    "starts fall": {"starts": np.array([0, 4, 3, 5])},
    "too few starts": {"starts": np.array([0, 5])},
    "starts beyond": {"starts": np.array([0, 3, 3, 6])},
    "negative offset": {"offsets": np.array([512, -1, 1536, 512, 1536])},
    "offset beyond": {"offsets": np.array([512, 10**9, 1536, 512, 1536])},
    "overflowing": {"offsets": np.full(5, 2**63 - 1), "sizes": np.full(5, 2**63 - 1)},
    "no size": {"sizes": np.array([1, 1, 0, 1, 1])},
    "sizes of another length": {"sizes": np.array([1, 1])},
    "names beyond": {"name_ends": np.array([1, 2, 3, 4, 10**6])},
    "names fall": {"name_ends": np.array([2**62, -(2**62), 3, 4, 65])},
    "labels beyond": {"labels": np.array([0, 1, 2, 0, 1])},
    "labels negative": {"labels": np.array([0, 1, -1, 0, 1])},
    "other type": {"sizes": np.ones(5, np.int32)},
    "other shape": {"sizes": np.ones((5, 1), np.int64)},
    "more arrays": {"more": np.ones(5, np.int64)},
    "skipped is no JSON": {"skipped": np.frombuffer(b"{{{", np.uint8)},
    "skipped is no pair": {"skipped": np.frombuffer(b'["one"]\n', np.uint8)},
}


@pytest.mark.parametrize("name", HOSTILE_ARRAYS)
def test_hostile_arrays_are_refused(index_file, tmp_path, name):
    with pytest.raises(DataError, match="no index of shards, or a damaged one"):
        open_index(changed(index_file, tmp_path, HOSTILE_ARRAYS[name]))


def shards_with(**values):
    shard = {"name": "a.tar", "num_bytes": 10240, "sha256": "0" * 64, "num_stored": 10240}
    return [{**shard, **values}, {**shard, "name": "b.tar"}, {**shard, "name": "c.tar"}]


@pytest.mark.parametrize(
    "header",
    [
        {"version": 2},
        {"format": "other"},
        {"kind": "zip"},
        {"column": "image"},
        {"num_images": 6},
        {"class_names": [1]},
        {"class_names": "two"},
        {"shards": {}},
        {"shards": []},
        {"shards": shards_with(name="../a.tar")},
        {"shards": shards_with(name="/a.tar")},
        {"shards": shards_with(name="a//b.tar")},
        {"shards": shards_with(name="x\n.tar")},
        {"shards": shards_with(name="b.tar")},
        {"shards": shards_with(name=3)},
        {"shards": shards_with(sha256="../../etc/passwd")},
        {"shards": shards_with(num_bytes=-1)},
        {"shards": shards_with(num_bytes=True)},
        {"shards": shards_with(num_stored=2**70)},
        {"shards": shards_with(more=1)},
    ],
)
def test_hostile_headers_are_refused(index_file, tmp_path, header):
    with pytest.raises(DataError):
        open_index(changed(index_file, tmp_path, **header))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_index_is_an_error_or_an_index(index_file, tmp_path_factory, data):
    content = bytearray(index_file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        index = open_index(path)
    except DataError:
        return
    assert [index.name(place) for place in range(len(index))]


@pytest.mark.parametrize("name", ["max_bytes", "cache_gb", "window", "lanes", "downloads", "stall_seconds"])
def test_options_out_of_range_are_refused(name):
    with pytest.raises(ConfigError, match=rf"data\.{name}"):
        DataConfig(**{name: 0})


def test_pictures_of_the_server_differ():
    assert encoded(picture(8, 9), "PNG") != encoded(picture(9, 9), "PNG")
