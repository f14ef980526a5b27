"""Networks that are not poa's: timm's models by name, and directories in timm's format."""

from __future__ import annotations

import difflib
from pathlib import Path

import timm
import torch
from torch import nn

from poa.errors import CheckpointError, ConfigError
from poa.family import CARD_FILE, family_directory
from poa.timm_directory import check_timm_directory

TIMM_PREFIX = "timm:"


def create_timm_model(spec: str, *, pretrained: bool = True, empty: bool = True, **arguments: object) -> nn.Module:
    """The model that `timm:NAME`, or a directory in timm's format, names, without its classifier.

    Args:
        spec: what the user wrote.
        pretrained: False: without its weights.
        empty: without its weights it is on the meta device; False: with fresh ones of torch's global generator.
        arguments: passed to timm.

    Raises:
        ConfigError: timm has no model of that name.
        CheckpointError: there is no such directory, or timm cannot open or download it.
    """
    name = timm_name(spec)
    try:
        with torch.device("meta" if empty and not pretrained else "cpu"):
            model: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=0, **arguments)
    except Exception as error:
        hint = ""
        if pretrained and spec.startswith(TIMM_PREFIX):
            hint = " Without a network, download the model elsewhere and give its directory."
        raise CheckpointError(
            f"timm cannot open {spec}: {type(error).__name__}: {str(error).rstrip('.')}.{hint}"
        ) from error
    return model


def timm_name(spec: str) -> str:
    """How `timm.create_model` calls what `timm:NAME`, or a directory in timm's format, names.

    Raises:
        ConfigError: timm has no model of that name.
        CheckpointError: there is no such directory.
    """
    if not spec.startswith(TIMM_PREFIX):
        return _directory_name(Path(spec))
    name = spec.removeprefix(TIMM_PREFIX)
    if not timm.is_model(name.partition(".")[0]):
        close = difflib.get_close_matches(name, timm.list_pretrained(), n=3, cutoff=0.5)
        hint = f" Nearest: {', '.join(close)}." if close else ""
        raise ConfigError(f"timm has no model {name!r}.{hint} `timm.list_pretrained()` lists those with weights.")
    return name


def is_family(path: Path) -> bool:
    """Whether a family of poa lies there."""
    try:
        family_directory(path)
    except CheckpointError:
        return False
    return True


def _directory_name(path: Path) -> str:
    if not path.exists():
        raise CheckpointError(
            f"there is no {path}. Give timm:NAME, a directory in timm's format, or a run or family of poa."
        )
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} holds no network: no config.json of timm, no {CARD_FILE} of poa.")
    check_timm_directory(path)
    return f"local-dir:{path}"
