"""`poa pretrain`."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from poa.config import PretrainConfig, from_dict, load_recipe, load_yaml, recipe_names, to_dict
from poa.config.files import merged
from poa.errors import ConfigError, PoaError, PoaWarning
from poa.patient_file import PatientStream

DEFAULT_RECIPE = "vit-s16"


@dataclass(frozen=True)
class Pretrain:
    """Pre-train a family of sub-networks on unlabelled images.

    Start from a recipe, lay a YAML file over it if you like, and change single options here. The same command, or
    just `poa pretrain --out RUN`, goes on with a run that was stopped. The result is in RUN/family.
    """

    out: Path
    """The run directory."""
    recipe: str | None
    """The recipe to start from; vit-s16 by default. The options below show its values."""
    config: Path | None
    """A YAML file with options, laid over the recipe: `section: {option: value}`."""
    options: Annotated[PretrainConfig, tyro.conf.arg(name="")]


def run(arguments: Sequence[str]) -> int:
    """Runs the command; exit status 0, or 128 + signal when stopped by one."""
    config, out = _parsed_once(arguments)
    from poa.distributed import ranks_of_environment
    from poa.train import ConsoleReporter, pretrain

    with redirect_stderr(PatientStream(sys.stderr)):
        result = pretrain(config, out, ConsoleReporter())
    ranks = ranks_of_environment()
    if not ranks.is_main:
        return 0 if result.family else 128 + (result.signal or 0)
    if result.family is None:
        print(f"Stopped after step {result.step} of {result.num_steps}; saved.", file=sys.stderr)
        also = "" if ranks.num_ranks == 1 else " (alone, or by torchrun with any number of processes)"
        print(f"Go on with: poa pretrain --out {out}{also}", file=sys.stderr)
        return 128 + (result.signal or 0)
    print(f"The family is in {result.family}. See its sub-networks with: poa subnets {out}")
    return 0


def _parsed_once(arguments: Sequence[str]) -> tuple[PretrainConfig, Path]:
    """As `parse`; of the processes that torchrun starts with the same arguments one tells what is wrong with them."""
    try:
        return parse(arguments)
    except PoaError as error:
        error.is_told = os.environ.get("RANK", "0") != "0"
        raise


def parse(arguments: Sequence[str]) -> tuple[PretrainConfig, Path]:
    """The configuration that the arguments ask for, and the run directory.

    The base is the run that is in --out if there is one and neither --recipe nor --config is given, else the recipe.

    Raises:
        ConfigError: the recipe or the YAML file is not there or not valid, or an option is out of range.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--out", type=Path)
    first.add_argument("--recipe")
    first.add_argument("--config", type=Path)
    first.add_argument("--init", "--init.source", dest="init", default="")
    try:
        known, _ = first.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}.") from error
    base = _base(known.out, known.recipe, known.config, known.init)
    out = known.out if known.out is not None else tyro.MISSING
    command = tyro.cli(
        Pretrain,
        prog="poa pretrain",
        args=list(arguments),
        default=Pretrain(out, known.recipe, known.config, base),
        config=(tyro.conf.AvoidSubcommands,),
        description=f"{Pretrain.__doc__}\n\nRecipes: {', '.join(recipe_names())}.",
    )
    if not command.options.data.source:
        raise ConfigError("where are the images? Give --data FOLDER, --data FILE.parquet or --data digits.")
    return command.options, command.out


def _base(out: Path | None, recipe: str | None, file: Path | None, init: str) -> PretrainConfig:
    if out is not None and recipe is None and file is None:
        from poa.train.run_directory import RunDirectory

        saved = RunDirectory(out).saved_config()
        if saved is not None:
            return saved
    base = load_recipe(recipe or DEFAULT_RECIPE)
    over = {} if file is None else load_yaml(file)
    section = over.get("init")
    spec = init or (section.get("source") if isinstance(section, dict) else "")
    if isinstance(spec, str) and spec:
        base = _grown_from(base, spec)
    return from_dict(PretrainConfig, merged(to_dict(base), over), str(file)) if over else base


def _grown_from(base: PretrainConfig, spec: str) -> PretrainConfig:
    """The recipe with the model of the weights that it starts from, and with the images prepared as they expect."""
    from poa.pretrained import grown_from

    grown = grown_from(spec, base.model)
    if grown is None:
        return replace(base, init=replace(base.init, source=spec))
    multiple, local = grown.model.crop_multiple, base.augment.local_size
    fitted: dict[str, Any] = {"local_size": max(multiple, round(local / multiple) * multiple)}
    if len(grown.mean) in (1, grown.model.num_channels):
        fitted |= {"mean": grown.mean, "std": grown.std}
    else:
        warnings.warn(
            f"augment.mean and augment.std are the recipe's: {spec} has none for {grown.model.num_channels} channels.",
            PoaWarning,
            stacklevel=2,
        )
    changes = {"model.image_size": (base.model.image_size, grown.model.image_size)}
    changes |= {f"augment.{name}": (getattr(base.augment, name), value) for name, value in fitted.items()}
    for name, (old, new) in changes.items():
        if old != new:
            warnings.warn(f"{name} is {new} instead of the recipe's {old}, to fit {spec}.", PoaWarning, stacklevel=2)
    init = replace(base.init, source=spec)
    return replace(base, model=grown.model, augment=replace(base.augment, **fitted), init=init)
