import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn
from transformers.utils import logging

from poa.cli.main import main
from poa.config import SwinConfig, ViTConfig
from poa.data.augment import eval_transform
from poa.deploy.export.transformers import open_transformers_directory, save_transformers, transformers_model
from poa.errors import CheckpointError, ConfigError, ExtractionError, SubnetError
from poa.family import Family
from poa.task_head import TaskHead
from tests.contract.configs import SMALLEST
from tests.golden.reference import relative_error
from tests.unit.test_extraction import make_family

VIT = ViTConfig(widths=(32, 48, 64), depths=(2, 3, 4), head_dim=16, patch_size=4, image_size=16, num_channels=1)
SWIN = SwinConfig(
    widths=(16, 32), depths=(2, 3), other_depths=(2, 1, 2), head_dim=16, window_size=2, patch_size=2, image_size=32
)
CASES = {
    "plain": (VIT, "Dinov2Model"),
    "no LayerScale": (replace(VIT, init_values=None), "Dinov2Model"),
    "no bias of queries, keys and values": (replace(VIT, qkv_bias=False), "Dinov2Model"),
    "class token outside the position embedding": (replace(VIT, no_embed_class=True), "Dinov2Model"),
    "registers": (replace(VIT, num_reg_tokens=4), "Dinov2WithRegistersModel"),
    "registers outside the position embedding": (
        replace(VIT, num_reg_tokens=4, no_embed_class=True),
        "Dinov2WithRegistersModel",
    ),
    "SwiGLU of DINOv2's size": (
        replace(VIT, widths=(48, 96), mlp="swiglu_packed", mlp_ratio=8 / 3, num_reg_tokens=1),
        "Dinov2WithRegistersModel",
    ),
    "SwiGLU of another size": (replace(VIT, mlp="swiglu_packed", mlp_ratio=2.67), "TimmWrapperModel"),
    "MLP ratio that is not whole": (replace(VIT, mlp_ratio=1.5), "TimmWrapperModel"),
    "rotary positions": (replace(VIT, position="rope", num_reg_tokens=4), "TimmWrapperModel"),
    "SwiGLU and rotary positions": (
        replace(VIT, position="rope", mlp="swiglu", norm_eps=1e-5, qkv_bias=False),
        "TimmWrapperModel",
    ),
    "Swin": (SWIN, "SwinModel"),
    "Swin with whole windows on larger maps": (replace(SWIN, image_size=64, always_partition=True), "SwinModel"),
    "Swin with whole windows on a map they cover": (replace(SWIN, always_partition=True), "TimmWrapperModel"),
    "Swin with maps smaller than the window": (replace(SWIN, window_size=4), "TimmWrapperModel"),
    "ResNet": (SMALLEST["resnet"], "TimmWrapperModel"),
    "ConvNeXt": (SMALLEST["convnext"], "TimmWrapperModel"),
}


def members(family):
    return dict.fromkeys((family.space.smallest, family.space.middle, family.space.intact))


def assert_equal_to_subnet(model, family, subnet, image_size):
    images = torch.randn(2, family.card.preprocessing.num_channels, image_size, image_size)
    with torch.inference_mode():
        found = model(pixel_values=images)
        tokens = family.extract(subnet, image_size).forward_features(images)
        if type(model).__name__ == "SwinModel":
            tokens = tokens.flatten(1, 2)
        expected = family.features(images, subnet)
    assert relative_error(found.pooler_output, expected) < 1e-5
    assert relative_error(found.last_hidden_state, tokens) < 1e-5


@pytest.fixture(scope="module")
def family():
    return make_family(VIT)


@pytest.fixture(scope="module")
def wrapped():
    return make_family(SMALLEST["convnext"])


@pytest.mark.parametrize("case", CASES)
def test_written_models_equal_their_subnets(case, tmp_path):
    config, kind = CASES[case]
    family = make_family(config)
    for subnet in members(family):
        folder = tmp_path / str(subnet)
        found = save_transformers(family, subnet, folder)
        model = transformers.AutoModel.from_pretrained(folder)
        assert type(model).__name__ == kind
        assert_equal_to_subnet(model, family, subnet, config.image_size)
        record = json.loads((folder / "poa.json").read_text())
        assert record["subnet"] == record["verification"]["subnet"] == str(subnet)
        assert record["verification"]["relative_difference"] == found.relative_difference < 1e-5


@pytest.mark.parametrize(
    ("case", "image_size"),
    [
        ("plain", 24),
        ("plain", 8),
        ("registers", 24),
        ("registers outside the position embedding", 8),
        ("rotary positions", 24),
        ("Swin", 64),
        ("ResNet", 64),
        ("ConvNeXt", 64),
    ],
)
def test_another_image_size(case, image_size, tmp_path):
    config, kind = CASES[case]
    family = make_family(config)
    save_transformers(family, family.space.smallest, tmp_path / "net", image_size=image_size)
    model = open_transformers_directory(tmp_path / "net")
    assert type(model).__name__ == kind
    assert_equal_to_subnet(model, family, family.space.smallest, image_size)
    assert json.loads((tmp_path / "net" / "poa.json").read_text())["preprocessing"]["image_size"] == image_size


def test_maps_that_outgrow_the_window_at_another_image_size_need_no_wrapper(tmp_path):
    family = make_family(replace(SWIN, always_partition=True))
    save_transformers(family, family.space.smallest, tmp_path / "net", image_size=64)
    assert type(open_transformers_directory(tmp_path / "net")).__name__ == "SwinModel"


@pytest.mark.parametrize("architecture", SMALLEST)
def test_timm_directories_open_with_transformers(architecture, tmp_path):
    family = make_family(SMALLEST[architecture])
    for subnet in members(family):
        family.save_subnet(subnet, tmp_path / str(subnet))
        model = transformers.AutoModel.from_pretrained(tmp_path / str(subnet))
        assert type(model).__name__ == "TimmWrapperModel"
        assert_equal_to_subnet(model, family, subnet, family.card.preprocessing.image_size)


@pytest.mark.parametrize("case", ["plain", "registers", "Swin", "rotary positions", "ResNet"])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_the_image_processor_prepares_images_as_the_family_does(case, num_channels, tmp_path):
    family = make_family(replace(CASES[case][0], num_channels=num_channels, image_size=32))
    mean, std = ((0.4,), (0.2,)) if num_channels == 1 else ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    how = replace(family.card.preprocessing, mean=mean, std=std, crop_pct=0.8)
    family = Family(replace(family.card, preprocessing=how), family.supernet)
    save_transformers(family, family.space.smallest, tmp_path / "net")

    rows, columns = np.mgrid[:70, :50]
    pixels = (128 + 100 * np.sin(rows / 7) * np.cos(columns / 5)).astype(np.uint8)
    image = Image.fromarray(pixels)
    if num_channels == 3:
        image = Image.merge("RGB", [Image.fromarray(part) for part in (pixels, pixels // 2, 255 - pixels)])
    inputs = transformers.AutoImageProcessor.from_pretrained(tmp_path / "net")(image, return_tensors="pt")
    found = inputs["pixel_values"]

    expected = torch.tensor(eval_transform(image, 32, 0.8)) / 255
    expected = (expected - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    assert found.shape == (1, num_channels, 32, 32)
    assert (found[0] - expected).abs().max() < 1.5 / 255 / min(std)
    assert torch.isfinite(open_transformers_directory(tmp_path / "net")(**inputs).pooler_output).all()


def test_the_image_processor_takes_size_and_interpolation_from_what_was_written(family, tmp_path):
    how = replace(family.card.preprocessing, interpolation="bilinear", crop_pct=0.9)
    other = Family(replace(family.card, preprocessing=how), family.supernet)
    save_transformers(other, other.space.smallest, tmp_path / "net", image_size=24)
    described = json.loads((tmp_path / "net" / "preprocessor_config.json").read_text())
    assert described["crop_size"] == {"height": 24, "width": 24}
    assert described["size"] == {"shortest_edge": 26}
    assert described["resample"] == Image.Resampling.BILINEAR


def test_written_models_open_where_poa_is_not_installed(family, wrapped, tmp_path):
    images = {}
    for name, source in (("native", family), ("wrapped", wrapped)):
        save_transformers(source, source.space.smallest, tmp_path / name)
        how = source.card.preprocessing
        images[name] = torch.randn(2, how.num_channels, how.image_size, how.image_size)
    torch.save(images, tmp_path / "images.pt")
    script = (
        "import sys, torch; sys.modules['poa'] = None\n"
        "from transformers import AutoModel\n"
        "images = torch.load('images.pt')\n"
        "found = {name: AutoModel.from_pretrained(name)(image).pooler_output for name, image in images.items()}\n"
        "torch.save({name: tensor.detach() for name, tensor in found.items()}, 'out.pt')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    found = torch.load(tmp_path / "out.pt")
    for name, source in (("native", family), ("wrapped", wrapped)):
        assert relative_error(found[name], source.features(images[name], source.space.smallest)) < 1e-5


def with_head(family, *, multi_label=False):
    width = family.supernet.layout.features.size
    rng = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(3, width, generator=rng) / width**0.5, torch.randn(3, generator=rng)
    return Family(family.card, family.supernet, TaskHead(weight, bias, ("ant", "bee", "cat"), multi_label))


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("plain", "Dinov2ForImageClassification"),
        ("registers", "Dinov2WithRegistersForImageClassification"),
        ("Swin", "SwinForImageClassification"),
        ("ResNet", "TimmWrapperForImageClassification"),
        ("rotary positions", "TimmWrapperForImageClassification"),
    ],
)
@pytest.mark.parametrize("multi_label", [False, True])
def test_a_classifier_is_written_with_its_classes(case, kind, multi_label, tmp_path):
    family = with_head(make_family(CASES[case][0]), multi_label=multi_label)
    how, subnet = family.card.preprocessing, family.space.smallest
    found = save_transformers(family, subnet, tmp_path / "net")
    assert found.logits_relative_difference < 1e-5
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "net")
    assert type(model).__name__ == kind
    assert model.config.id2label == {0: "ant", 1: "bee", 2: "cat"}
    expected_type = "multi_label_classification" if multi_label else "single_label_classification"
    assert model.config.problem_type == expected_type
    images = torch.randn(2, how.num_channels, how.image_size, how.image_size)
    with torch.inference_mode():
        assert relative_error(model(pixel_values=images).logits, family.logits(images, subnet)) < 1e-5


@pytest.mark.parametrize("case", ["plain", "ResNet"])
def test_a_wrong_classifier_is_refused_and_leaves_nothing_behind(case, tmp_path, monkeypatch):
    family = with_head(make_family(CASES[case][0]))
    honest = TaskHead.windows

    def damaged(head, features, width):
        found = honest(head, features, width)
        return found | {"weight": replace(found["weight"], scale=1.01 * found["weight"].scale)}

    expected = family.head.state(family.supernet.layout.features, family.space.smallest.width)
    monkeypatch.setattr(
        Family,
        "logits",
        lambda family, images, subnet: family.features(images, subnet) @ (expected["weight"].T) + expected["bias"],
    )
    monkeypatch.setattr(TaskHead, "windows", damaged)
    with pytest.raises(ExtractionError, match="differs"):
        save_transformers(family, family.space.smallest, tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


def test_networks_without_a_class_in_transformers_give_none(wrapped):
    assert transformers_model(wrapped.extract(wrapped.space.smallest)) is None
    assert transformers_model(nn.Linear(2, 2)) is None


def test_the_translated_model_shares_no_memory_with_the_family(family):
    model = transformers_model(family.extract(family.space.intact))
    before = {name: tensor.clone() for name, tensor in family.supernet.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for name, tensor in family.supernet.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("kind", ["family", "wrapped"])
def test_a_damaged_model_is_refused_and_leaves_nothing_behind(kind, request, tmp_path, monkeypatch):
    source = request.getfixturevalue(kind)
    honest = source.supernet.timm_windows

    def damaged(subnet, image_size):
        found = honest(subnet, image_size)
        name = next(name for name in found if name.endswith("norm.weight"))
        return found | {name: replace(found[name], scale=1.01 * found[name].scale)}

    monkeypatch.setattr(source.supernet, "timm_windows", damaged)
    with pytest.raises(ExtractionError, match="differs"):
        save_transformers(source, source.space.smallest, tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["pooler_output", "last_hidden_state"])
def test_both_outputs_are_verified(name, family, tmp_path, monkeypatch):
    honest = transformers.Dinov2Model.forward

    def damaged(*args, **kwargs):
        found = honest(*args, **kwargs)
        found[name] = found[name] * 1.01
        return found

    monkeypatch.setattr(transformers.Dinov2Model, "forward", damaged)
    with pytest.raises(ExtractionError, match="differs"):
        save_transformers(family, family.space.smallest, tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


def test_the_class_vector_of_the_wrapper_is_verified(wrapped, tmp_path, monkeypatch):
    honest = transformers.TimmWrapperModel.forward

    def damaged(*args, **kwargs):
        found = honest(*args, **kwargs)
        found["pooler_output"] = found["pooler_output"] * 1.01
        return found

    monkeypatch.setattr(transformers.TimmWrapperModel, "forward", damaged)
    with pytest.raises(ExtractionError, match="differs"):
        save_transformers(wrapped, wrapped.space.smallest, tmp_path / "net")


def test_existing_directory_is_replaced_only_when_asked(family, tmp_path):
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is there already"):
        save_transformers(family, family.space.smallest, tmp_path / "net")
    assert [path.name for path in tmp_path.rglob("*")] == ["net", "notes.txt"]
    save_transformers(family, family.space.smallest, tmp_path / "net", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "net").iterdir()) == [
        "config.json",
        "model.safetensors",
        "poa.json",
        "preprocessor_config.json",
    ]


def test_unknown_subnet_and_image_size_are_refused(family, tmp_path):
    with pytest.raises(SubnetError, match="Nearest: w48-d3"):
        save_transformers(family, "w50-d3", tmp_path / "net")
    with pytest.raises(ConfigError, match="nearest is 16"):
        save_transformers(family, family.space.smallest, tmp_path / "net", image_size=17)
    assert list(tmp_path.iterdir()) == []


def test_missing_transformers_names_the_extra(family, tmp_path, monkeypatch, capsys):
    family.save(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "transformers", None)
    for attempt in (
        lambda: save_transformers(family, family.space.smallest, tmp_path / "net"),
        lambda: open_transformers_directory(tmp_path / "net"),
        lambda: transformers_model(family.extract(family.space.smallest)),
    ):
        with pytest.raises(ConfigError, match=r"pip install 'poa\[transformers\]'"):
            attempt()
    command = ["extract", str(tmp_path / "run"), "smallest", "--format", "transformers", "--out", str(tmp_path / "net")]
    assert main(command) == 1
    assert "pip install 'poa[transformers]'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_logging_of_transformers_is_as_before(family, tmp_path, monkeypatch):
    before = logging.get_verbosity()
    logging.set_verbosity_info()
    monkeypatch.setattr(logging, "_tqdm_active", True)
    try:
        save_transformers(family, family.space.smallest, tmp_path / "net")
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        open_transformers_directory(tmp_path / "net")
        assert not logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()


def test_the_command_says_how_to_open_what_it_wrote_and_nothing_else(family, wrapped, tmp_path):
    for name, source in (("native", family), ("wrapped", wrapped)):
        source.save(tmp_path / name / "run")
    script = (
        "import sys; from poa.cli.main import main\n"
        "for name in ('native', 'wrapped'):\n"
        "    options = ('--format', 'transformers', '--out', f'{name}/net')\n"
        "    assert main(['extract', f'{name}/run', 'smallest', *options]) == 0\n"
    )
    command = [sys.executable, "-c", script]
    found = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert len(lines) == 6
    for name, source in (("native", family), ("wrapped", wrapped)):
        written, compared, opened = lines[:3] if name == "native" else lines[3:]
        assert written.endswith(f"parameters, written to {name}/net")
        assert "relative difference" in compared
        assert opened == f'Open it with: transformers.AutoModel.from_pretrained("{name}/net")'
        model = transformers.AutoModel.from_pretrained(tmp_path / name / "net")
        assert_equal_to_subnet(model, source, source.space.smallest, source.card.preprocessing.image_size)
    assert "it/s" not in found.stderr
    assert "ransformers" not in found.stderr


def test_timm_directories_are_written_without_transformers(family, tmp_path):
    family.save(tmp_path / "run")
    script = (
        "import sys; import poa.family; assert 'transformers' not in sys.modules\n"
        "from poa.cli.main import main\n"
        "assert main(['extract', 'run', 'smallest', '--out', 'net']) == 0\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)


@pytest.mark.parametrize("arguments", [["--help"], ["extract", "--help"]])
def test_help_loads_neither_torch_nor_transformers(arguments):
    script = (
        "import sys; from poa.cli.main import main\n"
        "try:\n"
        f"    main({arguments})\n"
        "except SystemExit as end:\n"
        "    assert not end.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
