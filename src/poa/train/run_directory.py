"""The run directory: what is in it, and whether a command may go on with it."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from poa.config import PretrainConfig, from_dict, load_yaml, to_dict, to_yaml
from poa.config.card import EnvironmentFile
from poa.config.files import differences
from poa.data import ImageSource
from poa.errors import CheckpointError, ConfigError, DataError
from poa.files import read_json, write_json, write_text
from poa.pretrained import StartReport
from poa.runtime import Runtime
from poa.version import __version__

CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
START_FILE = "start.json"

FREE_OPTIONS = (
    "runtime.",
    "parallel.",
    "monitor.",
    "data.max_bad_share",
    "data.index",
    "data.cache_dir",
    "data.cache_gb",
    "data.downloads",
    "data.retries",
    "data.retry_seconds",
    "data.stall_seconds",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.log_every",
)
"""Options that may differ when a run goes on: they do not change what is learnt."""


@dataclass(frozen=True)
class RunDirectory:
    """The files of a run. `family/` is the result; the rest is how it came about."""

    path: Path

    @property
    def family(self) -> Path:
        """The finished family."""
        return self.path / "family"

    @property
    def checkpoints(self) -> Path:
        """The checkpoints."""
        return self.path / "checkpoints"

    @property
    def skipped(self) -> Path:
        """The images that could not be read."""
        return self.path / "skipped.jsonl"

    def saved_config(self) -> PretrainConfig | None:
        """The configuration of the run that is here, or None.

        Raises:
            CheckpointError: something else is here.
            ConfigError: the saved configuration is damaged.
        """
        file = self.path / CONFIG_FILE
        if file.exists():
            return from_dict(PretrainConfig, load_yaml(file), str(file))
        if self.path.exists() and (not self.path.is_dir() or any(item.name[0] != "." for item in self.path.iterdir())):
            raise CheckpointError(
                f"{self.path} is there already and is no run of poa (it has no {CONFIG_FILE}). Name another --out."
            )
        return None

    def check_continuation(self, config: PretrainConfig) -> None:
        """Raises `ConfigError` if a run is here whose configuration differs in what it learns."""
        saved = self.saved_config()
        if saved is None:
            return
        found = differences(to_dict(saved), to_dict(config))
        changed = {name: pair for name, pair in found.items() if not name.startswith(FREE_OPTIONS)}
        if changed:
            listed = "\n".join(f"  {name}: the run has {old!r}, got {new!r}" for name, (old, new) in changed.items())
            raise ConfigError(
                f"{self.path} holds a run with other options:\n{listed}\n"
                "Leave these options out to go on with it, or name another --out."
            )

    def begin(
        self, config: PretrainConfig, source: ImageSource, runtime: Runtime, start: StartReport | None = None
    ) -> None:
        """Writes the resolved configuration, what this start runs on, and how it started from public weights if it did.

        Raises:
            DataError: the run began with other images.
            CheckpointError: the directory cannot be written.
        """
        data = {
            "source": source.spec,
            "num_images": len(source),
            "num_skipped_when_listing": len(source.skipped),
            "fingerprint": source.fingerprint,
        }
        starts = self._earlier_starts(data)
        try:
            write_text(self.path / CONFIG_FILE, to_yaml(config))
            write_json(self.path / ENVIRONMENT_FILE, {"data": data, "starts": [*starts, _environment(runtime)]})
            if start is not None:
                write_json(self.path / START_FILE, _described(start))
        except OSError as error:
            raise CheckpointError(f"cannot write into {self.path}: {error.strerror}.") from error

    def check_is_shared(self) -> None:
        """Raises `CheckpointError` where a process does not see what the main one wrote with `begin`."""
        if not (self.path / CONFIG_FILE).is_file():
            raise CheckpointError(
                f"{self.path} is not the directory that the main process sees. All machines of a run need one shared "
                "directory for it: name one on a shared file system (--out)."
            )

    def recorded_start(self) -> dict[str, Any]:
        """`{"init": …}` of a run that started from public weights, else nothing: for the family's provenance."""
        file = self.path / START_FILE
        return {"init": read_json(file)} if file.is_file() else {}

    def _earlier_starts(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        file = self.path / ENVIRONMENT_FILE
        if not file.exists():
            return []
        earlier = from_dict(EnvironmentFile, read_json(file), str(file))
        if earlier.data.fingerprint != data["fingerprint"]:
            raise DataError(
                f"the images in {data['source']} are not those that this run began with "
                f"({earlier.data.num_images} then, {data['num_images']} now, or other contents). "
                "Restore them, or start a new run with another --out."
            )
        return earlier.starts


def _described(start: StartReport) -> dict[str, Any]:
    return {
        **start.provenance,
        "relative_difference": start.relative_difference,
        "tensors": to_dict(start.tensors),
        "num_reordered_groups": start.num_reordered_groups,
        "feature_order": list(start.feature_order),
    }


def _environment(runtime: Runtime) -> dict[str, Any]:
    packages = ("torch", "torchvision", "timm", "numpy", "pillow", "opencv-python-headless")
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "packages": {"poa": __version__, **{name: _installed(name) for name in packages}},
        **runtime.describe(),
    }


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed under this name"
