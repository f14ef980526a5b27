import pytest
import torch

from poa.backbones.vit import ElasticViT
from poa.config import ViTConfig
from poa.elastic import SearchSpace, Subnet, kept_blocks
from tests.golden.reference import golden_json, golden_tensors, our_backbone_name, relative_error

CONFIG = ViTConfig(widths=(64, 96, 128), depths=(3, 4, 5, 6), head_dim=32, patch_size=8, image_size=32, drop_path=0.0)


@pytest.fixture(scope="module")
def vit():
    weights = golden_tensors("vit_weights_f16.part0", "vit_weights_f16.part1")
    model = ElasticViT(CONFIG)
    model.load_state_dict({our_backbone_name(name): part.float() for name, part in weights.items()})
    return model.eval()


@pytest.fixture(scope="module")
def io():
    return golden_tensors("vit_io")


@pytest.mark.parametrize("case", ["32", "32_mask", "48", "48_mask"])
@pytest.mark.parametrize("name", [f"w{w}-d{d}" for w in (64, 96, 128) for d in (3, 4, 5, 6)])
def test_subnet_outputs_equal_the_reference(vit, io, name, case):
    size = case[:2]
    masks = [io[f"mask{size}"].bool()] if case.endswith("mask") else None
    with torch.inference_mode():
        found = vit([io[f"x{size}"]], Subnet.parse(name), masks)[0]
    key = f"{name.replace('-', '_')}.{case}"
    assert relative_error(found.cls, io[f"{key}.cls"]) < 1e-5
    assert relative_error(found.patches, io[f"{key}.patch"]) < 1e-5


@pytest.mark.parametrize(("grid", "key"), [((6, 6), "48_full"), ((2, 2), "16x16px_full"), ((3, 5), "24x40px_full")])
def test_position_embedding_is_resized_as_in_the_reference(vit, io, grid, key):
    assert relative_error(vit._positions(128, grid), io[f"pos_embed_{key}"]) < 1e-6


def test_packed_crops_give_what_separate_calls_give(vit, io):
    subnet = Subnet.parse("w96-d4")
    with torch.inference_mode():
        packed = vit([io["x32"], io["x48"]], subnet, [io["mask32"].bool(), None])
        alone = vit([io["x32"]], subnet, [io["mask32"].bool()]) + vit([io["x48"]], subnet)
    for ours, theirs in zip(packed, alone, strict=True):
        assert relative_error(ours.cls, theirs.cls) < 1e-6
        assert relative_error(ours.patches, theirs.patches) < 1e-6


@pytest.mark.parametrize(
    ("space", "key"),
    [
        (SearchSpace(tuple(range(384, 1025, 64)), (tuple(range(12, 25)),)), "vit_default_scale3"),
        (SearchSpace((96, 112, 128), (tuple(range(6, 19)),), 2.0, 2.0), "swin_default"),
    ],
)
def test_multiplicities_equal_the_reference(space, key):
    expected = {(w, d): count for w, d, count in golden_json("networks")[key]["networks"]}
    ours = {(subnet.width, *subnet.depths): count for subnet, count in space.multiplicities.items()}
    assert ours == expected
    assert len(space.draw_list) == sum(expected.values()) - 1


def test_kept_blocks_equal_the_reference():
    networks = golden_json("networks")
    for depth, blocks in networks["vit_block_indices"].items():
        assert list(kept_blocks(24, int(depth))) == blocks
