"""Evaluation and training on labels compute on a GPU what they compute on the CPU.

The same on the CPU is tested by the files of each command; here only what another device can change.
"""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from poa.backbones import ARCHITECTURES
from poa.cli.main import main
from poa.family import Family, FamilyCard, Preprocessing
from tests.coco_images import squares
from tests.contract.configs import SMALLEST
from tests.devices import needs_cuda

GPU = "cuda"

pytestmark = needs_cuda


def saved(folder, architecture, num_channels):
    config, kind = replace(SMALLEST[architecture], num_channels=num_channels), ARCHITECTURES[architecture]
    backbone = kind.build(config)
    backbone.init_weights_(torch.Generator().manual_seed(0))
    how = Preprocessing(config.image_size, num_channels, (0.5,), (0.25,))
    Family(FamilyCard(kind, config, how), backbone).save(folder)
    return str(folder)


def called(*parts):
    assert main([str(part) for part in parts]) == 0


def results(file):
    return [each["figures"] for each in json.loads(file.read_text())["results"]]


@pytest.mark.parametrize("architecture", sorted(SMALLEST))
def test_robustness_on_a_gpu_is_that_on_the_cpu(architecture, tmp_path):
    family = saved(tmp_path / "family", architecture, 1)
    line = ("evaluate", "robustness", family, "--train", "digits:train", "--test", "digits:test")
    line += ("--corruptions", "fog", "--drops", "0.5", "--num-workers", "0")
    for device in ("cpu", GPU):
        called(*line, "--device", device, "--json", tmp_path / f"{device}.json")
    for ours, theirs in zip(results(tmp_path / f"{GPU}.json"), results(tmp_path / "cpu.json"), strict=True):
        assert ours == pytest.approx(theirs, abs=0.02)


@pytest.mark.parametrize("protocol", ["knn", "linear"])
def test_protocols_on_a_gpu_are_those_on_the_cpu(protocol, tmp_path):
    family = saved(tmp_path / "family", "vit", 1)
    line = ("evaluate", protocol, family, "--train", "digits:train", "--test", "digits:test", "--num-workers", "0")
    for device in ("cpu", GPU):
        called(*line, "--device", device, "--json", tmp_path / f"{device}.json")
    for ours, theirs in zip(results(tmp_path / f"{GPU}.json"), results(tmp_path / "cpu.json"), strict=True):
        assert ours["accuracy"] == pytest.approx(theirs["accuracy"], abs=0.03)


@pytest.mark.parametrize("how", [("--subnet", "smallest"), ("--elastic",)], ids=["alone", "elastic"])
def test_fine_tuning_on_a_gpu_learns(how, tmp_path):
    family = saved(tmp_path / "family", "vit", 1)
    line = ("finetune", family, *how, "--train", "digits:train", "--test", "digits:test", "--out", tmp_path / "out")
    line += ("--fit.epochs", "5", "--fit.lr", "0.01", "--fit.warmup-epochs", "1", "--fit.layer-decay", "1")
    line += ("--randaugment-ops", "0", "--flip-prob", "0", "--cutmix", "0", "--mixup", "0", "--label-smoothing", "0")
    called(*line, "--num-workers", "0", "--device", GPU)
    history = json.loads((tmp_path / "out" / "metrics.json").read_text())["history"]
    losses = [sum(value for name, value in epoch.items() if name.startswith("loss/")) for epoch in history]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_segmentation_on_a_gpu_gives_finite_figures(head, tmp_path):
    family = saved(tmp_path / "family", "vit", 3)
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for kind in ("images", "masks"):
            (tmp_path / part / kind).mkdir(parents=True)
        for number in range(4):
            mask = np.kron(rng.integers(0, 2, (4, 6)), np.ones((8, 8), dtype=int)).astype(np.uint8)
            Image.fromarray(mask).save(tmp_path / part / "masks" / f"{number}.png")
            Image.fromarray(np.repeat(200 * mask[:, :, None], 3, axis=2)).save(
                tmp_path / part / "images" / f"{number}.png"
            )
    (tmp_path / "classes.json").write_text(json.dumps({"names": ["dark", "bright"]}))
    line = ("evaluate", "segment", family, "--train", tmp_path / "train", "--test", tmp_path / "test", "--head", head)
    line += ("--segment.image-size", "32", "48", "--segment.channels", "16", "--fit.epochs", "2", "--fit.batch-size")
    called(*line, "2", "--fit.warmup-epochs", "0", "--num-workers", "0", "--device", GPU, "--out", tmp_path / "out")
    assert all(math.isfinite(figures["miou"]) for figures in results(tmp_path / "out" / "results.json"))


@pytest.mark.parametrize("method", ["faster-rcnn", "cascade-rcnn"])
def test_detection_with_masks_on_a_gpu_has_finite_losses_and_figures(method, tmp_path):
    family = saved(tmp_path / "family", "vit", 3)
    train, test = (squares(tmp_path / name, count=4, seed=seed) for seed, name in enumerate(("train", "test")))
    line = ("evaluate", "detect", family, "--train", train, "--test", test, "--detect.method", method)
    line += ("--detect.masks", "--detect.image-size", "48", "64", "--detect.channels", "16", "--detect.head-channels")
    line += ("32", "--detect.mask-channels", "8", "--detect.num-proposals", "30", "--fit.epochs", "1")
    called(*line, "--fit.batch-size", "4", "--num-workers", "0", "--device", GPU, "--out", tmp_path / "out")
    trained = json.loads((tmp_path / "out" / "results.json").read_text())["training"]
    assert len(trained) == len(results(tmp_path / "out" / "results.json")) == 4
    epochs = [line for each in trained.values() for line in each["history"]]
    assert all(math.isfinite(value) for line in epochs for value in line.values())
    assert all({"loss/objectness", "loss/mask", "mask AP"} <= set(line) for line in epochs)
