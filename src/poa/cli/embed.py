"""`poa embed`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes

from poa.cli.progress import bars
from poa.cli.reading import ReadingOptions
from poa.config import RuntimeConfig
from poa.embed import Embedded, EmbedOptions, Share, embed
from poa.errors import ConfigError, SubnetError

if TYPE_CHECKING:
    import torch

    from poa.models import Candidate


@dataclass(frozen=True)
class Embed:
    """Compute the vectors of a set of images into a Parquet file.

    Columns: image_name, label (where there are labels) and vector, in the order of the images. Memory stays bounded
    for any number of images. A call that was stopped goes on when it is given again, and several processes share the
    work under torchrun; the file is the same to the last bit in any case.
    """

    model: Annotated[str, tyro.conf.Positional]
    """A run or family of poa (with --subnet), a directory in timm's format, or timm:NAME."""
    images: Annotated[str, tyro.conf.Positional]
    """A folder of images, .parquet or .tar files, a pattern like shards-{0000..0009}.tar, or digits:test."""
    out: Path
    """The file to write, *.parquet; or a directory for a table in parts."""
    subnet: str | None = None
    """Of a family which sub-network: w384-d12 for example; smallest, middle or intact."""
    options: OmitArgPrefixes[EmbedOptions] = field(default_factory=EmbedOptions)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto: CUDA where there is one, else MPS, else the CPU."""
    num_workers: int = -1
    """Processes that decode; -1 chooses."""
    reading: OmitArgPrefixes[ReadingOptions] = field(default_factory=ReadingOptions)


def run(arguments: Sequence[str]) -> int:
    """Runs the command."""
    command = tyro.cli(Embed, prog="poa embed", args=list(arguments))
    from poa.data import open_source
    from poa.runtime import resolve_runtime

    share = Share.of_environment()
    runtime = resolve_runtime(RuntimeConfig(device=command.device, num_workers=command.num_workers))
    network = _opened(command.model, command.subnet)
    source = open_source(command.images, command.reading.config(), network.preprocessing.num_channels, in_order=True)
    network.to(_own(runtime.device))
    num_workers = runtime.num_workers
    if command.num_workers == -1:
        num_workers = max(1, num_workers // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    with bars() as shown:
        found = embed(
            network,
            source,
            command.out,
            command.options,
            share=share,
            num_workers=num_workers,
            max_bad_share=command.reading.max_bad_share,
            on_progress=(lambda done, total: shown.show("images", done, total)) if share.process == 0 else None,
        )
    _tell(found, command.out, share, network)
    return 0


def _opened(model: str, subnet: str | None) -> Candidate:
    from poa.models import open_models
    from poa.timm_models import is_family

    if model.startswith("timm:") or not is_family(Path(model)):
        if subnet is not None:
            raise ConfigError(f"--subnet is of a family, and {model} is none.")
        return open_models([model])[0]
    if subnet is None:
        raise SubnetError(f"{model} is a family. Say which of its sub-networks by --subnet; `poa subnets` lists them.")
    found = open_models([model], [subnet])
    if len(found) != 1:
        raise SubnetError(f"`poa embed` computes the vectors of one network; {subnet!r} names {len(found)}.")
    return found[0]


def _own(device: torch.device) -> torch.device:
    """Of several GPUs the one of this process, as torchrun numbers them."""
    import torch

    if device.type != "cuda":
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def _tell(found: Embedded, out: Path, share: Share, network: Candidate) -> None:
    if found.missing:
        print(
            f"Process {share.process} of {share.num_processes} is done; {len(found.missing)} parts are missing, "
            f"{found.missing[0]} the first. The process that writes the last of them puts {out} together. Should none "
            f"be at work any more, run the same command again."
        )
        return
    for bad in found.skipped:
        print(f"left out: {bad.name}: {bad.reason}", file=sys.stderr)
    what = f"{found.num_images:,} vectors of {network.num_features} numbers"
    print(f"{out} was complete already: {what}." if found.was_there else f"{what}, written to {out}.")
