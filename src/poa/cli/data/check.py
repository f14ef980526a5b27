"""`poa data check`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import OmitArgPrefixes

from poa.cli.progress import bars
from poa.cli.reading import SourceOptions
from poa.data.tools import CheckOptions, Findings, check_images, plot_sizes, spread, verify_shards
from poa.errors import ConfigError
from poa.files import check_writable, write_json

_NUM_SHOWN = 10


@dataclass(frozen=True)
class DataCheck:
    """Look at every image: whether it decodes, how large it is, whether it is there twice.

    Of shards with an index also: whether every shard has the size and the SHA-256 that the index says. The exit status
    is 0 if all is well, else 1.
    """

    images: Annotated[str, tyro.conf.Positional]
    """A folder of images, .parquet or .tar files, a pattern like shards-{0000..0009}.tar, local or under a URL."""
    json: Path | None = None
    """A file for all that is found."""
    plot: Path | None = None
    """A picture (PNG) of how large the images are."""
    recipe: str | None = None
    """Images whose shorter side is below this recipe's image size are wrong."""
    options: OmitArgPrefixes[CheckOptions] = field(default_factory=CheckOptions)
    num_workers: int = -1
    """Processes that decode; -1 chooses. They change nothing of the result."""
    source: OmitArgPrefixes[SourceOptions] = field(default_factory=SourceOptions)


def run(arguments: Sequence[str]) -> int:
    """Runs the command."""
    command = tyro.cli(DataCheck, prog="poa data check", args=list(arguments))
    from poa.data import open_source, resolve_num_workers
    from poa.data.shards import ShardSource

    for path in filter(None, (command.json, command.plot)):
        check_writable(path)
    options = _with_recipe(command.options, command.recipe)
    # All is looked at; what is too much is said at the end.
    config = replace(command.source.config(), max_bad_share=1.0)
    source = open_source(command.images, config, 3, in_order=True)
    with bars() as shown:
        found = check_images(
            source,
            options,
            config=config,
            num_workers=resolve_num_workers(command.num_workers, "cpu"),
            on_progress=partial(shown.show, "images"),
        )
        if isinstance(source, ShardSource):
            found = replace(found, shards=verify_shards(command.images, config, partial(shown.show, "shards")))
    if command.json is not None:
        write_json(command.json, found.as_json())
    if command.plot is not None:
        plot_sizes(found, command.plot)
    print("\n".join(_told(found)))
    problems = found.problems()
    for problem in problems:
        print(f"wrong: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _with_recipe(options: CheckOptions, recipe: str | None) -> CheckOptions:
    if recipe is None:
        return options
    if options.min_side:
        raise ConfigError("give --min-side or --recipe, not both: a recipe's image size is the smallest side.")
    from poa.config import load_recipe

    return replace(options, min_side=load_recipe(recipe).model.image_size)


def _told(found: Findings) -> Iterator[str]:
    """What there is, a line for each kind."""
    yield f"{found.num_images:,} images, unreadable: {found.num_unreadable:,}"
    yield from _first([f"{bad.name}: {bad.reason}" for bad in found.unreadable], found.num_unreadable)
    for name, values in (
        ("width", found.widths),
        ("height", found.heights),
        ("shorter side", found.short_sides),
        ("width / height", found.aspect_ratios),
    ):
        if (of := spread(values)) is not None:
            yield f"{name:<15}{of['min']:.4g} to {of['max']:.4g}, median {of['median']:.4g}"
    yield f"{'formats':<15}{_counts(found.formats)}"
    yield f"{'modes':<15}{_counts(found.modes)}"
    if found.class_sizes is not None and (of := spread(found.class_sizes)) is not None:
        yield f"{'classes':<15}{len(found.class_sizes):,}, of {of['min']:,} to {of['max']:,} images"
    same = found.duplicates
    yield f"{'duplicates':<15}{same.num_surplus:,}, groups of the same pixels: {same.num_groups:,}"
    yield from _first([" = ".join(group) for group in same.groups], same.num_groups)
    if found.options.min_side:
        yield f"{'too small':<15}{found.num_small:,} with a side below {found.options.min_side} pixels"
    yield from _first(found.small, found.num_small)
    if found.shards is not None:
        yield f"{'shards':<15}{found.shards.num_shards:,}, not as the index says: {len(found.shards.faults):,}"
        yield from _first([" ".join(fault) for fault in found.shards.faults], len(found.shards.faults))


def _first(lines: Sequence[str], count: int) -> Iterator[str]:
    """The first lines of `count`, and how many more there are."""
    yield from (f"  {line}" for line in lines[:_NUM_SHOWN])
    if count > len(lines[:_NUM_SHOWN]):
        yield f"  and {count - len(lines[:_NUM_SHOWN]):,} more (--json FILE lists --num-listed of them)"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())
