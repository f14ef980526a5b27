"""What poa guarantees about files and networks that nobody vouches for (docs/safety.md)."""

import ast
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import timm
import torch
from safetensors.torch import save_file

import poa
from poa.backbones import architecture
from poa.config import DataConfig, PretrainConfig, from_dict, load_yaml
from poa.data import open_source
from poa.errors import CheckpointError, ConfigError, DataError, PoaError
from poa.family import Family, FamilyCard, Preprocessing, load, read_card
from poa.files import MAX_JSON_BYTES, read_json
from poa.models import open_models
from poa.pretrained import grown_from, open_weights
from poa.tensor_file import read_tensors
from poa.timm_models import create_timm_model
from tests.bombs import END, member
from tests.contract.configs import IN_COLOUR

SOURCE = Path(poa.__file__).parent
SECRET = "planted-b51c9e77"  # noqa: S105 (it is none)

# --- no pickle, no code


def calls(tree):
    """Every call in a module: its dotted name, its keyword arguments and its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            values = {each.arg: each.value for each in node.keywords}
            keywords = {name: each.value if isinstance(each, ast.Constant) else each for name, each in values.items()}
            yield ast.unparse(node.func), keywords, node.lineno


def dangers(text):
    """What in a module's source could run code that a file holds, each with its line."""
    tree = ast.parse(text)
    forbidden = {
        "pickle",
        "cPickle",
        "_pickle",
        "dill",
        "cloudpickle",
        "marshal",
        "shelve",
        "joblib",
        "pty",
        "commands",
    }
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            if name.partition(".")[0] in forbidden:
                yield f"{node.lineno}: import {name}"
    names = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}
    names |= {"yaml.full_load", "pandas.read_pickle", "pd.read_pickle", "torch.hub.load"}
    for name, keywords, line in calls(tree):
        if name in names or name.startswith(("os.spawn", "os.exec")):
            yield f"{line}: {name}()"
        if name in ("torch.load", "torch.jit.load") and keywords.get("weights_only") is not True:
            yield f"{line}: {name}() without weights_only=True"
        if name == "Image.open" and "formats" not in keywords:
            yield f"{line}: {name}() without formats: some of Pillow's run foreign programs"
        for keyword in ("allow_pickle", "shell", "trust_remote_code"):
            if keywords.get(keyword) not in (None, False):
                yield f"{line}: {name}({keyword}=…)"


def test_no_module_of_poa_can_run_what_a_file_holds():
    found = [
        f"{file.relative_to(SOURCE)}:{each}"
        for file in sorted(SOURCE.rglob("*.py"))
        for each in dangers(file.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "Image.open(path)",
        "exec(text)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_the_scan_finds_what_it_looks_for(text):
    assert list(dangers(text))


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return (open, (str(self.proof), "w"))


def pickled(proof):
    return pickle.dumps({"weight": Payload(proof)})


def torch_file(path, proof):
    torch.save({"model": Payload(proof)}, path)


@pytest.fixture
def family(tmp_path):
    config = IN_COLOUR["vit"]
    backbone = architecture(config).build(config)
    backbone.init_weights_(torch.Generator().manual_seed(0))
    card = FamilyCard(architecture(config), config, Preprocessing(32, 3, (0.5,), (0.5,)))
    Family(card, backbone).save(tmp_path / "family")
    return tmp_path / "family"


def test_the_payload_of_these_tests_works(tmp_path):
    pickle.loads(pickled(tmp_path / "proof"))  # noqa: S301 (this is what poa must not do)
    assert (tmp_path / "proof").exists()


def test_pickled_weights_are_never_opened(tmp_path, family):
    proof = tmp_path / "proof"
    for folder, file in (("bin", "pytorch_model.bin"), ("pth", "model.pth"), ("both", "pytorch_model.bin")):
        (tmp_path / folder).mkdir()
        told = {"architecture": "resnet10t", "num_classes": 0}
        (tmp_path / folder / "config.json").write_text(json.dumps(told))
        torch_file(tmp_path / folder / file, proof)
    (tmp_path / "both" / "model.safetensors").write_bytes(pickled(proof))
    torch_file(tmp_path / "bare.pth", proof)
    torch_file(tmp_path / "bare.safetensors", proof)
    specs = [str(tmp_path / name) for name in ("bin", "pth", "both", "bare.pth", "bare.safetensors")]
    for spec in specs:
        for read in (lambda spec: open_models([spec]), open_weights, create_timm_model):
            with pytest.raises(PoaError):
                read(spec)
    for name in ("weights.safetensors", "family.json"):
        whole = (family / name).read_bytes()
        torch_file(family / name, proof)
        with pytest.raises(CheckpointError):
            load(family)
        (family / name).write_bytes(whole)
    load(family)
    assert not proof.exists()


def test_pickles_among_the_data_are_never_opened(tmp_path):
    proof = tmp_path / "proof"
    payload = pickled(proof)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "1.png").write_bytes(payload)
    (tmp_path / "1.tar").write_bytes(member("1.png", payload) + member("1.cls", b"1") + member("1.pkl", payload) + END)
    pyarrow.parquet.write_table(
        pa.table({"image": [payload]}, metadata={b"huggingface": payload, b"pandas": payload}), tmp_path / "1.parquet"
    )
    for name in ("folder", "1.tar", "1.parquet"):
        source = open_source(str(tmp_path / name), DataConfig(max_bad_share=1.0), 3)
        with pytest.raises(Exception, match="not an image"):
            source.load(0)
    assert not proof.exists()


def test_vectors_that_are_a_pickle_are_never_opened(tmp_path):
    from poa.evaluate.store import Slot

    proof = tmp_path / "proof"
    np.save(tmp_path / "0.npy", np.array([Payload(proof)], dtype=object), allow_pickle=True)
    (tmp_path / "progress.json").write_text(json.dumps({"num_images": 1, "num_rows": 1, "num_arrays": 1}))
    with pytest.raises(CheckpointError, match="damaged"):
        Slot(tmp_path, 1)
    assert not proof.exists()


def test_yaml_makes_no_objects_of_python(tmp_path):
    proof = tmp_path / "proof"
    (tmp_path / "c.yaml").write_text(f"data: !!python/object/apply:builtins.open ['{proof}', 'w']\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_yaml(tmp_path / "c.yaml")
    assert not proof.exists()


# --- bounded reading


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"b{i}: &b{i} [{', '.join(['*a' if i == 0 else f'*b{i - 1}'] * 9)}]\n"
         for i in range(9)), "more than 20,000 values"),
        ("a: &a [*a, *a]\n", "more than 20,000 values"),
        ("[" * 20_000, "nested too deeply"),
        ("a: " + "1" * 5_000, "not valid YAML"),
        ("a: " + "x" * 300_000, "larger than 256 KiB"),
        ("a: !!timestamp x", "not valid YAML"),
        ("a: !!bool x", "not valid YAML"),
        ("- 1", "must hold"),
    ],
)  # fmt: skip
def test_configurations_that_explode_are_refused(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_yaml(tmp_path / "c.yaml")
    assert len(str(caught.value)) < 1_000


@pytest.mark.parametrize("name", ["c.yaml", "c.json"])
def test_what_is_no_regular_file_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(PoaError, match="no regular file"):
        (load_yaml if name.endswith("yaml") else read_json)(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "damaged"),
        (b"[1]", "no JSON object but a list"),
        (b"\xff\xfe", "damaged"),
        (b"", "damaged"),
        (None, "cannot read"),
    ],
)
def test_json_that_explodes_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "1.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_json(tmp_path / "1.json")


def test_json_of_a_terabyte_is_refused(tmp_path):
    with (tmp_path / "1.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match=f"larger than {MAX_JSON_BYTES >> 20} MiB"):
        read_json(tmp_path / "1.json")


HUGE = [
    ("vit", {"widths": [10**9]}),
    ("vit", {"widths": [8], "depths": [10**9]}),
    ("vit", {"image_size": 10**9}),
    ("vit", {"patch_size": 10**9, "image_size": 10**9}),
    ("vit", {"mlp_ratio": 1e300}),
    ("vit", {"num_reg_tokens": 10**9}),
    ("vit", {"num_channels": 10**9}),
    ("vit", {"draw_emphasis": 1e300}),
    ("swin", {"other_depths": [2, 10**9, 2]}),
    ("swin", {"window_size": 10**9}),
    ("swin", {"image_size": 10**9}),
    ("resnet", {"base_channels": 2**40}),
    ("resnet", {"stage3_depths": [10**9]}),
    ("resnet", {"widths": [32 * i for i in range(1, 200)], "stage2_depths": list(range(1, 200)),
                "stage3_depths": list(range(1, 200))}),
    ("convnext", {"widths": [10**9]}),
    ("convnext", {"image_size": 10**9}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes"), HUGE)
def test_absurd_networks_are_refused_by_their_configuration(name, changes):
    with pytest.raises(ConfigError, match=r"at most|multiples|less than"):
        from_dict(PretrainConfig, {"model": {"architecture": name, **changes}}, "here")


def test_a_card_that_asks_for_more_than_its_weights_is_refused_before_memory_is_asked_for(family):
    card = json.loads((family / "family.json").read_text())
    card["config"] |= {"widths": [65_536], "depths": [1_024]}
    (family / "family.json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match="does not fit the architecture"):
        load(family)


@pytest.mark.parametrize(
    "change",
    [
        {"unknown": 1},
        {"weights": {"file": "x", "sha256": "../../etc/passwd"}},
        {"weights": []},
        {"architecture": ["vit"]},
        {"config": None},
        {"provenance": {"init": "text"}},
        {"provenance": {"a": [[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]}},
        {"version": "1"},
        {"version": 99},
        {"preprocessing": {"image_size": 33, "num_channels": 3, "mean": [0.5], "std": [0.5]}},
        {"preprocessing": {"image_size": 32, "num_channels": 1, "mean": [0.5], "std": [0.5]}},
        {"preprocessing": {"image_size": 32, "num_channels": 3, "mean": [0.5], "std": [0.0]}},
        {"preprocessing": {"image_size": 32, "num_channels": 3, "mean": [0.5, 0.5], "std": [0.5]}},
        {"preprocessing": {"image_size": 32, "num_channels": 3, "mean": [0.5], "std": [0.5], "interpolation": "x"}},
    ],
)
def test_a_card_that_is_not_as_its_schema_says_is_refused(family, change):
    card = json.loads((family / "family.json").read_text())
    (family / "family.json").write_text(json.dumps(card | change))
    with pytest.raises(CheckpointError, match=r"family\.json"):
        read_card(family)


@pytest.mark.parametrize("kind", [torch.int32, torch.complex64, torch.float8_e4m3fn, torch.float16])
def test_weights_of_another_or_of_several_types_are_refused(family, kind):
    state = read_tensors(family / "weights.safetensors")
    name = next(iter(state))
    save_file({**state, name: state[name].to(kind)}, family / "weights.safetensors")
    card = json.loads((family / "family.json").read_text())
    card["weights"]["sha256"] = hashlib.sha256((family / "weights.safetensors").read_bytes()).hexdigest()
    (family / "family.json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match="must hold tensors of one of float32"):
        load(family)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [0, 2**64 - 1], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "??", "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
         "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
    ],
)  # fmt: skip
def test_tensors_that_do_not_lie_in_their_file_are_refused(tmp_path, header):
    text = json.dumps(header).encode()
    (tmp_path / "1.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        read_tensors(tmp_path / "1.safetensors")


# --- directories in timm's format


def timm_directory(folder, **changes):
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, **arguments)
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    told = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 0}
    config = {"architecture": "vit_tiny_patch16_224", "model_args": arguments, "num_classes": 0, "pretrained_cfg": told}
    config |= {name: {**config[name], **value} if isinstance(value, dict) else value for name, value in changes.items()}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "hf-hub:evil/model"}, "no network of timm"),
        ({"architecture": 3}, "no network of timm"),
        ({"model_args": {"embed_dim": 10**9}}, "numbers up to 65,536"),
        ({"model_args": {"depth": 50_000}}, "numbers up to 256"),
        ({"model_args": {"embed_dim": 32_768, "depth": 8, "num_heads": 2}}, "does not fit"),
        ({"model_args": {"checkpoint_path": "elsewhere.pth"}}, "must not have"),
        ({"model_args": {"pretrained_cfg": {}}}, "must not have"),
        ({"model_args": {"act_layer": {"a": 1}}}, "words and lists"),
        ({"model_args": {"no_such_argument": 1}}, "cannot make the network"),
        ({"model_args": [1]}, "object model_args"),
        ({"model_args": {"num_blocks": [200] * 200}}, "numbers up to 256"),
        ({"pretrained_cfg": {"input_size": [3, 10**6, 10**6]}}, "input_size"),
        ({"pretrained_cfg": {"num_classes": 10**9}}, "num_classes"),
    ],
)
def test_a_directory_that_would_do_more_than_describe_a_network_is_refused(tmp_path, changes, message):
    spec = timm_directory(tmp_path / "net", **changes)
    for read in (lambda: open_models([spec]), lambda: grown_from(spec, IN_COLOUR["vit"])):
        with pytest.raises(PoaError, match=message):
            read()


def test_a_plain_directory_is_opened_and_its_claims_of_origin_hold_no_password(tmp_path):
    told = {"url": f"https://me:{SECRET}@example.org/w.pth?token={SECRET}", "license": "mit"}
    spec = timm_directory(tmp_path / "net", pretrained_cfg=told)
    assert open_models([spec])[0].num_features == 16
    provenance = json.dumps(open_weights(spec).provenance)
    assert SECRET not in provenance
    assert "mit" in provenance


@pytest.mark.parametrize("change", [{"mean": "abc"}, {"crop_pct": "x"}, {"interpolation": "evil"}, {"std": [0, 0, 0]}])
def test_odd_claims_about_images_are_refused(tmp_path, change):
    with pytest.raises(PoaError):
        open_models([timm_directory(tmp_path / "net", pretrained_cfg=change)])


# --- no secrets, no telemetry

RUN = """
import json, os, socket, sys
allowed = ("127.0.0.1", "::1", "localhost", "", None, 0)
def guard(name):
    known = getattr(socket.socket, name)
    def guarded(self, address, *rest):
        host = address[0] if isinstance(address, tuple) else None
        if host not in allowed:
            raise SystemExit(f"telemetry: {name} to {address}")
        return known(self, address, *rest)
    setattr(socket.socket, name, guarded)
for name in ("connect", "connect_ex", "bind"):
    guard(name)
asked = socket.getaddrinfo
def getaddrinfo(host, *rest, **options):
    if host not in allowed:
        raise SystemExit(f"telemetry: asked for {host}")
    return asked(host, *rest, **options)
socket.getaddrinfo = getaddrinfo
from poa.cli.main import main
for arguments in json.loads(sys.argv[1]):
    status = main(arguments)
    assert status == 0, (arguments, status)
for address in (("93.184.216.34", 80),):
    try:
        socket.create_connection(address, timeout=1)
    except SystemExit as error:
        print("guarded:", error)
"""

TINY = """
data: {source: digits}
model: {widths: [16, 32], depths: [1, 2], head_dim: 16}
heads: {num_prototypes: [16], hidden_dim: 16, bottleneck_dim: 8}
augment: {num_local_crops: 0}
train: {epochs: 0.05, batch_size: 32, checkpoint_every: 2, log_every: 1}
monitor: {every: 0, num_images: 40, collapse_rank: 1.0}
runtime: {num_workers: 0, num_threads: 1, device: cpu}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A pre-training and what follows, in a process without a network and with secrets in its environment."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "tiny.yaml").write_text(TINY)
    commands = [
        ["pretrain", "--recipe", "digits", "--config", "tiny.yaml", "--out", "RUN"],
        ["subnets", "RUN"],
        ["extract", "RUN", "smallest", "--out", "NET"],
    ]
    planted = {"AWS_SECRET_ACCESS_KEY": SECRET, "HF_TOKEN": SECRET, "MY_VARIABLE": SECRET}
    proxy = {"HTTPS_PROXY": f"http://me:{SECRET}@proxy.invalid:1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(commands)],
        cwd=folder, env={**os.environ, **planted, **proxy}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    return folder, done


def test_nothing_of_the_network_is_asked_for(run):
    _, done = run
    assert done.returncode == 0, done.stderr[-2000:]
    assert "telemetry" not in done.stderr
    assert "guarded: telemetry: " in done.stdout


def test_nothing_of_the_environment_is_written_or_shown(run):
    folder, done = run
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert {"config.yaml", "environment.json", "family.json", "poa.json"} <= {file.name for file in files}
    assert [file for file in files if SECRET.encode() in file.read_bytes()] == []
    assert SECRET not in done.stdout + done.stderr


@pytest.mark.parametrize("spec", [f"https://me:{SECRET}@example.org/a-{{0..1}}.tar", f"s3://b/a.tar?key={SECRET}"])
def test_a_url_with_a_password_is_refused_without_repeating_it(spec):
    with pytest.raises(DataError) as caught:
        open_source(spec, DataConfig(), 3)
    assert SECRET not in str(caught.value)


def test_a_zip_file_is_no_safetensors(tmp_path):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("data.pkl", pickled(tmp_path / "proof"))
    (tmp_path / "1.safetensors").write_bytes(stream.getvalue())
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        read_tensors(tmp_path / "1.safetensors")
    assert not (tmp_path / "proof").exists()


def test_messages_show_no_more_than_the_beginning_of_a_wrong_value():
    with pytest.raises(ConfigError) as caught:
        replace(IN_COLOUR["vit"], widths=tuple(range(100_000, 1, -1)))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("polygon", [[0, 0, 1e7, 0, 1e7, 1e7], [0, 0, 10**400, 0, 1, 1], [0, 0, float("nan"), 0, 1, 1]])
def test_polygons_of_absurd_size_are_left_out(polygon):
    from poa.tasks.dense.entries import BadEntry, entry_box, run_lengths

    with pytest.raises(BadEntry, match="no finite numbers"):
        run_lengths([polygon], (16, 16))
    with pytest.raises(BadEntry, match="not finite"):
        entry_box(polygon[:4])
    assert run_lengths([[0, 0, 8, 0, 8, 8]], (16, 16))["size"] == [16, 16]


@pytest.mark.parametrize("value", [3, [1], "text", {"source": 3}, {"source": ["a"]}])
def test_a_start_that_is_no_section_is_refused_by_the_command_line(tmp_path, value):
    from poa.cli.pretrain import parse

    (tmp_path / "c.yaml").write_text(json.dumps({"init": value}))
    with pytest.raises(ConfigError, match="init"):
        parse(["--config", str(tmp_path / "c.yaml"), "--data", "digits", "--out", str(tmp_path / "run")])
