"""The command line from end to end, each command in a process of its own.

Most processes are forked from a server that has torch loaded already; the first run is started as users start it.
"""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import timm
import torch
from PIL import Image

from poa.cli.main import main
from poa.config import DataConfig
from poa.data import open_source
from poa.data.base import printable
from poa.family import load
from tests.golden.reference import relative_error
from tests.hostile_images import encoded, make_hostile_folder

NUM_STEPS = 30
TINY = """
model: {widths: [16, 32], depths: [1, 2], head_dim: 16}
heads: {num_prototypes: [16, 32], hidden_dim: 32, bottleneck_dim: 16}
augment: {num_local_crops: 2}
optim: {warmup_epochs: 0.2, freeze_last_layer_epochs: 0.2}
objective: {teacher_temp_warmup_epochs: 0.5}
train: {epochs: 0.68, batch_size: 32, checkpoint_every: 7, log_every: 3}
monitor: {every: 20, num_images: 100, collapse_rank: 1.0}
runtime: {num_workers: 0, num_threads: 1, device: cpu}
"""
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["pytest", "timm", "pyarrow.parquet", "poa.train", "poa.evaluate", "poa.cli.pretrain", "torch.utils.tensorboard"]
)


def child(arguments, folder, out, err):
    for stream, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.exit(main(arguments))


class Command:
    """A running command in a scratch folder."""

    count = 0

    def __init__(self, folder, *arguments):
        Command.count += 1
        self.files = [folder / f".command-{Command.count}.{name}" for name in ("out", "err")]
        self.process = SERVER.Process(target=child, args=([str(part) for part in arguments], folder, *self.files))
        self.process.start()

    def kill(self, number):
        os.kill(self.process.pid, number)

    def wait_until(self, condition):
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline, self.wait().err
            if not self.process.is_alive():
                return False
            time.sleep(0.002)
        return True

    def wait(self):
        self.process.join(300)
        out, err = (file.read_text() if file.exists() else "" for file in self.files)
        return SimpleNamespace(status=self.process.exitcode, out=out, err=err)


def poa(folder, *arguments):
    return Command(folder, *arguments).wait()


def succeed(folder, *arguments):
    found = poa(folder, *arguments)
    assert found.status == 0, found.err
    return found


def pretrain(*arguments, out="run"):
    return ("pretrain", "--recipe", "digits", "--config", "tiny.yaml", "--data", "digits", "--out", out, *arguments)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(TINY)
    command = [sys.executable, "-m", "poa.cli.main", *pretrain()]
    found = subprocess.run(command, check=False, cwd=folder, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return SimpleNamespace(folder=folder, run=folder / "run", out=found.stdout, err=found.stderr)


def weights(run):
    return (Path(run) / "family" / "weights.safetensors").read_bytes()


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clocked = ("images_per_second", "seconds", "data_wait")
    return [{key: line[key] for key in line if key not in clocked} for line in lines]


def last_step(run):
    try:
        lines = (run / "metrics.jsonl").read_text().split("\n")[:-1]
    except FileNotFoundError:
        return 0
    return json.loads(lines[-1])["step"] if lines else 0


def steps_saved(run):
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


def content(run):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.rglob("*") if path.is_file()}


def test_a_run_writes_its_configuration_environment_metrics_checkpoints_and_family(finished):
    run = finished.run
    assert sorted(path.name for path in run.iterdir()) == [
        ".lock",
        "checkpoints",
        "config.yaml",
        "environment.json",
        "family",
        "metrics.jsonl",
        "tensorboard",
    ]
    assert "epochs: 0.68" in (run / "config.yaml").read_text()
    environment = json.loads((run / "environment.json").read_text())
    assert environment["data"]["num_images"] == 1437
    assert [start["device"] for start in environment["starts"]] == ["cpu"]
    lines = metrics(run)
    assert [line["step"] for line in lines if "loss" in line] == list(range(3, NUM_STEPS + 1, 3))
    assert [line["step"] for line in lines if "monitor" in line] == [20, NUM_STEPS]
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert steps_saved(run) == [28, NUM_STEPS]
    assert sorted(path.name for path in (run / "family").iterdir()) == ["family.json", "weights.safetensors"]
    assert any((run / "tensorboard").iterdir())
    assert "poa subnets run" in finished.out
    assert "4 sub-networks" in finished.err


def test_the_same_command_again_changes_nothing_that_was_learnt(finished):
    names = ("family", "checkpoints", "metrics.jsonl")
    before = {path: value for path, value in content(finished.run).items() if set(names) & set(path.parts)}
    for arguments in (pretrain(), ("pretrain", "--out", "run")):
        again = succeed(finished.folder, *arguments)
        assert "The family is in run/family" in again.out
    after = {path: value for path, value in content(finished.run).items() if set(names) & set(path.parts)}
    assert {path: value[1] for path, value in after.items()} == {path: value[1] for path, value in before.items()}
    assert all(after[path][0] == before[path][0] for path in before if path.name != "metrics.jsonl")


@pytest.mark.parametrize(("number", "status", "num_workers"), [(signal.SIGTERM, 143, 1), (signal.SIGINT, 130, 0)])
def test_a_run_stopped_by_a_signal_saves_and_goes_on_as_if_it_never_stopped(
    folder, finished, number, status, num_workers
):
    run = folder / "run"
    command = Command(folder, *pretrain("--runtime.num-workers", num_workers))
    assert command.wait_until(lambda: last_step(run) >= 3)
    command.kill(number)
    found = command.wait()
    assert found.status == status, found.err
    saved = steps_saved(run)[-1]
    assert 3 <= saved < NUM_STEPS
    assert f"Stopped after step {saved} of {NUM_STEPS}; saved." in found.err
    assert "poa pretrain --out run" in found.err
    assert not (run / "family").exists()
    assert poa(folder, "subnets", "run").status == 1
    resumed = succeed(folder, "pretrain", "--out", "run")
    assert f"Resuming after step {saved}" in resumed.err
    assert weights(run) == weights(finished.run)
    assert metrics(run) == metrics(finished.run)


@pytest.mark.slow
def test_a_run_killed_ten_times_equals_one_that_never_was(folder):
    options = (
        *("--model.drop-path", "0.2", "--optim.accumulate", "2", "--runtime.num-workers", "1"),
        *("--train.epochs", "2", "--train.checkpoint-every", "3", "--train.log-every", "1", "--monitor.every", "0"),
    )
    succeed(folder, *pretrain(*options, out="whole"))
    rng = random.Random(0)
    run = folder / "run"
    for _ in range(10):
        begun = steps_saved(run)[-1:] or [0]
        lines = run / "metrics.jsonl"
        before = lines.stat().st_ino if lines.exists() else None
        command = Command(folder, *pretrain(*options))
        assert command.wait_until(lambda: lines.exists() and lines.stat().st_ino != before)  # noqa: B023
        target = begun[0] + rng.randint(0, 5)
        assert command.wait_until(lambda: last_step(run) >= target)  # noqa: B023
        time.sleep(rng.uniform(0, 0.1))
        command.kill(signal.SIGKILL)
        assert command.wait().status == -signal.SIGKILL
    succeed(folder, "pretrain", "--out", "run")
    assert weights(run) == weights(folder / "whole")
    assert metrics(run) == metrics(folder / "whole")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--train.epochs", "2"), "train.epochs: the run has 0.68, got 2.0"),
        (("--optim.base-lr", "1e-3", "--model.widths", "32"), "model.widths"),
        (("--data", "digits:test"), "data.source: the run has 'digits', got 'digits:test'"),
        (("--train.seed", "1"), "train.seed: the run has 0, got 1"),
    ],
)
def test_other_options_that_change_what_is_learnt_are_refused_by_name(finished, options, named):
    before = content(finished.run)
    found = poa(finished.folder, "pretrain", "--out", "run", *options)
    assert found.status == 1
    assert named in found.err
    assert "another --out" in found.err
    assert content(finished.run) == before


def test_options_that_do_not_change_what_is_learnt_may_differ(finished):
    options = ("--runtime.num-threads", "2", "--train.log-every", "5", "--train.keep-checkpoints", "3")
    succeed(finished.folder, "pretrain", "--out", "run", *options, "--monitor.every", "0")
    succeed(finished.folder, *pretrain())


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "tiny.yaml").write_text(TINY)
    images = folder / "images"
    images.mkdir()
    _, bad = make_hostile_folder(images)
    rng = np.random.default_rng(0)
    count = len(open_source(str(images), DataConfig(max_bad_share=0.5), 1))
    for index in range(24 + -count % 8):
        pixels = rng.integers(0, 256, (16, 16), dtype=np.uint8)
        (images / f"extra-{index}.png").write_bytes(encoded(Image.fromarray(pixels), "PNG"))
    options = ("--data", "images", "--train.batch-size", "8", "--train.epochs", "1", "--monitor.every", "0")
    refused = poa(folder, *pretrain(*options, out="refused"))
    accepted = poa(folder, *pretrain(*options, "--data.max-bad-share", "0.5"))
    return SimpleNamespace(folder=folder, bad=bad, refused=refused, accepted=accepted)


def test_a_hostile_folder_pretrains_and_every_bad_image_is_listed(hostile):
    assert hostile.accepted.status == 0, hostile.accepted.err
    lines = (hostile.folder / "run" / "skipped.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    names = [record["name"] for record in records]
    assert sorted(names) == sorted(printable(name) for name in hostile.bad)
    assert all(record["reason"] for record in records)


def test_a_hostile_folder_is_refused_by_default_before_anything_is_written(hostile):
    assert hostile.refused.status == 1
    assert "--data.max-bad-share" in hostile.refused.err
    assert "Traceback" not in hostile.refused.err
    assert not (hostile.folder / "refused").exists()


def test_other_images_than_those_of_the_run_are_refused(hostile):
    assert hostile.accepted.status == 0, hostile.accepted.err
    extra = hostile.folder / "images" / "later.png"
    extra.write_bytes(encoded(Image.new("L", (16, 16)), "PNG"))
    found = poa(hostile.folder, "pretrain", "--out", "run")
    extra.unlink()
    assert found.status == 1
    assert "are not those that this run began with" in found.err
    assert "another --out" in found.err
    succeed(hostile.folder, "pretrain", "--out", "run")


def test_the_number_of_workers_does_not_change_what_is_learnt(folder, finished):
    succeed(folder, *pretrain("--runtime.num-workers", "2"))
    assert weights(folder / "run") == weights(finished.run)
    assert metrics(folder / "run") == metrics(finished.run)


BEGIN = pretrain(out="new")
EVALUATE = ("evaluate", "knn", "run", "--train", "digits:train", "--test", "digits:test", "--device", "cpu")
MISTAKES = {
    "command misspelt": (("pretrian",), "Did you mean `poa pretrain`?"),
    "no run directory": (("pretrain", "--data", "digits"), "--out"),
    "no images named": (("pretrain", "--recipe", "vit-s16", "--out", "new"), "--data"),
    "images not there": ((*BEGIN, "--data", "nowhere"), "there is no 'nowhere'"),
    "folder without images": ((*BEGIN, "--data", "empty"), "no images found"),
    "run directory holds something": (pretrain(out="other"), "Name another --out"),
    "run directory is a file": (pretrain(out="tiny.yaml"), "Name another --out"),
    "run directory below a file": (pretrain(out="tiny.yaml/run"), "cannot write into"),
    "recipe misspelt": (("pretrain", "--recipe", "digit", "--out", "new"), "did you mean 'digits'"),
    "no such file": (("pretrain", "--config", "no.yaml", "--out", "new"), "cannot read the configuration no.yaml"),
    "unknown option in the file": (
        ("pretrain", "--recipe", "digits", "--config", "typo.yaml", "--out", "new"),
        "did you mean 'epochs'",
    ),
    "no value in the file": (
        ("pretrain", "--recipe", "digits", "--config", "none.yaml", "--out", "new"),
        "train.epochs",
    ),
    "option misspelt": ((*BEGIN, "--train.bach-size", "3"), "--train.batch-size"),
    "value of the wrong type": ((*BEGIN, "--train.batch-size", "many"), "--train.batch-size"),
    "more images in a batch than there are": ((*BEGIN, "--train.batch-size", "5000"), "--train.batch-size 1437"),
    "widths that are no multiples": ((*BEGIN, "--model.widths", "16", "24"), "multiples of head_dim 16"),
    "micro-batches that do not divide": ((*BEGIN, "--optim.accumulate", "3"), "a divisor of train.batch_size 32"),
    "local crops that do not fit": ((*BEGIN, "--augment.local-size", "5"), "for example 4"),
    "channels that no image has": ((*BEGIN, "--model.num-channels", "5"), "num_channels"),
    "endless run": ((*BEGIN, "--train.epochs", "inf"), "train.epochs"),
    "less than one step": ((*BEGIN, "--train.epochs", "0.001"), "train.epochs"),
    "decay rate of one": ((*BEGIN, "--optim.beta2", "1"), "optim.beta2"),
    "unknown device": ((*BEGIN, "--runtime.device", "tpu"), "cuda"),
    "family not there": (("subnets", "nowhere"), "there is no nowhere"),
    "no family": (("subnets", "other"), "holds no family"),
    "path too long": (("subnets", "x" * 300), "x" * 300),
    "stranger extracted": (("extract", "run", "w20-d1", "--out", "new"), "Nearest: w16-d1"),
    "no name extracted": (("extract", "run", "big", "--out", "new"), "like w384-d12"),
    "several extracted": (("extract", "run", "all", "--out", "new"), "one sub-network"),
    "extracted over something": (("extract", "run", "w16-d1", "--out", "other"), "--overwrite"),
    "image size that does not fit": (
        ("extract", "run", "w16-d1", "--out", "new", "--image-size", "9"),
        "the nearest is 8",
    ),
    "image size zero": (("extract", "run", "w16-d1", "--out", "new", "--image-size", "0"), "image size"),
    "unknown protocol": (("evaluate", "nn"), "Protocols: knn"),
    "no neighbours": ((*EVALUATE, "--k", "0"), "1 or more"),
    "empty list of neighbours": ((*EVALUATE, "--k"), "k"),
    "temperature zero": ((*EVALUATE, "--temp", "0"), "greater than 0"),
    "batch of nothing": ((*EVALUATE, "--batch-size", "0"), "batch"),
    "no subnets": ((*EVALUATE, "--subnets"), "subnets"),
    "evaluation on an unknown device": ((*EVALUATE, "--device", "tpu"), "cuda"),
    "results into a folder": ((*EVALUATE, "--subnets", "smallest", "--json", "other"), "cannot write other"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_with_its_mend_and_no_traceback(finished, mistake):
    folder, (arguments, mend) = finished.folder, MISTAKES[mistake]
    for name in ("empty", "other"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "other" / "notes.txt").write_text("mine")
    (folder / "typo.yaml").write_text("train: {epoch: 3}\n")
    (folder / "none.yaml").write_text("train: {epochs: }\n")
    found = poa(folder, *arguments)
    written = (folder / "new").exists()
    if written:
        (folder / "new").rename(folder / f"written-by-{mistake}")
    assert "Traceback" not in found.err
    assert found.status in (1, 2)
    assert mend in found.err
    assert not written


def test_help_and_listing_need_no_torch(finished):
    for arguments in (["--help"], ["--version"], ["subnets", str(finished.run)], ["pretrian"]):
        script = f"import sys; from poa.cli.main import main; main({arguments}); assert 'torch' not in sys.modules"
        found = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
        assert found.returncode == 0, found.stderr


@pytest.mark.parametrize(
    "command", [(), ("pretrain",), ("subnets",), ("extract",), ("evaluate",), ("evaluate", "knn"), ("demo",)]
)
def test_every_command_explains_itself(folder, command):
    assert "usage: poa" in succeed(folder, *command, "--help").out


def test_subnets_are_listed_with_their_sizes(finished):
    table = succeed(finished.folder, "subnets", "run").out
    rows = json.loads(succeed(finished.folder, "subnets", "run/family", "--json").out)
    assert [row["subnet"] for row in rows] == ["w16-d1", "w16-d2", "w32-d1", "w32-d2"]
    for row in rows:
        assert row["num_params"] > 0
        assert row["flops"] > 0
        assert f"{row['num_params']:,}" in table


def test_an_extracted_subnet_is_verified_and_opens_with_timm(finished, tmp_path):
    out = succeed(finished.folder, "extract", "run", "middle", "--out", tmp_path / "net").out
    family = load(finished.run)
    subnet = family.space.middle
    assert f"{subnet}: {family.card.num_params(subnet):,} parameters" in out
    assert "relative difference" in out
    model = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True).eval()
    images = torch.randn(3, 1, 8, 8)
    with torch.inference_mode():
        assert relative_error(model(images), family.features(images, subnet)) < 1e-5
    succeed(finished.folder, "extract", "run", "smallest", "--out", tmp_path / "net", "--overwrite")


def test_evaluation_prints_a_table_and_writes_its_figures(finished, tmp_path):
    options = ("--num-workers", "0", "--k", "10", "20", "--json", tmp_path / "knn.json")
    table = succeed(finished.folder, *EVALUATE, *options).out
    found = json.loads((tmp_path / "knn.json").read_text())
    assert (found["protocol"], found["num_train"], found["num_test"], found["skipped"]) == ("knn", 1437, 360, [])
    assert [result["network"] for result in found["results"]] == ["w16-d1", "w16-d2", "w32-d1", "w32-d2"]
    for result in found["results"]:
        assert list(result["figures"]) == ["accuracy", "accuracy_k10", "accuracy_k20"]
        assert all(0.15 < value <= 1.0 for value in result["figures"].values())
        assert f"{result['figures']['accuracy_k10']:.4g}" in table


def test_micro_batches_go_through_the_command_line(folder):
    succeed(folder, *pretrain("--optim.accumulate", "2", "--train.epochs", "0.2", "--monitor.every", "0"))
    lines = metrics(folder / "run")
    assert all(len(line["subnets"]) == 2 for line in lines)
    assert load(folder / "run").card.provenance["steps"] == 9


def test_parquet_files_are_pretrained_on_and_evaluated(folder):
    for split, count in (("train", 200), ("test", 60)):
        source = open_source(f"digits:{split}", DataConfig(), 1)
        rows = [
            {"image": {"bytes": encoded(source.load(i), "PNG")}, "label": int(source.labels[i])} for i in range(count)
        ]
        pa.parquet.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
    succeed(folder, *pretrain("--data", "train.parquet", "--train.epochs", "1"))
    assert json.loads((folder / "run" / "environment.json").read_text())["data"]["num_images"] == 200
    monitored = [line["monitor"] for line in metrics(folder / "run") if "monitor" in line]
    assert "knn" in monitored[-1]["w32-d2"]
    data = ("--train", "train.parquet", "--test", "test.parquet", "--json", "knn.json", "--k", "5")
    succeed(folder, "evaluate", "knn", "run", *data, "--num-workers", "1", "--device", "cpu")
    found = json.loads((folder / "knn.json").read_text())
    assert (found["num_train"], found["num_test"]) == (200, 60)
    assert all(0.0 < result["figures"]["accuracy_k5"] <= 1.0 for result in found["results"])
