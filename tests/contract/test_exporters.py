"""What every registered format of an export does."""

from functools import lru_cache

import numpy as np
import pytest
import torch

from poa.deploy.export.base import Exported
from poa.deploy.export.registry import EXPORTERS
from poa.family import Family
from poa.task_head import TaskHead
from tests.contract.configs import SMALLEST
from tests.unit.test_extraction import make_family

TOLERANCE = 1e-4
FLOAT32 = [name for name, exporter in EXPORTERS.items() if exporter.precision == "float32"]
DIRECTORIES = ("timm", "transformers")
QUICK = {(name, "vit", True) for name in FLOAT32 if name != "executorch"} | {
    ("onnx", "resnet", False),
    ("torch-export", "convnext", False),
}
"""Of the formats that trace: the others take seconds each, a Swin in ExecuTorch minutes."""


@lru_cache
def family_of(architecture, has_head):
    family = make_family(SMALLEST[architecture])
    if not has_head:
        return family
    width = family.supernet.layout.features.size
    rng = torch.Generator().manual_seed(1)
    names = ("ant", "bee", "cat")
    head = TaskHead(torch.randn(3, width, generator=rng) / width**0.5, torch.randn(3, generator=rng), names)
    return Family(family.card, family.supernet, head)


def exported(architecture, has_head=False):
    family = family_of(architecture, has_head)
    return Exported(family, family.space.middle, family.card.preprocessing.image_size)


def cases():
    found = []
    for name in FLOAT32:
        for architecture in SMALLEST:
            for has_head in (False, True):
                case = (name, architecture, has_head)
                is_quick = name in DIRECTORIES or case in QUICK
                label = f"{name}-{architecture}{'-head' if has_head else ''}"
                found.append(pytest.param(*case, marks=[] if is_quick else [pytest.mark.slow], id=label))
    return [each for each in found if not each.id.startswith("executorch") or "head" not in each.id]


@pytest.mark.parametrize(("name", "architecture", "has_head"), cases())
def test_what_is_written_is_run_by_its_runtime_and_equals_the_family(name, architecture, has_head, tmp_path):
    exporter, what = EXPORTERS[name](), exported(architecture, has_head)
    exporter.write(what, tmp_path)
    run = exporter.open(tmp_path, num_threads=1)
    assert exporter.size(tmp_path) > 4 * what.family.card.num_params(what.subnet) - 1
    for file in tmp_path.rglob("*"):
        assert b"site-packages" not in file.read_bytes()
        assert b"/poa/" not in file.read_bytes()
    images = what.probe_images(8)
    first = None
    for num_images in (1, 3, 8):
        batch = images[:num_images]
        found = run(batch.numpy())
        expected = what.expected(batch).numpy()
        assert found.dtype == np.float32
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= TOLERANCE
        assert np.array_equal(found, run(batch.numpy()))
        first = found if first is None else first
    assert np.abs(first - what.expected(images[:1]).numpy()).max() <= TOLERANCE
