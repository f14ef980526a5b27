"""The projection heads of a finished run: the family has the teacher's backbone, the last checkpoint its heads."""

from __future__ import annotations

from pathlib import Path

from poa.errors import CheckpointError
from poa.family import load
from poa.objective.heads import ProjectionHeads
from poa.train.checkpoint import CheckpointStore
from poa.train.run_directory import CONFIG_FILE, RunDirectory

PREFIX = "model.teacher.heads."


def load_heads(path: str | Path) -> ProjectionHeads | None:
    """The teacher's heads that belong to the family of a run, on the CPU, in evaluation mode.

    Returns:
        None where there are none: the path is no run directory, or its checkpoints were removed.

    Raises:
        CheckpointError: the checkpoints are damaged, or the newest is not of the step at which the family was made.
        ConfigError: the run's configuration is damaged.
    """
    run = RunDirectory(Path(path))
    if not (run.path / CONFIG_FILE).is_file():
        return None
    config = run.saved_config()
    found = CheckpointStore(run.checkpoints, keep=1).newest()
    if config is None or found is None:
        return None
    family = load(run.path)
    finished = family.card.provenance.get("steps")
    if found.step != finished:
        raise CheckpointError(
            f"the newest checkpoint of {run.path} is of step {found.step}, its family of step {finished}: the heads "
            f"do not belong to it. Name the family's directory ({run.family}) to do without them."
        )
    heads = ProjectionHeads(family.supernet.layout.features, config.heads)
    found.load_(found.tensors_of(heads, PREFIX))
    return heads.eval().requires_grad_(False)
