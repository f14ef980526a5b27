"""`poa embed` through its command line, with an untrained family on the digits."""

import io
import json
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from poa.backbones import architecture
from poa.cli.main import main
from poa.config import DataConfig, load_recipe
from poa.data import eval_transform, normalize, open_source
from poa.embed import read_vectors, run
from poa.embed.parts import METADATA_KEY, Columns
from poa.errors import DataError
from poa.family import Family, FamilyCard
from poa.models import FamilyMember, open_models
from poa.randomness import generator
from poa.train.monitor import preprocessing_of

NUM_IMAGES = 40


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As under torchrun: how a sum is cut between threads changes its last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    config = load_recipe("digits")
    kind = architecture(config.model)
    backbone = kind.build(config.model)
    backbone.init_weights_(torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("embed") / "family"
    Family(FamilyCard(kind, config.model, preprocessing_of(config)), backbone).save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The same images, in the same order, in a folder, in shards and in Parquet."""
    root, digits = tmp_path_factory.mktemp("images"), open_source("digits:test", DataConfig(), 1)
    names, contents, labels = [], [], []
    for index in range(NUM_IMAGES):
        stream = io.BytesIO()
        digits.load(index).save(stream, "PNG")
        names.append(f"{index // 10}/{index:02d}.png")
        contents.append(stream.getvalue())
        labels.append(index // 10)
        (root / "folder" / names[-1]).parent.mkdir(parents=True, exist_ok=True)
        (root / "folder" / names[-1]).write_bytes(contents[-1])
    (root / "tar").mkdir()
    for shard, numbers in enumerate((range(25), range(25, NUM_IMAGES))):
        with tarfile.open(root / "tar" / f"{shard}.tar", "w") as archive:
            for number in numbers:
                member = tarfile.TarInfo(names[number])
                member.size = len(contents[number])
                archive.addfile(member, io.BytesIO(contents[number]))
    pq.write_table(pa.table({"image": contents, "label": labels}), root / "all.parquet", row_group_size=7)
    return {"folder": root / "folder", "tar": root / "tar", "parquet": root / "all.parquet"}


def embed(*arguments):
    return main(["embed", *map(str, arguments), "--device", "cpu"])


def options(out, *more, subnet="w48-d2", num_workers=0):
    return ("--out", out, "--subnet", subnet, "--num-workers", num_workers, "--batch-size", 8, *more)


@pytest.fixture(scope="module")
def reference(family, images, tmp_path_factory):
    """Of the folder, without interruption."""
    out = tmp_path_factory.mktemp("reference") / "vectors.parquet"
    assert embed(family, images["folder"], *options(out, "--part-size", 10)) == 0
    return out


def test_vectors_equal_those_of_the_family_member(family, images, tmp_path):
    assert embed(family, images["folder"], *options(tmp_path / "v.parquet", "--batch-size", NUM_IMAGES)) == 0
    names, labels, vectors = read_vectors(tmp_path / "v.parquet")
    member = open_models([family], ["w48-d2"])[0]
    assert isinstance(member, FamilyMember)
    source, how = open_source(str(images["folder"]), DataConfig(), 1), member.preprocessing
    pixels = [
        eval_transform(source.load(i), how.image_size, how.crop_pct, how.interpolation) for i in range(len(source))
    ]
    with torch.inference_mode():
        expected = member.features(normalize(torch.from_numpy(np.stack(pixels)), how.mean, how.std)).cls
    assert np.array_equal(vectors, expected.numpy())
    assert names == [source.image_name(index) for index in range(len(source))]
    assert labels.tolist() == source.labels.tolist()


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_folder_tar_and_parquet_give_the_same_vectors_bit_for_bit(kind, family, images, reference, tmp_path):
    assert embed(family, images[kind], *options(tmp_path / "v.parquet", "--part-size", 10)) == 0
    names, labels, vectors = read_vectors(tmp_path / "v.parquet")
    assert np.array_equal(vectors, read_vectors(reference)[2])
    assert np.array_equal(labels, read_vectors(reference)[1])
    assert names[26] == {"tar": "1.tar/2/26.png", "parquet": "all.parquet:26"}[kind]


def test_the_number_of_workers_changes_nothing(family, images, reference, tmp_path):
    out = tmp_path / "v.parquet"
    assert embed(family, images["folder"], *options(out, "--part-size", 10, num_workers=2)) == 0
    assert out.read_bytes() == reference.read_bytes()


def test_the_schema_says_what_the_vectors_are_of(family, images, reference):
    schema, rows = pq.read_schema(reference), pq.ParquetFile(reference)
    assert schema.names == ["image_name", "label", "vector"]
    assert schema.field("vector").type == pa.list_(pa.float32(), 48)
    assert rows.num_row_groups == 4
    described = json.loads(schema.metadata[METADATA_KEY])
    member = open_models([family], ["w48-d2"])[0]
    assert described["fingerprint"] == member.fingerprint
    assert described["preprocessing"]["image_size"] == member.preprocessing.image_size
    assert described["images_fingerprint"] == open_source(str(images["folder"]), DataConfig(), 1).fingerprint
    assert described["class_names"] == ["0", "1", "2", "3"]
    assert described["num_skipped"] == 0


def test_processes_share_the_parts_and_the_last_puts_them_together(
    family, images, reference, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "v.parquet"
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (2, 0):
        monkeypatch.setenv("RANK", str(rank))
        assert embed(family, images["folder"], *options(out, "--part-size", 10)) == 0
    assert "Process 0 of 3 is done; 1 parts are missing, 1 the first" in capsys.readouterr().out
    assert not out.exists()
    monkeypatch.setenv("RANK", "1")
    assert embed(family, images["folder"], *options(out, "--part-size", 10)) == 0
    assert out.read_bytes() == reference.read_bytes()
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.slow
def test_two_processes_under_torchrun_write_the_same_file(family, images, reference, tmp_path):
    out = tmp_path / "v.parquet"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "poa.cli.main", "embed", family, images["folder"], *options(out, "--part-size", 10)]
    done = subprocess.run(
        [*torchrun, *map(str, command), "--device", "cpu"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert np.array_equal(read_vectors(out)[2], read_vectors(reference)[2])
    assert list(tmp_path.iterdir()) == [out]


def started(command):
    """A process that runs it with one thread: torch's own threads do not survive a fork."""

    def work():
        torch.set_num_threads(1)
        os._exit(embed(*command))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def test_a_run_killed_at_any_moment_goes_on_to_the_same_file(family, tmp_path):
    command = [family, "digits:test", *options(tmp_path / "v.parquet", "--part-size", 4)]
    parts, total = tmp_path / "v.parquet.parts", 90
    draw = generator(0, "kills")
    for wanted in np.sort(draw.choice(np.arange(1, total - 10), 5, replace=False)).tolist():
        process = started(command)
        deadline = time.monotonic() + 60
        while len(list(parts.glob("part-*"))) < wanted and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(float(draw.uniform(0, 0.003)))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert wanted <= len(list(parts.glob("part-*"))) < total
    whole = tmp_path / "whole.parquet"
    for each in (command, [family, "digits:test", *options(whole, "--part-size", 4)]):
        process = started(each)
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "v.parquet").read_bytes() == whole.read_bytes()
    assert not parts.exists()


def test_a_run_killed_while_the_parts_are_put_together_reads_no_image_again(
    family, images, reference, tmp_path, monkeypatch
):
    out = tmp_path / "v.parquet"

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run, "read_part", killed)
        assert embed(family, images["folder"], *options(out, "--part-size", 10)) == 130
    assert not out.exists()
    monkeypatch.setattr("poa.data.folder.FolderSource.load", None)
    assert embed(family, images["folder"], *options(out, "--part-size", 10)) == 0
    assert out.read_bytes() == reference.read_bytes()


def test_a_complete_file_is_left_alone_and_other_vectors_do_not_replace_it(family, images, reference, capsys):
    before = reference.stat().st_mtime_ns
    assert embed(family, images["folder"], *options(reference, "--part-size", 10)) == 0
    assert "complete already: 40 vectors of 48 numbers" in capsys.readouterr().out
    for change, said in (
        ({"subnet": "w80-d4"}, "its network is w48-d2, now it would be w80-d4"),
        ({"more": ("--dtype", "float16")}, "options"),
    ):
        arguments = options(
            reference, "--part-size", 10, *change.get("more", ()), subnet=change.get("subnet", "w48-d2")
        )
        assert embed(family, images["folder"], *arguments) == 1
        assert said in capsys.readouterr().err
    assert reference.stat().st_mtime_ns == before


def test_parts_of_other_vectors_are_not_mixed_in(family, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert embed(family, images["folder"], *options(tmp_path / "v.parquet", "--part-size", 10)) == 0
    monkeypatch.setenv("RANK", "1")
    assert embed(family, images["tar"], *options(tmp_path / "v.parquet", "--part-size", 10)) == 1
    assert "images_fingerprint" in capsys.readouterr().err


def test_a_directory_keeps_the_parts(family, images, reference, tmp_path, capsys):
    arguments = (family, images["folder"], *options(tmp_path / "parts", "--part-size", 10))
    assert embed(*arguments) == 0
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == [f"part-{n:05d}.parquet" for n in range(4)]
    assert np.array_equal(read_vectors(tmp_path / "parts")[2], read_vectors(reference)[2])
    (tmp_path / "parts" / "part-00002.parquet").write_bytes(b"damaged")
    assert embed(*arguments) == 1
    assert "part-00002.parquet cannot be read as Parquet" in capsys.readouterr().err
    (tmp_path / "parts" / "part-00002.parquet").unlink()
    assert embed(*arguments) == 0
    assert np.array_equal(read_vectors(tmp_path / "parts")[2], read_vectors(reference)[2])
    (tmp_path / "parts" / "thesis.txt").touch()
    assert embed(*arguments) == 1
    assert "holds other files, thesis.txt" in capsys.readouterr().err


def test_bad_images_are_left_out_listed_and_refused_above_their_share(family, images, tmp_path, capsys):
    out, source = tmp_path / "v.parquet", tmp_path / "images"
    for index in range(20):
        (source / f"{index % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), index).save(source / f"{index % 2}" / f"{index:02d}.png")
    (source / "0" / "08.png").write_bytes(b"no image")
    (source / "1" / "empty.png").touch()
    arguments = (family, source, *options(out, "--part-size", 5))
    assert embed(*arguments) == 1
    assert "max-bad-share" in capsys.readouterr().err
    assert embed(*arguments, "--max-bad-share", "0.05") == 1
    assert "2 of 21 images cannot be used" in capsys.readouterr().err
    assert not out.exists()
    assert embed(*arguments, "--max-bad-share", "0.1") == 0
    assert "left out: 0/08.png: is not an image" in capsys.readouterr().err
    names, labels, vectors = read_vectors(out)
    assert len(names) == len(labels) == len(vectors) == 19
    assert [int(name[0]) for name in names] == labels.tolist()
    listed = [json.loads(line) for line in (tmp_path / "v.skipped.jsonl").read_text().splitlines()]
    assert {each["name"] for each in listed} == {"0/08.png", "1/empty.png"}
    assert json.loads(pq.read_schema(out).metadata[METADATA_KEY])["num_skipped"] == 2
    assert embed(*arguments, "--max-bad-share", "0.1") == 0
    assert "left out: 0/08.png" in capsys.readouterr().err
    assert embed(*arguments, "--max-bad-share", "0.05") == 1


def test_half_precision_is_the_rounded_vectors(family, images, reference, tmp_path):
    out = tmp_path / "v.parquet"
    assert embed(family, images["folder"], *options(out, "--part-size", 10, "--dtype", "float16")) == 0
    assert pq.read_schema(out).field("vector").type == pa.list_(pa.float16(), 48)
    assert np.array_equal(read_vectors(out)[2], read_vectors(reference)[2].astype(np.float16))


def test_bfloat16_products_are_near_and_only_where_asked_for(family, images, reference, tmp_path):
    out = tmp_path / "v.parquet"
    assert embed(family, images["folder"], *options(out, "--part-size", 10, "--precision", "bfloat16")) == 0
    found, exact = read_vectors(out)[2], read_vectors(reference)[2]
    assert 0 < np.linalg.norm(found - exact) < 0.05 * np.linalg.norm(exact)


@pytest.mark.parametrize(("value", "said"), [(1e6, "use --dtype float32"), (np.nan, "is not finite")])
def test_vectors_that_would_not_be_finite_are_refused_with_the_images_name(value, said):
    source = open_source("digits:test", DataConfig(), 1)
    vectors = np.array([[1.0, 2.0], [1.0, value]], np.float32)
    with pytest.raises(DataError, match=f"{source.image_name(7)} .*{said}"):
        Columns(2, "float16", has_labels=True).table(source, [3, 7], vectors)


def test_an_extracted_directory_gives_the_vectors_of_its_sub_network(family, images, reference, tmp_path):
    assert main(["extract", family, "w48-d2", "--out", str(tmp_path / "net")]) == 0
    out = tmp_path / "v.parquet"
    assert embed(tmp_path / "net", images["folder"], "--out", out, "--num-workers", 0) == 0
    np.testing.assert_allclose(read_vectors(out)[2], read_vectors(reference)[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "Say which of its sub-networks by --subnet"),
        (("--subnet", "all"), "'all' names 9"),
        (("--subnet", "w48-d2", "--part-size", "0"), "part_size must be 1 or more"),
    ],
)
def test_mistakes_are_told_before_work_starts(more, said, family, images, tmp_path, capsys):
    assert embed(family, images["folder"], "--out", tmp_path / "v.parquet", *more) == 1
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_does_not_exist_is_refused(family, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    assert embed(family, images["folder"], *options(tmp_path / "v.parquet")) == 1
    assert "RANK must be 0 to 0; got 3" in capsys.readouterr().err


def test_a_file_that_is_not_ours_is_not_replaced(family, images, tmp_path, capsys):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "v.parquet")
    assert embed(family, images["folder"], *options(tmp_path / "v.parquet")) == 1
    assert "not from `poa embed`" in capsys.readouterr().err
    with pytest.raises(DataError, match="no vectors"):
        read_vectors(tmp_path / "v.parquet")


def test_the_similarity_example_finds_images_that_look_alike(family, tmp_path, monkeypatch, capsys):
    """Even of an untrained family, the nearest digits show what the query shows more often than by chance."""
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "similarity_search.py"))
    features, picture, source = (
        tmp_path / "v.parquet",
        tmp_path / "alike.png",
        open_source("digits:test", DataConfig(), 1),
    )
    source.load(5).save(tmp_path / "query.png")
    queries = ["5", str(tmp_path / "query.png"), *map(str, range(20, 28))]
    command = ["similarity_search", str(features), "digits:test", "--model", family, "--subnet", "w80-d4"]
    monkeypatch.setattr("sys.argv", [*command, "--queries", *queries, "--picture", str(picture)])
    assert example["main"]() == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if ": digit-" in line]
    assert [line.count("digit-") for line in lines] == [9, 8, *[9] * 8]
    row, _, near = lines[0].partition(": ")
    assert row == source.image_name(5)
    assert row not in near
    assert lines[1].split(": ")[1].startswith(f"{row} (1.000), ")
    label = {source.image_name(index): int(source.labels[index]) for index in range(len(source))}
    hits = [
        label[name] == label[found]
        for line in lines[2:]
        for name, *rest in [re.findall(r"digit-\d+", line)]
        for found in rest
    ]
    assert np.mean(hits) > 0.3
    assert Image.open(picture).size[0] > 500
