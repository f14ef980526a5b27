"""`poa extract`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from poa.errors import SubnetError

if TYPE_CHECKING:
    from poa.family import Family, Verification


@dataclass(frozen=True)
class Extract:
    """Cut one sub-network out of a family into a directory that timm or transformers opens without poa.

    Of a family from `poa finetune --elastic` it is cut with its classifier.

    The written model is opened again and compared with the sub-network on a probe batch; it is refused if they
    differ.
    """

    path: Annotated[Path, tyro.conf.Positional]
    """A run directory or a family directory."""
    subnet: Annotated[str, tyro.conf.Positional]
    """The sub-network, w384-d12 for example; `smallest`, `middle` or `intact` too."""
    out: Path
    """The directory to write."""
    image_size: int | None = None
    """Side of the images that the model is for; the family's own by default."""
    format: Literal["timm", "transformers"] = "timm"
    """timm's directory (transformers opens it through its timm wrapper), or transformers' own where it has a class."""
    overwrite: bool = False
    """Replace the directory if it is there."""


def run(arguments: Sequence[str]) -> int:
    """Runs the command."""
    command = tyro.cli(Extract, prog="poa extract", args=list(arguments), config=(tyro.conf.FlagCreatePairsOff,))
    from poa.family import load

    family = load(command.path)
    subnets = family.space.parse_all([command.subnet])
    if len(subnets) != 1:
        raise SubnetError(f"`poa extract` cuts out one sub-network; {command.subnet!r} names {len(subnets)}.")
    subnet = subnets[0]
    save = family.save_subnet if command.format == "timm" else _transformers_writer(family)
    found: Verification = save(subnet, command.out, image_size=command.image_size, overwrite=command.overwrite)
    logits = found.logits_relative_difference
    print(f"{subnet}: {family.card.num_params(subnet):,} parameters, written to {command.out}")
    if family.head is not None:
        print(f"It classifies {family.head.num_classes} classes: {_listed(family.head.class_names)}")
    print(
        f"Compared with the family on {found.num_probe_images} probe images: relative difference "
        f"{found.relative_difference:.1e} (allowed: {found.tolerance:g}), largest {found.max_abs_difference:.1e}"
        + ("" if logits is None else f", of the logits {logits:.1e}")
    )
    opener = {
        "timm": f'timm.create_model("local-dir:{command.out}", pretrained=True)',
        "transformers": f'transformers.{_auto_class(family)}.from_pretrained("{command.out}")',
    }
    print(f"Open it with: {opener[command.format]}")
    return 0


def _auto_class(family: Family) -> str:
    return "AutoModel" if family.head is None else "AutoModelForImageClassification"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _transformers_writer(family: Family) -> Callable[..., Verification]:
    from poa.deploy.export.transformers import save_transformers

    return partial(save_transformers, family)
