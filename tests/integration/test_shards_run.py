"""Pre-training on shards behind a URL."""

import pytest
import torch

from poa.errors import DataError
from poa.family import load
from poa.train import pretrain
from tests.shard_server import serving, write_index, write_tars
from tests.unit.test_train import changed


def run_on(source, tmp_path, name, **data):
    config = changed(
        data={"source": source, "cache_dir": str(tmp_path / "cache"), "window": 2, **data},
        train={"epochs": 2.0, "batch_size": 8},
    )
    pretrain(config, tmp_path / name)
    return load(tmp_path / name)


def test_a_run_on_shards_behind_a_url_equals_one_on_the_same_shards_here(tmp_path):
    folder = write_tars(tmp_path / "shards", [10, 7, 9, 6])
    write_index(folder)
    here = run_on(str(folder), tmp_path, "here")
    with serving(folder) as server:
        server.faults = {"s-0001.tar": [503], "s-0002.tar": ["torn"]}
        away = run_on(f"{server.url}/s-{{0000..0003}}.tar", tmp_path, "away", retry_seconds=0.01)
        assert {name: server.requests[name] for name in server.requests if name.endswith(".tar")} == {
            "s-0000.tar": 1,
            "s-0001.tar": 2,
            "s-0002.tar": 2,
            "s-0003.tar": 1,
        }
    one, other = here.supernet.state_dict(), away.supernet.state_dict()
    assert all(torch.equal(part, other[name]) for name, part in one.items())
    data = [family.card.provenance["data"] for family in (here, away)]
    assert data[0]["fingerprint"] == data[1]["fingerprint"]


def test_a_url_with_a_secret_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(DataError, match="no secret belongs"):
        run_on("https://user:hunter2@host/s-{0..3}.tar", tmp_path, "run")
    assert not any("hunter2" in file.read_text() for file in tmp_path.rglob("*") if file.is_file())
