"""Checking every image of a source, and converting sources into shards."""

import hashlib
import io
import json
import tarfile
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from poa.config import DataConfig
from poa.data import open_source
from poa.data.shards import INDEX_NAME, ShardSource, build_index, open_index
from poa.data.tools import CheckOptions, ShardOptions, check_images, plot_sizes, verify_shards, write_shards
from poa.data.tools import convert as converting
from poa.data.tools.ahead import Ahead
from poa.data.tools.copied import FlatCopy
from poa.errors import CheckpointError, DataError
from tests.hostile_images import encoded, make_hostile_folder, picture

CONFIG = DataConfig()
LENIENT = DataConfig(max_bad_share=1.0)
SMALL = ShardOptions(shard_mb=1)
NUM_IMAGES, NUM_CLASSES = 60, 2


def noise(seed, side=96):
    """An image that hardly compresses: some 27 kB as PNG."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """1.7 MB of images in two first-level folders, the classes one after the other."""
    root = tmp_path_factory.mktemp("photos")
    for index in range(NUM_IMAGES):
        path = root / ("cat", "dog")[index * NUM_CLASSES // NUM_IMAGES] / f"{index:02d}.x.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(noise(index), "PNG"))
    return root


@pytest.fixture(scope="module")
def parquet(folder, tmp_path_factory):
    """The same images in Parquet, in several row groups."""
    source = opened(folder)
    table = pa.table({"image": [source.encoded(index) for index in range(NUM_IMAGES)], "label": source.labels})
    path = tmp_path_factory.mktemp("parquet") / "all.parquet"
    pq.write_table(table, path, row_group_size=7)
    return path


def opened(path, config=CONFIG):
    return open_source(str(path), config, 3, in_order=True)


def convert(source, out, options=SMALL, config=CONFIG, **more):
    return write_shards(source if hasattr(source, "encoded") else opened(source), out, options, config=config, **more)


def digests(folder):
    """The SHA-256 of every file, hidden ones included."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory):
    """The folder as tar shards."""
    out = tmp_path_factory.mktemp("shards") / "tar"
    return out, convert(folder, out)


def members(path):
    """What a plain tar reader finds, by name."""
    with tarfile.open(path) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


def origins(out):
    """By the image's name in the shards its name in the source."""
    lines = (out / "origins.jsonl").read_text().splitlines()
    return {found["image"]: found["origin"] for found in map(json.loads, lines)}


class Interrupting:
    """Raises KeyboardInterrupt when that many images are done."""

    def __init__(self, what, limit):
        self.what, self.limit = what, limit

    def __call__(self, what, done, _):
        if what == self.what and done >= self.limit:
            raise KeyboardInterrupt


class TestEncoded:
    def test_image_files_come_out_of_every_source_with_their_bytes_unchanged(self, folder, parquet, tmp_path):
        with tarfile.open(tmp_path / "all.tar", "w") as archive:
            archive.add(folder, ".")
        contents = [(folder / name).read_bytes() for name in sorted(p.relative_to(folder) for p in folder.glob("*/*"))]
        for source in (opened(folder), opened(parquet), opened(tmp_path / "all.tar")):
            found = [source.encoded(index) for index in range(NUM_IMAGES)]
            assert sorted(found) == sorted(contents)
            with pytest.raises(IndexError):
                source.encoded(NUM_IMAGES)

    def test_an_image_without_a_file_comes_as_png_of_its_own_channels(self):
        source = opened("digits")
        with Image.open(io.BytesIO(source.encoded(3))) as image:
            assert (image.format, image.mode) == ("PNG", "L")
            assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(source.load(3)))


class TestShards:
    def test_a_plain_tar_reader_finds_every_image_once_with_its_bytes_and_its_class(self, written, folder):
        out, found = written
        contents = {f"{file.name}/{name}": data for file in found.files for name, data in members(file).items()}
        assert len(found.files) == 2
        assert found.num_images == NUM_IMAGES == len(origins(out))
        assert len(contents) == 2 * NUM_IMAGES
        assert len(set(origins(out).values())) == NUM_IMAGES
        for name, origin in origins(out).items():
            assert contents[name] == (folder / origin).read_bytes()
            assert contents[name.replace(".png", ".cls")] == (b"0" if origin.startswith("cat") else b"1")

    def test_members_follow_webdataset_and_tell_nothing_of_the_machine(self, written):
        _, found = written
        for file in found.files:
            with tarfile.open(file) as archive:
                for image, label in zip(*[iter(archive)] * 2, strict=True):
                    assert image.name.count(".") == 1
                    assert label.name == image.name.replace(".png", ".cls")
                    assert (image.mtime, image.uid, image.gid, image.uname, image.gname) == (0, 0, 0, "", "")

    def test_images_of_sorted_classes_become_shards_that_are_fair_samples(self, written):
        for file in written[1].files:
            classes = Counter(data for name, data in members(file).items() if name.endswith(".cls"))
            assert sum(classes.values()) == NUM_IMAGES // 2
            assert min(classes.values()) >= 8

    def test_the_index_has_images_labels_and_names_of_classes(self, written, folder):
        out, _ = written
        source, before = opened(out), opened(folder)
        place = {before.image_name(index): index for index in range(NUM_IMAGES)}
        assert isinstance(source, ShardSource)
        assert source.class_names == ("cat", "dog")
        for index in range(NUM_IMAGES):
            there = place[origins(out)[source.image_name(index)]]
            assert source.encoded(index) == before.encoded(there)
            assert source.labels[index] == before.labels[there]

    def test_shards_are_the_same_to_the_last_bit_for_any_number_of_workers(self, written, folder, tmp_path):
        convert(folder, tmp_path / "again", num_workers=2)
        assert digests(tmp_path / "again") == digests(written[0])

    def test_parquet_is_as_the_datasets_library_reads_it(self, folder, tmp_path):
        found = convert(folder, tmp_path / "out", replace(SMALL, format="parquet"))
        table = pa.concat_tables([pq.read_table(file) for file in found.files])
        features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
        assert len(found.files) == 2
        assert features == {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
        for row in table.to_pylist():
            assert row["image"]["bytes"] == (folder / row["image"]["path"]).read_bytes()
            assert row["label"] == row["image"]["path"].startswith("dog")
        assert list(origins(tmp_path / "out").values()) == [row["image"]["path"] for row in table.to_pylist()]
        source = opened(tmp_path / "out", DataConfig(cache_dir=str(tmp_path / "cache")))
        assert [origins(tmp_path / "out")[source.image_name(i)] for i in range(3)] == [
            row["image"]["path"] for row in table.slice(0, 3).to_pylist()
        ]

    def test_parquet_becomes_the_same_shards_as_the_folder(self, parquet, written, tmp_path):
        found = convert(parquet, tmp_path / "out")
        assert [digests(tmp_path / "out")[file.name] for file in found.files] == [
            digests(written[0])[file.name] for file in written[1].files
        ]

    def test_without_shuffling_the_order_is_that_of_the_source(self, folder, tmp_path):
        convert(folder, tmp_path / "out", replace(SMALL, shuffle=False))
        source = opened(folder)
        assert list(origins(tmp_path / "out").values()) == [source.image_name(index) for index in range(NUM_IMAGES)]

    def test_another_seed_is_another_order(self, folder, written, tmp_path):
        convert(folder, tmp_path / "out", replace(SMALL, seed=1))
        assert list(origins(tmp_path / "out").values()) != list(origins(written[0]).values())

    def test_of_a_hostile_folder_valid_images_are_written_and_all_others_listed(self, tmp_path):
        (tmp_path / "folder").mkdir()
        valid, bad = make_hostile_folder(tmp_path / "folder")
        found = convert(opened(tmp_path / "folder", LENIENT), tmp_path / "out", config=LENIENT)
        listed = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
        assert {entry["name"] for entry in listed} == bad
        assert len(listed) == len(bad) == len(found.skipped)
        assert found.num_images == len(valid) == len(opened(tmp_path / "out"))
        assert check_images(opened(tmp_path / "out"), config=LENIENT).num_unreadable == 0

    def test_too_many_unreadable_images_stop_it(self, folder, tmp_path):
        source = opened(folder)
        source.encoded = lambda index: b"no image" if index < 5 else (folder / source.image_name(index)).read_bytes()
        with pytest.raises(DataError, match=r"(?s)[2-5] of 60 images cannot be used.*listed in .*skipped.jsonl"):
            convert(source, tmp_path / "out")
        assert 2 <= len((tmp_path / "out" / "skipped.jsonl").read_text().splitlines()) <= 5

    def test_no_readable_image_is_an_error(self, tmp_path):
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "a.png").write_bytes(b"no image")
        with pytest.raises(DataError, match="nothing is left"):
            convert(opened(tmp_path / "folder", LENIENT), tmp_path / "out", config=LENIENT)


class TestGoingOn:
    @pytest.mark.parametrize("num_done", [16, 48])
    def test_an_interrupted_conversion_ends_as_one_that_was_not(self, num_done, folder, tmp_path):
        convert(folder, tmp_path / "whole")
        with pytest.raises(KeyboardInterrupt):
            convert(folder, tmp_path / "out", on_progress=Interrupting("images", num_done))
        shards = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard-*.tar")}
        assert len(shards) == num_done // 30
        assert not list((tmp_path / "out").glob(".shard-*"))
        (tmp_path / "out" / ".shard-00001.tar.left").write_bytes(b"by a process that was killed")
        convert(folder, tmp_path / "out")
        assert digests(tmp_path / "out") == digests(tmp_path / "whole")
        assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in shards} == shards

    def test_images_left_out_before_an_interruption_are_listed_in_the_end(self, folder, tmp_path):
        source = opened(folder)
        source.encoded = lambda index: b"" if index == bad else (folder / source.image_name(index)).read_bytes()
        bad = -1
        convert(source, tmp_path / "whole")
        bad = next(
            index
            for index in range(NUM_IMAGES)
            if source.image_name(index) == origins(tmp_path / "whole")["shard-00000.tar/000007.png"]
        )
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out", config=LENIENT, on_progress=Interrupting("images", 48))
        found = convert(source, tmp_path / "out", config=LENIENT)
        assert [name for name, _ in found.skipped] == [source.image_name(bad)]
        assert found.num_images == NUM_IMAGES - 1

    def test_a_complete_conversion_is_not_done_again(self, folder, tmp_path):
        first = convert(folder, tmp_path / "out")
        before = digests(tmp_path / "out")
        again = convert(folder, tmp_path / "out", on_progress=Interrupting("images", 0))
        assert again == replace(first, was_there=True)
        assert digests(tmp_path / "out") == before

    @pytest.mark.parametrize(
        ("options", "what"),
        [
            ({"format": "parquet"}, "format tar; now it would be parquet"),
            ({"shard_mb": 2}, "shard_mb 1; now it would be 2"),
            ({"seed": 3}, "seed 0; now it would be 3"),
            ({"shuffle": False}, "shuffle True; now it would be False"),
        ],
    )
    def test_other_options_are_refused_by_name(self, options, what, folder, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            convert(folder, tmp_path / "out", on_progress=Interrupting("images", 16))
        with pytest.raises(CheckpointError, match=what):
            convert(folder, tmp_path / "out", replace(SMALL, **options))

    def test_other_images_and_other_folders_are_refused(self, folder, tmp_path):
        convert(folder, tmp_path / "out")
        with pytest.raises(CheckpointError, match="of other images"):
            convert("digits", tmp_path / "out")
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("")
        with pytest.raises(CheckpointError, match="not from `poa data shard`"):
            convert(folder, tmp_path / "mine")

    def test_a_shard_that_went_missing_is_told(self, folder, tmp_path):
        found = convert(folder, tmp_path / "out")
        found.files[1].unlink()
        with pytest.raises(CheckpointError, match=r"shard-00001.tar is gone"):
            convert(folder, tmp_path / "out")

    def test_one_that_was_killed_before_it_had_said_what_it_does_is_begun_anew(self, folder, tmp_path):
        (tmp_path / "out" / ".parts").mkdir(parents=True)
        (tmp_path / "out" / ".poa-shards.json.left").write_text("{")
        assert convert(folder, tmp_path / "out").num_images == NUM_IMAGES

    def test_a_second_process_is_refused(self, folder, tmp_path):
        def again(what, done, total):
            with pytest.raises(CheckpointError, match="another process is writing"):
                convert(folder, tmp_path / "out")

        convert(folder, tmp_path / "out", on_progress=again)

    def test_a_disk_that_is_too_small_is_told_before_anything_is_written(self, folder, tmp_path, monkeypatch):
        monkeypatch.setattr(converting.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
        with pytest.raises(CheckpointError, match=r"need about 0.0 GB; the disk of .* has 0.0 GB left"):
            convert(folder, tmp_path / "out")
        assert not list((tmp_path / "out").glob("shard-*"))

    def test_an_interrupted_copy_of_parquet_goes_on_where_it_was_flushed(self, parquet, tmp_path, monkeypatch):
        monkeypatch.setattr("poa.data.tools.copied._FLUSH_BYTES", 200_000)
        source, read = opened(parquet), []

        def stop(done, total):
            if done >= 20:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            FlatCopy(source, tmp_path, stop)
        with (tmp_path / "images.bin").open("ab") as file:
            file.write(b"torn")
        original = source.encoded
        source.encoded = lambda index: read.append(index) or original(index)
        copy = FlatCopy(source, tmp_path)
        assert 20 <= read[0] < 30
        assert read == list(range(read[0], NUM_IMAGES))
        assert [copy.encoded(index) for index in range(NUM_IMAGES)] == [original(index) for index in range(NUM_IMAGES)]


class TestAhead:
    @pytest.fixture
    def source(self, folder, tmp_path):
        """Seven shards that are read through a cache with room for all."""
        table = pa.table({"image": [(folder / "cat" / "00.x.png").read_bytes() + bytes([row]) for row in range(7)]})
        for row in range(7):
            pq.write_table(table.slice(row, 1), tmp_path / f"{row}.parquet")
        build_index(str(tmp_path), CONFIG).save(tmp_path / INDEX_NAME)
        return opened(tmp_path, DataConfig(cache_dir=str(tmp_path / "cache"), downloads=2))

    def fetched(self, source, count):
        """Which shards the cache has, once there are so many."""
        while True:
            found = [source.cache.touch(shard) for shard in source.shards_of(np.arange(7))]
            if sum(found) >= count:
                return [number for number, is_there in enumerate(found) if is_there]
            time.sleep(0.01)

    def test_the_next_shards_are_fetched_while_one_is_read(self, source):
        with Ahead(source) as ahead:
            ahead.reached(0)
            assert self.fetched(source, 3) == [0, 1, 2]
            ahead.reached(0)
            ahead.reached(3)
            assert self.fetched(source, 6) == [0, 1, 2, 3, 4, 5]
            ahead.reached(6)
            assert self.fetched(source, 7) == list(range(7))

    def test_nothing_is_fetched_that_the_cache_has_no_room_for(self, source):
        largest = max(shard.space for shard in source.shards_of(np.arange(7)))
        source.cache.limit = 3 * largest
        with Ahead(source) as ahead:
            ahead.reached(0)
            assert self.fetched(source, 2) == [0, 1]

    def test_images_are_the_same_with_it(self, source):
        found = check_images(source, config=CONFIG)
        assert (found.num_unreadable, found.duplicates.num_surplus) == (0, 6)
        assert self.fetched(source, 7) == list(range(7))


class TestCheck:
    @pytest.fixture
    def mixed(self, tmp_path):
        """Faults of every kind."""
        for name, image, kind in (
            ("cat/a.png", picture(40, 20), "PNG"),
            ("cat/b.bmp", picture(40, 20), "BMP"),
            ("dog/c.png", picture(40, 20), "PNG"),
            ("dog/d.png", picture(30, 30).convert("L"), "PNG"),
            ("dog/e.jpg", picture(8, 16), "JPEG"),
        ):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(encoded(image, kind))
        (tmp_path / "dog" / "f.png").write_bytes(encoded(picture(), "PNG")[:60])
        (tmp_path / "dog" / "g.png").write_bytes(b"")
        return tmp_path

    def check(self, path, *, num_workers=0, **options):
        return check_images(opened(path, LENIENT), CheckOptions(**options), config=LENIENT, num_workers=num_workers)

    def test_every_fault_is_found_counted_and_named(self, mixed):
        found = self.check(mixed, min_side=10)
        assert found.num_images == 7
        assert {name for name, _ in found.unreadable} == {"dog/f.png", "dog/g.png"}
        assert found.duplicates.groups == (("cat/a.png", "cat/b.bmp", "dog/c.png"),)
        assert (found.duplicates.num_groups, found.duplicates.num_surplus) == (1, 2)
        assert found.duplicates.num_contradictions == 1
        assert (found.num_small, found.small) == (1, ("dog/e.jpg",))
        assert found.formats == {"PNG": 3, "BMP": 1, "JPEG": 1}
        assert found.modes == {"RGB": 4, "L": 1}
        assert len(found.problems()) == 3

    def test_sizes_are_those_of_upright_images(self, mixed):
        exif = Image.Exif()
        exif[0x0112] = 6
        (mixed / "cat" / "turned.jpg").write_bytes(encoded(picture(50, 11), "JPEG", exif=exif))
        found = self.check(mixed).as_json()
        assert found["width"] == {"min": 8, "median": 35.0, "max": 40}
        assert found["height"] == {"min": 16, "median": 20.0, "max": 50}
        assert found["short_side"] == {"min": 8, "median": 20.0, "max": 30}
        assert found["aspect_ratio"] == {"min": 0.22, "median": 1.5, "max": 2.0}

    def test_findings_are_the_same_for_any_number_of_workers(self, mixed):
        assert self.check(mixed, num_workers=2).as_json() == self.check(mixed).as_json()

    def test_shares_say_what_is_accepted(self, mixed):
        assert len(self.check(mixed).problems()) == 2
        assert self.check(mixed, max_bad_share=2 / 7, max_duplicate_share=2 / 7).problems() == []
        assert len(self.check(mixed, max_bad_share=0.28, max_duplicate_share=0.28).problems()) == 2

    def test_what_is_listed_is_bounded_what_is_counted_is_not(self, mixed):
        found = self.check(mixed, num_listed=1, min_side=25)
        assert (len(found.unreadable), found.num_unreadable) == (1, 2)
        assert (len(found.small), found.num_small) == (1, 4)
        assert [len(group) for group in found.duplicates.groups] == [1]

    def test_a_source_without_a_readable_image_has_no_sizes(self, tmp_path):
        (tmp_path / "a.png").write_bytes(b"no image")
        found = self.check(tmp_path)
        assert found.as_json()["width"] is None
        assert found.formats == {}
        assert len(found.problems()) == 1

    def test_classes_with_huge_numbers_are_counted(self, tmp_path):
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            for key, label in enumerate((10**17, 3, 3)):
                for ending, content in (("png", encoded(picture(9 + key), "PNG")), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{key}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        assert self.check(tmp_path / "a.tar").class_sizes.tolist() == [2, 1]

    def test_the_picture_is_one(self, mixed, tmp_path):
        plot_sizes(self.check(mixed, min_side=10), tmp_path / "sizes.png")
        with Image.open(tmp_path / "sizes.png") as image:
            assert image.format == "PNG"


class TestVerify:
    @pytest.fixture(params=["tar", "parquet"])
    def shards(self, request, folder, tmp_path):
        convert(folder, tmp_path / "shards", ShardOptions(format=request.param, shard_mb=1))
        return tmp_path / "shards"

    def faults(self, folder):
        found = verify_shards(str(folder), CONFIG)
        assert found.num_shards == 2
        return [fault.name for fault in found.faults], {fault.reason for fault in found.faults}

    def test_sound_shards_have_no_fault(self, shards):
        assert self.faults(shards) == ([], set())

    def test_a_flipped_bit_is_found(self, shards):
        path = sorted(shards.glob("shard-00001.*"))[0]
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        names, reasons = self.faults(shards)
        assert names == [path.name]
        assert "SHA-256" in reasons.pop()

    def test_a_shard_cut_short_and_one_that_is_gone_are_found(self, shards):
        first, second = sorted(shards.glob("shard-*"))
        first.write_bytes(first.read_bytes()[:-1])
        second.unlink()
        names, reasons = self.faults(shards)
        assert names == [first.name, second.name]
        assert len(reasons) == 2

    @pytest.mark.parametrize(("array", "what"), [("labels", "other labels"), ("offsets", "other places")])
    def test_an_index_of_other_places_or_labels_is_found(self, array, what, shards):
        index = open_index(shards / INDEX_NAME)
        changed = getattr(index, array).copy()
        changed[-1] = 1 - changed[-1] if array == "labels" else changed[-2]
        replace(index, **{array: changed}).save(shards / INDEX_NAME)
        names, reasons = self.faults(shards)
        assert [name.partition(".")[0] for name in names] == ["shard-00001"]
        assert what in reasons.pop()

    def test_some_of_the_shards_can_be_looked_at(self, shards):
        path = sorted(shards.glob("shard-00001.*"))[0]
        found = verify_shards(str(path), CONFIG)
        assert (found.num_shards, found.faults) == (1, ())

    def test_remote_shards_are_left_to_the_fetching(self):
        assert verify_shards("https://example.org/shard-{00000..00001}.tar", CONFIG) is None
