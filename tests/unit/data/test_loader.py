import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from poa.config import AugmentConfig, DataConfig, MaskConfig, PretrainConfig, TrainConfig, ViTConfig
from poa.data import EpochPlan, MultiCropBatches, block_mask, make_loader, open_source, resolve_num_workers
from poa.errors import DataError
from poa.randomness import generator
from tests.hostile_images import encoded, picture

LENIENT = DataConfig(max_bad_share=1.0)


def make_config(batch_size=8, channels=1, num_local=3):
    return PretrainConfig(
        model=ViTConfig(widths=(16,), depths=(1,), head_dim=8, patch_size=2, image_size=8, num_channels=channels),
        augment=AugmentConfig(num_local_crops=num_local, local_size=4, mean=(0.5,), std=(0.5,)),
        mask=MaskConfig(ratio=(0.1, 0.5)),
        train=TrainConfig(batch_size=batch_size, seed=5),
    )


def make_batches(source=None, accumulate=1, num_local=3, seed=5):
    source = source or open_source("digits", LENIENT, 1)
    config = make_config(min(8, len(source)), 3 if source.load(0).mode == "RGB" else 1, num_local)
    return MultiCropBatches(source, EpochPlan(len(source), config.train.batch_size, accumulate, seed), config)


def folder_source(root, num_good, bad=()):
    root.mkdir(exist_ok=True)
    for index in range(num_good + len(bad)):
        content = b"no image" if index in bad else encoded(picture(10 + index, 12), "PNG")
        (root / f"{index:03d}.png").write_bytes(content)
    return open_source(str(root), LENIENT, 3)


def assert_same(one, other):
    assert one.skipped == other.skipped
    for left, right in zip(one[:4], other[:4], strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)


def test_a_micro_batch_has_the_shapes_and_types_promised():
    batch = make_batches()[0]
    assert batch.global_crops.shape == (2, 8, 1, 8, 8)
    assert batch.local_crops.shape == (3, 8, 1, 4, 4)
    assert batch.masks.shape == (16, 16)
    assert batch.indices.shape == (8,)
    types = [tensor.dtype for tensor in batch[:4]]
    assert types == [torch.uint8, torch.uint8, torch.bool, torch.int64]
    assert batch.skipped == []
    assert (batch.masks.sum(dim=1) > 0).sum() == 8


def test_local_crops_may_be_none():
    assert make_batches(num_local=0)[0].local_crops.shape == (0, 8, 1, 4, 4)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_any_number_of_workers_gives_the_same_batches(tmp_path, num_workers):
    batches = make_batches(folder_source(tmp_path / "images", 20, bad=(3, 7)))
    loaded = list(make_loader(batches, 1, 7, num_workers, pin_memory=False))
    assert len(loaded) == 6
    for step, batch in enumerate(loaded, start=1):
        assert_same(batch, batches[step])


def test_a_micro_batch_is_the_same_after_a_trip_to_another_process_and_another_start():
    batches = make_batches()
    copy = pickle.loads(pickle.dumps(batches))  # noqa: S301
    late = next(iter(make_loader(copy, 180, 181, 0, pin_memory=False)))
    assert_same(late, batches[180])
    assert not torch.equal(late.global_crops, make_batches(seed=6)[180].global_crops)


def test_crops_of_an_image_depend_on_seed_epoch_and_index_only():
    small, large = make_batches(accumulate=4), make_batches(accumulate=1)
    parts = [small[step] for step in range(4)]
    whole = large[0]
    assert torch.equal(torch.cat([part.indices for part in parts]), whole.indices)
    assert torch.equal(torch.cat([part.global_crops for part in parts], dim=1), whole.global_crops)
    assert torch.equal(torch.cat([part.local_crops for part in parts], dim=1), whole.local_crops)


def test_epochs_augment_the_same_image_differently(tmp_path):
    batches = make_batches(folder_source(tmp_path / "images", 4))
    one, other = batches[0], batches[1]
    image = int(one.indices[0])
    place = other.indices.tolist().index(image)
    assert not torch.equal(one.global_crops[:, 0], other.global_crops[:, place])


def test_masks_of_a_row_come_from_its_image_and_view():
    batches = make_batches()
    batch = batches[0]
    epoch, indices = batches.plan.position(0)
    size = len(indices)
    for row in np.flatnonzero(batch.masks.sum(dim=1).numpy()):
        view, place = divmod(int(row), size)
        count = int(batch.masks[row].sum())
        made = [
            block_mask((4, 4), target, MaskConfig(), generator(5, "mask", epoch, int(indices[place]), view))
            for target in range(count, 17)
        ]
        assert any((mask.ravel() == batch.masks[row].numpy()).all() for mask in made)


def test_unreadable_images_are_replaced_by_the_next_and_reported(tmp_path):
    source = folder_source(tmp_path / "images", 4, bad=(1, 2, 5))
    batches = make_batches(source)
    batch = batches[0]
    assert sorted(batch.indices.tolist()) == list(range(7))
    assert {name for name, _ in batch.skipped} == {"001.png", "002.png", "005.png"}
    assert all(reason for _, reason in batch.skipped)
    crops = MultiCropBatches(source, batches.plan, make_config(7, 3))._crops
    place = batch.indices.tolist().index(1)
    expected = crops(source.load(3), lambda crop: generator(5, "augment", 0, 1, crop))
    assert (batch.global_crops[:, place].numpy() == expected[0]).all()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_hundred_unreadable_images_in_a_row_stop_with_a_plain_message(tmp_path, num_workers):
    source = folder_source(tmp_path / "images", 1, bad=range(1, 130))
    batches = make_batches(source)
    with pytest.raises(DataError, match=r"100 images of .* in a row") as caught:
        list(make_loader(batches, 0, 16, num_workers, pin_memory=False))
    assert "Traceback" not in str(caught.value)


def test_loading_leaves_torchs_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    list(make_loader(make_batches(), 0, 2, 0, pin_memory=False))
    assert torch.equal(torch.rand(1), expected)


def test_workers_leave_interrupts_to_the_parent():
    loader = iter(make_loader(make_batches(), 0, 12, 2, pin_memory=False))
    batches = [next(loader), next(loader)]
    workers = [process.pid for process in multiprocessing.active_children()]
    assert workers
    for pid in workers:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    batches += list(loader)
    assert len(batches) == 12


def test_the_number_of_workers_is_as_asked_or_fits_the_machine(monkeypatch):
    assert resolve_num_workers(0, "cuda") == 0
    assert resolve_num_workers(7, "cpu") == 7
    for cores, on_cuda, on_cpu in ((1, 1, 1), (2, 1, 1), (8, 7, 4), (64, 16, 32)):
        monkeypatch.setattr("poa.data.loader._num_cores", lambda cores=cores: cores)
        assert resolve_num_workers(-1, "cuda") == on_cuda
        assert resolve_num_workers(-1, "cpu") == on_cpu
    monkeypatch.undo()
    assert resolve_num_workers(-1, "mps") >= 1


KILLED = """
import multiprocessing
import os
from torch.utils.data import Dataset
from poa.data import make_loader


class Pids(Dataset):
    def __getitem__(self, index):
        return os.getpid()


if __name__ == "__main__":
    multiprocessing.set_start_method("forkserver")
    batches = iter(make_loader(Pids(), 0, 1000, 1, False))
    print(next(batches), flush=True)
    input()
"""


def is_running(pid):
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to look at other processes")
def test_workers_end_with_a_process_that_is_killed(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    process = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    assert worker != process.pid
    assert is_running(worker)
    process.kill()  # it stays a zombie until it is waited for
    for _ in range(300):
        if not is_running(worker):
            break
        time.sleep(0.1)
    assert not is_running(worker)
    process.wait()
