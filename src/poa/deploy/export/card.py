"""The model card of an export: README.md as Hugging Face's Hub reads it, YAML metadata first.

https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml

from poa.deploy.export.base import Exported, Exporter
from poa.deploy.export.compare import Comparison
from poa.deploy.export.images import ExportImages
from poa.deploy.export.snippet import snippet
from poa.deploy.report.provenance import provenance_of
from poa.errors import ConfigError
from poa.family import Family
from poa.files import write_text
from poa.version import __version__

CARD_FILE = "README.md"

HUB_LICENCES = frozenset(
    (
        "apache-2.0",
        "mit",
        "bsd-2-clause",
        "bsd-3-clause",
        "bsl-1.0",
        "isc",
        "mpl-2.0",
        "unlicense",
        "gpl-2.0",
        "gpl-3.0",
        "lgpl-3.0",
        "agpl-3.0",
        "cc0-1.0",
        "cc-by-3.0",
        "cc-by-4.0",
        "cc-by-sa-4.0",
        "cc-by-nc-3.0",
        "cc-by-nc-4.0",
        "cc-by-nc-sa-4.0",
        "cc-by-nd-4.0",
        "cc-by-nc-nd-4.0",
        "openrail",
        "apple-ascl",
        "apple-amlr",
    )
)
"""Names of licences on the Hub (https://huggingface.co/docs/hub/repositories-licenses); others are `other` there."""
MAX_VALUE = 200
"""Characters of a line of provenance; longer ones (orders of channels) stay in poa.json."""
NOT_STATED = "unknown"


def licence_of(family: Family, asked: str | None = None) -> str | None:
    """The licence of what is exported: that of the public weights the family started from, else what is asked for.

    Returns:
        None where neither is known: the card says so.

    Raises:
        ConfigError: the weights have a licence and another one is asked for.
    """
    init = family.card.provenance.get("init", {})
    own = init.get("license", NOT_STATED)
    if own == NOT_STATED:
        return asked
    if asked is not None and asked != own:
        raise ConfigError(
            f"the family started from {init.get('name', 'weights')}, whose licence is {own}; it cannot be exported as "
            f"{asked}. Leave --license out."
        )
    return str(own)


def write_card(
    directory: Path,
    exporter: Exporter,
    what: Exported,
    found: Comparison,
    images: ExportImages | None = None,
    *,
    licence: str | None = None,
) -> None:
    """Writes README.md beside an export.

    Args:
        directory: where it was written.
        exporter: its format.
        what: the sub-network.
        found: how it compares with the family.
        images: what it was compared and calibrated on; noise if None.
        licence: of the weights, where they did not start from others; see `licence_of`.

    Raises:
        ConfigError: see `licence_of`.
    """
    stated = licence_of(what.family, licence)
    head = yaml.safe_dump(metadata(exporter, what, stated), sort_keys=False, allow_unicode=True)
    parts = [
        _introduction(exporter, what),
        _what_it_is(exporter, what, found),
        f"## Use\n\nIn this directory:\n\n```python\n{snippet(exporter, what)}\n```",
        _preprocessing(exporter, what),
        _closeness(exporter, found, images),
        *([] if found.accuracy is None else [_accuracy(found)]),
        _provenance(what),
        _licence(what.family, stated),
    ]
    write_text(directory / CARD_FILE, f"---\n{head}---\n\n" + "\n\n".join(parts) + "\n")


def metadata(exporter: Exporter, what: Exported, licence: str | None) -> dict[str, Any]:
    """What the Hub reads of a model card."""
    described: dict[str, Any] = {}
    if licence is not None:
        is_known = licence in HUB_LICENCES
        described["license"] = licence if is_known else "other"
        if not is_known and licence != "other":
            described["license_name"] = licence
    described["library_name"] = exporter.hub_library
    described["pipeline_tag"] = "image-feature-extraction" if what.family.head is None else "image-classification"
    tags = ["poa", what.family.card.architecture.name, exporter.hub_library, exporter.precision]
    return described | {"tags": list(dict.fromkeys(tags))}


def _introduction(exporter: Exporter, what: Exported) -> str:
    card, head = what.family.card, what.family.head
    does = "class vectors of images" if head is None else f"logits of {head.num_classes} classes"
    return (
        f"# {card.architecture.name} {what.subnet}, {exporter.name}\n\n"
        f"It computes {does}. It is one of {len(what.family.subnets)} sub-networks cut out of one set of weights that "
        f"was trained without labels (POA, Zhang et al., ECCV 2024), written by poa {__version__}."
    )


def _what_it_is(exporter: Exporter, what: Exported, found: Comparison) -> str:
    card, size = what.family.card, what.image_size
    flops = card.architecture.flops(card.config, what.subnet, size)
    channels, head = card.preprocessing.num_channels, what.family.head
    output = what.family.supernet.layout.features.active(what.subnet.width) if head is None else head.num_classes
    rows = {
        "sub-network": f"{what.subnet} of {what.family.space.smallest} to {what.family.space.intact}",
        "format": f"{exporter.name}: {exporter.summary}",
        "precision": exporter.precision,
        "parameters": f"{card.num_params(what.subnet):,}" + ("" if head is None else ", without the classifier"),
        "operations": f"{flops / 1e6:,.1f} million for an image (a multiplication and its addition are two)",
        "file": f"{exporter.weights_file}, {found.num_bytes / 1e6:.2f} MB",
        "input": f"images [batch, {channels}, {size}, {size}]",
        "output": f"{what.output_name} [batch, {output}]",
    }
    text = "## What it is\n\n| | |\n| --- | --- |\n" + "\n".join(
        f"| {name} | {value} |" for name, value in rows.items()
    )
    if head is not None:
        text += f"\n\nClasses: {', '.join(head.class_names)}."
    return text


def _preprocessing(exporter: Exporter, what: Exported) -> str:
    described = what.preprocessing(is_normalised_inside=getattr(exporter, "normalise_inside", False))
    mean, std = (", ".join(f"{value:g}" for value in described[name]) for name in ("mean", "std"))
    steps = "\n".join(f"{number}. {step}" for number, step in enumerate(described["steps"], start=1))
    where = "the model itself does that" if described["normalised_inside"] else "by channel"
    return f"## Preprocessing\n\n{steps}\n\nMean {mean}, deviation {std} ({where})."


def _closeness(exporter: Exporter, found: Comparison, images: ExportImages | None) -> str:
    of_what = "images of noise" if images is None else f"images of {_name(images.spec)}"
    threads = f"{found.num_threads} thread{'s' if found.num_threads > 1 else ''}"
    text = (
        "## Beside the family\n\n"
        f"The file was opened by its own runtime and compared with the sub-network in float32 on {found.num_images} "
        f"{of_what}:\n\n"
        f"- largest difference of a value: {found.max_abs_difference:.1e}\n"
        f"- relative difference (Euclidean norm): {found.relative_difference:.1e}\n"
        f"- cosine similarity: {found.cosine_similarity:.6f} in the mean, {found.min_cosine_similarity:.6f} at least\n"
        f"- latency: {found.latency_ms:.3g} ms for one image (median of {found.num_runs} runs, {threads}, "
        f"{found.processor})"
    )
    if exporter.needs_calibration and images is not None and images.calibration is not None:
        text += f"\n\nIts scales were chosen on {len(images.calibration)} other images of {_name(images.spec)}."
    return text


def _accuracy(found: Comparison) -> str:
    measured = found.accuracy
    assert measured is not None  # noqa: S101 (so it is called)
    against = f" against {measured.num_train:,} labelled ones" if measured.num_train else ""
    return (
        "## Accuracy\n\n"
        "| | top-1 |\n| --- | --- |\n"
        f"| sub-network, float32 | {measured.subnet:.2%} |\n"
        f"| this file | {measured.export:.2%} |\n\n"
        f"Measured with {measured.protocol} on {measured.num_test:,} images{against}, the same for both. Lost: "
        f"{100 * measured.drop:.2f} points, standard error of the paired difference "
        f"{100 * measured.standard_error:.2f}."
    )


def _provenance(what: Exported) -> str:
    lines = []
    for group in provenance_of(what.family.card, None):
        rows = [(term, _name(value)) for term, value in group.rows if value and len(value) <= MAX_VALUE]
        lines += [f"- {group.heading.lower()}: {term}: {value}" for term, value in rows]
    return "## Provenance\n\nWhat the family records of itself:\n\n" + "\n".join(lines)


def _licence(family: Family, stated: str | None) -> str:
    init = family.card.provenance.get("init", {})
    return "## Licence\n\n" + " ".join(_licence_sentences(init, stated))


def _licence_sentences(init: dict[str, Any], stated: str | None) -> Iterator[str]:
    if stated is None:
        yield "The licence of these weights is not stated."
    else:
        yield f"The licence of these weights is {stated}."
    if not init:
        return
    own = init.get("license", NOT_STATED)
    yield f"Their training started from {_name(str(init.get('name', 'other weights')))}, " + (
        "whose licence is not known." if own == NOT_STATED else f"licensed under {own}."
    )


def _name(value: str) -> str:
    """The last part of a path of the machine that wrote it, which tells others nothing; anything else as it is."""
    path = Path(value)
    if path.is_absolute():
        return path.name
    return PureWindowsPath(value).name if PureWindowsPath(value).is_absolute() else value
