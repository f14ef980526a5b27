"""What is fuzzed: everything that reads what a user names. Each either works or raises one of `EXPECTED`."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from poa.data import BadImage
from poa.errors import PoaError
from poa.randomness import generator
from tests.fuzzing import mutate
from tests.hostile_images import encoded, picture, valid_files

Rng = np.random.Generator


@dataclass(frozen=True)
class Target:
    """Something that reads a file.

    Attributes:
        name: of the target.
        seeds: valid contents.
        mutations: of which one makes a case.
        run: reads a content; the folder is its own and may be written to.
        share: of the cases, relative to the other targets.
    """

    name: str
    seeds: tuple[Any, ...]
    mutations: tuple[Callable[[Any, Rng], Any], ...]
    run: Callable[[Any, Path], object]
    share: float = 1.0

    def case(self, seed: int, index: int) -> Any:
        """The content of a case, a pure function of its arguments."""
        rng = generator(seed, "fuzz", zlib.crc32(self.name.encode()), index)
        content = self.seeds[int(rng.integers(len(self.seeds)))]
        return self.mutations[int(rng.integers(len(self.mutations)))](content, rng)


def targets(folder: Path) -> list[Target]:
    """All of them; `folder` gets the valid files that they begin with."""
    bytewise, treewise = (mutate.mutated_bytes,), (mutate.mutated_value,)
    return [
        Target("config-yaml", _yaml_texts(), bytewise, _read_yaml),
        Target("config-tree", _config_trees(), treewise, _read_tree),
        Target("pretrain-cli", _config_trees(), treewise, _parse_cli, 0.15),
        *_family_targets(folder),
        Target("timm-directory", _timm_configs(), treewise, _read_timm, 0.15),
        Target("environment-json", (_environment(),), treewise, _read_environment, 0.5),
        Target("tar", _archives(), (mutate.mutated_tar, mutate.mutated_tar, mutate.mutated_bytes), _read_tar, 2.0),
        Target("images", tuple(_images().values()), bytewise, _decode, 4.0),
        Target("png", tuple(_pngs()), (mutate.mutated_png,), _decode, 1.5),
        Target("profile-csv", (_profile_csv(),), bytewise, _read_profile),
        Target("results-csv", (_RESULTS.encode(),), bytewise, _read_results),
        Target("subnet-names", (b"w384-d12", b"w64-d4-6", b"all", b"intact"), bytewise, _parse_name),
        Target("coco-json", (_COCO,), treewise, _read_coco, 0.5),
        *_shard_index(folder),
        *_checkpoint(folder),
    ]


EXPECTED: tuple[type[Exception], ...] = (PoaError, BadImage)
"""What a user's mistake, or hostile input, may raise."""


# --- configurations


def _yaml_texts() -> tuple[bytes, ...]:
    from importlib import resources

    texts = [item.read_bytes() for item in resources.files("poa.recipes").iterdir() if item.name.endswith(".yaml")]
    tricks = b"a: &a [1, 2]\nb: [*a, *a]\nc: !!timestamp 2001-01-01\nd: 0x1F\ne: 1:30\nf: !!binary aGk=\ng: {? x : y}\n"
    return (*sorted(texts), tricks)


def _config_trees() -> tuple[dict[str, Any], ...]:
    from poa.config import PretrainConfig, to_dict
    from tests.contract.configs import IN_COLOUR

    return tuple(to_dict(replace(PretrainConfig(), model=model)) for model in IN_COLOUR.values())


def _read_yaml(content: bytes, folder: Path) -> None:
    from poa.config import PretrainConfig, from_dict, load_yaml

    (folder / "c.yaml").write_bytes(content)
    from_dict(PretrainConfig, load_yaml(folder / "c.yaml"), "c.yaml")


def _read_tree(tree: Any, folder: Path) -> None:
    del folder
    from poa.config import PretrainConfig, from_dict, to_yaml

    to_yaml(from_dict(PretrainConfig, tree if isinstance(tree, dict) else {}, "tree"))


def _parse_cli(tree: Any, folder: Path) -> None:
    from poa.cli.pretrain import parse

    (folder / "c.yaml").write_text(yaml.safe_dump(tree))
    arguments = ["--config", str(folder / "c.yaml"), "--data", "digits", "--out", str(folder / "run")]
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        parse(arguments)


# --- families and networks


def _family_targets(folder: Path) -> list[Target]:
    import torch

    from poa.backbones import architecture
    from poa.family import Family, FamilyCard, Preprocessing
    from poa.task_head import TaskHead
    from tests.contract.configs import IN_COLOUR

    cards, weights, heads, parts = [], [], [], []
    for name, config in IN_COLOUR.items():
        backbone = architecture(name).build(config)
        backbone.init_weights_(torch.Generator().manual_seed(0))
        card = FamilyCard(architecture(name), config, Preprocessing(32, 3, (0.5,), (0.5,)), provenance={"data": {}})
        channels = backbone.layout.features.active(config.widths[-1])
        head = TaskHead(torch.zeros(2, channels), torch.zeros(2), ("a", "b"))
        Family(card, backbone, head).save(folder / "families" / name, overwrite=True)
        place = folder / "families" / name
        cards.append((name, json.loads((place / "family.json").read_text())))
        if name in ("vit", "convnext"):  # the others' are megabytes
            weights.append((name, (place / "weights.safetensors").read_bytes()))
        heads.append((name, json.loads((place / "head.json").read_text())))
        parts.append((name, (place / "head.safetensors").read_bytes()))
    root = folder / "families"
    both = (_second(mutate.mutated_safetensors), _second(mutate.mutated_safetensors), _second(mutate.mutated_bytes))
    return [
        Target("family-json", tuple(cards), (_second(mutate.mutated_value),), _FamilyReader(root, "family.json"), 2.0),
        Target("family-weights", tuple(weights), both, _FamilyReader(root, "weights.safetensors"), 2.0),
        Target("head-json", tuple(heads), (_second(mutate.mutated_value),), _FamilyReader(root, "head.json"), 0.5),
        Target("head-weights", tuple(parts), both, _FamilyReader(root, "head.safetensors"), 0.5),
    ]


def _second(mutation: Callable[[Any, Rng], Any]) -> Callable[[Any, Rng], Any]:
    """The mutation of the second of a pair."""
    return lambda pair, rng: (pair[0], mutation(pair[1], rng))


@dataclass(frozen=True)
class _FamilyReader:
    """Reads a family of which one file has another content; checksums are made to fit."""

    root: Path
    file: str

    def __call__(self, pair: tuple[str, Any], folder: Path) -> None:
        from poa.family import load

        name, content = pair
        place = folder / f"family-{name}"
        for source in (self.root / name).iterdir():
            if not (place / source.name).exists():
                place.mkdir(exist_ok=True)
                (place / source.name).write_bytes(source.read_bytes())
        is_tree = self.file.endswith(".json")
        (place / self.file).write_bytes(json.dumps(content).encode() if is_tree else content)
        if not is_tree:
            card = place / ("head.json" if self.file.startswith("head") else "family.json")
            described = json.loads((self.root / name / card.name).read_text())
            described["weights"]["sha256"] = hashlib.sha256(content).hexdigest()
            card.write_text(json.dumps(described))
        try:
            family = load(place)
            family.card.num_params(family.space.smallest)
            family.card.flops(family.space.intact)
        finally:
            for source in (self.root / name).iterdir():
                if source.suffix == ".json" or source.name == self.file:
                    (place / source.name).write_bytes(source.read_bytes())


def _timm_configs() -> tuple[dict[str, Any], ...]:
    told = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 0, "crop_pct": 1.0}
    vit = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    return (
        {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": vit, "pretrained_cfg": told},
        {"architecture": "resnet10t", **told},
    )


def _read_timm(tree: Any, folder: Path) -> None:
    from poa.timm_models import create_timm_model

    (folder / "config.json").write_bytes(json.dumps(tree).encode())
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(2**24)
    create_timm_model(str(folder), pretrained=False)


def _environment() -> dict[str, Any]:
    data = {"source": "digits", "num_images": 10, "num_skipped_when_listing": 0, "fingerprint": "abc"}
    return {"data": data, "starts": [{"time": "now", "packages": {"poa": "1"}}]}


def _read_environment(tree: Any, folder: Path) -> None:
    from poa.train.run_directory import RunDirectory

    (folder / "environment.json").write_bytes(json.dumps(tree).encode())
    (folder / "start.json").write_bytes(json.dumps(tree).encode())
    run = RunDirectory(folder)
    run.recorded_start()
    run._earlier_starts(_environment()["data"])


# --- data


def _archives() -> tuple[bytes, ...]:
    found = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
            for name, content in (
                ("a/1.png", _PNG),
                ("a/1.cls", b"1"),
                ("long/" * 24 + "2.png", _PNG),
                ("č.txt", b"x"),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        found.append(stream.getvalue())
    return tuple(found)


def _read_tar(content: bytes, folder: Path) -> None:
    from poa.config import DataConfig
    from poa.data import open_source

    (folder / "1.tar").write_bytes(content)
    source = open_source(str(folder / "1.tar"), DataConfig(max_bad_share=1.0), 3)
    for index in range(min(len(source), 3)):
        with contextlib.suppress(BadImage):
            source.load(index)
        source.image_name(index)
    assert source.fingerprint


_PNG = encoded(picture(16, 16), "PNG")


def _images() -> dict[str, bytes]:
    return {name: content for name, content in valid_files().items() if len(content) < 40_000}


def _pngs() -> list[bytes]:
    return [content for content in _images().values() if content.startswith(b"\x89PNG")]


def _decode(content: bytes, folder: Path) -> None:
    del folder
    from poa.data import decode_image

    decode_image(content, 3, 1_000_000)


# --- tables and names


def _profile_csv() -> bytes:
    from poa.deploy.profile.kit.rows import COLUMNS

    values = {
        **{"device": "cpu", "runtime": "torch", "precision": "float32", "num_threads": "1", "batch_size": "1"},
        **{"image_size": "32", "subnet": "w16-d1", "is_measured": "true", "latency_ms": "1.5", "latency_p95_ms": "2"},
        **{"throughput": "600", "peak_memory_mb": "", "num_params": "1000", "flops": "2000", "file_size_mb": "0.1"},
        **{"fit_error": "", "family": "0123456789ab", "date": "2026-01-01", "poa_version": "1"},
    }
    return f"{','.join(COLUMNS)}\n{','.join(values[name] for name in COLUMNS)}\n".encode()


def _read_profile(content: bytes, folder: Path) -> None:
    from poa.deploy.profile.table import read_profile

    (folder / "p.csv").write_bytes(content)
    read_profile(folder / "p.csv")


_RESULTS = "network,source,num_params,flops,knn/accuracy,linear/accuracy\nw16-d1,RUN,1000,2000,0.5,0.75\n"


def _read_results(content: bytes, folder: Path) -> None:
    from poa.deploy.select.results import read_results

    (folder / "r.csv").write_bytes(content)
    read_results(folder / "r.csv")


def _parse_name(content: bytes, folder: Path) -> None:
    del folder
    from poa.elastic import SearchSpace

    space = SearchSpace((16, 32), ((1, 2), (3, 4)))
    space.parse_all([content.decode("utf-8", "surrogateescape")])


_RUNS = {"size": [16, 16], "counts": [40, 200, 16]}
_COCO = {
    "images": [{"id": 1, "file_name": "1.png", "width": 16, "height": 16}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 8, 8], "segmentation": _RUNS},
        {"id": 2, "image_id": 1, "category_id": 1, "bbox": [0, 0, 4, 4], "segmentation": [[0, 0, 4, 0, 4, 4]]},
    ],
    "categories": [{"id": 1, "name": "cat"}],
}


def _read_coco(tree: Any, folder: Path) -> None:
    from poa.tasks.dense.annotations import Accepting, read_annotations

    (folder / "1.png").write_bytes(_PNG)
    (folder / "a.json").write_bytes(json.dumps(tree).encode())
    read_annotations(folder / "a.json", folder, Accepting(True, 1.0, 10**6, "--detect.max-bad-share"), 3)


def _shard_index(folder: Path) -> list[Target]:
    """The index of two shards; its header, its metadata and its bytes."""
    from poa.config import DataConfig
    from poa.data.shards.build import build_index

    shards = folder / "shards"
    shards.mkdir(exist_ok=True)
    for number, content in enumerate(_archives()[:2]):
        (shards / f"s-{number}.tar").write_bytes(content)
    index = build_index(str(shards / "s-{0..1}.tar"), DataConfig(max_bad_share=1.0))
    index.save(folder / "index.safetensors")
    seeds = ((folder / "index.safetensors").read_bytes(),)
    ways = (mutate.mutated_safetensors, _mutated_metadata, _mutated_metadata, mutate.mutated_bytes)
    return [Target("shard-index", seeds, ways, _read_index)]


def _mutated_metadata(content: bytes, rng: Rng) -> bytes:
    """The index with another JSON object in its metadata."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    ((key, text),) = header["__metadata__"].items()
    header["__metadata__"][key] = json.dumps(mutate.mutated_value(json.loads(text), rng))
    made = json.dumps(header).encode()
    return len(made).to_bytes(8, "little") + made + content[8 + length :]


def _read_index(content: bytes, folder: Path) -> None:
    from poa.data.shards.index import open_index

    (folder / "index.safetensors").write_bytes(content)
    index = open_index(folder / "index.safetensors")
    for place in range(min(len(index), 3)):
        index.name(place)
        index.shard_of(place)
    assert index.fingerprint


def _checkpoint(folder: Path) -> list[Target]:
    """The JSON state of a checkpoint, and the file of its tensors."""
    import torch

    from poa.train.checkpoint import CheckpointStore

    store = CheckpointStore(folder / "checkpoints", keep=1)
    store.save(1, {"a": torch.zeros(3), "b": torch.zeros(2, 2)}, {"metrics": {}, "position": 1}, wait=True)
    store.close()
    whole = store.path(1)
    tensors = next(whole.glob("*.safetensors"))
    state = json.loads((whole / "state.json").read_text())
    return [
        Target("checkpoint-state", (state,), (mutate.mutated_value,), _CheckpointReader(whole, "state.json"), 0.5),
        Target(
            "checkpoint-tensors",
            (tensors.read_bytes(),),
            (mutate.mutated_safetensors, mutate.mutated_bytes),
            _CheckpointReader(whole, tensors.name),
            0.5,
        ),
    ]


@dataclass(frozen=True)
class _CheckpointReader:
    """Reads a checkpoint of which one file has another content; its size and checksum are made to fit."""

    whole: Path
    file: str

    def __call__(self, content: Any, folder: Path) -> None:
        import warnings

        import torch

        from poa.train.checkpoint import CheckpointStore

        store = CheckpointStore(folder / "checkpoints", keep=1)
        place = store.path(1)
        place.mkdir(parents=True, exist_ok=True)
        for source in self.whole.iterdir():
            (place / source.name).write_bytes(source.read_bytes())
        is_tree = self.file.endswith(".json")
        made = json.dumps(content).encode() if is_tree else content
        (place / self.file).write_bytes(made)
        if not is_tree:
            text = (place / "state.json").read_text()
            before = (self.whole / self.file).read_bytes()
            text = text.replace(hashlib.sha256(before).hexdigest(), hashlib.sha256(made).hexdigest())
            (place / "state.json").write_text(text.replace(f": {len(before)}", f": {len(made)}"))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = store.newest()
                if found is not None:
                    found.load_({"a": torch.ones(3), "b": torch.ones(2, 2)})
        finally:
            store.close()
