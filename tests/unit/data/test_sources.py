import json
import os
import pickle

import numpy as np
import pytest

from poa.config import DataConfig
from poa.data import BadImage, open_source, parquet
from poa.data.digits import NUM_TRAIN
from poa.errors import ConfigError, DataError
from tests.hostile_images import encoded, make_hostile_folder, picture, valid_files

LENIENT = DataConfig(max_bad_share=1.0)
PNG = encoded(picture(), "PNG")


def fill(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(PNG)


def names_of(source):
    return [source.image_name(index) for index in range(len(source))]


def test_of_a_hostile_folder_valid_images_load_and_all_others_are_reported(tmp_path):
    valid, bad = make_hostile_folder(tmp_path)
    assert len(valid) + len(bad) >= 50
    source = open_source(str(tmp_path), LENIENT, 3)
    loaded, reported = set(), dict(source.skipped)
    for index in range(len(source)):
        try:
            assert source.load(index).mode == "RGB"
            loaded.add(source.image_name(index))
        except BadImage as error:
            reported[source.image_name(index)] = error.reason
    escaped = {"new\nline.png": "new\\nline.png", os.fsdecode(b"not-utf8-\xff\xfe.png"): "not-utf8-\\udcff\\udcfe.png"}
    assert loaded == {escaped.get(name, name) for name in valid}
    assert set(reported) == bad
    assert all(reason.isprintable() and len(reason) > 5 for reason in reported.values())


def test_the_order_does_not_depend_on_the_order_of_creation(tmp_path):
    names = ["b/2.png", "a.png", "b/10.png", "B/1.png", "c/d/e.png"]
    fill(tmp_path / "one", *names)
    fill(tmp_path / "two", *reversed(names))
    one, two = (open_source(str(tmp_path / name), LENIENT, 3) for name in ("one", "two"))
    assert names_of(one) == names_of(two) == sorted(names)
    assert one.fingerprint == two.fingerprint


def test_labels_are_first_level_folders_when_every_image_lies_in_one_of_two(tmp_path):
    fill(tmp_path, "cat/1.png", "dog/deep/2.png", "cat/3.png")
    source = open_source(str(tmp_path), LENIENT, 3, require_labels=True)
    assert source.class_names == ("cat", "dog")
    assert source.labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize("names", [("cat/1.png",), ("cat/1.png", "dog/2.png", "3.png"), ("1.png", "2.png")])
def test_other_layouts_have_no_labels_and_say_so_when_they_are_needed(tmp_path, names):
    fill(tmp_path, *names)
    assert open_source(str(tmp_path), LENIENT, 3).labels is None
    with pytest.raises(DataError, match="first-level folders"):
        open_source(str(tmp_path), LENIENT, 3, require_labels=True)


def test_linked_folders_are_walked_once_and_real_ones_keep_their_names(tmp_path):
    fill(tmp_path / "data", "real/1.png")
    fill(tmp_path / "elsewhere", "2.png")
    (tmp_path / "data" / "alias").symlink_to("real", target_is_directory=True)
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data", target_is_directory=True)
    source = open_source(str(tmp_path / "data"), LENIENT, 3)
    assert names_of(source) == ["more/2.png", "real/1.png"]
    assert source.skipped == ()


def test_too_many_unusable_entries_stop_the_listing(tmp_path):
    fill(tmp_path, *(f"{index}.png" for index in range(9)))
    (tmp_path / "empty.png").touch()
    assert len(open_source(str(tmp_path), DataConfig(max_bad_share=0.1), 3)) == 9
    with pytest.raises(DataError, match=r"1 of 10 images.*--data\.max-bad-share") as caught:
        open_source(str(tmp_path), DataConfig(max_bad_share=0.09), 3)
    assert "empty.png: is empty" in str(caught.value)


def test_specs_that_name_no_source_are_refused_with_a_hint(tmp_path):
    fill(tmp_path / "images", "1.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("a")
    (tmp_path / "images.zip").write_bytes(b"PK")
    cases = {
        "": "no source of images was given",
        str(tmp_path / "imagse"): "did you mean '.*/images'",
        "digitss": "did you mean 'digits'",
        str(tmp_path / "images" / "1.png"): "single image",
        str(tmp_path / "images.zip"): "kind that is not read",
        str(tmp_path / "empty"): "0 files were seen",
        str(tmp_path / "notes"): "1 files were seen.*jpg, jpeg",
        "nul\0byte": "cannot be a path|there is no",
    }
    for spec, message in cases.items():
        with pytest.raises(DataError, match=message):
            open_source(spec, LENIENT, 3)


def test_a_folder_of_only_unusable_files_lists_them(tmp_path):
    (tmp_path / "empty.png").touch()
    with pytest.raises(DataError, match=r"no images found(.|\n)*empty\.png: is empty"):
        open_source(str(tmp_path), LENIENT, 3)


@pytest.mark.parametrize("spec", ["digits", "folder"])
def test_other_numbers_of_channels_are_refused_when_opening(tmp_path, spec):
    fill(tmp_path, "1.png")
    with pytest.raises(ConfigError, match="num_channels"):
        open_source("digits" if spec == "digits" else str(tmp_path), LENIENT, 5)


def test_the_digits_are_divided_once_and_for_all():
    train, test = (open_source(f"digits:{split}", LENIENT, 1) for split in ("train", "test"))
    assert (len(train), len(test)) == (NUM_TRAIN, 360) == (1437, 360)
    assert not set(names_of(train)) & set(names_of(test))
    assert open_source("digits", LENIENT, 1).fingerprint == train.fingerprint != test.fingerprint
    assert train.class_names == tuple("0123456789")
    assert np.asarray(train.load(0)).shape == (8, 8)
    assert max(np.asarray(train.load(index)).max() for index in range(20)) == 255
    assert np.bincount(test.labels).min() > 20


# Parquet


def write_parquet(path, cells, labels=None, metadata=None, struct=True):
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()}) if struct else pa.binary()
    values = [None if cell is None else {"bytes": cell, "path": "x"} for cell in cells] if struct else cells
    columns = {"image": pa.array(values, kind)}
    if labels is not None:
        columns["label"] = pa.array(labels)
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=2)


def hugging_face(names):
    return {"huggingface": json.dumps({"info": {"features": {"label": {"names": names}}}})}


@pytest.mark.parametrize("struct", [True, False])
def test_parquet_reads_bytes_and_structs(tmp_path, struct):
    cells = [valid_files()[name] for name in ("plain.bmp", "cmyk.jpg", "sixteen-bit.png")]
    write_parquet(tmp_path / "a.parquet", cells, [2, 0, 1], hugging_face(["x", "y", "z"]), struct=struct)
    source = open_source(str(tmp_path / "a.parquet"), LENIENT, 3, require_labels=True)
    assert source.labels.tolist() == [2, 0, 1]
    assert source.class_names == ("x", "y", "z")
    assert [source.load(index).size for index in range(3)] == [(32, 32)] * 3


def test_a_folder_of_parquet_files_is_one_source_in_order_of_name(tmp_path):
    write_parquet(tmp_path / "b.parquet", [PNG] * 3, [1, 1, 1])
    write_parquet(tmp_path / "a.parquet", [PNG] * 2, [0, 0])
    source = open_source(str(tmp_path), LENIENT, 3)
    assert names_of(source) == [*(f"a.parquet:{row}" for row in range(2)), *(f"b.parquet:{row}" for row in range(3))]
    assert source.labels.tolist() == [0, 0, 1, 1, 1]
    assert source.class_names is None


def test_parquet_rows_without_an_image_are_skipped_by_name(tmp_path):
    write_parquet(tmp_path / "a.parquet", [PNG, None, PNG, b""], [5, 6, 7, 8])
    source = open_source(str(tmp_path / "a.parquet"), LENIENT, 3)
    assert [skipped.name for skipped in source.skipped] == ["a.parquet:1", "a.parquet:3"]
    assert names_of(source) == ["a.parquet:0", "a.parquet:2"]
    assert source.labels.tolist() == [5, 7]


@pytest.mark.parametrize("labels", [None, [0, None], [-1, 3]])
def test_parquet_with_missing_labels_has_none(tmp_path, labels):
    write_parquet(tmp_path / "a.parquet", [PNG, PNG], labels)
    assert open_source(str(tmp_path / "a.parquet"), LENIENT, 3).labels is None


def test_parquet_mistakes_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, [PNG], ["cat"])
    with pytest.raises(DataError, match=r"labels must be integers.*--data\.label-column"):
        open_source(str(path), LENIENT, 3)
    with pytest.raises(DataError, match=r"no column 'img'; its columns are image, label"):
        open_source(str(path), DataConfig(image_column="img"), 3)
    with pytest.raises(DataError, match="holds string; images must be bytes"):
        open_source(str(path), DataConfig(image_column="label", label_column="none"), 3)
    write_parquet(path, [PNG], [7], hugging_face(["a"]))
    with pytest.raises(DataError, match="labels up to 7 but names only 1"):
        open_source(str(path), LENIENT, 3)
    write_parquet(path, [], [])
    with pytest.raises(DataError, match="no images found"):
        open_source(str(path), LENIENT, 3)
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        open_source(str(path), LENIENT, 3)


def test_unreadable_metadata_leave_the_class_names_out(tmp_path):
    write_parquet(tmp_path / "a.parquet", [PNG], [0], {"huggingface": "{broken"})
    source = open_source(str(tmp_path / "a.parquet"), LENIENT, 3)
    assert source.class_names is None
    assert source.labels.tolist() == [0]


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    import sys

    write_parquet(tmp_path / "a.parquet", [PNG])
    monkeypatch.setitem(sys.modules, "pyarrow.compute", None)
    with pytest.raises(DataError, match=r'pip install "poa\[parquet\]"'):
        open_source(str(tmp_path / "a.parquet"), LENIENT, 3)


def test_parquet_read_in_order_is_the_same_source_with_one_row_group_in_memory(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = [*(encoded(picture(10 + index), "PNG") + bytes(1000) for index in range(7)), None, b"no image"]
    for number in range(2):
        table = pa.table({"image": pa.array(cells, pa.binary()), "label": list(range(9))})
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=4)
    whole, ordered = (open_source(str(tmp_path), LENIENT, 3, in_order=in_order) for in_order in (False, True))
    assert type(ordered) is not type(whole)
    assert names_of(ordered) == names_of(whole)
    assert ordered.skipped == whole.skipped
    assert ordered.labels.tolist() == whole.labels.tolist()
    assert ordered.fingerprint == whole.fingerprint
    reads = []
    monkeypatch.setattr(parquet, "_read", lambda *what, read=parquet._read: reads.append(what) or read(*what))
    readable = [index for index in range(len(whole)) if not whole.image_name(index).endswith(":8")]
    assert all(ordered.load(index).tobytes() == whole.load(index).tobytes() for index in readable)
    assert [(file.name, group) for file, _, group in reads] == [(f"{n}.parquet", g) for n in (0, 1) for g in (0, 1)]
    assert len(pickle.dumps(ordered)) < 2000
    assert len(pickle.dumps(whole)) > 14_000
