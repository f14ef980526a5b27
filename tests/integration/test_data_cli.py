"""`poa data` through its command line, with images made on the spot."""

import functools
import http.server
import json
import threading

import numpy as np
import pytest
from PIL import Image

from poa.cli.main import main
from poa.config import DataConfig
from poa.data import open_source
from poa.data.shards import INDEX_NAME, open_index
from tests.hostile_images import encoded, picture

NUM_IMAGES = 24


@pytest.fixture
def photos(tmp_path):
    """Images of three classes, all different."""
    folder = tmp_path / "photos"
    for index in range(NUM_IMAGES):
        path = folder / f"class-{index % 3}" / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(20 + index, 30), "PNG"))
    return folder


@pytest.fixture
def served(tmp_path):
    """The URL of a server of `tmp_path`."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def data(*arguments):
    return main(["data", *map(str, arguments)])


def shard(photos, out, *more):
    return data("shard", photos, "--out", out, "--num-workers", 0, *more)


def check(images, *more):
    return data("check", images, "--num-workers", 0, *more)


class TestShardAndCheck:
    @pytest.mark.parametrize("kind", ["tar", "parquet"])
    def test_converted_images_are_all_there_and_pass_the_check(self, kind, photos, tmp_path, capsys):
        out, cache = tmp_path / "shards", ("--cache-dir", tmp_path / "cache")
        assert shard(photos, out, "--format", kind) == 0
        said = capsys.readouterr().out
        assert f"24 images in 1 shard, {(out / f'shard-00000.{kind}').stat().st_size / 1000:.1f} kB" in said
        assert f"poa pretrain --data {out}" in said
        assert check(out, "--json", tmp_path / "found.json", "--plot", tmp_path / "sizes.png", *cache) == 0
        found = json.loads((tmp_path / "found.json").read_text())
        assert found["num_images"] == NUM_IMAGES
        assert found["problems"] == []
        assert found["shards"] == {"count": 1, "faults": []}
        assert found["classes"] == {"count": 3, "images": {"min": 8, "median": 8.0, "max": 8}}
        assert Image.open(tmp_path / "sizes.png").format == "PNG"
        source = open_source(str(out), DataConfig(cache_dir=str(tmp_path / "cache")), 3)
        assert source.class_names == ("class-0", "class-1", "class-2")
        assert np.bincount(source.labels).tolist() == [8, 8, 8]

    def test_the_same_command_again_says_that_all_is_there(self, photos, tmp_path, capsys):
        for _ in range(2):
            assert shard(photos, tmp_path / "shards") == 0
        assert "complete already: 24 images" in capsys.readouterr().out

    def test_images_left_out_are_told(self, photos, tmp_path, capsys):
        (photos / "class-0" / "empty.png").touch()
        (photos / "class-0" / "broken.png").write_bytes(b"no image")
        assert shard(photos, tmp_path / "shards") == 1
        assert "or raise --max-bad-share to 0.039" in capsys.readouterr().err
        assert shard(photos, tmp_path / "shards", "--max-bad-share", 0.08) == 0
        told = capsys.readouterr()
        assert "24 images in" in told.out
        assert "left out: class-0/broken.png: is not an image" in told.err

    def test_an_interrupted_conversion_says_how_it_goes_on(self, photos, tmp_path, capsys, monkeypatch):
        def interrupt(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr("poa.cli.data.shard.write_shards", interrupt)
        assert shard(photos, tmp_path / "shards") == 130
        assert "the same command goes on" in capsys.readouterr().err

    def test_what_is_wrong_is_told_and_ends_in_one(self, photos, tmp_path, capsys):
        (photos / "class-0" / "copy.png").write_bytes((photos / "class-1" / "01.png").read_bytes())
        (photos / "class-0" / "broken.png").write_bytes(b"no image")
        assert check(photos, "--min-side", 22, "--json", tmp_path / "found.json") == 1
        told = capsys.readouterr()
        assert told.err.count("wrong: ") == 3
        assert "class-0/copy.png = class-1/01.png" in told.out
        assert len(json.loads((tmp_path / "found.json").read_text())["problems"]) == 3
        assert check(photos, "--max-bad-share", 0.04, "--max-duplicate-share", 0.04) == 0

    def test_the_smallest_side_is_that_of_the_recipe(self, photos, capsys):
        assert check(photos, "--recipe", "digits") == 0
        assert check(photos, "--recipe", "cifar") == 1
        assert "fewer than 32 pixels: 24 of 24" in capsys.readouterr().err
        assert check(photos, "--recipe", "digits", "--min-side", 3) == 1
        assert "not both" in capsys.readouterr().err

    def test_a_damaged_shard_is_named(self, photos, tmp_path, capsys):
        shard(photos, tmp_path / "shards")
        path = tmp_path / "shards" / "shard-00000.tar"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        assert check(tmp_path / "shards") == 1
        told = capsys.readouterr()
        assert "shard-00000.tar has another SHA-256" in told.out
        assert "shards that are not as their index says: 1 of 1" in told.err

    def test_where_nothing_can_be_written_is_told_before_the_images_are_read(self, tmp_path, capsys):
        assert check(tmp_path / "gone", "--json", tmp_path) == 1
        assert "is a directory" in capsys.readouterr().err


class TestIndex:
    def test_local_shards_have_it_beside_them_as_when_they_were_converted(self, photos, tmp_path, capsys):
        shard(photos, tmp_path / "shards")
        path = tmp_path / "shards" / INDEX_NAME
        before = open_index(path)
        path.unlink()
        assert data("index", tmp_path / "shards") == 0
        assert f"24 images in 1 shard, {before.shards[0].num_bytes / 1000:.1f} kB" in capsys.readouterr().out
        assert open_index(path).shards == before.shards
        assert np.array_equal(open_index(path).labels, before.labels)
        assert open_index(path).class_names == ("class-0", "class-1", "class-2")

    def test_remote_shards_need_a_place_for_it_and_can_be_checked_and_converted(self, photos, served, tmp_path, capsys):
        shard(photos, tmp_path / "shards")
        (tmp_path / "shards" / INDEX_NAME).unlink()
        url, cache = f"{served}/shards/shard-{{00000..00000}}.tar", ("--cache-dir", tmp_path / "cache")
        assert data("index", url, *cache) == 1
        assert "--out" in capsys.readouterr().err
        assert data("index", url, "--out", tmp_path / "mine.safetensors", *cache) == 0
        again = ("--index", tmp_path / "mine.safetensors", *cache)
        assert check(url, *again) == 0
        assert shard(url, tmp_path / "again", *again) == 0
        assert len(open_source(str(tmp_path / "again"), DataConfig(), 3)) == NUM_IMAGES

    def test_a_command_that_there_is_not_is_told_with_those_that_there_are(self, capsys):
        assert data("shrad") == 1
        assert "Did you mean `poa data shard`?" in capsys.readouterr().err
        assert data("--help") == 0
        assert "usage: poa data" in capsys.readouterr().out
