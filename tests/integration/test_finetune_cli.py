"""`poa finetune` and `poa extract` through the command line, on untrained families."""

import csv
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from poa.backbones import architecture
from poa.cli.main import main
from poa.config import ViTConfig
from poa.family import Family, FamilyCard, Preprocessing

CONFIG = ViTConfig(widths=(16, 32), depths=(1, 2), head_dim=16, patch_size=4, image_size=8, num_channels=1)
QUICK = ("--device", "cpu", "--num-workers", "0", "--fit.epochs", "3", "--fit.batch-size", "8")
QUICK += ("--fit.lr", "0.01", "--fit.warmup-epochs", "1", "--randaugment-ops", "0", "--cutmix", "0")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    kind = architecture(CONFIG)
    backbone = kind.build(CONFIG)
    backbone.init_weights_(torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("finetune") / "run"
    Family(FamilyCard(kind, CONFIG, Preprocessing(8, 1, (0.5,), (0.5,))), backbone).save(folder / "family")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for label, name in enumerate(("dark", "bright")):
        (folder / name).mkdir()
        for number in range(20):
            pixels = np.random.default_rng(number).integers(0, 80, (8, 8)) + 120 * label
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}.png")
    return folder


def command(*parts):
    return main([str(part) for part in parts])


def flat(capsys):
    captured = capsys.readouterr()
    return " ".join(f"{captured.out} {captured.err}".split())


def test_a_subnet_is_fine_tuned_and_the_same_command_again_changes_nothing(run, images, tmp_path, capsys):
    line = ("finetune", run, "--subnet", "w16-d1", "--train", images, "--out", tmp_path / "out", *QUICK)
    assert command(*line) == 0
    printed = flat(capsys)
    assert "32 training and 8 test images, 2 classes" in printed
    assert f'timm.create_model("local-dir:{tmp_path}/out/model", pretrained=True)' in printed
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"curves.png", "metrics.json", "model", "state"}
    model = timm.create_model(f"local-dir:{tmp_path}/out/model", pretrained=True)
    assert (model.num_classes, model.pretrained_cfg["label_names"]) == (2, ["bright", "dark"])
    before = load_file(tmp_path / "out" / "model" / "model.safetensors")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["best"]["accuracy"] > 0.7
    assert command(*line) == 0
    after = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in after)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["history"] == metrics["history"]
    assert command(*line, "--mixup", "0.1") == 1
    assert "another task" in flat(capsys)


def test_a_family_is_fine_tuned_and_any_size_cut_with_its_classifier(run, images, tmp_path, capsys):
    line = ("finetune", run, "--elastic", "--train", images, "--test", images, "--out", tmp_path / "out", *QUICK)
    assert command(*line) == 0
    printed = flat(capsys)
    assert all(name in printed for name in ("w16-d1", "w16-d2", "w32-d1", "w32-d2"))
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert [row["network"] for row in rows] == ["w16-d1", "w16-d2", "w32-d1", "w32-d2"]
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["subnets"]
    assert [float(row["finetune/accuracy"]) for row in rows] == [each["accuracy"] for each in found]
    assert (tmp_path / "out" / "results.png").stat().st_size > 10_000
    assert command("extract", tmp_path / "out", "w16-d2", "--out", tmp_path / "net") == 0
    assert "classifies 2 classes: bright, dark" in flat(capsys)
    model = timm.create_model(f"local-dir:{tmp_path}/net", pretrained=True).eval()
    images_of = [np.asarray(Image.open(images / name / "3.png"))[None] / 255.0 for name in ("bright", "dark")]
    normalised = (torch.tensor(np.stack(images_of), dtype=torch.float32) - 0.5) / 0.5
    with torch.inference_mode():
        found = model(normalised)
    assert found.argmax(dim=1).tolist() == [0, 1]
    assert command("extract", tmp_path / "out", "w16-d2", "--out", tmp_path / "other", "--format", "transformers") == 0
    assert "AutoModelForImageClassification" in flat(capsys)
    opened = AutoModelForImageClassification.from_pretrained(tmp_path / "other").eval()
    with torch.inference_mode():
        assert torch.allclose(opened(pixel_values=normalised).logits, found, rtol=1e-5, atol=1e-5)


def test_images_of_several_classes_are_told_by_a_table(run, images, tmp_path, capsys):
    names = [f"{name}/{number}.png" for name in ("dark", "bright") for number in range(20)]
    rows = [f"{name},{name.split('/')[0]}{';even' if number % 2 else ''}" for number, name in enumerate(names)]
    (images / "labels.csv").write_text("\n".join(["image,labels", *rows[:-1], f"{names[-1]},"]) + "\n")
    line = ("finetune", run, "--subnet", "smallest", "--train", images, "--multi-label", *QUICK)
    assert command(*line, "--out", tmp_path / "out") == 0
    printed = flat(capsys)
    assert "3 classes" in printed
    assert "Images of no class: 1 to train on, 0 to test on." in printed
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["metric"] == "map"


def test_fresh_weights_are_started_from_where_asked(run, images, tmp_path):
    line = ("finetune", run, "--subnet", "w16-d1", "--train", images, "--untrained", "--fit.freeze", *QUICK)
    assert command(*line, "--out", tmp_path / "out") == 0
    given = load_file(run / "family" / "weights.safetensors")["patch_embed.proj.weight"][:16]
    found = load_file(tmp_path / "out" / "model" / "model.safetensors")["patch_embed.proj.weight"]
    assert found.shape == given.shape
    assert not torch.allclose(found, given)


MISTAKES = {
    "no sub-network": ((), "name one by --subnet (w16-d1, w32-d2, w32-d2"),
    "both": (("--elastic", "--subnet", "w16-d1"), "leave --subnet out"),
    "unknown": (("--subnet", "w20-d1"), "Nearest: w16-d1"),
    "many": (("--subnet", "all"), "names 4"),
    "size": (("--subnet", "w16-d1", "--image-size", "9"), "the nearest is 8"),
    "elastic size": (("--elastic", "--image-size", "16"), "keeps the family's image size"),
    "surplus": (("--subnet", "w16-d1", "--subnets", "all"), "--subnets is for --elastic"),
    "surplus number": (("--subnet", "w16-d1", "--distill-weight", "2"), "are for --elastic"),
    "holdout": (("--subnet", "w16-d1", "--test", "digits:test", "--holdout", "0.3"), "one of the two"),
    "split seed": (("--subnet", "w16-d1", "--test", "digits:test", "--split-seed", "1"), "held out without --test"),
    "other classes": (("--subnet", "w16-d1", "--test", "digits:test"), "10 classes that no training image is of"),
    "one class": (("--subnet", "w16-d1", "--train", "ONE"), "has no labels"),
    "no images": (("--subnet", "w16-d1", "--test", "nowhere"), "there is no 'nowhere'"),
    "share": (("--subnet", "w16-d1", "--holdout", "1.5"), "above 0 and below 1"),
    "option": (("--subnet", "w16-d1", "--label-smoothing", "2"), "--label-smoothing must be"),
    "empty": (("--elastic", "--subnets"), "--subnets names none"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_before_anything_is_trained(run, images, tmp_path, capsys, mistake):
    options, message = MISTAKES[mistake]
    (tmp_path / "one" / "class").mkdir(parents=True)
    Image.new("L", (8, 8)).save(tmp_path / "one" / "class" / "1.png")
    options = [str(tmp_path / "one") if part == "ONE" else part for part in options]
    train = () if "--train" in options else ("--train", images)
    assert command("finetune", run, *train, "--out", tmp_path / "out", *options, *QUICK) == 1
    assert message in flat(capsys)
    assert not (tmp_path / "out").exists()


def test_what_is_no_family_has_no_subnets(images, tmp_path, capsys):
    for option in (("--elastic",), ("--subnet", "w16-d1")):
        assert command("finetune", "timm:resnet10t", *option, "--train", images, "--out", tmp_path / "out") == 1
        assert f"{option[0]} is for families" in flat(capsys)
