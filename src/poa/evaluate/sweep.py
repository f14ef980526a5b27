"""Several protocols over many networks: one pass over the images, one table, resumable."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from poa.config import to_dict
from poa.errors import CheckpointError, DataError
from poa.evaluate.base import Evaluator
from poa.evaluate.features import DEFAULT_LOADING, Loading
from poa.evaluate.intact import with_intact
from poa.evaluate.report import Report, Result, read_results, write_csv, write_results
from poa.evaluate.run import OnProgress, OnResult, Splits, evaluate, result_key, test_plan
from poa.files import read_json, write_json, write_text
from poa.models import Candidate

DATA_FILE = "data.json"
LINES_FILE = "results.jsonl"
FEATURES_FOLDER = "features"


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found.

    Attributes:
        report: every result, those of earlier calls into the same directory included.
        num_known: results that were there already.
        csv: the table, a row for each network.
        json: everything.
    """

    report: Report
    num_known: int
    csv: Path
    json: Path


def sweep(
    protocols: Sequence[Evaluator],
    networks: Sequence[Candidate],
    data: Splits,
    out: Path,
    *,
    loading: Loading = DEFAULT_LOADING,
    keep_features: bool = False,
    on_progress: OnProgress | None = None,
    on_result: OnResult | None = None,
) -> SweepResult:
    """Runs the protocols over the networks; what is in `out` already is not computed again.

    Vectors are kept in `out/features` while it runs: a sweep that was stopped goes on where it was, to within
    `FLUSH_SECONDS`. Results are written one by one to `out/results.jsonl`, in the end all to `results.csv` and
    `results.json`.

    Args:
        protocols: what to measure.
        networks: what is measured.
        data: the images, from `split`.
        out: the directory.
        loading: batch size and workers.
        keep_features: leave the vectors there, for a later sweep with more protocols.
        on_progress: called after every batch of images.
        on_result: called with every new result.

    Raises:
        CheckpointError: `out` holds a sweep over other images.
        DataError: the vectors do not fit on the disk, or too many images could not be read.
    """
    out.mkdir(parents=True, exist_ok=True)
    _claim(out / DATA_FILE, data)
    known = _known(out / LINES_FILE)
    due = [network for network in networks if any(result_key(network, each) not in known for each in protocols)]
    num_known = sum(result_key(network, each) in known for network in networks for each in protocols)
    report = Report((), data.num_train, data.num_test, ())
    if due:
        _require_space(out, due, protocols, data)
        with (out / LINES_FILE).open("a", encoding="utf-8") as lines:
            report = evaluate(
                protocols,
                due,
                data,
                loading=loading,
                store=out / FEATURES_FOLDER,
                on_progress=on_progress,
                on_result=partial(_record, lines, on_result),
                is_due=lambda network, each: result_key(network, each) not in known,
            )
    report = Report(tuple(_known(out / LINES_FILE).values()), report.num_train, report.num_test, report.skipped)
    described = {"data": _described(data), "protocols": {each.name: to_dict(each) for each in protocols}}
    write_csv(out / "results.csv", report.results)
    write_results(out / "results.json", report, described)
    if not keep_features:
        shutil.rmtree(out / FEATURES_FOLDER, ignore_errors=True)
    return SweepResult(report, num_known, out / "results.csv", out / "results.json")


def _record(lines: TextIO, on_result: OnResult | None, result: Result) -> None:
    lines.write(json.dumps(asdict(result)) + "\n")
    lines.flush()
    if on_result is not None:
        on_result(result)


def _known(file: Path) -> dict[str, Result]:
    if not file.is_file():
        return {}
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        write_text(file, "".join(lines[:-1]))  # the process was killed while it wrote this line
        lines.pop()
    return {result.key: result for result in read_results(lines)}


def _described(data: Splits) -> dict[str, Any]:
    """The images, so that results of others are not mixed in."""
    found: dict[str, Any] = {}
    for name, source, indices in (
        ("train", data.train, data.train_indices),
        ("test", data.test, data.test_indices),
    ):
        if source is not None:
            chosen = "all" if indices is None else hashlib.sha256(indices.tobytes()).hexdigest()[:16]
            found[name] = {"source": source.spec, "fingerprint": source.fingerprint, "images": chosen}
    return found


def _claim(file: Path, data: Splits) -> None:
    mine = _described(data)
    if not file.is_file():
        write_json(file, mine)
        return
    there = read_json(file, remedy="Give another --out.")
    for name, part in mine.items():
        known = there.setdefault(name, part)
        if not isinstance(known, dict) or not {"source", "fingerprint", "images"} <= known.keys():
            raise CheckpointError(f"{file} is damaged: {name} is no description of images. Give another --out.")
        if (known["fingerprint"], known["images"]) != (part["fingerprint"], part["images"]):
            raise CheckpointError(
                f"{file.parent} holds a sweep over other {name} images ({known['source']}); the ones now are "
                f"{part['source']}. Give another --out."
            )
    write_json(file, there)


def _require_space(out: Path, networks: Sequence[Candidate], protocols: Sequence[Evaluator], data: Splits) -> None:
    num_blocks = max(each.num_blocks for each in protocols)
    at_looks = sum(data.num_test if chosen is None else len(chosen) for chosen in test_plan(protocols, data).values())
    present = with_intact(networks) if any(each.needs_intact for each in protocols) else networks
    num_vectors = (data.num_train + data.num_test) * (num_blocks + (num_blocks > 1)) + at_looks
    num_vectors += data.num_train if any(each.needs_views for each in protocols) else 0
    needed = 4 * sum(network.num_features for network in present) * num_vectors
    free = shutil.disk_usage(out).free
    if needed > 0.9 * free:
        raise DataError(
            f"the vectors of {len(networks)} networks need up to {needed / 1e9:.1f} GB in {out}, where "
            f"{free / 1e9:.1f} GB are free. Name fewer with --subnets (the results add up in one --out), or give an "
            "--out on another disk."
        )
