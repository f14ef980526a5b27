"""The kit that measures sub-networks on a machine without poa and torch."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from poa.deploy.profile.kit import script
from poa.deploy.profile.kit.timing import OnProgress, no_progress
from poa.deploy.profile.measure import exported, exporter_of
from poa.deploy.profile.table import family_key
from poa.errors import ConfigError
from poa.files import replace_directory, write_json, write_text
from poa.version import __version__

if TYPE_CHECKING:
    from poa.elastic import Subnet
    from poa.family import Family

PACKAGE = "poa_kit"
START = f"""import sys
from pathlib import Path

from {PACKAGE}.script import main

sys.exit(main(Path(__file__).resolve().parent))
"""

README = """# Measure {count} networks on this machine

Needs Python 3.9 or newer, numpy and onnxruntime (`pip install numpy onnxruntime`), nothing else.

    python {script} --device-name "NAME OF THIS MACHINE"

It writes `profile.csv`; stopped, the same command goes on. `python {script} --help` lists the options: threads, batch
size, how long is measured. Let the machine do nothing else meanwhile, and keep it from saving power.

Then, where poa and the family are:

    poa profile FAMILY --complete profile.csv

adds what the other sub-networks of the family cost, predicted from the measured ones, with the error of the prediction.

The networks take images of {num_channels} × {image_size} × {image_size}, in batches of any size. Family: {family}.
"""


def write_kit(
    family: Family,
    subnets: Sequence[Subnet],
    directory: Path,
    *,
    runtime: str = "onnx",
    image_size: int | None = None,
    overwrite: bool = False,
    on_progress: OnProgress = no_progress,
) -> None:
    """Writes a directory with ONNX files of the sub-networks and the script that measures them, all or nothing.

    Args:
        family: on the CPU.
        subnets: what the kit holds.
        directory: what is written.
        runtime: an export format that writes ONNX files.
        image_size: side of the images; the family's by default.
        overwrite: replace the directory if it is there.
        on_progress: called with the number of networks that are written, and of all.

    Raises:
        ConfigError: the format writes no ONNX files, its libraries are not installed, or no network can be cut for
            images of that size.
        CheckpointError: the directory holds something and `overwrite` is False.
    """
    exporter = exporter_of(runtime)
    if not exporter.weights_file.endswith(".onnx"):
        raise ConfigError(
            f"a kit runs ONNX files; {runtime} writes {exporter.weights_file}. Use onnx or an int8 of it."
        )
    size = family.checked_image_size(image_size)
    card = family.card
    with replace_directory(directory, overwrite=overwrite) as scratch:
        networks = []
        for done, subnet in enumerate(subnets):
            on_progress(done, len(subnets))
            folder = Path("networks", str(subnet))
            (scratch / folder).mkdir(parents=True)
            exporter.write(exported(family, subnet, size, exporter), scratch / folder)
            networks.append(
                {
                    "subnet": str(subnet),
                    "file": (folder / exporter.weights_file).as_posix(),
                    "num_params": card.num_params(subnet),
                    "flops": card.architecture.flops(card.config, subnet, size),
                }
            )
        setting: dict[str, str | int] = {"runtime": runtime, "precision": exporter.precision, "image_size": size}
        _describe(family, scratch, setting, networks)
        on_progress(len(subnets), len(subnets))


def _describe(family: Family, directory: Path, setting: Mapping[str, str | int], networks: Sequence[object]) -> None:
    """Writes everything but the networks."""
    known = {
        **setting,
        "num_channels": family.card.preprocessing.num_channels,
        "family": family_key(family.card),
        "poa_version": __version__,
    }
    described = {"format": script.KIT_FORMAT, "version": script.KIT_VERSION, **known, "networks": networks}
    write_json(directory / script.KIT_FILE, described)
    source = Path(script.__file__).parent
    shutil.copytree(source, directory / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    write_text(directory / script.SCRIPT, START)
    write_text(directory / "README.md", README.format(count=len(networks), script=script.SCRIPT, **known))
