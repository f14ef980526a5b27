"""`poa evaluate segment` through its command line, on an untrained family and drawn images."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from poa.backbones import ARCHITECTURES
from poa.cli.main import main
from poa.family import Family, FamilyCard, Preprocessing
from tests.contract.configs import SMALLEST

QUICK = ("--segment.image-size", "32", "48", "--fit.epochs", "2", "--fit.batch-size", "3", "--fit.warmup-epochs", "0")
QUICK += ("--device", "cpu", "--num-workers", "0")
COLOURS = np.array([(200, 40, 40), (40, 200, 40), (40, 40, 200)], dtype=np.uint8)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    config, kind = replace(SMALLEST["vit"], num_channels=3), ARCHITECTURES["vit"]
    backbone = kind.build(config)
    backbone.init_weights_(torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("segment") / "family"
    Family(FamilyCard(kind, config, Preprocessing(config.image_size, 3, (0.5,), (0.25,))), backbone).save(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 3)):
        for kind in ("images", "masks"):
            (tmp_path / part / kind).mkdir(parents=True)
        for number in range(count):
            mask = np.kron(rng.integers(0, 3, (4, 6)), np.ones((8, 8), dtype=int)).astype(np.uint8)
            Image.fromarray(COLOURS[mask]).save(tmp_path / part / "images" / f"{number}.png")
            Image.fromarray(mask).save(tmp_path / part / "masks" / f"{number}.png")
    (tmp_path / "classes.json").write_text(json.dumps({"names": ["red", "green", "blue"]}))
    return tmp_path


def command(family, data, *options):
    paths = ("--train", data / "train", "--test", data / "test", "--out", data / "out")
    return [str(part) for part in ("evaluate", "segment", family, *paths, *QUICK, *options)]


def test_every_sub_network_is_trained_once_and_stands_in_table_and_pictures(family, data, capsys):
    assert main(command(family, data, "--subnets", "smallest", "--untrained", "--num-shown", "2")) == 0
    assert main(command(family, data, "--subnets", "smallest", "intact", "--num-shown", "2")) == 0
    assert "1 results were there already" in capsys.readouterr().out
    out = data / "out"
    found = json.loads((out / "results.json").read_text())
    assert [each["network"] for each in found["results"]] == ["w16-d1", "w32-d2"]
    assert found["classes"] == ["red", "green", "blue"]
    assert (found["num_train"], found["num_test"]) == (6, 3)
    assert {"miou", "pixel_accuracy", "iou/red", "iou/green", "iou/blue"} == set(found["results"][0]["figures"])
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert [float(row["segment-linear/miou"]) for row in rows] == [each["figures"]["miou"] for each in found["results"]]
    assert len(list((out / "networks").iterdir())) == 3
    for name in ("predictions.png", "miou.png"):
        assert (out / name).stat().st_size > 10_000


def test_upernet_is_trained_with_its_network(family, data, capsys):
    options = ("--head", "upernet", "--segment.channels", "8", "--subnets", "smallest", "--val", str(data / "test"))
    assert main(command(family, data, *options)) == 0
    assert "upernet head, 6 training and 3 test images" in " ".join(capsys.readouterr().out.split())


MISTAKES = {
    "no masks": (("--train", "EMPTY"), "there is no folder"),
    "head of a patch that does not fit": (("--segment.image-size", "33", "48"), "multiples of its patches"),
    "classes of another set": (("--classes", "FEW"), "which no class has"),
    "nothing shown": (("--num-shown", "0"), "--num-shown must be 1 or more"),
    "out is a file": (("--out", "FEW"), "is a file. Name a directory"),
    "numbers out of range": (("--segment.flip-prob", "2"), "segment.flip_prob"),
}


@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_mistakes_are_told_before_anything_is_trained(family, data, mistake, capsys):
    options, text = MISTAKES[mistake]
    (data / "few.json").write_text(json.dumps({"names": ["red"]}))
    (data / "empty").mkdir()
    places = {"EMPTY": str(data / "empty"), "FEW": str(data / "few.json")}
    assert main(command(family, data, *(places.get(part, part) for part in options))) == 1
    assert text in " ".join(capsys.readouterr().err.split())
    assert not (data / "out" / "networks").exists()
