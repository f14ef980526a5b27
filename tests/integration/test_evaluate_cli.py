"""`poa evaluate` through its command line, on an untrained family over the digits."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from poa.backbones import architecture
from poa.cli.evaluate import PROTOCOLS
from poa.cli.main import main
from poa.config import load_recipe
from poa.evaluate.registry import EVALUATORS
from poa.family import Family, FamilyCard
from poa.train.monitor import preprocessing_of

ON = ("--train", "digits:train", "--device", "cpu", "--num-workers", "0")
QUICK = {
    "linear": ("--min-steps", "60", "--num-epochs", "1"),
    "fewshot": ("--num-repeats", "2"),
    "robustness": ("--corruptions", "fog", "--severities", "3"),
}
TEST = ("--test", "digits:test")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = load_recipe("digits")
    kind = architecture(config.model)
    backbone = kind.build(config.model)
    backbone.init_weights_(torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("evaluate") / "family"
    Family(FamilyCard(kind, config.model, preprocessing_of(config)), backbone).save(folder)
    return str(folder)


@pytest.mark.parametrize("protocol", sorted(PROTOCOLS))
def test_every_protocol_prints_a_table_and_writes_json_csv_and_a_picture(run, protocol, tmp_path, capsys):
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "csv", "png")}
    written = ("--json", files["json"], "--csv", files["csv"], "--picture", files["png"])
    options = (*(TEST if EVALUATORS[protocol]().needs_test else ()), *QUICK.get(protocol, ()))
    command = ("evaluate", protocol, run, *ON, "--subnets", "smallest", "intact", *options, *written)
    assert main([str(part) for part in command]) == 0
    out = capsys.readouterr().out
    assert "w48-d2" in out
    assert ("±" in out) == (protocol in ("fewshot", "clustering"))
    found = json.loads(files["json"].read_text())
    assert [each["network"] for each in found["results"]] == ["w48-d2", "w80-d4"]
    rows = list(csv.DictReader(files["csv"].open()))
    headline = found["results"][0]["headline"]
    assert [float(row[f"{protocol}/{headline}"]) for row in rows] == [
        each["figures"][headline] for each in found["results"]
    ]
    assert files["png"].stat().st_size > 10_000


def test_a_sweep_writes_one_table_and_goes_on(run, tmp_path, capsys):
    (tmp_path / "options.yaml").write_text("linear: {min_steps: 60, num_epochs: 1}\nknn: {k: [5]}\n")
    command = ["evaluate", "sweep", run, *ON, *TEST, "--out", str(tmp_path / "sweep"), "--parquet"]
    command += ["--config", str(tmp_path / "options.yaml")]
    assert main([*command, "--subnets", "smallest"]) == 0
    assert main([*command, "--subnets", "smallest", "middle", "intact"]) == 0
    assert "2 results were there already" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "sweep" / "results.csv").open()))
    assert [row["network"] for row in rows] == ["w48-d2", "w64-d3", "w80-d4"]
    assert "knn/accuracy_k5" in rows[0]
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {
        "data.json",
        "results.jsonl",
        "results.csv",
        "results.json",
        "results.parquet",
        "knn.png",
        "linear.png",
    }


def unlabelled_folder(path, num_images):
    path.mkdir()
    for index, pixels in enumerate(load_digits().images[:num_images]):
        Image.fromarray((16 * pixels).clip(0, 255).astype(np.uint8)).save(path / f"{index}.png")
    return str(path)


def test_health_needs_neither_labels_nor_the_intact_network_among_those_asked_for(run, tmp_path, capsys):
    folder = unlabelled_folder(tmp_path / "images", 40)
    on = ("--data", folder, "--device", "cpu", "--num-workers", "0", "--subnets")
    found = {}
    for name, subnets in (("without", ["smallest"]), ("with", ["smallest", "intact"])):
        assert main(["evaluate", "health", run, *on, *subnets, "--json", str(tmp_path / name)]) == 0
        results = json.loads((tmp_path / name).read_text())["results"]
        found[name] = {each["network"]: each["figures"] for each in results}
    assert found["without"] == {"w48-d2": found["with"]["w48-d2"]}
    assert found["with"]["w80-d4"]["cka"] == pytest.approx(1.0)
    assert found["with"]["w48-d2"]["cka"] < 0.999
    assert "health, 40 images" in capsys.readouterr().out
    out = str(tmp_path / "sweep")
    assert main(["evaluate", "sweep", run, *on, "smallest", "--protocols", "health", "--out", out]) == 0
    swept = list(csv.DictReader((tmp_path / "sweep" / "results.csv").open()))
    assert [(row["network"], float(row["health/cka"])) for row in swept] == [
        ("w48-d2", pytest.approx(found["without"]["w48-d2"]["cka"]))
    ]


def test_untrained_networks_are_compared_with_their_own_intact_network(run, tmp_path):
    folder, file = unlabelled_folder(tmp_path / "images", 40), tmp_path / "found.json"
    on = ("--data", folder, "--device", "cpu", "--num-workers", "0", "--subnets", "intact", "--untrained")
    assert main(["evaluate", "health", run, *on, "--weights-seed", "1", "--json", str(file)]) == 0
    results = json.loads(file.read_text())["results"]
    assert [each["network"] for each in results] == ["w80-d4", "w80-d4 untrained"]
    assert [each["figures"]["cka"] for each in results] == [pytest.approx(1.0)] * 2


def test_a_protocol_that_needs_labels_says_so_of_a_folder_without(run, tmp_path, capsys):
    folder = unlabelled_folder(tmp_path / "images", 12)
    assert main(["evaluate", "linear", run, "--data", folder, "--device", "cpu"]) == 1
    assert "has no labels. Give one folder for each class" in capsys.readouterr().err


def test_untrained_networks_stand_beside_the_trained_ones(run, capsys):
    assert main(["evaluate", "knn", run, *ON, *TEST, "--subnets", "smallest", "--untrained"]) == 0
    assert "w48-d2 untrained" in capsys.readouterr().out


MISTAKES = {
    "sweep of nothing": (("sweep", "RUN", *ON, "--out", "OUT", "--protocols"), "no protocol is named"),
    "protocol misspelt": (("liner", "RUN"), "Did you mean 'linear'"),
    "protocol of a sweep misspelt": (("sweep", "RUN", *ON, "--out", "OUT", "--protocols", "kn"), "no protocol 'kn'"),
    "options of a protocol that is not run": (
        ("sweep", "RUN", *ON, "--out", "OUT", "--protocols", "knn", "--config", "YAML"),
        "options of linear, which --protocols does not name",
    ),
    "more shots than there are": (("fewshot", "RUN", *ON, "--shots", "1000"), "Give --shots of at most"),
    "more results than images": (("retrieval", "RUN", *ON, *TEST, "--k", "5000"), "in the gallery: 1437 images"),
    "clusters that cannot be": (("clustering", "RUN", "--data", "digits", "--num-clusters", "9999"), "clusters of"),
    "test images for nothing": (("clustering", "RUN", *ON, *TEST), "--test digits:test would not be used: clustering"),
    "seed of no fresh weights": (("knn", "RUN", *ON, "--weights-seed", "1"), "--untrained, which is not given"),
    "seed of nothing held out": (("knn", "RUN", *ON, *TEST, "--split-seed", "1"), "held out without --test"),
    "no block": (("linear", "RUN", *ON, "--last-blocks", "0"), "last_blocks must be"),
    "timm model misspelt": (("knn", "timm:resnet5O", *ON), "timm has no model 'resnet5O'"),
    "no such network": (("knn", "nowhere", *ON), "there is no nowhere"),
    "picture into a folder that is none": (("knn", "RUN", *ON, "--picture", "YAML/x.png"), "cannot write"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_with_its_mend(run, mistake, tmp_path, capsys):
    options = tmp_path / "options.yaml"
    options.write_text("linear: {min_steps: 100}\n")
    places = {"RUN": run, "OUT": str(tmp_path / "out"), "YAML": str(options), "YAML/x.png": f"{options}/x.png"}
    arguments, mend = MISTAKES[mistake]
    try:
        status = main(["evaluate", *(places.get(part, part) for part in arguments)])
    except SystemExit as stop:
        status = stop.code
    assert status in (1, 2)
    assert mend in " ".join(capsys.readouterr().err.split())
