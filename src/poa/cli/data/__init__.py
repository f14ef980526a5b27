"""`poa data WHAT`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import import_module

from rich.filesize import decimal

from poa.errors import ConfigError

COMMANDS = {
    "check": "look at every image: whether it decodes, how large it is, whether it is there twice",
    "shard": "convert images from anywhere into shards, each a fair sample of all",
    "index": "make the index of shards that are there, local or remote",
}
"""Each a module of this package."""


def run(arguments: Sequence[str]) -> int:
    """Runs the command."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    name, rest = arguments[0], list(arguments[1:])
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean `poa data {close[0]}`?" if close else ""
        raise ConfigError(f"there is no command `poa data {name}`.{hint} Commands: {', '.join(COMMANDS)}.")
    status: int = import_module(f"poa.cli.data.{name}").run(rest)
    return status


def shards_in_words(num_shards: int, num_bytes: int) -> str:
    """How many shards there are and how large they are together."""
    return f"{num_shards:,} shard{'s' if num_shards != 1 else ''}, {decimal(num_bytes)}"


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = "\n".join(f"  {name:<{width}}{text}" for name, text in COMMANDS.items())
    return (
        "usage: poa data COMMAND IMAGES [OPTIONS]\n\n"
        "IMAGES are a folder of images, .parquet or .tar files, local or under a URL, or digits.\n\n"
        f"commands:\n{lines}\n\n`poa data COMMAND --help` explains one."
    )
