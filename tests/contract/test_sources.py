"""What every registered source of images must do."""

import io
import pickle
import tarfile
from dataclasses import replace

import numpy as np
import pytest

from poa.config import DataConfig
from poa.data import SOURCES, BadImage, open_source
from tests.hostile_images import encoded, picture
from tests.shard_server import parquet_of, serving, write_index, write_tars

CONFIG = DataConfig(max_bad_share=1.0)
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def contents(count, shift=0):
    return [encoded(picture(10 + index + shift, 12), "PNG") for index in range(count)]


def make_digits(root, changed):
    return "digits:test" if changed else "digits"


def make_folder(root, changed):
    for index, content in enumerate(contents(4, shift=changed)):
        path = root / f"class {index % 2}" / f"line\nbreak {index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (root / "class 0" / "empty.png").touch()
    return str(root)


def make_parquet(root, changed):
    import pyarrow as pa
    import pyarrow.parquet as pq

    root.mkdir(parents=True, exist_ok=True)
    cells = [*contents(4, shift=changed), None, b"no image"]
    table = pa.table({"image": pa.array(cells, pa.binary()), "label": [0, 1, 2, 0, 1, 2]})
    pq.write_table(table, root / "line\nbreak.parquet", row_group_size=3)
    return str(root)


def make_tar(root, changed):
    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / "line\nbreak.tar", "w") as archive:
        for index, content in enumerate([*contents(4, shift=changed), b""]):
            member = tarfile.TarInfo(f"class {index % 2}/line\nbreak {index}.png")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(root)


def make_tar_shards(root, changed):
    write_tars(root, [3, 0, 2], modified=int(changed))
    write_index(root)
    return str(root)


def make_parquet_shards(root, changed):
    root.mkdir(parents=True, exist_ok=True)
    (root / "a.parquet").write_bytes(parquet_of(4, shift=changed))
    write_index(root)
    return f"file://{root}/a.parquet"


MAKERS = {
    "digits": make_digits,
    "folder": make_folder,
    "parquet": make_parquet,
    "tar": make_tar,
    "shards of tar": make_tar_shards,
    "shards of parquet": make_parquet_shards,
    "shards of tar by http": make_tar_shards,
    "shards of parquet by http": make_parquet_shards,
}


@pytest.fixture(params=MAKERS)
def spec_maker(request, tmp_path, monkeypatch):
    """Makes a source of one kind and gives the spec of it; those "by http" are behind a web server."""
    monkeypatch.setattr("tests.contract.test_sources.CONFIG", replace(CONFIG, cache_dir=str(tmp_path / "cache")))
    with serving(tmp_path) as server:

        def make(name="source", changed=False):
            spec = MAKERS[request.param](tmp_path / name, changed)
            if not request.param.endswith("by http"):
                return spec
            last = "" if spec.startswith("/") else "/a.parquet"
            return f"{server.url}/{name}{last}"

        yield make


def test_every_kind_of_source_is_held_to_this():
    assert {name.partition(" ")[0] for name in MAKERS} == set(SOURCES)


@pytest.fixture
def source(spec_maker):
    return open_source(spec_maker(), CONFIG, 3)


def load_or_reason(source, index):
    try:
        return source.load(index).tobytes()
    except BadImage as error:
        return error.reason


def test_every_source_is_opened_by_its_own_kind(spec_maker):
    spec = spec_maker()
    source = open_source(spec, CONFIG, 3)
    assert next(kind for kind in SOURCES.values() if kind.accepts(spec)) is type(source)
    assert source.spec == spec


@pytest.mark.parametrize("num_channels", MODES)
def test_images_have_the_mode_asked_for(spec_maker, num_channels):
    source = open_source(spec_maker(), CONFIG, num_channels)
    assert len(source) >= 4
    for index in range(4):
        assert source.load(index).mode == MODES[num_channels]


def test_names_are_unique_and_print_on_one_line(source):
    names = [source.image_name(index) for index in range(len(source))]
    names += [name for name, _ in source.skipped]
    assert len(set(names)) == len(names)
    assert all(name and name.isprintable() for name in names)
    assert all(reason.isprintable() for _, reason in source.skipped)


def test_labels_cover_every_image_and_lie_within_the_classes(source):
    assert source.labels is not None
    assert source.labels.shape == (len(source),)
    assert source.labels.dtype == np.int64
    assert source.labels.min() >= 0
    if source.class_names is not None:
        assert source.labels.max() < len(source.class_names)
        assert all(isinstance(name, str) for name in source.class_names)


def test_order_images_and_fingerprint_are_the_same_each_time(spec_maker):
    one, two = open_source(spec_maker(), CONFIG, 3), open_source(spec_maker(), CONFIG, 3)
    assert [one.image_name(i) for i in range(len(one))] == [two.image_name(i) for i in range(len(two))]
    assert [load_or_reason(one, i) for i in range(4)] == [load_or_reason(two, i) for i in range(4)]
    assert one.fingerprint == two.fingerprint
    assert len(one.fingerprint) == 64
    assert set(one.fingerprint) <= set("0123456789abcdef")


def test_the_fingerprint_changes_with_the_images(spec_maker):
    one = open_source(spec_maker("one"), CONFIG, 3)
    other = open_source(spec_maker("other", changed=True), CONFIG, 3)
    assert one.fingerprint != other.fingerprint


def test_a_pickled_source_is_the_same_source(source):
    copy = pickle.loads(pickle.dumps(source))  # noqa: S301
    assert len(copy) == len(source)
    assert copy.fingerprint == source.fingerprint
    assert copy.skipped == source.skipped
    assert load_or_reason(copy, len(copy) - 1) == load_or_reason(source, len(source) - 1)


@pytest.mark.parametrize("beyond", [-1, 0, 1000])
def test_indices_out_of_range_are_index_errors(source, beyond):
    index = beyond if beyond < 0 else len(source) + beyond
    with pytest.raises(IndexError):
        source.load(index)
    with pytest.raises(IndexError):
        source.image_name(index)


def test_numpy_integers_are_indices(source):
    index = np.int64(1)
    assert source.load(index).tobytes() == source.load(1).tobytes()
    assert source.image_name(index) == source.image_name(1)
