"""`poa evaluate detect` through its command line, on an untrained family over images of squares."""

import csv
import json
import sys

import pytest

from poa.cli.main import main
from tests.coco_images import coco_entry, edited, member_of, squares

ON = ("--device", "cpu", "--num-workers", "0")
NETWORKS = ("--subnets", "w16-d1", "w32-d2", *ON)
SMALLEST = ("--subnets", "w16-d1", *ON)
SMALL = (
    *("--detect.image-size", "48", "64", "--detect.anchor-scale", "3", "--detect.channels", "16"),
    *("--detect.head-channels", "32", "--detect.mask-channels", "8", "--detect.num-proposals", "30"),
    *("--detect.regions-per-image", "16", "--detect.score-threshold", "0", "--detect.max-detections", "5"),
    *(
        "--fit.epochs",
        "2",
        "--fit.batch-size",
        "4",
        "--fit.evaluate-every",
        "1",
        "--shown-score",
        "0",
        "--num-shown",
        "1",
    ),
)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detect") / "family"
    member_of("vit").family.save(folder)
    return str(folder)


@pytest.fixture
def images(tmp_path):
    return {name: squares(tmp_path / name, count=4, seed=seed) for seed, name in enumerate(("train", "test", "val"))}


def called(family, images, out, *more, networks=NETWORKS):
    files = [part for name, file in images.items() for part in (f"--{name}", str(file))]
    return main(["evaluate", "detect", family, *networks, *files, "--out", str(out), *SMALL, *more])


def test_every_network_gets_a_detector_a_row_and_a_column_of_the_picture(family, images, tmp_path, capsys):
    out = tmp_path / "out"
    method = ("--detect.method", "cascade-rcnn", "--detect.masks")
    assert called(family, images, out, *method, "--untrained", networks=SMALLEST) == 0
    printed = capsys.readouterr().out
    assert "4 images with" in printed
    assert "w16-d1 untrained" in printed
    names = ["w16-d1", "w16-d1 untrained"]
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert [row["network"] for row in rows] == names
    found = json.loads((out / "results.json").read_text())
    assert [float(row["detect/mask AP50"]) for row in rows] == [
        result["figures"]["mask AP50"] for result in found["results"]
    ]
    assert found["options"]["detect"]["method"] == "cascade-rcnn"
    assert found["data"]["val"]["num_images"] == 4
    for name in names:
        training = found["training"][name]
        assert [line["epoch"] for line in training["history"]] == [1.0, 2.0]
        assert {path.name for path in (out / training["folder"]).iterdir()} == {"detector", "curves.png"}
    assert all((out / name).stat().st_size > 10_000 for name in ("results.png", "detections.png"))


def test_what_is_done_is_not_done_again(family, images, tmp_path, capsys):
    out = tmp_path / "out"
    assert called(family, images, out, networks=SMALLEST) == 0
    first = json.loads((out / "results.json").read_text())["results"]
    written = (out / "w16-d1" / "detector" / "state.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert called(family, images, out) == 0
    assert "1 of 2 networks were there already" in capsys.readouterr().out
    assert json.loads((out / "results.json").read_text())["results"][0] == first[0]
    assert (out / "w16-d1" / "detector" / "state.safetensors").stat().st_mtime_ns == written
    assert called(family, images, out, "--fit.seed", "1") == 1
    assert "other numbers" in capsys.readouterr().err


def without_segmentations(document):
    for entry in document["annotations"]:
        del entry["segmentation"]


MISTAKES = {
    "masks without segmentations": (("--detect.masks",), without_segmentations, "its segmentation is missing"),
    "a size of no whole patches": (("--detect.image-size", "50", "64"), None, "multiples of its patches"),
    "images elsewhere": (("--train-images", "."), None, "none of the 4 images of"),
    "a folder of no annotations": (("--val-images", "."), None, "left out where there is no --val"),
    "no picture": (("--num-shown", "0"), None, "--num-shown must be 1 or more"),
    "no objects": ((), lambda document: document.update(annotations=[]), "holds no object to detect"),
    "a network of another kind": (("--subnets", "w17-d1"), None, "w17"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_are_refused_in_words_before_anything_is_trained(family, images, tmp_path, capsys, what):
    options, change, message = MISTAKES[what]
    del images["val"]
    if change is not None:
        edited(images["train"], change)
    assert called(family, images, tmp_path / "out", *options) == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert not list((tmp_path / "out").glob("w*"))


def test_a_missing_library_is_named(family, images, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    assert called(family, images, tmp_path / "out") == 1
    assert 'pip install "poa[dense]"' in capsys.readouterr().err


def test_what_is_left_out_is_said_and_recorded(family, images, tmp_path, capsys):
    def change(document):
        document["images"][0]["file_name"] = "gone.png"
        document["annotations"].append(coco_entry(900, 2, (0, 0, 10, 10), category=7))

    edited(images["train"], change)
    out = tmp_path / "out"
    assert called(family, images, out, "--detect.max-bad-share", "0.5", networks=SMALLEST) == 0
    printed = capsys.readouterr()
    assert "left out: 1 images with" in printed.out
    assert "left out: gone.png: cannot be read" in printed.err
    names = [bad["name"] for bad in json.loads((out / "results.json").read_text())["skipped"]]
    assert names == ["gone.png", "annotation 900 on 2.png"]
