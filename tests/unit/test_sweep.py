import csv
import json
import shutil

import numpy as np
import pytest
import torch

import poa.evaluate.features as features_module
from poa.errors import CheckpointError, DataError
from poa.evaluate import Knn, Loading, evaluate, extract_features, split, sweep
from poa.evaluate.looks import PLAIN, RandomView
from poa.models import family_members
from tests.unit.test_evaluate import CountingSource, digits, family  # noqa: F401 (a fixture)

K1 = Knn(k=(1,))


class StopError(Exception):
    pass


class Fingerprinted(CountingSource):
    @property
    def fingerprint(self):
        return self.spec


def stopping_after(num_images):
    def report(done):
        if done >= num_images:
            raise StopError

    return report


def vectors(networks, source, store, **options):
    with extract_features(networks, source, store=store, **options) as found:
        rows = {network.name: found.of(network.name).cls.clone() for network in networks}
        return rows, found.indices.tolist(), [image.name for image in found.skipped]


@pytest.mark.parametrize("batch_size", [4, 7])
def test_a_stopped_extraction_goes_on_and_ends_as_one_that_never_stopped(family, tmp_path, monkeypatch, batch_size):  # noqa: F811
    monkeypatch.setattr(features_module, "FLUSH_SECONDS", 0.0)
    networks = family_members(family)
    options = {"loading": Loading(batch_size=4, max_bad_share=0.5)}
    expected = vectors(networks, CountingSource("a", bad=[2, 13, 20]), None, **options)
    with pytest.raises(StopError):
        vectors(networks, CountingSource("a", bad=[2, 13, 20]), tmp_path, on_progress=stopping_after(16), **options)
    again = CountingSource("a", bad=[2, 13, 20])
    options = {"loading": Loading(batch_size=batch_size, max_bad_share=0.5)}
    found = vectors(networks, again, tmp_path, **options)
    assert again.loads.tolist() == [0] * 16 + [1] * 14
    assert found[1:] == expected[1:]
    for name, rows in expected[0].items():
        torch.testing.assert_close(found[0][name], rows, rtol=1e-5, atol=1e-6)


def test_networks_that_are_complete_are_not_computed_again(family, tmp_path, monkeypatch):  # noqa: F811
    source, networks = CountingSource("a"), family_members(family)
    first = vectors(networks[:2], source, tmp_path)
    read = []
    for network in networks:
        plain = network.last_blocks
        monkeypatch.setattr(
            network, "last_blocks", lambda *given, of=network, plain=plain: read.append(of.name) or plain(*given)
        )
    second = vectors(networks, source, tmp_path)
    assert set(read) == {network.name for network in networks[2:]}
    assert all(torch.equal(second[0][name], rows) for name, rows in first[0].items())


def test_a_random_view_is_the_same_for_the_same_seed_and_another_for_another(family):  # noqa: F811
    networks, source = family_members(family)[:1], CountingSource("a")
    looks = [PLAIN, RandomView(0), RandomView(1)]
    with extract_features(networks, source, looks=looks) as found:
        name = networks[0].name
        plain, one, other = (found.of(name, look.name).cls.clone() for look in looks)
    with extract_features(networks, source, looks=[RandomView(0)], loading=Loading(num_workers=2)) as found:
        assert torch.equal(found.of(name, "view-0").cls, one)
    assert not torch.equal(one, plain)
    assert not torch.equal(one, other)
    assert source.loads.tolist() == [1] * 30


def test_a_sweep_gives_what_each_protocol_gives_alone_and_decodes_every_image_once(family, tmp_path):  # noqa: F811
    networks, protocols = family_members(family), [K1, Knn(k=(5,), temp=1.0)]
    train, test = Fingerprinted("train"), Fingerprinted("test")
    data = split(train, test, protocols)
    alone = [evaluate([each], networks, data).results for each in protocols]
    train.loads[:], test.loads[:] = 0, 0
    found = sweep(protocols, networks, data, tmp_path / "sweep")
    assert train.loads.tolist() == test.loads.tolist() == [1] * 30
    assert len(found.report.results) == 8
    by_key = {result.key: result for result in found.report.results}
    assert all(by_key[result.key] == result for results in alone for result in results)
    assert not (tmp_path / "sweep" / "features").exists()


def test_a_sweep_that_was_stopped_goes_on_and_computes_nothing_twice(family, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(features_module, "FLUSH_SECONDS", 0.0)
    networks = family_members(family)
    data = split(CountingSource("train"), CountingSource("test"), [K1])
    expected = sweep([K1], networks, data, tmp_path / "whole").report.results

    def stop_at_third_result(result, seen=[]):  # noqa: B006
        seen.append(result)
        if len(seen) == 3:
            raise StopError

    with pytest.raises(StopError):
        sweep([K1], networks, data, tmp_path / "stopped", on_result=stop_at_third_result)
    data.train.loads[:] = 0
    again = sweep([K1], networks, data, tmp_path / "stopped")
    assert again.num_known == 3
    assert again.report.results == expected
    assert data.train.loads.sum() == 0
    known = sweep([K1], networks, data, tmp_path / "stopped")
    assert (known.num_known, known.report.results) == (4, expected)


def test_a_half_written_line_of_results_is_measured_again(family, tmp_path):  # noqa: F811
    networks = family_members(family)
    data = split(CountingSource("train"), CountingSource("test"), [K1])
    expected = sweep([K1], networks, data, tmp_path).report.results
    lines = tmp_path / "results.jsonl"
    lines.write_text(lines.read_text()[:-20])
    found = sweep([K1], networks, data, tmp_path)
    assert found.num_known == 3
    assert found.report.results == expected


def test_the_table_has_a_row_for_each_network_and_a_column_for_each_figure(family, tmp_path):  # noqa: F811
    networks, protocols = family_members(family), [K1]
    data = split(digits("train"), digits("test"), protocols)
    found = sweep(protocols, networks[:3], data, tmp_path)
    found = sweep(protocols, networks, data, tmp_path)
    rows = list(csv.DictReader(found.csv.open()))
    assert [row["network"] for row in rows] == [network.name for network in networks]
    assert list(rows[0]) == ["network", "source", "num_params", "flops", "knn/accuracy", "knn/accuracy_k1"]
    assert [float(row["knn/accuracy"]) for row in rows] == [result.value for result in found.report.results]
    written = json.loads(found.json.read_text())
    assert [each["figures"] for each in written["results"]] == [each.figures for each in found.report.results]
    assert written["data"]["train"]["source"] == "digits:train"


def test_a_directory_with_a_sweep_over_other_images_is_refused(family, tmp_path):  # noqa: F811
    networks = family_members(family)[:1]
    sweep([K1], networks, split(Fingerprinted("one"), Fingerprinted("test"), [K1]), tmp_path)
    with pytest.raises(CheckpointError, match=r"over other train images \(one\); the ones now are two"):
        sweep([K1], networks, split(Fingerprinted("two"), Fingerprinted("test"), [K1]), tmp_path)


def test_vectors_that_do_not_fit_on_the_disk_are_refused_before_work_starts(family, tmp_path, monkeypatch):  # noqa: F811
    networks = family_members(family)
    data = split(CountingSource("train"), CountingSource("test"), [K1])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(DataError, match="the vectors of 4 networks need up to"):
        sweep([K1], networks, data, tmp_path)
    assert data.train.loads.sum() == 0


def test_memory_is_bounded_by_files_whatever_the_number_of_images(family, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(features_module, "MEMORY_BUDGET", 100)
    with extract_features(family_members(family), CountingSource("a"), store=tmp_path) as found:
        assert all(isinstance(slot.arrays[0], np.memmap) for slot in found.slots.values())
