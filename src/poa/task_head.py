"""A linear classifier that every sub-network of a family shares, cut by the rule that cuts the family."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from poa.config import from_dict
from poa.config.card import HeadFile
from poa.elastic import Axis, Cut, Window, fixed
from poa.errors import CheckpointError, ConfigError
from poa.files import file_sha256, read_json, write_json
from poa.tensor_file import read_tensors

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

HEAD_FILE = "head.json"
HEAD_WEIGHTS_FILE = "head.safetensors"
HEAD_FORMAT = "poa-head"
HEAD_VERSION = 1


def head_cuts(features: Axis, num_classes: int) -> tuple[Cut, Cut]:
    """How weight and bias of the classifier are cut: elastic in its input, with POA's factor for fewer inputs.

    Args:
        features: the channels of the class vectors (`Layout.features`).
        num_classes: the logits.
    """
    return Cut((fixed(num_classes), features), fan_in=1), Cut((fixed(num_classes),))


@dataclass(frozen=True)
class TaskHead:
    """The classifier of a fine-tuned family.

    Attributes:
        weight: of the intact network.
        bias: of all sub-networks.
        class_names: by class.
        multi_label: whether an image may have any number of classes: the logits go through a sigmoid each.
    """

    weight: Float[Tensor, "K C"]
    bias: Float[Tensor, "K"]
    class_names: tuple[str, ...]
    multi_label: bool = False

    @property
    def num_classes(self) -> int:
        """The logits."""
        return len(self.class_names)

    def state(self, features: Axis, width: int) -> dict[str, Tensor]:
        """`weight` and `bias` of the plain linear layer of a sub-network of that width, its factor folded in."""
        return {name: window.dense().cpu() for name, window in self.windows(features, width).items()}

    def windows(self, features: Axis, width: int) -> dict[str, Window]:
        """What a sub-network of that width owns of `weight` and `bias`, where it lies."""
        weight, bias = head_cuts(features, self.num_classes)
        return {
            "weight": weight.window(self.weight.detach(), width),
            "bias": bias.window(self.bias.detach(), width),
        }

    def save(self, directory: Path) -> None:
        """Writes `head.safetensors` and `head.json` into a directory that is there."""
        from safetensors.torch import save_file

        weights = directory / HEAD_WEIGHTS_FILE
        parts = {"weight": self.weight, "bias": self.bias}
        save_file({name: part.detach().cpu().contiguous() for name, part in parts.items()}, weights)
        described = {
            "format": HEAD_FORMAT,
            "version": HEAD_VERSION,
            "class_names": list(self.class_names),
            "multi_label": self.multi_label,
            "weights": {"file": HEAD_WEIGHTS_FILE, "sha256": file_sha256(weights)},
        }
        write_json(directory / HEAD_FILE, described)


def read_head(directory: Path, features: Axis) -> TaskHead | None:
    """The classifier in a family's directory; None if the family has none.

    Args:
        directory: with `family.json`.
        features: the channels of the family's class vectors.

    Raises:
        CheckpointError: it is damaged, from a newer version of poa, or of another family.
    """
    file, weights, remedy = directory / HEAD_FILE, directory / HEAD_WEIGHTS_FILE, "Copy the family anew."
    if not file.exists() and not weights.exists():
        return None
    values = read_json(file, remedy=remedy)
    version = values.get("version")
    if values.get("format") != HEAD_FORMAT or not isinstance(version, int) or version > HEAD_VERSION:
        found = f"{values.get('format')!s:.40} version {version!s:.40}"
        raise CheckpointError(f"{file} is {found}. Install a newer poa.")
    try:
        described = from_dict(HeadFile, values, str(file))
    except ConfigError as error:
        raise CheckpointError(f"{file} is damaged: {error} {remedy}") from error
    if not weights.is_file() or file_sha256(weights) != described.weights.sha256:
        raise CheckpointError(f"{weights} is damaged: its checksum is not the one in {HEAD_FILE}. Copy it anew.")
    state = read_tensors(weights)
    if sorted(state) != ["bias", "weight"] or not all(tensor.is_floating_point() for tensor in state.values()):
        raise CheckpointError(f"{weights} must hold a weight and a bias of floating-point numbers. {remedy}")
    head = TaskHead(state["weight"], state["bias"], described.class_names, described.multi_label)
    expected = tuple(cut.full_shape for cut in head_cuts(features, head.num_classes))
    if (tuple(head.weight.shape), tuple(head.bias.shape)) != expected:
        raise CheckpointError(f"{weights} does not fit the family: its weight is {tuple(head.weight.shape)}.")
    return head
