"""Configurations as dictionaries and YAML files, and the recipes that poa ships."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import dacite
import yaml

from poa.config.checks import MAX_SHOWN, shown
from poa.config.model import MODEL_CONFIGS
from poa.config.pretrain import PretrainConfig
from poa.errors import ConfigError

ConfigT = TypeVar("ConfigT")

MAX_YAML_BYTES = 256 * 1024
"""The largest configuration file that is read; the largest recipe has a hundredth of it."""
MAX_YAML_VALUES = 20_000
"""The most values in a configuration file, those that aliases repeat counted each time."""


def to_dict(config: Any) -> dict[str, Any]:  # noqa: ANN401 (any dataclass)
    """The configuration as plain dictionaries, lists, numbers and strings."""
    plain: dict[str, Any] = _plain(dataclasses.asdict(config))
    return plain


def to_yaml(config: Any) -> str:  # noqa: ANN401 (any dataclass)
    """The configuration as YAML, in the order of its fields."""
    text: str = yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None, width=100)
    return text


def from_dict(kind: type[ConfigT], values: Mapping[str, Any], origin: str) -> ConfigT:
    """A configuration of type `kind` from nested dictionaries; absent keys take their defaults.

    Args:
        kind: a dataclass, `PretrainConfig` for example.
        values: nested dictionaries.
        origin: where they came from, for messages ("recipe digits", a file name).

    Raises:
        ConfigError: a key is unknown (the nearest valid key is named), a value has the wrong type or is out
            of range.
    """
    return from_section(kind, values, origin, prefix="")


def from_section(kind: type[ConfigT], values: Mapping[str, Any], origin: str, prefix: str) -> ConfigT:
    """As `from_dict`; `prefix` is the section's name with a dot, for messages."""
    prepared = _prepared(kind, values, origin, prefix)
    try:
        return dacite.from_dict(kind, prepared, dacite.Config(strict=True))
    except dacite.exceptions.DaciteFieldError as error:
        if prefix:
            error.update_path(prefix.removesuffix("."))
        raise ConfigError(f"{origin}: {_told(error)}.") from error
    except (dacite.exceptions.DaciteError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        # The library also makes lists and dictionaries out of what cannot be made one.
        raise ConfigError(f"{origin}: {_told(error)}.") from error


def _told(error: Exception) -> str:
    """The error's message, which has the wrong value in it."""
    try:
        return str(error)[: 2 * MAX_SHOWN]
    except (RecursionError, ValueError):  # nested too deeply, or a number of thousands of digits
        return "a value is too large to show"


def load_yaml(path: Path) -> dict[str, Any]:
    """The content of a YAML file that holds a mapping (or nothing).

    Only plain values are made: YAML's tags for objects of Python are errors.

    Raises:
        ConfigError: the file is missing, larger than `MAX_YAML_BYTES`, is not YAML, holds more than `MAX_YAML_VALUES`
            values, or does not hold a mapping.
    """
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"the configuration {path} is no regular file.")
        with path.open("rb") as file:
            content = file.read(MAX_YAML_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}.") from error
    if len(content) > MAX_YAML_BYTES:
        raise ConfigError(f"{path} is no configuration: it is larger than {MAX_YAML_BYTES // 1024} KiB.")
    try:
        values = yaml.safe_load(content.decode("utf-8"))
    except RecursionError as error:
        raise ConfigError(f"{path} is not valid YAML: it is nested too deeply.") from error
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, AttributeError, TypeError) as error:
        # The library's readers of tagged values raise what Python's constructors do.
        raise ConfigError(f"{path} is not valid YAML: {str(error)[:500]}") from error
    _require_few(values, path)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold `section: {{option: value}}` pairs; got a {type(values).__name__}.")
    return values


def _require_few(values: object, path: Path) -> None:
    """Refuses aliases that would expand to very many values, or to themselves."""
    waiting, count = [values], 0
    while waiting and count <= MAX_YAML_VALUES:
        value, count = waiting.pop(), count + 1
        if isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple | set):
            waiting += value
    if waiting:
        raise ConfigError(f"{path} is no configuration: it holds more than {MAX_YAML_VALUES:,} values.")


def recipe_names() -> list[str]:
    """The names of the recipes that poa ships, sorted."""
    folder = resources.files("poa.recipes")
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def load_recipe(name: str) -> PretrainConfig:
    """The recipe of that name.

    Raises:
        ConfigError: there is none; the message lists those that there are.
    """
    names = recipe_names()
    if name not in names:
        raise ConfigError(f"there is no recipe {name!r}{_nearest(name, names)} Recipes: {', '.join(names)}.")
    values = yaml.safe_load(resources.files("poa.recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8"))
    return from_dict(PretrainConfig, values, f"recipe {name}")


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over` laid over it, section by section.

    A section of another architecture replaces the one below it whole.
    """
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping) and _same_architecture(below, value):
            result[key] = merged(below, value)
        else:
            result[key] = value
    return result


def differences(left: Mapping[str, Any], right: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """`{"section.option": (left value, right value)}` for every option in which the two differ."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys([*left, *right]):
        a, b = left.get(key), right.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found.update(differences(a, b, f"{prefix}{key}."))
        elif a != b:
            found[f"{prefix}{key}"] = (a, b)
    return found


def _same_architecture(below: Mapping[str, Any], value: Mapping[str, Any]) -> bool:
    named: object = below.get("architecture")
    return bool(value.get("architecture", named) == named)


def _prepared(kind: type[Any], values: Mapping[str, Any], origin: str, prefix: str) -> dict[str, Any]:
    """The values with numbers and lists as their fields want them; refuses unknown keys and what does not convert."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = get_type_hints(kind)
    result = {}
    for key, value in values.items():
        if key not in fields:
            hint = _nearest(str(key), list(fields))
            raise ConfigError(f"{origin}: there is no option {prefix}{str(key)[:MAX_SHOWN]}{hint}")
        factory: Any = fields[key].default_factory
        if dataclasses.is_dataclass(factory) and isinstance(factory, type):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{origin}: {prefix}{key} must be a section of options; got {shown(value)}.")
            section = _model_section(value, origin) if key == "model" else factory
            result[key] = from_section(section, value, origin, f"{prefix}{key}.")
        else:
            try:
                result[key] = _converted(value, hints[key])
            except (TypeError, ValueError, OverflowError) as error:
                raise ConfigError(f"{origin}: {prefix}{key} cannot be {shown(value)}: {str(error)[:200]}.") from error
    return result


def _model_section(values: Mapping[str, Any], origin: str) -> type[Any]:
    """The configuration's class for the architecture that the section names; a ViT's where it names none."""
    name = values.get("architecture", "vit")
    if not isinstance(name, str) or name not in MODEL_CONFIGS:
        hint = _nearest(str(name), list(MODEL_CONFIGS))
        raise ConfigError(
            f"{origin}: there is no model.architecture {shown(name)}{hint} Architectures: {', '.join(MODEL_CONFIGS)}."
        )
    return MODEL_CONFIGS[name]


def _converted(value: Any, hint: Any) -> Any:  # noqa: ANN401 (whatever YAML holds)
    """Lists as tuples, whole numbers and YAML's `1e-4` as floats, where the field is of that type."""
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError("a list is wanted")
        return tuple(_converted(item, get_args(hint)[0]) for item in value)
    wants_float = hint is float or float in get_args(hint)
    if wants_float and value is not None and not isinstance(value, bool):
        return float(value)
    return value


def _nearest(word: str, words: list[str]) -> str:
    close = difflib.get_close_matches(word[:MAX_SHOWN], words, n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else "."


def _plain(value: Any) -> Any:  # noqa: ANN401 (recursive over JSON-like values)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
