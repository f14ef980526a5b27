import dataclasses
import json
import os
import re
import signal
import time
import warnings

import numpy as np
import pytest
import torch

from poa.backbones.vit import ElasticViT
from poa.config import (
    AugmentConfig,
    DataConfig,
    HeadsConfig,
    MaskConfig,
    MonitorConfig,
    ObjectiveConfig,
    OptimConfig,
    PretrainConfig,
    TrainConfig,
    ViTConfig,
)
from poa.config import RuntimeConfig as Where
from poa.data import EpochPlan, MultiCropBatches, open_source
from poa.data.digits import DigitsSource
from poa.errors import PoaWarning, TrainingError
from poa.runtime import Runtime
from poa.train import Reporter, pretrain
from poa.train.interrupt import Interrupt
from poa.train.metrics import MetricsLog, read_metrics
from poa.train.monitor import Monitor
from poa.train.optim import clip_gradients_
from poa.train.schedules import StepValues
from poa.train.setup import build_trainer
from poa.train.step import StepRecord, train_step
from tests.unit.test_evaluate import CountingSource

STEPS_PER_EPOCH = 4
CPU = Runtime(torch.device("cpu"), "float32", compile=False, num_workers=0)
CONFIG = PretrainConfig(
    data=DataConfig(source="digits"),
    model=ViTConfig(
        widths=(16, 32),
        depths=(1, 2),
        head_dim=16,
        patch_size=2,
        image_size=8,
        num_channels=1,
        init_values=0.1,
        drop_path=0.0,
    ),
    heads=HeadsConfig(num_prototypes=(8, 12), hidden_dim=16, bottleneck_dim=8),
    objective=ObjectiveConfig(patch_start_epoch=0.0),
    augment=AugmentConfig(num_local_crops=2, local_size=4, mean=(0.3,), std=(0.35,)),
    mask=MaskConfig(min_patches=2),
    optim=OptimConfig(base_lr=1e-2, warmup_epochs=0.0, freeze_last_layer_epochs=0.0),
    train=TrainConfig(epochs=3.0, batch_size=8),
    monitor=MonitorConfig(every=0, num_images=60),
    runtime=Where(device="cpu", num_workers=0),
)


def changed(config=CONFIG, **sections):
    parts = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **parts)


@pytest.fixture(scope="module")
def source():
    return open_source("digits", DataConfig(), 1)


def make(config, source):
    trainer = build_trainer(config, STEPS_PER_EPOCH, CPU)
    plan = EpochPlan(len(source), config.train.batch_size, config.optim.accumulate, config.train.seed)
    num = config.optim.accumulate
    micro = MultiCropBatches(source, plan, config)
    return trainer, lambda step: [micro[step * num + part] for part in range(num)]


def copies(module):
    return {name: part.detach().clone() for name, part in module.state_dict().items()}


def same(before, module):
    after = module.state_dict()
    return {name for name, part in before.items() if torch.equal(part, after[name])}


def test_a_step_updates_student_and_teacher_and_reports_every_term(source):
    trainer, batches = make(CONFIG, source)
    student, teacher = copies(trainer.model.student), copies(trainer.model.teacher)
    record = train_step(trainer, batches(0), 0)
    assert record.is_finite
    assert len(same(student, trainer.model.student)) < len(student) / 4
    assert len(same(teacher, trainer.model.teacher)) < len(teacher) / 4
    assert all(np.isfinite(list(record.terms.values())))
    assert {"intact/local", "intact/patch", "elastic/koleo", "elastic/distill_global"} <= set(record.terms)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_a_step_is_a_function_of_state_batch_and_position(source):
    config = changed(model={"drop_path": 0.3})
    results = []
    for _ in range(2):
        trainer, batches = make(config, source)
        records = [train_step(trainer, batches(step), step) for step in range(2)]
        results.append((copies(trainer.model), [record.loss for record in records]))
    assert results[0][1] == results[1][1]
    assert all(torch.equal(results[0][0][name], results[1][0][name]) for name in results[0][0])


def test_micro_batches_add_up_to_the_mean_of_their_gradients_and_losses(source):
    config = changed(optim={"accumulate": 2})
    trainer, batches = make(config, source)
    together = train_step(trainer, batches(0), 0)
    alone = []
    for part in batches(0):
        single, _ = make(config, source)
        alone.append(train_step(single, [part], 0))
    assert len(together.subnets) == 2
    assert together.subnets[0] == alone[0].subnets[0]
    assert together.terms["intact/koleo"] == pytest.approx(
        (alone[0].terms["intact/koleo"] + alone[1].terms["intact/koleo"]) / 2, rel=1e-5
    )


def test_a_space_of_one_trains_without_an_elastic_student(source):
    trainer, batches = make(changed(model={"widths": (32,), "depths": (2,)}), source)
    record = train_step(trainer, batches(0), 0)
    assert record.subnets == (None,)
    assert record.is_finite
    assert not [name for name in record.terms if name.startswith(("elastic", "distill"))]


def poison_weight(student):
    with torch.no_grad():
        student.heads.heads[0].fc2.weight[0, 0] = float("nan")


def poison_gradient(student):
    student.backbone.blocks[1].mlp.fc1.weight.register_hook(lambda gradient: gradient * float("inf"))


@pytest.mark.parametrize("poison", [poison_weight, poison_gradient])
def test_a_step_that_is_not_finite_changes_nothing(source, poison):
    trainer, batches = make(CONFIG, source)
    train_step(trainer, batches(0), 0)
    moments = [dict(state) for state in trainer.optimizer.state.values()]
    moments = [{key: value.clone() for key, value in state.items()} for state in moments]
    poison(trainer.model.student)
    before = copies(trainer.model)
    record = train_step(trainer, batches(1), 1)
    assert not record.is_finite
    after = trainer.model.state_dict()
    assert all(torch.equal(part.nan_to_num(), after[name].nan_to_num()) for name, part in before.items())
    for old, new in zip(moments, trainer.optimizer.state.values(), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


class Told(Reporter):
    def __init__(self):
        self.messages = []

    def message(self, text):
        self.messages.append(text)


@pytest.mark.parametrize("is_slow", [True, False])
def test_a_run_that_waits_for_its_images_says_so_once(tmp_path, monkeypatch, is_slow):
    load, told = DigitsSource.load, Told()

    def slow(self, index):
        time.sleep(0.1 if is_slow else 0.0)
        return load(self, index)

    monkeypatch.setattr(DigitsSource, "load", slow)
    monkeypatch.setattr("poa.train.loop.WAIT_SHARE", 0.3 if is_slow else 1.0)
    pretrain(changed(train={"epochs": 0.04, "log_every": 2}), tmp_path / "run", told)
    shares = [line["data_wait"] for line in read_metrics(tmp_path / "run") if "data_wait" in line]
    assert len(shares) > 2
    assert all(0.0 < share <= 1.0 for share in shares)
    waiting = [text for text in told.messages if text.startswith("Training waited for images")]
    assert len(waiting) == int(is_slow)
    assert not is_slow or max(shares) > 0.3


def exploding(**train):
    return changed(optim={"base_lr": 1e38, "final_lr": 0.0}, train={"max_skipped_steps": 3, "epochs": 0.2, **train})


def test_a_run_that_stays_not_finite_ends_with_advice(tmp_path):
    with pytest.raises(TrainingError, match=r"4 steps in a row .*no checkpoint yet.*--optim\.base-lr"):
        pretrain(exploding(), tmp_path / "run")
    assert not (tmp_path / "run" / "family").exists()


def test_the_state_named_good_is_older_than_the_steps_that_were_not_finite(tmp_path):
    with pytest.raises(TrainingError) as caught:
        pretrain(exploding(checkpoint_every=1, keep_checkpoints=2), tmp_path / "run")
    last = int(re.search(r"the last was step (\d+)", str(caught.value))[1])
    good = re.search(r"The last good state is (.*step-(\d+))\.", str(caught.value))
    assert int(good[2]) <= last - 4
    assert os.path.isdir(good[1])  # noqa: PTH112


@pytest.mark.parametrize("limit", [0.5, 1e9, 0.0])
def test_gradients_of_backbone_and_heads_are_clipped_each_on_its_own(source, limit):
    trainer, _ = make(CONFIG, source)
    student = trainer.model.student
    rng = torch.Generator().manual_seed(0)
    for index, parameter in enumerate(student.parameters()):
        if index % 5:
            parameter.grad = torch.randn(parameter.shape, generator=rng)
    parts = {"backbone": student.backbone, "heads": student.heads}
    flat = {
        name: torch.cat([p.grad.flatten() for p in part.parameters() if p.grad is not None]).clone()
        for name, part in parts.items()
    }
    norms = clip_gradients_(student, limit)
    for name, part in parts.items():
        found = torch.cat([p.grad.flatten() for p in part.parameters() if p.grad is not None])
        norm = flat[name].norm()
        torch.testing.assert_close(norms[name], norm)
        factor = min(1.0, limit / float(norm)) if limit else 1.0
        torch.testing.assert_close(found, flat[name] * factor, rtol=1e-4, atol=1e-7)


def test_last_layers_of_the_heads_are_frozen_in_the_first_epoch_and_move_afterwards(source):
    trainer, batches = make(changed(optim={"freeze_last_layer_epochs": 1.0}), source)
    before = copies(trainer.model.student)
    last_layers = {name for name in before if ".last_layer." in name}
    assert len(last_layers) == 4
    for step in range(STEPS_PER_EPOCH):
        record = train_step(trainer, batches(step), step)
        assert record.values.last_layer_lr == 0.0
    assert last_layers <= same(before, trainer.model.student)
    assert len(same(before, trainer.model.student)) < len(before) / 2
    train_step(trainer, batches(STEPS_PER_EPOCH), STEPS_PER_EPOCH)
    assert not last_layers & same(before, trainer.model.student)


def test_masks_are_off_before_their_epoch_and_on_afterwards(source):
    trainer, batches = make(changed(objective={"patch_start_epoch": 0.5}), source)
    token = trainer.model.student.backbone.mask_token
    before = token.detach().clone()
    for step in range(2):
        record = train_step(trainer, batches(step), step)
        assert not record.values.masks
        assert record.terms["intact/patch"] == record.terms["elastic/patch"] == 0.0
    assert torch.equal(token, before)
    record = train_step(trainer, batches(2), 2)
    assert record.values.masks
    assert record.terms["intact/patch"] > 0
    assert not torch.equal(token, before)


def test_without_patch_weight_masks_never_come_on(source):
    trainer, _ = make(changed(objective={"patch_weight": 0.0}), source)
    assert not any(trainer.schedules.at(step).masks for step in range(trainer.schedules.num_steps))


def record_of(loss, is_finite=True):
    values = StepValues(0.1, 0.0, 0.1, 0.04, 0.99, 0.05, masks=True)
    return StepRecord(loss, {"intact/local": loss / 2}, {"heads": 1.0}, (), values, is_finite)


def write_steps(folder, first, last, window=None, every=2):
    folder.mkdir(exist_ok=True)
    with MetricsLog(folder, first, window) as log:
        for done in range(first + 1, last + 1):
            log.add(record_of(float(done), is_finite=done != 4), 8)
            if done % every == 0:
                log.write(done, record_of(float(done)))
        return log.window_state()


def timeless(lines):
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "seconds", "data_wait")} for line in lines]


def test_lines_hold_means_since_the_line_before_and_count_skipped_steps(tmp_path):
    write_steps(tmp_path, 0, 6)
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert [line["loss"] for line in lines] == [1.5, 3.0, 5.5]
    assert [line["loss/intact/local"] for line in lines] == [0.75, 1.5, 2.75]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 0]
    assert "masks" not in lines[0]


@pytest.mark.parametrize("tail", ["", '{"step": 6, "lo', '{"step": 8}\nnot json\n{"other": 1}\n'])
def test_resumed_metrics_equal_those_of_a_run_that_never_stopped(tmp_path, tail):
    write_steps(tmp_path / "whole", 0, 9, every=3)
    window = write_steps(tmp_path / "cut", 0, 5, every=3)
    write_steps(tmp_path / "lost", 0, 8, every=3)
    (tmp_path / "cut" / "metrics.jsonl").write_text((tmp_path / "lost" / "metrics.jsonl").read_text() + tail)
    write_steps(tmp_path / "cut", 5, 9, json.loads(json.dumps(window)), every=3)
    assert timeless(read_metrics(tmp_path / "cut")) == timeless(read_metrics(tmp_path / "whole"))


def random_backbone():
    backbone = ElasticViT(CONFIG.model)
    rng = torch.Generator().manual_seed(0)
    backbone.init_weights_(rng)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng), alpha=0.3)
    return backbone


def test_monitor_looks_at_three_subnets_and_leaves_the_backbone_as_it_was(source):
    backbone = random_backbone().train()
    monitor = Monitor(CONFIG, source, backbone.space)
    found = monitor.look(backbone)
    assert backbone.training
    assert list(found) == ["w16-d1", "w32-d2"]
    for figures in found.values():
        assert figures["rankme"] > 2
        assert 0 <= figures["knn"] <= 1
    assert found == Monitor(CONFIG, source, backbone.space).look(backbone)


def test_monitor_does_not_warn_of_fresh_weights(source):
    backbone = ElasticViT(CONFIG.model)
    backbone.init_weights_(torch.Generator().manual_seed(0))
    with torch.no_grad():
        backbone.norm.weight.zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("error", PoaWarning)
        found = Monitor(CONFIG, source, backbone.space).look(backbone, warn=False)
    assert all(figures["rankme"] < 2 for figures in found.values())


def test_monitor_warns_of_collapse(source):
    backbone = random_backbone()
    with torch.no_grad():
        backbone.norm.weight.zero_()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PoaWarning)
        found = Monitor(CONFIG, source, backbone.space).look(backbone)
    texts = [str(warning.message) for warning in caught if warning.category is PoaWarning]
    assert len(texts) == 2
    assert "w16-d1 have an effective rank of 1.00: they are collapsing" in texts[0]
    assert "w32-d2 have an effective rank of 1.00: they are collapsing" in texts[1]
    assert found["w16-d1"]["rankme"] == pytest.approx(1.0, abs=0.01)


def test_monitor_does_without_labels():
    source = CountingSource("plain", classes=None)
    backbone = random_backbone()
    found = Monitor(CONFIG, source, backbone.space).look(backbone)
    assert [list(figures) for figures in found.values()] == [["rankme"], ["rankme"]]


def test_monitor_accepts_as_many_unreadable_images_as_the_run():
    config = changed(data={"max_bad_share": 0.5})
    backbone = random_backbone()
    found = Monitor(config, CountingSource("plain", bad=[3, 4]), backbone.space).look(backbone)
    assert len(found) == 2


def test_monitor_looks_when_it_is_due_and_at_the_end():
    space = ElasticViT(CONFIG.model).space
    monitor = Monitor(changed(monitor={"every": 4}), CountingSource("x"), space)
    assert [step for step in range(1, 11) if monitor.is_due(step, 10)] == [4, 8, 10]
    never = Monitor(CONFIG, CountingSource("x"), space)
    assert not any(never.is_due(step, 10) for step in range(1, 11))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupt_remembers_the_signal_and_gives_the_handlers_back(number):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interrupt() as interrupt:
        assert interrupt.signal is None
        os.kill(os.getpid(), number)
        assert interrupt.signal == number
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def press_twice(first):
    with Interrupt():
        os.kill(os.getpid(), first)
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_second_ctrl_c_stops_at_once(first):
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        press_twice(first)
    assert signal.getsignal(signal.SIGINT) == handler
