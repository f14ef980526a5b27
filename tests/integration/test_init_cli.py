"""`poa pretrain --init` from end to end, through the command line."""

import json
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from poa.cli.main import main
from poa.family import load, read_card
from poa.train.checkpoint import CheckpointStore

SMALL = {"embed_dim": 48, "depth": 3, "num_heads": 3, "img_size": 28}
OPTIONS = """
augment: {num_local_crops: 1, local_size: 14, mean: [0.3], std: [0.35]}
heads: {num_prototypes: [16, 32], hidden_dim: 32, bottleneck_dim: 16}
optim: {warmup_epochs: 0.1, freeze_last_layer_epochs: 0}
init: {freeze_epochs: 0.2, num_images: 32}
train: {epochs: 0.4, batch_size: 64, checkpoint_every: 4, log_every: 2}
monitor: {every: 0}
runtime: {num_workers: 0, device: cpu}
"""


@pytest.fixture
def source(tmp_path):
    rng = torch.Generator().manual_seed(0)
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, **SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng), alpha=0.05)
    folder = tmp_path / "dino"
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    described = {
        "input_size": [3, 28, 28],
        "num_classes": 0,
        "license": "cc-by-nc-4.0",
        "first_conv": "patch_embed.proj",
    }
    described |= {"mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3]}
    config = {"architecture": "vit_small_patch14_dinov2", "model_args": SMALL, "pretrained_cfg": described}
    (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "options.yaml").write_text(OPTIONS)
    return folder


def pretrain(tmp_path, *arguments):
    options = ["--config", str(tmp_path / "options.yaml"), "--data", "digits", "--model.image-size", "28"]
    return main(["pretrain", "--out", str(tmp_path / "run"), *options, *map(str, arguments)])


def test_a_family_grows_from_a_timm_directory(source, tmp_path, capsys):
    assert pretrain(tmp_path, "--init", source, "--train.keep-every", 1, "--model.num-channels", 1) == 0
    said = capsys.readouterr().err
    assert "Started from" in said
    assert "resized: patch_embed.proj.weight (48, 3, 14, 14) → (48, 1, 14, 14)" in said
    assert "missing, so fresh: mask_token" in said
    card = read_card(tmp_path / "run")
    assert card.space.intact.width == 48
    assert card.space.intact.depths == (3,)
    init = card.provenance["init"]
    assert (init["name"], init["license"]) == ("dino", "cc-by-nc-4.0")
    assert init["relative_difference"] < 1e-5
    assert sorted(init["feature_order"]) == list(range(48))
    assert main(["extract", str(tmp_path / "run"), "smallest", "--out", str(tmp_path / "net")]) == 0
    assert json.loads((tmp_path / "net" / "config.json").read_text())["pretrained_cfg"]["license"] == "cc-by-nc-4.0"
    assert json.loads((tmp_path / "net" / "poa.json").read_text())["provenance"]["init"]["name"] == "dino"


def test_the_backbone_is_frozen_first_and_learns_then(source, tmp_path):
    assert pretrain(tmp_path, "--init", source, "--train.keep-every", 4) == 0
    order = read_card(tmp_path / "run").provenance["init"]["feature_order"]
    start = load_file(source / "model.safetensors")["norm.weight"][order]
    store = CheckpointStore(tmp_path / "run" / "checkpoints", 2, 4)
    steps = store.steps()
    found = {}
    for step in steps:
        state = load_file(next(store.path(step).glob("*.safetensors")))
        found[step] = next(part for name, part in state.items() if name.endswith("student.backbone.norm.weight"))
    assert torch.equal(found[4], start)
    assert not torch.equal(found[steps[-1]], start)


def test_a_resumed_run_needs_no_source(source, tmp_path, capsys):
    assert pretrain(tmp_path, "--init", source, "--train.checkpoint-every", 3) == 0
    first = load(tmp_path / "run").supernet.state_dict()
    family = tmp_path / "run" / "family"
    for file in [*family.iterdir()]:
        file.unlink()
    family.rmdir()
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    for file in source.iterdir():
        file.unlink()
    assert main(["pretrain", "--out", str(tmp_path / "run")]) == 0
    assert "Resuming after step" in capsys.readouterr().err
    again = load(tmp_path / "run")
    assert all(torch.equal(first[name], tensor) for name, tensor in again.supernet.state_dict().items())
    assert again.card.provenance["init"]["name"] == "dino"


def test_a_run_killed_in_its_first_checkpoint_starts_from_the_source_again(source, tmp_path, capsys):
    assert pretrain(tmp_path, "--init", source) == 0
    first = load(tmp_path / "run").supernet.state_dict()
    shutil.rmtree(tmp_path / "run" / "family")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "checkpoints" / ".step-00000004.half-written").mkdir(parents=True)
    capsys.readouterr()
    assert main(["pretrain", "--out", str(tmp_path / "run")]) == 0
    assert "Started from" in capsys.readouterr().err
    again = load(tmp_path / "run").supernet.state_dict()
    assert all(torch.equal(first[name], tensor) for name, tensor in again.items())


def test_crop_sizes_are_fitted_to_the_patches_of_the_source_and_said(source, tmp_path, capsys):
    (tmp_path / "options.yaml").write_text("train: {epochs: 0}")
    assert (
        main(
            ["pretrain", "--out", str(tmp_path / "r"), "--data", "digits", "--init", str(source), "--train.epochs", "0"]
        )
        == 1
    )
    said = capsys.readouterr().err
    assert "augment.local_size is 98 instead of the recipe's 96" in said
    assert "augment.mean is (0.5, 0.4, 0.3) instead of the recipe's (0.485, 0.456, 0.406)" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--init", "timm:resnet51"], "timm has no model 'resnet51'. Nearest:"),
        (["--init", "timm:resnet50"], "BatchNorm"),
        (["--init", "nowhere"], "there is no nowhere. Give timm:NAME"),
        (["--model.widths", "48", "64"], "are not those of the intact network"),
        (["--model.depths", "2"], "have no place here: blocks.2"),
    ],
)
def test_what_cannot_be_started_from_is_refused_before_work_starts(source, tmp_path, capsys, arguments, message):
    if "--init" not in arguments:
        arguments = ["--init", str(source), "--model.head-dim", "16", *arguments]
    assert pretrain(tmp_path, *arguments) == 1
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()
