import errno
import json
import os

import pytest
import torch

from poa.backbones.vit import ElasticViT
from poa.config import HeadsConfig, ObjectiveConfig, OptimConfig, ViTConfig
from poa.errors import CheckpointError, PoaWarning
from poa.files import replace_directory, write_json, write_text
from poa.objective import PoaModel
from poa.train.checkpoint import STATE_FILE, TENSORS_FILE, CheckpointStore, pack_state, unpack_state_
from poa.train.optim import make_optimizer

CONFIG = ViTConfig(widths=(16, 32), depths=(1, 2), head_dim=16, patch_size=4, image_size=8, num_channels=1)


class CutError(Exception):
    pass


def begin_and_raise(path, error):
    with replace_directory(path, overwrite=True) as scratch:
        (scratch / "part").write_text("1")
        raise error


def test_written_text_is_there_whole_and_replaces_the_old(tmp_path):
    write_text(tmp_path / "deep" / "file.txt", "žluťoučký\n")
    write_text(tmp_path / "deep" / "file.txt", "new\n")
    assert (tmp_path / "deep" / "file.txt").read_bytes() == b"new\n"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file.txt"]


def test_failed_writing_leaves_the_old_text_and_nothing_else(tmp_path, monkeypatch):
    write_text(tmp_path / "file.txt", "old")

    def fail(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "file.txt", "new")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "file.txt", "\udcff")
    assert (tmp_path / "file.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


def test_json_that_others_cannot_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "file.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_directory_appears_when_its_block_ends(tmp_path):
    with replace_directory(tmp_path / "a" / "net") as scratch:
        (scratch / "part").write_text("1")
        assert not (tmp_path / "a" / "net").exists()
    assert (tmp_path / "a" / "net" / "part").read_text() == "1"
    assert (tmp_path / "a" / "net").stat().st_mode & 0o777 == 0o755
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["net"]


@pytest.mark.parametrize("error", [CutError, KeyboardInterrupt])
def test_exception_in_the_block_leaves_nothing(tmp_path, error):
    with pytest.raises(error):
        begin_and_raise(tmp_path / "net", error)
    assert list(tmp_path.iterdir()) == []


def test_exception_in_the_block_leaves_what_was_to_be_overwritten(tmp_path):
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "old").write_text("1")
    with pytest.raises(CutError):
        begin_and_raise(tmp_path / "net", CutError)
    assert [path.name for path in tmp_path.rglob("*")] == ["net", "old"]


def test_existing_directory_is_refused_or_replaced_as_asked(tmp_path):
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "old").write_text("1")
    with pytest.raises(CheckpointError, match="is there already"), replace_directory(tmp_path / "net"):
        pytest.fail("the block must not run")
    assert (tmp_path / "net" / "old").exists()
    with replace_directory(tmp_path / "net", overwrite=True) as scratch:
        (scratch / "new").write_text("2")
    assert [path.name for path in (tmp_path / "net").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["net"]


def test_an_empty_directory_may_be_filled(tmp_path):
    (tmp_path / "net").mkdir()
    with replace_directory(tmp_path / "net") as scratch:
        (scratch / "new").write_text("2")
    assert [path.name for path in (tmp_path / "net").iterdir()] == ["new"]


def test_a_file_in_the_place_of_a_directory_is_refused(tmp_path):
    (tmp_path / "net").write_text("mine")
    with pytest.raises(CheckpointError, match="is there already"), replace_directory(tmp_path / "net"):
        pytest.fail("the block must not run")
    with pytest.raises(CheckpointError, match="cannot write"), replace_directory(tmp_path / "net" / "deeper"):
        pytest.fail("the block must not run")
    assert (tmp_path / "net").read_text() == "mine"


def save_steps(store, *steps):
    for step in steps:
        store.save(step, {"weight": torch.full((3,), float(step))}, {"note": f"after {step}"})


def test_newest_checkpoints_are_kept(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    assert store.steps() == []
    assert store.load_newest() is None
    save_steps(store, 5, 10, 15, 20)
    assert store.steps() == [15, 20]
    tensors, state = store.load_newest()
    assert tensors["weight"].tolist() == [20.0] * 3
    assert (state["step"], state["note"]) == (20, "after 20")


def test_checkpoints_at_chosen_steps_are_kept_for_good(tmp_path):
    store = CheckpointStore(tmp_path, keep=1, keep_every=10)
    save_steps(store, 5, 10, 15, 20, 25)
    assert store.steps() == [10, 20, 25]


def test_saving_a_step_again_replaces_it(tmp_path):
    store = CheckpointStore(tmp_path, keep=3)
    save_steps(store, 5)
    store.save(5, {"weight": torch.zeros(1)}, {"note": "again"})
    assert store.steps() == [5]
    assert store.load_newest()[1]["note"] == "again"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_other_things_in_the_folder_are_no_checkpoints(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    for name in ("step-5", ".step-00000007.abc", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000009").write_text("a file")
    assert store.steps() == []
    save_steps(store, 3, 4)
    assert store.steps() == [4]
    assert (tmp_path / "notes").is_dir()


def test_what_a_killed_process_left_half_written_is_cleared_away(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    (tmp_path / ".step-00000007.abc").mkdir()
    (tmp_path / ".step-00000007.abc" / TENSORS_FILE).write_bytes(b"half")
    save_steps(store, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000008"]


def flip_a_byte(folder):
    content = bytearray((folder / TENSORS_FILE).read_bytes())
    content[-1] ^= 1
    (folder / TENSORS_FILE).write_bytes(content)


def drop_the_checksum(folder):
    state = json.loads((folder / STATE_FILE).read_text())
    del state["sha256"]
    (folder / STATE_FILE).write_text(json.dumps(state))


DAMAGES = {
    "a byte differs": flip_a_byte,
    "tensors cut short": lambda folder: (folder / TENSORS_FILE).write_bytes(b"12"),
    "tensors missing": lambda folder: (folder / TENSORS_FILE).unlink(),
    "state cut short": lambda folder: (folder / STATE_FILE).write_text('{"step": '),
    "state of another kind": lambda folder: (folder / STATE_FILE).write_text("[]"),
    "state not text": lambda folder: (folder / STATE_FILE).write_bytes(b"\xff\xfe"),
    "state missing": lambda folder: (folder / STATE_FILE).unlink(),
    "no checksum": drop_the_checksum,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, damage):
    store = CheckpointStore(tmp_path, keep=3)
    save_steps(store, 5, 10)
    DAMAGES[damage](store.path(10))
    with pytest.warns(PoaWarning, match="step-00000010 is damaged.*passed over"):
        tensors, state = store.load_newest()
    assert state["step"] == 5
    assert tensors["weight"].tolist() == [5.0] * 3


def test_only_damaged_checkpoints_are_an_error_and_no_fresh_start(tmp_path):
    store = CheckpointStore(tmp_path, keep=3)
    save_steps(store, 5, 10)
    flip_a_byte(store.path(5))
    flip_a_byte(store.path(10))
    with pytest.warns(PoaWarning, match="is damaged"), pytest.raises(CheckpointError, match="all checkpoints"):
        store.load_newest()


def make_model(seed, targets="sinkhorn", heads=(8, 12)):
    model = PoaModel(ElasticViT(CONFIG), HeadsConfig(heads, 16, 8), ObjectiveConfig(targets=targets))
    model.init_weights_(torch.Generator().manual_seed(seed))
    optimizer = make_optimizer(model.student, OptimConfig())
    return model, optimizer


def take_steps(model, optimizer, seed):
    rng = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 1e-2, 0.1
    for _ in range(3):
        for parameter in model.student.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=rng)
        optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("targets", ["sinkhorn", "centering"])
def test_everything_that_training_needs_survives_a_checkpoint_bit_for_bit(tmp_path, targets):
    model, optimizer = make_model(0, targets)
    take_steps(model, optimizer, seed=1)
    for center in model.targets.buffers():
        center.normal_()
    store = CheckpointStore(tmp_path, keep=1)
    store.save(3, pack_state(model, optimizer), {})
    other, other_optimizer = make_model(5, targets)
    tensors, _ = store.load_newest()
    unpack_state_(tensors, other, other_optimizer)

    expected, found = model.state_dict(), other.state_dict()
    assert list(expected) == list(found)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert any("center" in name for name in expected) == (targets == "centering")
    names = [name for name, _ in model.student.named_parameters()]
    for name, ours, theirs in zip(names, model.student.parameters(), other.student.parameters(), strict=True):
        before, after = optimizer.state[ours], other_optimizer.state[theirs]
        assert sorted(before) == sorted(after) == ["exp_avg", "exp_avg_sq", "step"], name
        assert all(torch.equal(before[key], after[key]) for key in before), name

    take_steps(model, optimizer, seed=2)
    take_steps(other, other_optimizer, seed=2)
    assert all(map(torch.equal, model.student.parameters(), other.student.parameters()))


def test_state_of_an_optimiser_that_never_stepped_survives_too():
    model, optimizer = make_model(0)
    other, other_optimizer = make_model(1)
    unpack_state_(pack_state(model, optimizer), other, other_optimizer)
    assert not other_optimizer.state
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_checkpoint_of_another_configuration_is_refused_with_names():
    model, optimizer = make_model(0, heads=(8,))
    take_steps(model, optimizer, seed=1)
    other, other_optimizer = make_model(0, heads=(8, 12))
    with pytest.raises(CheckpointError, match=r"(?s)does not fit this configuration.*heads\.1"):
        unpack_state_(pack_state(model, optimizer), other, other_optimizer)


def test_full_disk_is_said_and_nothing_is_left_behind(tmp_path):
    with pytest.raises(CheckpointError, match=r"No space left on device\. Nothing of it"):
        begin_and_raise(tmp_path / "net", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert not any(tmp_path.iterdir())
