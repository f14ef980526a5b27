"""Golden values computed with the reference implementation (alipay/POA), and its names as ours."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file

DATA = Path(__file__).parent / "data"


def golden_json(name):
    return json.loads((DATA / f"{name}.json").read_text())


def golden_tensors(*names):
    tensors = {}
    for name in names:
        tensors.update(load_file(DATA / f"{name}.safetensors"))
    return tensors


def our_backbone_name(name):
    name = name.replace(".linear.", ".")
    return re.sub(r"(norm\d?)\.norm\.", r"\1.", name)


def relative_error(ours, theirs):
    ours, theirs = torch.as_tensor(ours).detach().double(), torch.as_tensor(theirs).double()
    return float(((ours - theirs).norm() / theirs.norm().clamp_min(1e-30)).detach())
