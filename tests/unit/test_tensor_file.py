"""Tensors written one after the other, in safetensors' format."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from poa.config import ViTConfig
from poa.tensor_file import NUM_WAITING, Part, write_safetensors
from tests.unit.test_extraction import make_family

TYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=8)


def parts_of(state):
    return {name: Part(tuple(part.shape), part.dtype, lambda part=part: part) for name, part in state.items()}


@settings(deadline=None, max_examples=60)
@given(
    described=st.dictionaries(NAMES, st.tuples(SHAPES, st.sampled_from(TYPES)), min_size=1, max_size=6),
    metadata=st.none() | st.dictionaries(NAMES, NAMES, min_size=1, max_size=1),
)
def test_file_is_byte_for_byte_what_safetensors_writes(tmp_path_factory, described, metadata):
    state = {name: torch.randn(shape).to(dtype) for name, (shape, dtype) in described.items()}
    path = tmp_path_factory.mktemp("written") / "model.safetensors"
    write_safetensors(parts_of(state), path, metadata)
    assert path.read_bytes() == save(state, metadata)


def test_tensors_are_made_when_their_turn_comes_and_freed_after_it(tmp_path):
    alive = [0]
    most = [0]

    class Counted:
        def __init__(self):
            alive[0] += 1
            most[0] = max(most[0], alive[0])

        def __del__(self):
            alive[0] -= 1

    def make():
        part = torch.zeros(1 << 16)
        part.held = Counted()
        return part

    state = {f"part{index:02}": Part((1 << 16,), torch.float32, make) for index in range(40)}
    write_safetensors(state, tmp_path / "model.safetensors")
    assert most[0] <= NUM_WAITING + 3
    assert len(load_file(tmp_path / "model.safetensors")) == 40


def test_failure_while_making_reaches_the_caller(tmp_path):
    def broken():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_safetensors({"a": Part((1,), torch.float32, broken)}, tmp_path / "model.safetensors")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is always full")
def test_full_disk_is_told():
    with pytest.raises(OSError, match="No space"):
        write_safetensors(parts_of({"a": torch.zeros(1 << 20)}), Path("/dev/full"))


def test_written_subnet_is_the_state_dict_that_extraction_gives(tmp_path):
    family = make_family(ViTConfig(widths=(16, 32), depths=(1, 2), head_dim=8, patch_size=4, image_size=16))
    for subnet in family.subnets:
        family.write_timm(subnet, tmp_path, 16)
        written = load_file(tmp_path / "model.safetensors")
        expected = family.supernet.timm_state(subnet, 16)
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[name], part) for name, part in expected.items())
