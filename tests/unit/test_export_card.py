import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from poa.data.augment import eval_transform
from poa.deploy.export.accuracy import AccuracyDrop
from poa.deploy.export.base import Exported
from poa.deploy.export.card import licence_of, write_card
from poa.deploy.export.compare import Comparison
from poa.deploy.export.images import ExportImages
from poa.deploy.export.registry import EXPORTERS
from poa.deploy.export.snippet import snippet
from poa.errors import ConfigError
from poa.family import Family
from poa.task_head import TaskHead
from tests.contract.configs import IN_COLOUR
from tests.unit.test_extraction import make_family

PROVENANCE = {
    "method": "POA",
    "poa": "0.1.0",
    "commit": "abc123",
    "data": {"source": "/home/somebody/photos/train.parquet", "num_images": 1437, "fingerprint": "83fa88"},
    "epochs": 40.0,
}
INIT = {
    "name": "vit_small.dino",
    "license": "apache-2.0",
    "source": "timm:vit_small.dino",
    "feature_order": list(range(99)),
}
FOUND = Comparison(
    subnet="w16-d1",
    format="onnx-int8",
    precision="int8",
    num_images=64,
    is_noise=False,
    max_abs_difference=0.0123,
    relative_difference=0.0045,
    cosine_similarity=0.998765,
    min_cosine_similarity=0.991234,
    num_bytes=12_340_000,
    latency_ms=3.21,
    num_runs=30,
    num_threads=2,
    processor="A Processor",
    accuracy=AccuracyDrop("k-NN, k = 20", 1000, 200, 0.8125, 0.805, 0.0031),
)
IMAGES = ExportImages(torch.zeros(64, 3, 32, 32), torch.zeros(50, 3, 32, 32), "/home/somebody/photos", "none")


def exported(*, provenance=PROVENANCE, has_head=False, num_channels=3, size=32):
    config = replace(IN_COLOUR["vit"], num_channels=num_channels)
    family = make_family(config)
    how = family.card.preprocessing
    if num_channels == 3:
        how = replace(how, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), crop_pct=0.875)
    head = None
    if has_head:
        weight = torch.randn(3, family.supernet.layout.features.size, generator=torch.Generator().manual_seed(3))
        head = TaskHead(weight, torch.zeros(3), ("ant", "bee", "cat"))
    family = Family(replace(family.card, preprocessing=how, provenance=provenance), family.supernet, head)
    what = Exported(family, family.space.smallest, size)
    return replace(what, calibration=what.probe_images(16))


def card_of(tmp_path, name="onnx-int8", what=None, **options):
    write_card(tmp_path, EXPORTERS[name](), exported() if what is None else what, FOUND, IMAGES, **options)
    return ModelCard.load(tmp_path / "README.md")


@pytest.mark.parametrize("name", EXPORTERS)
def test_the_hub_reads_the_metadata_of_every_format(name, tmp_path):
    data = card_of(tmp_path, name, licence="mit").data.to_dict()
    assert data["license"] == "mit"
    assert data["library_name"] == EXPORTERS[name].hub_library
    assert data["pipeline_tag"] == "image-feature-extraction"
    assert set(data["tags"]) >= {"poa", "vit", EXPORTERS[name].precision}
    assert "datasets" not in data
    assert card_of(tmp_path, name, exported(has_head=True)).data.pipeline_tag == "image-classification"


def test_the_figures_and_where_they_come_from_are_in_the_text(tmp_path):
    what = exported()
    text = card_of(tmp_path, what=what).text
    card = what.family.card
    for wanted in (
        f"{card.num_params(what.subnet):,}",
        f"{card.flops(what.subnet) / 1e6:,.1f} million",
        "12.34 MB",
        "1.2e-02",
        "4.5e-03",
        "0.998765",
        "0.991234",
        "3.21 ms for one image (median of 30 runs, 2 threads, A Processor)",
        "64 images of photos",
        "50 other images of photos",
        "81.25%",
        "80.50%",
        "0.75 points, standard error of the paired difference 0.31",
        "k-NN, k = 20 on 200 images against 1,000 labelled ones",
        "Mean 0.4, 0.5, 0.6, deviation 0.2, 0.25, 0.3",
        "the shorter side to 36 pixels, bicubic",
        "abc123",
        "83fa88",
        "train.parquet",
    ):
        assert wanted in text, wanted
    assert "/home" not in text


def test_a_card_without_images_or_accuracy_says_so(tmp_path):
    found = replace(FOUND, accuracy=None, is_noise=True)
    write_card(tmp_path, EXPORTERS["onnx"](), exported(), found)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "64 images of noise" in text
    assert "top-1" not in text
    assert "scales" not in text


@pytest.mark.parametrize(
    ("init", "asked", "metadata", "sentence"),
    [
        (None, None, {}, "The licence of these weights is not stated."),
        (None, "cc-by-4.0", {"license": "cc-by-4.0"}, "The licence of these weights is cc-by-4.0."),
        (None, "dinov3-license", {"license": "other", "license_name": "dinov3-license"}, "is dinov3-license."),
        (INIT, None, {"license": "apache-2.0"}, "started from vit_small.dino, licensed under apache-2.0."),
        (INIT, "apache-2.0", {"license": "apache-2.0"}, "licensed under apache-2.0."),
        (INIT | {"license": "unknown"}, None, {}, "started from vit_small.dino, whose licence is not known."),
        (INIT | {"license": "unknown"}, "mit", {"license": "mit"}, "whose licence is not known."),
    ],
)
def test_the_licence_is_that_of_the_weights_or_the_one_given_and_never_invented(
    init, asked, metadata, sentence, tmp_path
):
    what = exported(provenance=PROVENANCE if init is None else PROVENANCE | {"init": init})
    card = card_of(tmp_path, what=what, licence=asked)
    assert {key: value for key, value in card.data.to_dict().items() if key.startswith("license")} == metadata
    assert sentence in card.text
    assert "98" not in card.text.split("## Provenance")[1]


def test_another_licence_than_that_of_the_weights_is_refused():
    what = exported(provenance=PROVENANCE | {"init": INIT})
    with pytest.raises(
        ConfigError, match=r"vit_small\.dino, whose licence is apache-2\.0; it cannot be exported as mit"
    ):
        licence_of(what.family, "mit")


def run_snippet(exporter, what, folder, monkeypatch, mode):
    exporter.write(what, folder)
    rows, columns = np.mgrid[:70, :50]
    pixels = (128 + 100 * np.sin(rows / 7) * np.cos(columns / 5)).astype(np.uint8)
    image = Image.merge("RGB", [Image.fromarray(np.roll(pixels, 9 * part, axis=1)) for part in range(3)])
    image.convert(mode).save(folder / "image.jpg")
    monkeypatch.chdir(folder)
    names = {}
    with torch.inference_mode():
        exec(snippet(exporter, what), names)  # noqa: S102 (what the card shows)
    found = names["found"]
    found = torch.from_numpy(found) if isinstance(found, np.ndarray) else found
    how = what.family.card.preprocessing
    with Image.open("image.jpg") as file:
        shown = eval_transform(file.convert(mode), what.image_size, how.crop_pct, how.interpolation)
    mean, std = (torch.tensor(how.per_channel(each)).view(-1, 1, 1) for each in (how.mean, how.std))
    return found, what.expected(((torch.tensor(shown) / 255 - mean) / std).unsqueeze(0))


QUICK = ("timm", "torch-export", "onnx")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in EXPORTERS]
)
def test_the_snippet_runs_and_gives_what_the_family_gives(name, tmp_path, monkeypatch, capsys):
    what = exported()
    found, expected = run_snippet(EXPORTERS[name](), what, tmp_path, monkeypatch, "RGB")
    assert found.shape == expected.shape
    difference = float((found - expected).norm() / expected.norm())
    # On processors with bfloat16 units OpenVINO computes in bfloat16 by default.
    is_exact = EXPORTERS[name].precision == "float32" and name != "openvino"
    assert difference < (1e-5 if is_exact else 0.05)
    assert f"# [1, {expected.shape[1]}]" in snippet(EXPORTERS[name](), what)


@pytest.mark.parametrize(("name", "mode"), [("timm", "L"), pytest.param("transformers", "RGB", marks=pytest.mark.slow)])
def test_the_snippet_of_a_classifier_gives_logits(name, mode, tmp_path, monkeypatch):
    what = exported(has_head=True, num_channels=len(mode))
    found, expected = run_snippet(EXPORTERS[name](), what, tmp_path, monkeypatch, mode)
    assert found.shape == (1, 3)
    assert float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnx", "torch-export"])
def test_the_snippet_of_a_network_that_normalises_itself_leaves_that_out(name, tmp_path, monkeypatch):
    exporter = EXPORTERS[name](normalise_inside=True)
    found, expected = run_snippet(exporter, exported(), tmp_path, monkeypatch, "RGB")
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_channels_that_no_image_file_has_get_an_array_in_their_place(tmp_path, monkeypatch):
    what = exported(num_channels=5)
    EXPORTERS["timm"]().write(what, tmp_path)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(snippet(EXPORTERS["timm"](), what), names)  # noqa: S102 (what the card shows)
    assert names["images"].shape == (1, 5, 32, 32)
    assert math.isfinite(float(names["found"].detach().sum()))
