"""The size of a sub-network's file, exactly, without writing it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float64

from poa.elastic import Subnet
from poa.family import Family


def timm_file_sizes(family: Family, subnets: Sequence[Subnet], image_size: int) -> Float64[np.ndarray, "N"]:
    """MB (10⁶ bytes) of the `model.safetensors` that `Family.save_subnet` would write for each."""
    sizes = []
    for subnet in subnets:
        shapes = {name: each.shape for name, each in family.supernet.timm_windows(subnet, image_size).items()}
        if family.head is not None:
            part = family.timm_config(subnet, image_size)["pretrained_cfg"]["classifier"]
            head = family.head.windows(family.supernet.layout.features, subnet.width)
            shapes |= {f"{part}.{name}": each.shape for name, each in head.items()}
        sizes.append(safetensors_bytes(shapes) / 1e6)
    return np.array(sizes, dtype=np.float64)


def safetensors_bytes(shapes: Mapping[str, Sequence[int]]) -> int:
    """Bytes of a safetensors file of float32 tensors.

    Eight bytes tell the length of the header, JSON filled up with spaces to a multiple of eight bytes; the tensors
    follow in the order of their names.
    """
    header, end = {}, 0
    for name in sorted(shapes):
        start, end = end, end + 4 * int(np.prod(shapes[name], dtype=np.int64))
        header[name] = {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"))
    return 8 + -(-len(text.encode()) // 8) * 8 + end
