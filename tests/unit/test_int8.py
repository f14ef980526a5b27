from dataclasses import replace
from functools import lru_cache

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from poa.deploy.export.base import Exported
from poa.deploy.export.int8_onnx import OnnxInt8, OnnxInt8Dynamic
from poa.deploy.export.int8_openvino import OpenVinoInt8
from poa.errors import ConfigError
from poa.family import Family
from poa.task_head import TaskHead
from tests.contract.configs import IN_COLOUR
from tests.unit.test_extraction import TINY, make_family

FORMATS = (OnnxInt8, OnnxInt8Dynamic, OpenVinoInt8)
CONFIGS = {"vit": TINY, **{name: config for name, config in IN_COLOUR.items() if name != "vit"}}
DEPTH = TINY.depths[-1]
FLOAT = {"Softmax", "LayerNormalization", "Erf", "MatMul"}
QUICK = {(OnnxInt8, "vit"), (OnnxInt8Dynamic, "vit"), (OpenVinoInt8, "vit"), (OnnxInt8, "convnext")}
CASES = [
    pytest.param(kind, name, id=f"{kind.name}-{name}", marks=[] if (kind, name) in QUICK else [pytest.mark.slow])
    for kind in FORMATS
    for name in CONFIGS
    if (kind, name) != (OnnxInt8Dynamic, "resnet")
]


@lru_cache
def exported(name, num_classes=0, num_calibration=32):
    family = make_family(CONFIGS[name])
    if num_classes:
        width = family.supernet.layout.features.size
        rng = torch.Generator().manual_seed(1)
        names = tuple(map(str, range(num_classes)))
        weight = torch.randn(num_classes, width, generator=rng) / width**0.5
        family = Family(family.card, family.supernet, TaskHead(weight, torch.randn(num_classes, generator=rng), names))
    what = Exported(family, family.space.intact, family.card.preprocessing.image_size)
    return replace(what, calibration=what.probe_images(num_calibration) if num_calibration else None)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Directories by format: each is written once."""

    @lru_cache
    def write(kind, name):
        folder = tmp_path_factory.mktemp("int8")
        kind().write(exported(name), folder)
        return folder

    return write


def assert_close(found, expected, at_least=0.99):
    cosines = torch.cosine_similarity(torch.from_numpy(found), expected)
    assert float(cosines.min()) > at_least
    size = torch.from_numpy(found).norm() / expected.norm()
    assert 0.95 < float(size) < 1.05


def weights_of(model):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_quarter_of_the_bytes_gives_nearly_the_same_vectors_for_any_batch(kind, name, written, capfd):
    what, exporter = exported(name), kind()
    capfd.readouterr()
    folder = written(kind, name)
    assert capfd.readouterr() == ("", "")
    run = exporter.open(folder, num_threads=1)
    keeps_convolutions = kind is OnnxInt8Dynamic and name == "convnext"
    share = 0.75 if keeps_convolutions else 0.5
    assert exporter.size(folder) < share * 4 * what.family.card.num_params(what.subnet)
    images = what.probe_images(8)
    for num_images in (1, 3, 8):
        found = run(images[:num_images].numpy())
        assert found.dtype == np.float32
        assert_close(found, what.expected(images[:num_images]))
    assert np.abs(run(images.numpy()) - what.expected(images).numpy()).max() > 1e-4


@pytest.mark.parametrize(
    "kind",
    [
        OnnxInt8,
        pytest.param(OnnxInt8Dynamic, marks=pytest.mark.slow),
        pytest.param(OpenVinoInt8, marks=pytest.mark.slow),
    ],
)
def test_the_classifier_is_inside(kind, tmp_path):
    what = exported("vit", num_classes=5)
    kind().write(what, tmp_path)
    images = what.probe_images(8)
    found = kind().open(tmp_path, 1)(images.numpy())
    assert found.shape == (8, 5)
    assert_close(found, what.family.logits(images, what.subnet))


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_normalising_inside_changes_nothing(kind, tmp_path):
    what = exported("vit")
    images = what.probe_images(4).numpy()
    found = []
    for inside in (False, True):
        folder = tmp_path / str(inside)
        folder.mkdir()
        exporter = kind(normalise_inside=inside)
        exporter.write(what, folder)
        found.append(exporter.open(folder, 1)(images))
    assert np.abs(found[0] - found[1]).max() < 1e-2 * np.abs(found[0]).max()


def test_only_products_with_weights_are_quantised_and_each_output_channel_has_its_scale(written):
    model = onnx.load(written(OnnxInt8, "vit") / "model.onnx")
    weights, maker = weights_of(model), {name: node for node in model.graph.node for name in node.output}
    num_products, float_kinds = 0, set()
    for node in model.graph.node:
        sources = [maker[name] for name in node.input if name in maker]
        quantised = [source for source in sources if source.op_type == "DequantizeLinear"]
        products = [source for source in quantised if source.input[0] in weights]
        if not products:
            if not quantised:
                float_kinds.add(node.op_type)
            assert not quantised or node.op_type not in FLOAT, node.op_type
            continue
        num_products += 1
        assert node.op_type in ("MatMul", "Conv", "Gemm")
        weight = weights[products[0].input[0]]
        assert weight.dtype == np.int8
        num_channels = weight.shape[0] if node.op_type == "Conv" else weight.shape[-1]
        assert weights[products[0].input[1]].shape == (num_channels,)
    assert float_kinds >= FLOAT
    assert num_products == 1 + 4 * DEPTH
    assert sum(node.op_type == "MatMul" for node in model.graph.node) == 6 * DEPTH


def test_dynamic_quantises_linear_layers_and_leaves_convolutions(written):
    kinds = [node.op_type for node in onnx.load(written(OnnxInt8Dynamic, "vit") / "model.onnx").graph.node]
    assert kinds.count("MatMulInteger") == 4 * DEPTH
    assert "Conv" in kinds
    assert "ConvInteger" not in kinds


@pytest.mark.slow
@pytest.mark.parametrize("kind", [OnnxInt8Dynamic, OnnxInt8])
def test_reduced_weights_have_seven_bits(kind, tmp_path):
    largest = []
    for reduces in (False, True):
        folder = tmp_path / str(reduces)
        folder.mkdir()
        kind(reduce_range=reduces).write(exported("vit"), folder)
        weights = weights_of(onnx.load(folder / "model.onnx")).values()
        largest.append(max(int(np.abs(part.astype(int)).max()) for part in weights if part.dtype == np.int8))
    assert largest[0] == 127
    assert largest[1] <= 64


@pytest.mark.parametrize("kind", [OnnxInt8, OpenVinoInt8])
def test_static_formats_refuse_to_guess_scales(kind, tmp_path):
    what = exported("vit", num_calibration=0)
    with pytest.raises(ConfigError, match=rf"{kind.name} chooses its scales on images"):
        kind().write(what, tmp_path)
    with pytest.raises(ConfigError, match=r"calibration images \[B, 1, 16, 16\]; got \[2, 1, 8, 8\]"):
        kind().write(replace(what, calibration=torch.zeros(2, 1, 8, 8)), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("num_classes", [0, 3])
def test_dynamic_refuses_networks_of_convolutions_alone(num_classes, tmp_path):
    with pytest.raises(ConfigError, match=r"made of convolutions alone\. Export it to onnx-int8"):
        OnnxInt8Dynamic().write(exported("resnet", num_classes), tmp_path)
    assert not list(tmp_path.iterdir())
