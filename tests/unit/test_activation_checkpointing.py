import copy
import io
import weakref
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from poa.backbones import ARCHITECTURES, architecture
from poa.config import ViTConfig
from tests.contract.configs import SMALLEST

NAMES = sorted(ARCHITECTURES)
CONFIGS = {**SMALLEST, "rope": replace(SMALLEST["vit"], position="rope", mlp="swiglu", num_reg_tokens=2)}
BATCH = 6


def make(config, *, checkpointed=False):
    backbone = architecture(config).build(config)
    backbone.init_weights_(torch.Generator().manual_seed(0))
    # Branches that start at zero would hide what goes on in them.
    for parameter in backbone.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    if checkpointed:
        backbone.checkpoint_blocks_()
    return backbone


def run(backbone, subnet, *, seed=3):
    """Global crops with masks and smaller local ones, with stochastic depth: the features as one vector."""
    config = backbone.config
    rng = torch.Generator().manual_seed(seed)
    crops = [
        torch.randn(BATCH, config.num_channels, side, side, generator=rng)
        for side in (config.image_size, config.image_size // 2)
    ]
    masks = torch.rand(BATCH, config.mask_side**2, generator=rng) < 0.4
    features = backbone(crops, subnet, [masks, None], torch.Generator().manual_seed(seed))
    return torch.cat([part.flatten() for pair in features for part in pair]), rng


def gradients(backbone, subnet, precision="float32"):
    backbone.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16) if precision == "bfloat16" else nullcontext():
        features, rng = run(backbone, subnet)
        loss = (features.float() * torch.randn(features.shape, generator=rng)).square().mean()
    loss.backward()
    return {"loss": loss.detach()} | {
        name: parameter.grad for name, parameter in backbone.named_parameters() if parameter.grad is not None
    }


def assert_identical(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the tensors made within and still alive; `peak` is the most at once."""

    def __init__(self, backbone):
        super().__init__()
        self.known = {parameter.untyped_storage()._cdata for parameter in backbone.parameters()}
        self.alive = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


def peak_bytes(backbone):
    backbone.zero_grad(set_to_none=True)
    with LiveMemory(backbone) as memory:
        run(backbone, backbone.space.intact)[0].square().mean().backward()
    return memory.peak


def calls_of_blocks(backbone):
    calls = []
    for block in backbone.block_modules():
        block.forward = partial(lambda forward, *arguments: (calls.append(1), forward(*arguments))[1], block.forward)
    return calls


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_loss_and_gradients_are_the_same_bit_for_bit(name, precision):
    plain, checkpointed = make(CONFIGS[name]), make(CONFIGS[name], checkpointed=True)
    for subnet in (plain.space.intact, plain.space.smallest):
        assert_identical(gradients(checkpointed, subnet, precision), gradients(plain, subnet, precision))


@pytest.mark.parametrize("name", NAMES)
def test_the_backward_pass_draws_nothing_at_random(name):
    backbone = make(SMALLEST[name], checkpointed=True)
    features, _ = run(backbone, backbone.space.intact)
    before = torch.get_rng_state()
    features.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", NAMES)
def test_a_block_is_computed_twice_with_gradients_and_once_without(name):
    backbone = make(SMALLEST[name], checkpointed=True)
    calls = calls_of_blocks(backbone)
    run(backbone, backbone.space.intact)[0].sum().backward()
    num_calls = len(calls)
    calls.clear()
    with torch.no_grad():
        run(backbone, backbone.space.intact)
    assert num_calls == 2 * len(calls) > 0


def test_deep_networks_need_a_fraction_of_the_memory():
    config = ViTConfig(widths=(16, 32), depths=(1, 16), head_dim=8, patch_size=4, image_size=32, drop_path=0.2)
    assert peak_bytes(make(config, checkpointed=True)) < 0.4 * peak_bytes(make(config))


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_needs_less_memory(name):
    # Of a size at which the weights' gradients do not outweigh the activations.
    config = replace(SMALLEST[name], image_size=64)
    assert peak_bytes(make(config, checkpointed=True)) < 0.9 * peak_bytes(make(config))


@pytest.mark.parametrize("name", NAMES)
def test_names_copies_and_files_of_the_weights_are_unchanged(name):
    backbone = make(SMALLEST[name])
    teacher = copy.deepcopy(backbone)
    names = list(backbone.state_dict())
    expected = gradients(teacher, teacher.space.smallest)
    backbone.checkpoint_blocks_()
    assert list(backbone.state_dict()) == names
    teacher.load_state_dict(backbone.state_dict(), strict=True)
    assert not any(block.is_recomputed for block in teacher.block_modules())
    file = io.BytesIO()
    torch.save(backbone, file)
    file.seek(0)
    for other in (copy.deepcopy(backbone), torch.load(file, weights_only=False)):
        assert all(block.is_recomputed for block in other.block_modules())
        assert_identical(gradients(other, other.space.smallest), expected)


@pytest.mark.slow
def test_compiled_blocks_are_computed_anew_too(monkeypatch):
    # Without generating code, which takes minutes on a CPU.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    config = replace(SMALLEST["vit"], depths=(1,), drop_path=0.3)
    plain, compiled = make(config), make(config, checkpointed=True)
    expected = gradients(plain, plain.space.smallest)
    compiled.compile_blocks_()
    found = gradients(compiled, compiled.space.smallest)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    assert peak_bytes(compiled) < peak_bytes(make(config))
