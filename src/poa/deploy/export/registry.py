"""The formats that poa exports to, by name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from poa.deploy.export.base import Exporter
from poa.deploy.export.directories import Timm, Transformers
from poa.deploy.export.executorch import ExecuTorch
from poa.deploy.export.graph import GraphExporter
from poa.deploy.export.int8_onnx import OnnxInt8, OnnxInt8Dynamic
from poa.deploy.export.int8_openvino import OpenVinoInt8
from poa.deploy.export.onnx import Onnx
from poa.deploy.export.openvino import OpenVino
from poa.deploy.export.torch_export import TorchExport
from poa.errors import ConfigError

EXPORTERS: dict[str, type[Exporter]] = {
    exporter.name: exporter
    for exporter in (
        Timm,
        Transformers,
        Onnx,
        OnnxInt8,
        OnnxInt8Dynamic,
        OpenVino,
        OpenVinoInt8,
        TorchExport,
        ExecuTorch,
    )
}
"""`poa export --to NAME` writes one; `tests/contract/test_exporters.py` holds what all of them do."""


def find_exporters(names: Sequence[str], *, normalise_inside: bool = False) -> list[Exporter]:
    """The formats of those names, each once, in their order.

    Args:
        names: of formats.
        normalise_inside: see `GraphExporter`.

    Raises:
        ConfigError: there is no such format, none is named, one cannot normalise inside, or a library that one needs
            is missing.
    """
    if not names:
        raise ConfigError(f"no format is named. Formats: {', '.join(EXPORTERS)}.")
    found = [_exporter(name, normalise_inside) for name in dict.fromkeys(names)]
    for exporter in found:
        exporter.require()
    return found


def _exporter(name: str, normalise_inside: bool) -> Exporter:
    if name not in EXPORTERS:
        close = difflib.get_close_matches(name, EXPORTERS, n=1)
        hint = f" Nearest: {close[0]}." if close else ""
        raise ConfigError(f"there is no format {name!r}.{hint} Formats: {', '.join(EXPORTERS)}.")
    kind = EXPORTERS[name]
    if not normalise_inside:
        return kind()
    if not issubclass(kind, GraphExporter):
        able = ", ".join(each.name for each in EXPORTERS.values() if issubclass(each, GraphExporter))
        raise ConfigError(f"the format {name} leaves normalisation to its library. These can do it inside: {able}.")
    return kind(normalise_inside=True)
