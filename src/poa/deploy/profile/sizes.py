"""The size of a sub-network's file, exactly, without writing it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from poa.elastic import Subnet
from poa.family import Family
from poa.tensor_file import num_bytes


def timm_file_sizes(family: Family, subnets: Sequence[Subnet], image_size: int) -> Float64[np.ndarray, "N"]:
    """MB (10⁶ bytes) of the `model.safetensors` that `Family.save_subnet` would write for each."""
    sizes = [num_bytes(family.timm_parts(subnet, image_size)) / 1e6 for subnet in subnets]
    return np.array(sizes, dtype=np.float64)
