"""timm's stock models without weights."""

from __future__ import annotations

from torch import nn

from poa.backbones.base import TimmModel


def empty_timm_model(made: TimmModel, **training: float) -> nn.Module:
    """The timm model of that description without a head, to be given its weights: they are not initialised.

    It is on the meta device; a model with constant buffers that no state dict holds is on the CPU.

    Args:
        made: how timm makes it.
        training: more arguments for timm, as `drop_path_rate`.
    """
    import timm
    import torch

    arguments = {"pretrained": False, "num_classes": 0, **made.arguments, **training}
    with torch.device("meta"):
        empty: nn.Module = timm.create_model(made.architecture, **arguments)
    if next(empty.buffers(), None) is None:
        return empty
    # Buffers that no state dict holds (Swin's attention masks) are computed where the model is made.
    with torch.random.fork_rng(devices=[]):
        whole: nn.Module = timm.create_model(made.architecture, **arguments)
    return whole
