"""Directories in timm's format: checked before timm opens them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poa.errors import CheckpointError
from poa.files import read_json

if TYPE_CHECKING:
    from torch import nn

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

MAX_NUMBER = 65_536
"""The largest number among a network's arguments: channels, sides, classes of attention."""
MAX_DEPTH = 256
"""The most layers that an argument may ask for, those of a list together."""
MAX_IMAGE_SIDE = 2_048
"""The longest side of the images that a directory's network may say it takes."""
MAX_CLASSES = 2**20
_COUNTS = ("depth", "layers", "blocks")
_RESERVED = ("pretrained", "checkpoint", "cache_dir", "scriptable", "exportable", "no_jit", "device", "dtype")


def open_timm_directory(directory: str | Path) -> nn.Module:
    """The timm model in a directory with `config.json` and `model.safetensors`, in evaluation mode.

    Raises:
        CheckpointError: the directory holds no such model.
    """
    import timm

    folder = Path(directory)
    check_timm_directory(folder)
    model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return model.eval()


def check_timm_directory(folder: Path) -> None:
    """Refuses a directory that timm would open at a risk; nothing in it is executed, and no weights are read.

    timm would also load pickled weights, pass any argument on, and ask for any memory: here the weights are
    safetensors, the arguments plain values in bounds, and the network no larger than its file.

    Raises:
        CheckpointError: there is no `model.safetensors`, or `config.json` does not describe a network of timm with it.
    """
    if not (folder / CONFIG_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
        raise CheckpointError(
            f"{folder} is no directory in timm's format: {CONFIG_FILE} and {WEIGHTS_FILE} are needed (pickled weights "
            "are not read)."
        )
    config = read_json(folder / CONFIG_FILE, remedy="Copy the directory anew.")
    # timm reads arguments only beside a `pretrained_cfg`.
    name, arguments = config.get("architecture"), config.get("model_args") or {} if "pretrained_cfg" in config else {}
    problem = _wrong_name(name) or _wrong_arguments(arguments) or _wrong_images(config)
    if problem:
        raise CheckpointError(f"{folder / CONFIG_FILE} {problem}. Copy the directory anew.")
    num_params, num_bytes = _num_params(str(name), arguments, folder), (folder / WEIGHTS_FILE).stat().st_size
    if 2 * num_params > num_bytes:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE} does not fit {CONFIG_FILE}: {num_bytes} bytes for {num_params} parameters. Copy "
            "the directory anew."
        )


def _wrong_name(name: object) -> str:
    import timm

    if not isinstance(name, str) or not timm.is_model(name):
        return f"names no network of timm: architecture {str(name)[:100]!r}"
    return ""


def _wrong_arguments(arguments: object) -> str:
    """What is wrong with the arguments that the network is made with, if anything."""
    if not isinstance(arguments, Mapping):
        return "must have an object model_args"
    for name, value in arguments.items():
        most = MAX_DEPTH if any(part in name for part in _COUNTS) else MAX_NUMBER
        if name.startswith(_RESERVED) or not name.isidentifier():
            return f"must not have model_args.{name[:100]}"
        is_long = most == MAX_DEPTH and isinstance(value, list) and _is_plain(value, most) and _sum(value) > most
        if is_long or not _is_plain(value, most):
            return f"has model_args.{name[:100]}: {str(value)[:100]}; numbers up to {most:,}, words and lists are read"
    return ""


def _wrong_images(config: Mapping[str, Any]) -> str:
    """What is wrong with what it says of images and classes, if anything."""
    told = config.get("pretrained_cfg", config)
    if not isinstance(told, Mapping):
        return "must have an object pretrained_cfg"
    size = told.get("input_size", [3, 224, 224])
    if not isinstance(size, list) or len(size) != 3 or not all(_is_count(each, MAX_IMAGE_SIDE) for each in size):
        return f"has input_size {str(size)[:100]}; three numbers from 1 to {MAX_IMAGE_SIDE:,} are read"
    for part in (config, told):
        if not _is_count(part.get("num_classes", 1) or 1, MAX_CLASSES):
            return f"has num_classes {str(part['num_classes'])[:100]}; 0 to {MAX_CLASSES:,} are read"
    return ""


def _num_params(name: str, arguments: Mapping[str, Any], folder: Path) -> int:
    """The parameters of the network, made without memory for them."""
    import timm
    import torch

    kept = {key: value for key, value in arguments.items() if key != "num_classes"}
    try:
        with torch.device("meta"):
            model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **kept)
    except Exception as error:
        raise CheckpointError(
            f"timm cannot make the network of {folder / CONFIG_FILE}: {type(error).__name__}: {str(error)[:200]}."
        ) from error
    return sum(parameter.numel() for parameter in model.parameters())


def _is_plain(value: object, most: float) -> bool:
    if isinstance(value, list):
        return len(value) <= 1_024 and all(not isinstance(each, list) and _is_plain(each, most) for each in value)
    if isinstance(value, int | float):
        return abs(value) <= most
    return value is None or (isinstance(value, str) and len(value) <= 1_000)


def _sum(values: list[Any]) -> float:
    return sum(each for each in values if isinstance(each, int | float))


def _is_count(value: object, most: int) -> bool:
    return isinstance(value, int) and 1 <= value <= most
