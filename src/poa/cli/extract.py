"""`poa extract`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from poa.errors import SubnetError


@dataclass(frozen=True)
class Extract:
    """Cut one sub-network out of a family into a directory that timm opens without poa.

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
    found = family.save_subnet(subnet, command.out, image_size=command.image_size, overwrite=command.overwrite)
    print(f"{subnet}: {family.card.num_params(subnet):,} parameters, written to {command.out}")
    print(
        f"Compared with the family on {found.num_probe_images} probe images: relative difference "
        f"{found.relative_difference:.1e} (allowed: {found.tolerance:g}), largest {found.max_abs_difference:.1e}"
    )
    print(f'Open it with: timm.create_model("local-dir:{command.out}", pretrained=True)')
    return 0
