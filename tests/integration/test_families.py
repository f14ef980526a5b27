"""Families of every architecture, trained for real through the command line."""

import json
from dataclasses import replace

import pytest
import yaml

from poa.cli.main import main
from poa.config import to_dict
from tests.contract.configs import SMALLEST

SHORT = {
    "heads": {"num_prototypes": [16, 32], "hidden_dim": 32, "bottleneck_dim": 16},
    "objective": {"patch_start_epoch": 0.0},
    "augment": {"num_local_crops": 2, "mean": [0.3], "std": [0.35]},
    "optim": {"warmup_epochs": 0.1, "freeze_last_layer_epochs": 0},
    "train": {"epochs": 0.2, "batch_size": 32, "checkpoint_every": 4, "log_every": 2},
    "monitor": {"every": 4, "num_images": 60, "collapse_rank": 1.0},
    "runtime": {"num_workers": 0, "device": "cpu"},
}

DIGITS = {
    "swin": {
        "model": {
            "architecture": "swin",
            "widths": [16, 24, 32],
            "depths": [2, 3, 4],
            "other_depths": [1, 1, 1],
            "head_dim": 8,
            "window_size": 4,
            "patch_size": 1,
            "image_size": 8,
            "num_channels": 1,
            "init_std": 0.1,
            "drop_path": 0.0,
        },
        "train": {"epochs": 10},
    },
    "resnet": {
        "model": {
            "architecture": "resnet",
            "widths": [32, 64],
            "stage2_depths": [1, 2],
            "stage3_depths": [1, 2],
            "outer_depths": [1, 1],
            "base_channels": 16,
            "image_size": 16,
            "num_channels": 1,
        },
        "train": {"epochs": 14},
    },
}


def run(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


@pytest.mark.parametrize("name", sorted(SMALLEST))
def test_every_architecture_trains_resumes_and_is_cut_through_the_command_line(name, tmp_path, capsys):
    config = replace(SMALLEST[name], num_channels=1)
    local = max(config.crop_multiple, config.image_size // 2 // config.crop_multiple * config.crop_multiple)
    values = {**SHORT, "model": to_dict(config), "augment": {**SHORT["augment"], "local_size": local}}
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(values))
    out = tmp_path / "run"
    run("pretrain", "--data", "digits", "--config", tmp_path / "options.yaml", "--out", out)
    patch_losses = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert any(value > 0 for line in patch_losses for key, value in line.items() if key.endswith("elastic/patch"))
    run("pretrain", "--out", out)
    run("extract", out, "smallest", "--out", tmp_path / "net")
    run("evaluate", "knn", out, "--train", "digits:train", "--test", "digits:test", "--subnets", "middle")
    run("subnets", out)
    assert "Compared with the family" in capsys.readouterr().out


def test_a_family_that_could_not_be_cut_is_refused_before_it_is_trained(tmp_path, capsys):
    (tmp_path / "options.yaml").write_text(yaml.safe_dump({**SHORT, "model": DIGITS["resnet"]["model"]}))
    options = [
        "--config",
        str(tmp_path / "options.yaml"),
        "--model.stem-channels",
        "32",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(["pretrain", "--data", "digits", *options]) == 1
    assert "model.stem_channels is 64, as in timm's ResNet; got 32" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", sorted(DIGITS))
def test_every_subnet_of_a_family_reads_digits(name, tmp_path):
    (tmp_path / "options.yaml").write_text(yaml.safe_dump({**DIGITS[name], "monitor": {"every": 0}}))
    out = tmp_path / "run"
    run("pretrain", "--recipe", "digits", "--config", tmp_path / "options.yaml", "--out", out)
    found = tmp_path / "knn.json"
    run("evaluate", "knn", out, "--train", "digits:train", "--test", "digits:test", "--json", found)
    results = json.loads(found.read_text())["results"]
    best = {result["network"]: result["figures"]["accuracy"] for result in results}
    assert len(best) == (9 if name == "swin" else 8)
    assert min(best.values()) >= 0.90, best
