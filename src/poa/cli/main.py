"""The entry point of `poa`: finds the command and words errors for people. Imports nothing heavy."""

from __future__ import annotations

import difflib
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import TextIO

from poa.errors import PoaError, PoaWarning
from poa.version import __version__

COMMANDS = {
    "data": "prepare images: `poa data check`, convert them into shards, index shards",
    "pretrain": "pre-train a family on a folder of images (or a parquet file)",
    "subnets": "list the sub-networks of a family with their sizes",
    "extract": "cut one sub-network out of a family into a timm directory",
    "profile": "measure latency, memory and size of sub-networks on a device",
    "select": "choose the best sub-network for a budget",
    "export": "write sub-networks for timm, transformers, ONNX, OpenVINO and others, each one checked",
    "embed": "compute the vectors of a set of images into a Parquet file",
    "report": "write one HTML page about a run or a family",
    "finetune": "train a network, or a whole family, to classify labelled images",
    "evaluate": "measure sub-networks: `poa evaluate knn`",
    "demo": "pre-train on handwritten digits and look at the result, in minutes",
}

USAGE_ERROR = 2
FAILED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; gives back the exit status: 0, 1 for a mistake that the user can mend, 2 for a wrong call."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"poa {__version__}")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean `poa {close[0]}`?" if close else ""
        print(f"error: there is no command {name!r}.{hint}\n\n{_help()}", file=sys.stderr)
        return USAGE_ERROR
    return _run(name, arguments[1:])


def _run(name: str, arguments: list[str]) -> int:
    warnings.showwarning = _show_warning
    warnings.simplefilter("always", PoaWarning)
    try:
        status: int = import_module(f"poa.cli.{name}").run(arguments)
        sys.stdout.flush()
    except PoaError as error:
        if not error.is_told:
            rank = os.environ.get("RANK", "0")
            who = "" if rank == "0" else f" in process {rank}"
            print(f"error{who}: {error}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        return 130
    return status


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,  # noqa: ARG001 (the warnings module's signature)
) -> None:
    is_ours = issubclass(category, PoaWarning)
    text = f"warning: {message}" if is_ours else f"{filename}:{lineno}: {category.__name__}: {message}"
    print(text, file=file or sys.stderr)


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = "\n".join(f"  {name:<{width}}{text}" for name, text in COMMANDS.items())
    return (
        "poa: pre-train once, deploy every size.\n\n"
        "usage: poa COMMAND [OPTIONS]\n\n"
        f"commands:\n{lines}\n\n"
        "`poa COMMAND --help` explains a command. For example:\n"
        "  poa pretrain --data IMAGES --recipe vit-s16 --out RUN\n"
        "  poa subnets RUN\n"
        "  poa extract RUN w192-d6 --out NET"
    )


if __name__ == "__main__":
    sys.exit(main())
