import errno
import json
import resource
import threading
import warnings
from datetime import timedelta

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed as dist
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from poa.backbones.vit import ElasticViT
from poa.config import HeadsConfig, ObjectiveConfig, OptimConfig, ViTConfig
from poa.distributed import Ranks
from poa.errors import CheckpointError, PoaWarning
from poa.objective import PoaModel
from poa.train import checkpoint_storage
from poa.train.checkpoint import CheckpointStore, pack_state, unpack_state_
from poa.train.checkpoint_storage import STATE_FILE, json_sha256, writers
from poa.train.optim import make_optimizer

CONFIG = ViTConfig(widths=(16, 32), depths=(1, 2), head_dim=16, patch_size=4, image_size=8, num_channels=1)
TENSORS_FILE = "rank-00000.safetensors"


def save_steps(store, *steps):
    for step in steps:
        store.save(step, {"weight": torch.full((3,), float(step))}, {"note": f"after {step}"}, wait=True)
        assert store.poll() is None


def newest_weight(store):
    found = store.newest()
    weight = torch.zeros(3)
    found.load_({"weight": weight})
    assert weight.tolist() == [float(found.step)] * 3
    assert found.state == {"note": f"after {found.step}"}
    return found.step


def test_every_type_and_shape_comes_back_bit_for_bit(tmp_path):
    tensors = {
        "matrix": torch.randn(5, 3),
        "step": torch.tensor(7.0),
        "empty": torch.zeros(0, 4),
        "half": torch.randn(4).to(torch.bfloat16),
        "double": torch.randn(2, 1, 2, dtype=torch.float64),
        "count": torch.tensor([1 << 40]),
        "flags": torch.tensor([True, False]),
        "not in a row": torch.randn(3, 4).T,
    }
    store = CheckpointStore(tmp_path, keep=1)
    store.save(3, tensors, {"nested": {"list": [1, 0.1, None]}}, wait=True)
    found = store.newest()
    again = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    found.load_(again)
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    assert (found.step, found.state) == (3, {"nested": {"list": [1, 0.1, None]}})
    assert {name: (info.shape, info.dtype) for name, info in found.tensors.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
    }


def test_a_checkpoint_is_json_and_safetensors_that_others_can_read(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    save_steps(store, 4)
    assert {path.name for path in store.path(4).iterdir()} == {STATE_FILE, TENSORS_FILE}
    assert load_file(store.path(4) / TENSORS_FILE)["weight"].tolist() == [4.0] * 3
    state = json.loads((store.path(4) / STATE_FILE).read_text())
    assert (state["format"], state["version"], state["step"]) == ("poa-checkpoint", 2, 4)


def test_newest_checkpoints_are_kept(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    assert store.steps() == []
    assert store.newest() is None
    save_steps(store, 5, 10, 15, 20)
    assert store.steps() == [15, 20]
    assert newest_weight(store) == 20


def test_checkpoints_at_chosen_steps_are_kept_for_good(tmp_path):
    store = CheckpointStore(tmp_path, keep=1, keep_every=10)
    save_steps(store, 5, 10, 15, 20, 25)
    assert store.steps() == [10, 20, 25]


def test_saving_a_step_again_replaces_it(tmp_path):
    store = CheckpointStore(tmp_path, keep=3)
    save_steps(store, 5)
    store.save(5, {"weight": torch.zeros(1)}, {"note": "again"}, wait=True)
    assert store.steps() == [5]
    assert store.newest().state["note"] == "again"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_other_things_in_the_folder_are_no_checkpoints(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    for name in ("step-5", ".step-00000007.partial", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000009").write_text("a file")
    assert store.steps() == []
    save_steps(store, 3, 4)
    assert store.steps() == [4]
    assert (tmp_path / "notes").is_dir()


def test_what_a_killed_process_left_half_written_is_cleared_away(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    for name in (".step-00000007.partial", ".step-00000008.partial", ".step-00000002.removed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / TENSORS_FILE).write_bytes(b"half")
    save_steps(store, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000008"]


@pytest.mark.parametrize("finds_it", ["newest", "save"])
def test_a_process_killed_while_it_replaced_a_checkpoint_leaves_the_old_one(tmp_path, finds_it):
    store = CheckpointStore(tmp_path, keep=2)
    save_steps(store, 5)
    store.path(5).rename(tmp_path / ".step-00000005.old-1234")
    if finds_it == "save":
        save_steps(store, 3)
    assert newest_weight(store) == 5


def flip_a_byte(folder, name=TENSORS_FILE):
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)


def with_state(**changes):
    """Changes fields of the state file, whose checksum then fits; a value None takes the field away."""

    def damage(folder):
        values = json.loads((folder / STATE_FILE).read_text())
        del values["sha256"]
        values |= changes
        values = {key: value for key, value in values.items() if value is not None}
        (folder / STATE_FILE).write_text(json.dumps({**values, "sha256": json_sha256(values)}))

    return damage


def edit_the_state(folder):
    text = (folder / STATE_FILE).read_text()
    (folder / STATE_FILE).write_text(text.replace("after 10", "after 11"))


FILE = {"num_bytes": 3, "sha256": "0"}
DAMAGES = {
    "a byte differs": flip_a_byte,
    "tensors cut short": lambda folder: (folder / TENSORS_FILE).write_bytes(b"12"),
    "tensors missing": lambda folder: (folder / TENSORS_FILE).unlink(),
    "other tensors beside": lambda folder: (folder / "rank-00001.safetensors").write_bytes(b""),
    "state cut short": lambda folder: (folder / STATE_FILE).write_text('{"step": '),
    "state of another kind": lambda folder: (folder / STATE_FILE).write_text("[]"),
    "state not text": lambda folder: (folder / STATE_FILE).write_bytes(b"\xff\xfe"),
    "state too deep": lambda folder: (folder / STATE_FILE).write_text('{"a":' * 100_000),
    "state missing": lambda folder: (folder / STATE_FILE).unlink(),
    "state edited": edit_the_state,
    "another step": with_state(step=11),
    "no number as step": with_state(step="10"),
    "no files": with_state(files={}),
    "files of another kind": with_state(files=["rank-00000.safetensors"]),
    "a file without a checksum": with_state(files={TENSORS_FILE: {"num_bytes": 3}}),
    "a file elsewhere": with_state(files={"../../secret": FILE}),
    "fields missing": with_state(state=None),
    "fields unknown": with_state(extra=1),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, damage):
    store = CheckpointStore(tmp_path, keep=3)
    save_steps(store, 5, 10)
    DAMAGES[damage](store.path(10))
    with pytest.warns(PoaWarning, match=r"step-00000010.* is passed over") as warned:
        assert newest_weight(store) == 5
    assert len([each for each in warned if each.category is PoaWarning]) == 1


@pytest.mark.parametrize(
    "written", [{"sha256": "0", "step": 10, "window": {}}, {"format": "poa-checkpoint", "version": 3}]
)
def test_a_checkpoint_of_another_format_is_named_so(tmp_path, written):
    store = CheckpointStore(tmp_path, keep=3)
    store.path(10).mkdir()
    (store.path(10) / STATE_FILE).write_text(json.dumps(written))
    with (
        pytest.warns(PoaWarning, match="is of format version [13]; this poa reads version 2"),
        pytest.raises(CheckpointError, match="all checkpoints"),
    ):
        store.newest()


def test_only_damaged_checkpoints_are_an_error_and_no_fresh_start(tmp_path):
    store = CheckpointStore(tmp_path, keep=3)
    save_steps(store, 5, 10)
    flip_a_byte(store.path(5))
    flip_a_byte(store.path(10))
    with pytest.warns(PoaWarning, match="is damaged"), pytest.raises(CheckpointError, match="all checkpoints"):
        store.newest()


def test_a_run_that_fell_back_keeps_what_it_writes_and_not_the_damaged_ones(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    save_steps(store, 5)
    CheckpointStore(tmp_path, keep=2).save(10, {"weight": torch.zeros(3)}, {}, wait=True)
    flip_a_byte(store.path(10))
    with pytest.warns(PoaWarning, match="passed over"):
        assert newest_weight(store) == 5
    save_steps(store, 8)
    assert store.steps() == [8, 10]
    save_steps(store, 12)
    assert store.steps() == [12]


def test_a_damaged_checkpoint_does_not_count_as_one_that_is_kept(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    save_steps(store, 5, 10)
    flip_a_byte(store.path(10))
    with pytest.warns(PoaWarning, match="passed over"):
        assert newest_weight(store) == 5
    save_steps(store, 15)
    assert store.steps() == [5, 15]


def gate(monkeypatch):
    """Holds the writing of files back until the event is set."""
    opened, write = threading.Event(), checkpoint_storage.write_safetensors

    def held_back(*args):
        assert opened.wait(60)
        write(*args)

    monkeypatch.setattr(checkpoint_storage, "write_safetensors", held_back)
    return opened


def test_training_goes_on_while_its_state_of_then_is_written(tmp_path, monkeypatch):
    opened = gate(monkeypatch)
    store = CheckpointStore(tmp_path, keep=2)
    weight, state = torch.full((3,), 5.0), {"note": "after 5"}
    store.save(5, {"weight": weight}, state)
    weight.fill_(6)
    state["note"] = "after 6"
    assert store.steps() == []
    assert store.poll() is None
    opened.set()
    assert store.wait() is None
    assert newest_weight(store) == 5
    store.save(6, {"weight": weight}, state)
    weight.fill_(7)
    assert newest_weight(store) == 6


def test_a_failed_process_does_not_wait_for_a_checkpoint_that_hangs(tmp_path, monkeypatch):
    opened = gate(monkeypatch)
    monkeypatch.setattr("poa.train.checkpoint.CLOSE_SECONDS", 0.01)
    store = CheckpointStore(tmp_path, keep=2)
    store.save(5, {"weight": torch.zeros(3)}, {})
    writing = next(thread for thread in threading.enumerate() if thread.name == "checkpoint-5")
    assert writing.daemon
    store.close()
    assert store.is_writing
    opened.set()
    assert store.wait() is None
    assert not store.is_writing


def on_a_full_disk(store, name=TENSORS_FILE):
    begin = store._begin

    def begin_on_full_disk(scratch):
        begin(scratch)
        (scratch / name).symlink_to("/dev/full")

    store._begin = begin_on_full_disk
    return begin


@pytest.mark.parametrize("wait", [True, False])
def test_a_full_disk_is_told_once_and_costs_no_older_checkpoint(tmp_path, wait):
    store = CheckpointStore(tmp_path, keep=1)
    save_steps(store, 5)
    begin = on_a_full_disk(store)
    store.save(10, {"weight": torch.ones(1 << 16)}, {}, wait=wait)
    message = store.wait()
    assert message == (
        "The checkpoint of step 10 could not be written: No space left on device. "
        f"The newest complete one is {store.path(5)}."
    )
    assert (store.wait(), store.poll()) == (None, None)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]
    store._begin = begin
    save_steps(store, 15)
    assert store.steps() == [15]


def test_a_failure_that_nobody_asked_about_is_told_after_the_next_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    begin = on_a_full_disk(store)
    store.save(10, {"weight": torch.ones(3)}, {})
    store._join()
    store._begin = begin
    store.save(15, {"weight": torch.ones(3)}, {}, wait=True)
    assert "step 10 could not be written: No space left on device. There is no older one." in store.poll()
    assert store.steps() == [15]


def test_a_file_that_may_not_grow_leaves_nothing_behind(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    save_steps(store, 5)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        store.save(10, {"weight": torch.ones(1 << 20)}, {}, wait=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in store.poll()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    store = CheckpointStore(tmp_path / "file" / "checkpoints", keep=1)
    store.save(5, {"weight": torch.ones(1)}, {}, wait=True)
    assert "step 5 could not be written: Not a directory" in store.poll()


def test_a_defect_while_writing_is_raised_and_no_message(tmp_path, monkeypatch):
    def defect(*args):
        raise ZeroDivisionError

    store = CheckpointStore(tmp_path, keep=1)
    save_steps(store, 5)
    monkeypatch.setattr(checkpoint_storage, "write_safetensors", defect)
    store.save(10, {"weight": torch.ones(1)}, {}, wait=True)
    with pytest.raises(RuntimeError, match="step 10 could not be written"):
        store.poll()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_what_does_not_fit_is_named_and_nothing_is_loaded(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    store.save(5, {"a": torch.ones(2), "b": torch.ones(3), "i": torch.ones(1, dtype=torch.int64)}, {}, wait=True)
    found = store.newest()
    a = torch.zeros(2)
    wanted = {"a": a, "b": torch.zeros(4), "c": torch.zeros(1), "i": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="does not fit this configuration") as error:
        found.load_(wanted)
    assert "b has the shape (3,), wanted is (4,); it lacks c; i is of type torch.int64" in str(error.value)
    assert a.tolist() == [0, 0]
    double = torch.zeros(2, dtype=torch.float64)
    found.load_({"a": double})
    assert double.tolist() == [1, 1]


def test_no_warning_of_torch_reaches_the_user(tmp_path):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        store = CheckpointStore(tmp_path, keep=1)
        save_steps(store, 5)
        newest_weight(store)
    assert not seen


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
            gradient = torch.randn(parameter.shape, generator=rng)
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.grad = gradient
        optimizer.step()
    optimizer.zero_grad()


def saved(folder, model, optimizer):
    store = CheckpointStore(folder, keep=1)
    store.save(3, pack_state(model, optimizer), {}, wait=True)
    return store.newest()


def full_state(model, optimizer):
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
        for name, tensor in pack_state(model, optimizer).items()
    }


def assert_same_state(left, right):
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize("targets", ["sinkhorn", "centering"])
def test_everything_that_training_needs_survives_a_checkpoint_bit_for_bit(tmp_path, targets):
    model, optimizer = make_model(0, targets)
    take_steps(model, optimizer, seed=1)
    for center in model.targets.buffers():
        center.normal_()
    other, other_optimizer = make_model(5, targets)
    unpack_state_(saved(tmp_path, model, optimizer), other, other_optimizer)
    expected = full_state(model, optimizer)
    assert_same_state(expected, full_state(other, other_optimizer))
    assert any("center" in name for name in expected) == (targets == "centering")
    keys = {name.split(".")[1] for name in expected if name.startswith("optimizer.")}
    assert keys == {"exp_avg", "exp_avg_sq", "step"}

    take_steps(model, optimizer, seed=2)
    take_steps(other, other_optimizer, seed=2)
    assert all(map(torch.equal, model.student.parameters(), other.student.parameters()))


def test_a_parameter_that_never_had_a_gradient_has_no_optimiser_state(tmp_path):
    model, optimizer = make_model(0)
    first, *_ = model.student.parameters()
    first.grad = torch.ones_like(first)
    optimizer.step()
    other, other_optimizer = make_model(1)
    unpack_state_(saved(tmp_path, model, optimizer), other, other_optimizer)
    assert [parameter is next(other.student.parameters()) for parameter in other_optimizer.state] == [True]
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_a_checkpoint_of_another_configuration_is_refused_with_names(tmp_path):
    fewer, more = make_model(0, heads=(8,)), make_model(0, heads=(8, 12))
    for model, optimizer in (fewer, more):
        take_steps(model, optimizer, seed=1)
    with pytest.raises(CheckpointError, match=r"does not fit this configuration: it lacks model\..*heads\.1"):
        unpack_state_(saved(tmp_path / "fewer", *fewer), *more)
    with pytest.raises(CheckpointError, match=r"does not fit .*heads\.1.* is in the checkpoint alone.*and \d+ more"):
        unpack_state_(saved(tmp_path / "more", *more), *fewer)


def test_the_writing_of_equal_tensors_is_spread_evenly():
    sizes = {f"t{number}": torch.zeros(number * 10) for number in range(1, 40)}
    found = writers(sizes, 3)
    assert found.keys() == sizes.keys()
    loads = [sum(sizes[name].nbytes for name in found if found[name] == rank) for rank in range(3)]
    assert max(loads) - min(loads) <= 40 * 10


# Several processes.

ROWS = {"long": (5, 3), "short": (1, 4), "even": (4,), "none": (0, 2)}


def numbers(name):
    return torch.arange(torch.Size(ROWS[name]).numel(), dtype=torch.float32).reshape(ROWS[name])


def written_files(store, step):
    return [load_file(path) for path in sorted(store.path(step).glob("*.safetensors"))]


def check_layouts(folder, ranks):
    """What one layout saved, every other loads."""
    mesh = init_device_mesh("cpu", (ranks.num_ranks,))
    store = CheckpointStore(folder / "layouts", 4, 0, ranks)
    plain = {name: numbers(name) for name in ROWS} | {"step": torch.tensor(3.0)}
    parts = {name: distribute_tensor(numbers(name), mesh, [Shard(0)]) for name in ROWS} | {"step": torch.tensor(3.0)}
    for step, tensors in ((1, plain), (2, parts)):
        store.save(step, tensors, {"who": "all"}, wait=True)
        assert store.poll() is None
        written = written_files(store, step)
        assert len(written) == ranks.num_ranks
        assert sum(tensor.nbytes for own in written for tensor in own.values()) == sum(t.nbytes for t in plain.values())
        found = store.newest()
        assert found.step == step
        whole = {name: torch.full_like(tensor, -1) for name, tensor in plain.items()}
        pieces = {name: torch.full_like(tensor, -1) for name, tensor in parts.items()}
        found.load_(whole)
        found.load_(pieces)
        assert all(torch.equal(whole[name], plain[name]) for name in plain)
        assert all(torch.equal(pieces[name].full_tensor(), plain[name]) for name in ROWS)
    store.close()


def check_model(folder, ranks, mesh):
    """A divided model goes on from what one process saved, and gives back what one process can read."""
    model, optimizer = make_model(9)
    fully_shard(model.student, mesh=mesh)
    fully_shard(model.teacher, mesh=mesh)
    optimizer = make_optimizer(model.student, OptimConfig())
    one = CheckpointStore(folder / "one", 1, 0, ranks)
    unpack_state_(one.newest(), model, optimizer)
    expected, expected_optimizer = make_model(0)
    take_steps(expected, expected_optimizer, seed=1)
    assert_same_state(full_state(model, optimizer), full_state(expected, expected_optimizer))
    assert all(isinstance(optimizer.state[each]["exp_avg"], DTensor) for each in model.student.parameters())
    many = CheckpointStore(folder / "many", 1, 0, ranks)
    many.save(3, pack_state(model, optimizer), {}, wait=True)
    assert many.poll() is None
    size = sum(tensor.nbytes for tensor in full_state(expected, expected_optimizer).values())
    assert sum(tensor.nbytes for own in written_files(many, 3) for tensor in own.values()) == size
    take_steps(model, optimizer, seed=2)
    take_steps(expected, expected_optimizer, seed=2)
    # The fused AdamW rounds the last numbers of a part otherwise than those that fill a vector register.
    torch.testing.assert_close(full_state(model, optimizer), full_state(expected, expected_optimizer))


def check_faults(folder, ranks):
    """A process that fails, or finds damage, is heard by all."""
    store = CheckpointStore(folder / "faults", 3, 0, ranks)
    last = ranks.num_ranks - 1
    save_steps(store, 5, 10)
    sync = checkpoint_storage.sync_path

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    if ranks.rank == last:
        checkpoint_storage.sync_path = full
    store.save(15, {f"weight {number}": torch.ones(3) for number in range(ranks.num_ranks)}, {})
    message = store.wait()
    assert message.startswith("The checkpoint of step 15 could not be written: No space left on device. The newest")
    checkpoint_storage.sync_path = sync
    store.save(20, {"weight": torch.ones(3), f"of {ranks.rank}": torch.ones(1)}, {}, wait=True)
    with pytest.raises(RuntimeError, match="step 20 could not be written"):
        store.poll()
    dist.barrier()
    if ranks.is_main:
        name = max(path.name for path in store.path(10).glob("*.safetensors"))
        flip_a_byte(store.path(10), name)
    dist.barrier()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert newest_weight(store) == 5
    assert [each.category for each in seen] == ([PoaWarning] if ranks.is_main else [])
    assert sorted(path.name for path in store.folder.iterdir()) == ["step-00000005", "step-00000010"]


def work(rank, num_ranks, folder, hybrid):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous-{num_ranks}",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=60),
    )
    ranks = Ranks(rank, num_ranks, rank, num_ranks)
    shape = (2, num_ranks // 2) if hybrid else (num_ranks,)
    names = ("copies", "parts") if hybrid else ("parts",)
    check_model(folder, ranks, init_device_mesh("cpu", shape, mesh_dim_names=names))
    check_layouts(folder, ranks)
    check_faults(folder, ranks)
    dist.destroy_process_group()


def run_processes(folder, num_ranks, hybrid):
    one, one_optimizer = make_model(0)
    take_steps(one, one_optimizer, seed=1)
    saved(folder / "one", one, one_optimizer)
    # Forked, which spares each the imports; on one thread, as torch's data workers are.
    multiprocessing.start_processes(work, (num_ranks, folder, hybrid), nprocs=num_ranks, start_method="fork")
    other, other_optimizer = make_model(5)
    unpack_state_(CheckpointStore(folder / "many", 1).newest(), other, other_optimizer)
    assert_same_state(full_state(one, one_optimizer), full_state(other, other_optimizer))


def test_two_processes_share_a_checkpoint_and_go_on_from_those_of_one(tmp_path):
    run_processes(tmp_path, 2, hybrid=False)


@pytest.mark.slow
@pytest.mark.parametrize("hybrid", [False, True])
def test_four_processes_share_a_checkpoint_and_go_on_from_those_of_one(tmp_path, hybrid):
    run_processes(tmp_path, 4, hybrid)
