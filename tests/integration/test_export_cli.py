"""`poa export` through the command line, on untrained families; the real runtimes open what was written."""

import json
import subprocess
import sys
from typing import get_args

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import Image

from poa.cli.export import Format
from poa.cli.main import main
from poa.config import DataConfig, ViTConfig
from poa.data import open_source
from poa.deploy.export.directories import Timm, Transformers
from poa.deploy.export.executorch import ExecuTorch
from poa.deploy.export.graph import quiet_native
from poa.deploy.export.images import read_images
from poa.deploy.export.registry import EXPORTERS
from poa.errors import DataError
from poa.family import Family
from poa.task_head import TaskHead
from tests.unit.test_extraction import make_family

CONFIG = ViTConfig(widths=(16, 32), depths=(1, 2), head_dim=16, patch_size=4, image_size=8, num_channels=1)
CLASSES = ("bright", "dark")


@pytest.fixture(scope="module")
def family():
    return make_family(CONFIG)


@pytest.fixture(scope="module")
def run(family, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "run"
    family.save(folder / "family")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir()
        for number in range(20):
            pixels = np.random.default_rng(number).integers(0, 80, (8, 8)) + 120 * (1 - label)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}.png")
    return folder


def command(*parts):
    return main([str(part) for part in parts])


def text_of(capsys):
    captured = capsys.readouterr()
    return " ".join(f"{captured.out} {captured.err}".split())


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_command_line_names_every_format():
    assert get_args(Format) == tuple(EXPORTERS)


def test_several_sizes_in_several_formats_and_the_same_command_again_changes_nothing(
    family, run, images, tmp_path, capsys
):
    out = tmp_path / "out"
    line = ("export", run, "w16-d1", "intact", "--to", "torch-export", "timm", "--out", out, "--images", images)
    assert command(*line) == 0
    printed = text_of(capsys)
    assert "4 of 4 exports" in printed
    assert "40 images" in printed
    seen = torch.randn(3, 1, 8, 8)
    for subnet in ("w16-d1", "w32-d2"):
        expected = family.features(seen, subnet).numpy()
        program = torch.export.load(out / subnet / "torch-export" / "model.pt2").module()
        with torch.inference_mode():
            assert np.abs(program(seen).numpy() - expected).max() < 1e-4
            model = timm.create_model(f"local-dir:{out / subnet / 'timm'}", pretrained=True).eval()
            assert np.abs(model(seen).numpy() - expected).max() < 1e-4
        for name in ("torch-export", "timm"):
            record = json.loads((out / subnet / name / "poa.json").read_text())
            assert record["comparison"]["num_images"] == 40
            assert record["comparison"]["max_abs_difference"] <= 1e-4
            assert record["verification"]["subnet"] == subnet
            assert (out / subnet / name / "README.md").read_text().startswith("---\n")
    before = files_of(out)
    assert command(*line) == 0
    assert "4 were there already" in text_of(capsys)
    assert files_of(out) == before
    assert command(*line[:4], "w32-d1", *line[4:]) == 0
    assert "6 of 6 exports" in text_of(capsys)
    assert before.items() < files_of(out).items()


def test_one_that_fails_does_not_keep_the_others_from_being_written(run, tmp_path, monkeypatch, capsys):
    honest = Transformers.write

    def fails(exporter, what, directory):
        honest(exporter, what, directory)
        if what.subnet.width == 16:
            raise RuntimeError("the library has a bad day")

    monkeypatch.setattr(Transformers, "write", fails)
    line = ("export", run, "w16-d1", "w32-d1", "--to", "transformers", "timm", "--out", tmp_path / "out")
    assert command(*line) == 1
    printed = text_of(capsys)
    assert "3 of 4 exports" in printed
    assert "error: w16-d1 as transformers was not written: RuntimeError: the library has a bad day" in printed
    assert sorted(path.name for path in (tmp_path / "out" / "w16-d1").iterdir()) == ["timm"]
    monkeypatch.setattr(Transformers, "write", honest)
    assert command(*line) == 0
    assert "3 were there already" in text_of(capsys)
    assert {path.name for path in (tmp_path / "out" / "w16-d1").iterdir()} == {"timm", "transformers"}


def test_one_that_differs_from_the_family_is_not_kept(run, tmp_path, monkeypatch, capsys):
    honest = Timm.open
    monkeypatch.setattr(Timm, "open", lambda *args: lambda images: honest(*args)(images) * 1.01)
    assert command("export", run, "smallest", "--to", "timm", "--out", tmp_path / "out") == 1
    printed = text_of(capsys)
    assert "w16-d1 as timm was not written: w16-d1 as timm differs" in printed
    assert "Traceback" not in printed
    assert list((tmp_path / "out" / "w16-d1").iterdir()) == []


REFUSED = {
    "formats that are calibrated, without images": (("smallest", "--to", "timm", "onnx-int8"), "with --images"),
    "an unknown sub-network": (("w17-d1", "--to", "timm"), "Nearest"),
    "an image size that the patches do not divide": (("smallest", "--to", "timm", "--image-size", "9"), "nearest is 8"),
    "normalising inside what holds no graph": (
        ("smallest", "--to", "onnx", "timm", "--normalise-inside"),
        "timm leaves normalisation to its library",
    ),
    "accuracy without images": (("smallest", "--to", "onnx-int8-dynamic", "--accuracy"), "name them with --images"),
    "accuracy of exact formats": (
        ("smallest", "--to", "timm", "--accuracy", "--images", "digits"),
        "formats of 8 bits, and --to names none",
    ),
    "no images": (("smallest", "--to", "timm", "--images", "digits", "--num-images", "0"), "1 or more; got 0"),
    "no sub-network": (("--to", "timm"), "no sub-network is named"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_before_anything_is_written(case, run, tmp_path, capsys):
    options, message = REFUSED[case]
    assert command("export", run, *options, "--out", tmp_path / "out") == 1
    assert message in text_of(capsys)
    assert not (tmp_path / "out").exists()


def test_a_missing_library_names_the_extra_before_anything_is_written(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "executorch", None)
    assert command("export", run, "smallest", "--to", "timm", "executorch", "--out", tmp_path / "out") == 1
    assert "pip install 'poa[executorch]'" in text_of(capsys)
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_replaced_only_when_asked(run, tmp_path, capsys):
    place = tmp_path / "out" / "w32-d2" / "timm"
    place.mkdir(parents=True)
    (place / "notes.txt").write_text("mine")
    line = ("export", run, "w16-d1", "w32-d2", "--to", "timm", "--out", tmp_path / "out")
    assert command(*line) == 1
    assert f"{place} holds something that is no complete export" in text_of(capsys)
    assert list(files_of(tmp_path / "out").values()) == [b"mine"]
    assert command(*line, "--overwrite") == 0
    assert not (place / "notes.txt").exists()
    assert command(*line, "--image-size", "16") == 1
    assert "another image size (8, now 16)" in text_of(capsys)


def test_the_classifier_is_exported_and_described(family, tmp_path):
    rng = torch.Generator().manual_seed(0)
    head = TaskHead(torch.randn(2, 32, generator=rng), torch.randn(2, generator=rng), CLASSES)
    classifying = Family(family.card, family.supernet, head)
    classifying.save(tmp_path / "family")
    assert command("export", tmp_path / "family", "smallest", "--to", "onnx", "--out", tmp_path / "out") == 0
    file = tmp_path / "out" / "w16-d1" / "onnx" / "model.onnx"
    seen = torch.randn(3, 1, 8, 8)
    found = onnxruntime.InferenceSession(file).run(["logits"], {"images": seen.numpy()})[0]
    assert np.abs(found - classifying.logits(seen, "w16-d1").numpy()).max() < 1e-4
    metadata = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    described = json.loads(metadata["poa.preprocessing"])
    assert described == json.loads((file.parent / "preprocessing.json").read_text())
    assert described["classes"] == list(CLASSES)
    assert described["output"]["name"] == "logits"
    assert metadata["poa.subnet"] == "w16-d1"


def test_a_network_that_normalises_inside_takes_values_of_0_to_1(family, run, tmp_path, capsys):
    options = ("--to", "onnx", "--normalise-inside", "--json", "--out", tmp_path / "out")
    assert command("export", run, "smallest", *options) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["comparison"]["max_abs_difference"] <= 1e-4
    assert entry["directory"] == str(tmp_path / "out" / "w16-d1" / "onnx")
    how, values = family.card.preprocessing, torch.rand(3, 1, 8, 8)
    session = onnxruntime.InferenceSession(tmp_path / "out" / "w16-d1" / "onnx" / "model.onnx")
    found = session.run(None, {"images": values.numpy()})[0]
    expected = family.features((values - how.mean[0]) / how.std[0], "w16-d1").numpy()
    assert np.abs(found - expected).max() < 1e-4


def test_images_that_cannot_be_read_are_left_out_and_reported(run, images, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for number, file in enumerate(sorted(images.rglob("*.png"))):
        (folder / f"{number}.png").write_bytes(file.read_bytes())
    (folder / "broken.png").write_bytes(b"no image")
    line = ("export", run, "smallest", "--to", "timm", "--out", tmp_path / "out", "--images", folder)
    assert command(*line) == 1
    assert "1 of 41 images cannot be used" in text_of(capsys)
    assert command(*line, "--max-bad-share", "0.1") == 0
    assert "left out: broken.png" in text_of(capsys)
    record = json.loads((tmp_path / "out" / "w16-d1" / "timm" / "poa.json").read_text())
    assert record["comparison"]["num_images"] == 40


def test_calibration_images_are_others_than_those_compared_and_always_the_same(family, images):
    source = open_source(str(images), DataConfig(), 1)
    first, again = (read_images(family, source, 15, needs_calibration=True) for _ in range(2))
    assert torch.equal(first.compared, again.compared)
    assert torch.equal(first.calibration, again.calibration)
    assert (len(first.compared), len(first.calibration)) == (15, 15)
    distances = torch.cdist(first.compared.flatten(1), first.calibration.flatten(1))
    assert float(distances.min()) > 0
    few = read_images(family, source, 100, needs_calibration=True)
    assert (len(few.compared), len(few.calibration)) == (20, 20)
    with pytest.raises(DataError, match="give at least 2"):
        read_images(family, source, 0)


def test_what_cpp_writes_is_shown_only_with_an_error(capfd):
    script = "import os; os.write(2, b'chatter\\n')"
    with quiet_native():
        subprocess.run([sys.executable, "-c", script], check=True)
    assert capfd.readouterr().err == ""
    with pytest.raises(subprocess.CalledProcessError), quiet_native():
        subprocess.run([sys.executable, "-c", f"{script}; raise SystemExit(1)"], check=True)
    assert capfd.readouterr().err == "chatter\n"


def test_help_loads_no_torch():
    script = (
        "import sys; from poa.cli.main import main\n"
        "try:\n"
        "    main(['export', '--help'])\n"
        "except SystemExit as end:\n"
        "    assert not end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.mark.slow
def test_the_runtimes_say_nothing(run, tmp_path):
    names = [name for name in EXPORTERS if not EXPORTERS[name].needs_calibration]
    assert ExecuTorch.name in names
    line = ["export", str(run), "smallest", "--to", *names, "--out", str(tmp_path / "out")]
    found = subprocess.run([sys.executable, "-m", "poa.cli.main", *line], check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stderr.strip() == ""
    assert found.stdout.strip().startswith(f"{len(names)} of {len(names)} exports")
