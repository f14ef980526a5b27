"""`poa profile` through its command line, on tiny families with fresh weights."""

import itertools
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from poa.backbones import architecture
from poa.cli.main import main
from poa.config import ViTConfig
from poa.deploy.profile import read_profile, write_profile
from poa.family import Family, FamilyCard, Preprocessing
from tests.devices import needs_cuda

QUICK = ("--num-runs", "6", "--max-seconds", "0.2", "--num-threads", "1")
QUICKER = (*QUICK, "--skip-memory")
TINY = ViTConfig(widths=(16, 24, 32), depths=(1, 2, 3), head_dim=8, patch_size=4, image_size=16, num_channels=1)


def save_family(folder, seed=0):
    kind = architecture(TINY)
    backbone = kind.build(TINY)
    backbone.init_weights_(torch.Generator().manual_seed(seed))
    how = Preprocessing(TINY.image_size, TINY.num_channels, (0.5,), (0.25,))
    Family(FamilyCard(kind, TINY, how), backbone).save(folder)
    return folder


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return save_family(tmp_path_factory.mktemp("profile") / "family")


@pytest.fixture(scope="module")
def networks(family, tmp_path_factory):
    """A kit of one of the nine networks."""
    folder = tmp_path_factory.mktemp("kit") / "kit"
    assert main(["profile", str(family), "--bundle", str(folder), "--subnets", "smallest"]) == 0
    return folder


def poa(*parts):
    return main(["profile", *map(str, parts)])


@pytest.mark.parametrize(
    ("runtime", "memory"), [("torch", ()), pytest.param("onnx", ("--skip-memory",), marks=pytest.mark.slow)]
)
def test_networks_are_measured_by_their_runtime(family, tmp_path, runtime, memory, capsys):
    out = tmp_path / "profile.csv"
    options = ("--runtime", runtime, "--subnets", "smallest", "--batch-size", "2", "--device-name", "the bench")
    assert poa(family, *options, *memory, *QUICK, "--out", out) == 0
    (row,) = read_profile(out)
    assert (row.device, row.runtime, row.precision, row.num_threads) == ("the bench", runtime, "float32", 1)
    assert (row.batch_size, row.image_size, row.subnet) == (2, 16, "w16-d1")
    assert row.is_measured
    assert 0 < row.latency_ms <= row.latency_p95_ms
    assert row.throughput == pytest.approx(2000 / row.latency_ms, rel=1e-3)
    assert row.peak_memory_mb is None if memory else 0 < row.peak_memory_mb < 100
    assert 4e-6 * row.num_params < row.file_size_mb < 4e-6 * row.num_params + 0.2
    printed = capsys.readouterr().out
    assert "w16-d1" in printed
    assert f"the bench: {runtime}, float32, 1 thread, batch 2, 16×16 px" in printed


def test_the_same_command_measures_only_what_is_missing(family, tmp_path, capsys):
    out = tmp_path / "profile.csv"
    assert poa(family, "--subnets", "smallest", *QUICKER, "--out", out) == 0
    (first,) = read_profile(out)
    write_profile(out, [replace(first, latency_ms=1234.5)])
    assert poa(family, "--subnets", "smallest", "intact", *QUICKER, "--out", out) == 0
    assert "1 were measured already." in capsys.readouterr().out
    assert [row.latency_ms == 1234.5 for row in read_profile(out)] == [True, False]
    assert poa(family, "--subnets", "smallest", "intact", *QUICKER, "--out", out, "--overwrite") == 0
    assert all(row.latency_ms < 1234.5 for row in read_profile(out))


def test_a_busy_machine_is_told_and_an_idle_one_is_not(family, tmp_path, monkeypatch, capsys):
    for step, is_told in ((1e6, True), (0.0, False)):
        waited = itertools.count(0.0, step)
        monkeypatch.setattr("poa.deploy.profile.kit.timing.seconds_waited", waited.__next__)
        assert poa(family, "--subnets", "smallest", *QUICKER, "--out", tmp_path / "profile.csv", "--overwrite") == 0
        assert ("warning: other processes held the processor" in capsys.readouterr().err) == is_told


def test_of_a_designed_subset_the_rest_is_predicted_with_the_error_on_held_out_rows(family, tmp_path, capsys):
    out = tmp_path / "profile.csv"
    assert poa(family, "--num-measured", "7", *QUICKER, "--out", out, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    rows = read_profile(out)
    assert [row.is_measured for row in rows].count(True) == 7
    assert len(rows) == len(found["rows"]) == 9
    (error,) = found["held_out"]
    assert error["num_measured"] == 7
    assert {row.fit_error for row in rows} == {None, round(error["root_mean_square"], 4)}
    assert {row.peak_memory_mb for row in rows} == {None}


def test_sizes_of_predicted_rows_are_those_of_the_files(family, tmp_path):
    out = tmp_path / "profile.csv"
    assert poa(family, "--num-measured", "7", *QUICKER, "--out", out) == 0
    predicted = {row.subnet: row.file_size_mb for row in read_profile(out) if not row.is_measured}
    assert len(predicted) == 2
    for name, megabytes in predicted.items():
        assert main(["extract", str(family), name, "--out", str(tmp_path / name)]) == 0
        assert (tmp_path / name / "model.safetensors").stat().st_size == round(1e6 * megabytes)


BLOCKED = """
import builtins, runpy, sys
real = builtins.__import__
def guarded(name, *rest):
    if name.split(".")[0] in ("poa", "torch", "timm", "scipy", "sklearn", "safetensors", "rich", "tyro"):
        raise ImportError("not on this machine: " + name)
    return real(name, *rest)
builtins.__import__ = guarded
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_kit(kit, folder, *options):
    command = [sys.executable, "-I", "-c", BLOCKED, str(kit / "measure.py"), *QUICK, *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_a_kit_fills_the_table_without_poa_and_torch(networks, tmp_path):
    done = run_kit(networks, tmp_path, "--device-name", "Pixel 8")
    assert done.returncode == 0, done.stderr
    table = tmp_path / "profile.csv"
    rows = read_profile(table)
    assert [row.subnet for row in rows] == ["w16-d1"]
    assert {(row.device, row.runtime, row.is_measured) for row in rows} == {("Pixel 8", "onnx", True)}
    assert 0 < rows[0].peak_memory_mb < 100
    again = run_kit(networks, tmp_path, "--device-name", "Pixel 8")
    assert "1 networks are in the table already, 0 are measured now" in again.stdout
    assert read_profile(table) == rows
    table.write_text("network,latency\n")
    assert "its columns are others" in run_kit(networks, tmp_path).stderr


def test_a_table_from_elsewhere_is_completed_in_each_of_its_settings(family, tmp_path, capsys):
    table = tmp_path / "profile.csv"
    names = ("w16-d1", "w16-d2", "w16-d3", "w24-d2", "w32-d1", "w32-d2", "w32-d3")
    assert poa(family, "--subnets", *names, *QUICKER, "--out", table) == 0
    measured = [replace(row, device="Pixel 8", runtime="onnx") for row in read_profile(table)]
    table.unlink()
    write_profile(table, [*measured, *(replace(row, num_threads=4) for row in measured)])
    before = read_profile(table)
    capsys.readouterr()
    assert poa(family, "--complete", table, "--out", tmp_path / "all.csv") == 0
    assert capsys.readouterr().out.count("predicted from 7 measured networks") == 2
    assert read_profile(table) == before
    completed = read_profile(tmp_path / "all.csv")
    assert len(completed) == 18
    assert {row for row in completed if row.is_measured} == set(before)
    assert poa(family, "--complete", table) == 0
    assert {row.key for row in read_profile(table)} == {row.key for row in completed}


def test_a_kit_is_self_contained_and_says_what_is_wrong_with_it(networks, tmp_path):
    assert {path.name for path in networks.iterdir()} == {"README.md", "kit.json", "measure.py", "networks", "poa_kit"}
    broken = tmp_path / "kit"
    broken.mkdir()
    shutil.copytree(networks / "poa_kit", broken / "poa_kit")
    (broken / "measure.py").write_bytes((networks / "measure.py").read_bytes())
    assert "kit.json is missing" in run_kit(broken, tmp_path).stderr
    (broken / "kit.json").write_bytes((networks / "kit.json").read_bytes())
    assert "the kit lacks networks/w16-d1/model.onnx" in run_kit(broken, tmp_path).stderr
    assert "at least 1" in run_kit(networks, tmp_path, "--batch-size", "0").stderr


def test_a_table_of_another_family_is_refused_before_work(family, tmp_path, capsys):
    out = tmp_path / "profile.csv"
    other = save_family(tmp_path / "other", seed=1)
    assert poa(other, "--subnets", "smallest", *QUICKER, "--out", out) == 0
    before = out.read_bytes()
    assert poa(family, "--subnets", "smallest", *QUICKER, "--out", out) == 1
    assert poa(family, "--complete", out) == 1
    assert capsys.readouterr().err.count("has rows of another family") == 2
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--runtime", "onyx"), "no runtime 'onyx'. Runtimes: torch, "),
        (("--runtime", "timm"), "no runtime 'timm'"),
        (("--device", "cuda", "--runtime", "onnx"), "--device cuda runs torch only"),
        (("--image-size", "15"), "15"),
        (("--subnets", "w17-d1"), "w17-d1 is not in this family"),
        (("--num-measured", "12"), "there are 9 sub-networks"),
        (("--num-measured", "3"), "at least 6 measured"),
        (("--num-threads", "0"), "--num-threads is 0"),
        (("--batch-size", "0"), "--batch-size is 0"),
        (("--num-runs", "0"), "--num-runs is at least 1"),
        (("--device-name", " "), "--device-name is empty"),
        (("--bundle", "KIT", "--device", "cuda", "--out", "x.csv"), "--device, --out would do nothing with --bundle"),
        (("--bundle", "KIT", "--runtime", "torch"), "a kit runs ONNX files"),
        (("--complete", "none.csv"), "cannot read the profile none.csv"),
        (("--complete", "none.csv", "--batch-size", "2"), "--batch-size would do nothing with --complete"),
    ],
)
def test_what_is_wrong_is_refused_before_work(family, tmp_path, monkeypatch, options, said, capsys):
    monkeypatch.chdir(tmp_path)
    assert poa(family, *options) == 1
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_runtime_that_is_not_installed_is_refused_with_what_to_install(family, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert poa(family, "--runtime", "onnx", "--out", tmp_path / "profile.csv") == 1
    assert "pip install 'poa[onnx]'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there, which the next test measures")
def test_cuda_that_is_not_there_is_refused(family, tmp_path, capsys):
    assert poa(family, "--device", "cuda", "--out", tmp_path / "profile.csv") == 1
    assert "cuda" in capsys.readouterr().err


@needs_cuda
def test_networks_are_measured_on_cuda(family, tmp_path):
    out = tmp_path / "profile.csv"
    assert poa(family, "--device", "cuda", "--subnets", "smallest", "intact", *QUICK, "--out", out) == 0
    small, large = read_profile(out)
    assert small.device == torch.cuda.get_device_name()
    assert 4e-6 * small.num_params < small.peak_memory_mb < large.peak_memory_mb < 100
