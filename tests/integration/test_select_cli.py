"""`poa select` through its command line, on a family's card and written tables."""

import json
import shlex
import subprocess
import sys

import pytest
from PIL import Image

from poa.backbones import architecture
from poa.cli.main import main
from poa.config import ViTConfig, to_dict
from poa.deploy.profile.table import ProfileRow, write_profile
from poa.family import FORMAT, FORMAT_VERSION, Preprocessing, read_card

QUALITY = {"w16-d1": 0.5, "w16-d2": 0.6, "w32-d1": 0.8, "w32-d2": 0.7}
LATENCY = {"w16-d1": 1.0, "w16-d2": 2.0, "w32-d1": 7.9, "w32-d2": 9.0}


@pytest.fixture
def given(tmp_path):
    """A directory with the card of a family (no weights), profile.csv and results.csv."""
    config = ViTConfig(widths=(16, 32), depths=(1, 2), head_dim=8, patch_size=4, image_size=16, num_channels=2)
    card = {"format": FORMAT, "version": FORMAT_VERSION, "architecture": "vit", "config": to_dict(config)}
    card |= {"preprocessing": to_dict(Preprocessing(16, 2, (0.5,), (0.25,))), "provenance": {}}
    card |= {"weights": {"file": "weights.safetensors", "sha256": "ab" * 32}}
    (tmp_path / "family.json").write_text(json.dumps(card))
    family = read_card(tmp_path)
    sizes = {str(subnet): family.num_params(subnet) for subnet in architecture("vit").space(config).subnets}
    lines = ["network,source,num_params,flops,knn/accuracy,linear/accuracy"]
    lines += [f"{name},{tmp_path},{sizes[name]},1,{value},{1 - value}" for name, value in QUALITY.items()]
    (tmp_path / "results.csv").write_text("\n".join(lines) + "\n")
    write_profile(tmp_path / "profile.csv", [profiled(name, sizes[name], 1) for name in sizes])
    return tmp_path


def profiled(name, num_params, num_threads, runtime="onnx"):
    is_measured = name != "w32-d1"
    return ProfileRow(
        **{"device": "Board", "runtime": runtime, "precision": "float32", "num_threads": num_threads, "batch_size": 1},
        **{"image_size": 16, "subnet": name, "is_measured": is_measured, "latency_ms": LATENCY[name]},
        **{"latency_p95_ms": 1.5 * LATENCY[name], "throughput": 1000 / LATENCY[name], "peak_memory_mb": 5.0},
        **{"num_params": num_params, "flops": 5, "file_size_mb": num_params * 4 / 1e6, "family": "ab" * 6},
        **{"fit_error": None if is_measured else 0.05, "date": "2026-01-02", "poa_version": "0"},
    )


def select(given, capsys, *options, tables=True):
    files = ("--profile", given / "profile.csv", "--results", given / "results.csv") if tables else ()
    status = main([str(part) for part in ("select", given, *files, *options)])
    out, err = capsys.readouterr()
    return status, " ".join((out + err).split())


def test_the_front_the_pick_with_why_and_the_command_are_printed(given, capsys):
    status, text = select(given, capsys, "--quality", "knn", "--max-latency", "8ms", "--max-size", "1MB")
    assert status == 0
    assert "w32-d1: best knn/accuracy within the budget, 0.8; latency ~7.9 ms (at most 8 ms);" in text
    assert "3 of 4 sub-networks fit" in text
    assert "→ w32-d1" in text
    assert "w16-d2: lost knn/accuracy −0.2; gained latency −5.9 ms" in text
    assert f"poa export {given} w32-d1 --to onnx --out exports" in text
    assert "predicted, and is within the fit's error (5 %) of the limit: measure it" in text


def test_json_is_complete(given, capsys):
    options = ("--quality", "knn", "--max-latency", "8ms", "--json", "--num-runner-ups", "1")
    status = main([str(part) for part in ("select", given, "--profile", given / "profile.csv", "--results",
                                          given / "results.csv", *options)])  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert status == 0
    assert found["pick"]["subnet"] == "w32-d1"
    assert (found["pick"]["quality"], found["pick"]["is_measured"], found["pick"]["fit_error"]) == (0.8, False, 0.05)
    assert found["budget"] == [{"figure": "latency_ms", "limit": 8.0, "is_minimum": False}]
    assert found["setting"]["runtime"] == "onnx"
    assert [each["row"]["subnet"] for each in found["runner_ups"]] == ["w16-d2"]
    assert [row["subnet"] for row in found["rows"]] == list(QUALITY)
    assert (found["num_usable"], found["num_fitting"]) == (4, 3)
    assert found["front"] == ["w16-d1", "w16-d2", "w32-d1"]
    assert shlex.split(found["command"])[:2] == ["poa", "export"]
    assert found["relaxations"] == []


def test_where_nothing_fits_the_status_is_3_and_the_named_limit_lets_something_in(given, capsys):
    options = ("--quality", "knn", "--max-latency", "0.5ms", "--min-quality", "0.55")
    status, text = select(given, capsys, *options)
    assert status == 3
    assert "Nothing fits" in text
    assert "--max-latency 2ms: then w16-d2 fits" in text
    assert select(given, capsys, "--quality", "knn", "--max-latency", "2ms", "--min-quality", "0.55")[0] == 0
    status, text = select(given, capsys, *options, "--json")
    found = json.loads(text)
    assert (status, found["pick"], found["command"]) == (3, None, None)
    assert found["relaxations"][0]["options"] == ["--max-latency 2ms"]


def test_the_largest_that_fits_is_picked_where_nobody_evaluated(given, capsys):
    status, text = select(given, capsys, "--quality", "params", "--max-params", "20k", tables=False)
    assert status == 0
    assert "most parameters within the budget" in text
    assert "nobody evaluated" in text
    assert "--to timm" in text


def test_several_settings_need_a_choice(given, capsys):
    write_profile(given / "profile.csv", [profiled("w16-d1", 5000, 4, "torch")])
    status, text = select(given, capsys, "--quality", "knn", "--max-latency", "8ms")
    assert status == 1
    assert "2 settings; choose one with --runtime or --num-threads" in text
    status, text = select(given, capsys, "--quality", "knn", "--max-latency", "8ms", "--num-threads", "4")
    assert status == 0
    assert "3 of 4 sub-networks were left out, for want of latency" in text
    assert f"poa export {given} w16-d1 --to timm" in text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--quality", "knn", "--max-latency", "8"), "Valid: 8ms"),
        (("--quality", "knn", "--num-runner-ups", "-1"), "must be 0 or more"),
        (("--quality", "kn"), "Nearest: knn"),
        ((), "Choose with --quality: knn, linear"),
    ],
)
def test_mistakes_are_told(given, capsys, options, says):
    status, text = select(given, capsys, *options)
    assert status == 1
    assert says in text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--quality", "params", "--max-latency", "8ms"), "--max-latency needs a table of the device"),
        (("--quality", "params", "--device", "Board"), "--profile is not given"),
        (("--quality", "knn"), "needs --results"),
    ],
)
def test_options_that_need_a_table_are_refused_without_it(given, capsys, options, says):
    status, text = select(given, capsys, *options, tables=False)
    assert status == 1
    assert says in text


def test_the_picture_is_drawn_whether_something_fits_or_not(given, capsys):
    for name, limit in (("fits", "8ms"), ("nothing", "0.5ms")):
        path = given / "pictures" / f"{name}.png"
        select(given, capsys, "--quality", "knn", "--max-latency", limit, "--min-quality", "0.6", "--plot", path)
        with Image.open(path) as image:
            assert image.size == (1125, 720)


def test_it_needs_no_torch(given):
    arguments = ["select", str(given), "--profile", f"{given}/profile.csv", "--results", f"{given}/results.csv"]
    arguments += ["--quality", "knn", "--max-latency", "8ms"]
    code = f"import sys; from poa.cli.main import main; main({arguments!r}); sys.exit(10 + ('torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 10
