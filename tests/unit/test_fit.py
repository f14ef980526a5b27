import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from poa.backbones import architecture
from poa.config import FitConfig, ViTConfig
from poa.errors import CheckpointError, ConfigError
from poa.runtime import Runtime
from poa.tasks.fit import STATE_FOLDER, NotFiniteError, Task, average_, fit, lr_schedule
from poa.tasks.parameters import parameter_groups
from poa.tasks.state import NUMBERS_FILE, TENSORS_FILE, read_state, write_state

CPU = Runtime(torch.device("cpu"), "float32", compile=False, num_workers=0)
CONFIG = FitConfig(epochs=5, batch_size=8, warmup_epochs=1, ema_decay=0.9)


class Body(nn.Module):
    """Two layers named as timm's, with dropout and a batch norm."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.bn = nn.BatchNorm1d(6)
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.dropout = nn.Dropout(0.3)

    def group_matcher(self, coarse=False):
        assert not coarse
        return {"stem": r"^stem|^bn", "blocks": r"^blocks\.(\d+)"}

    def forward(self, x):
        x = self.bn(self.stem(x))
        for block in self.blocks:
            x = x + self.dropout(block(x).relu())
        return x


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = Body()
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.backbone(x))


class Toy(Task):
    """Random points; `figures` scripts the epochs' metrics where it is given."""

    metric = "score"
    identity = "toy"

    def __init__(self, figures=None, spoilt=()):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = Model()
        rng = torch.Generator().manual_seed(1)
        self.x, self.y = torch.randn(24, 4, generator=rng), torch.randint(3, (24,), generator=rng)
        self.figures, self.spoilt = figures, spoilt
        self.num_looks = 0
        self.seen, self.watched = [], []

    def num_steps(self):
        return 3

    def batches(self, epoch):
        order = torch.randperm(24, generator=torch.Generator().manual_seed(epoch))
        for step in range(3):
            yield 3 * epoch + step, order[8 * step : 8 * step + 8]

    def loss(self, model, batch, device):
        number, rows = batch
        assert device == CPU.device
        self.seen.append(number)
        value = nn.functional.cross_entropy(model(self.x[rows]), self.y[rows])
        return {"label": value * (math.nan if number in self.spoilt else 1.0)}

    def evaluate(self, model, device):
        assert not model.training
        assert device == CPU.device
        self.watched.append(copy.deepcopy(model.state_dict()))
        self.num_looks += 1
        if self.figures is not None:
            return {"score": self.figures[self.num_looks - 1]}
        return {"score": -float(nn.functional.cross_entropy(model(self.x), self.y))}


class StoppedError(Exception):
    pass


def stop_after(steps):
    def on_step(done, total, loss):
        if done > steps:
            raise StoppedError

    return on_step


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("steps", [1, 3, 8, 14])
@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, ema_decay=0.0, evaluate_every=2, freeze=True)])
def test_a_resumed_run_equals_one_that_never_stopped_bit_for_bit(tmp_path, config, steps):
    whole = Toy()
    expected = fit(whole, config, CPU)
    with pytest.raises(StoppedError):
        fit(Toy(), config, CPU, out=tmp_path, on_step=stop_after(steps))
    resumed = Toy()
    found = fit(resumed, config, CPU, out=tmp_path)
    assert resumed.seen == whole.seen[3 * (steps // 3) :]
    assert found == expected
    assert same(resumed.model.state_dict(), whole.model.state_dict())


def test_a_finished_run_is_given_back_without_training(tmp_path):
    first, again = Toy(), Toy()
    expected = fit(first, CONFIG, CPU, out=tmp_path)
    assert fit(again, CONFIG, CPU, out=tmp_path) == expected
    assert again.seen == []
    assert same(again.model.state_dict(), first.model.state_dict())


def test_the_loss_falls_and_the_history_tells_every_epoch():
    found = fit(Toy(), replace(CONFIG, epochs=12, ema_decay=0.0, lr=0.01), CPU)
    assert [line["epoch"] for line in found.history] == list(range(1, 13))
    assert found.history[-1]["loss/label"] < 0.9 * found.history[0]["loss/label"]


def test_the_model_has_the_weights_of_its_best_epoch():
    task = Toy(figures=[0.1, 0.7, 0.3, 0.7, 0.2])
    found = fit(task, CONFIG, CPU)
    assert (found.best_epoch, found.best) == (2, {"score": 0.7})
    assert same(task.model.state_dict(), task.watched[1])
    assert not same(task.watched[1], task.watched[4])
    assert not task.model.training


def test_a_figure_that_is_no_number_is_never_the_best(tmp_path):
    found = fit(Toy(figures=[math.nan, 0.1, math.nan, 0.05, 0.0]), CONFIG, CPU, out=tmp_path)
    assert (found.best_epoch, found.best) == (2, {"score": 0.1})
    again = fit(Toy(), CONFIG, CPU, out=tmp_path)
    assert math.isnan(again.history[2]["score"])


@pytest.mark.parametrize(("every", "figures", "epochs"), [(1, [3, 2, 1, 9, 9], 3), (2, [3, 1, 9], 4), (1, range(5), 5)])
def test_training_stops_when_no_better_figure_comes(tmp_path, every, figures, epochs):
    config = replace(CONFIG, patience=2, evaluate_every=every)
    task = Toy(figures=[float(figure) for figure in figures])
    fit(task, config, CPU, out=tmp_path)
    assert len(task.seen) == 3 * epochs
    again = Toy()
    fit(again, config, CPU, out=tmp_path)
    assert again.seen == []


def test_epochs_between_two_looks_are_not_looked_at_but_the_last_is():
    task = Toy()
    found = fit(task, replace(CONFIG, evaluate_every=3), CPU)
    assert [line["epoch"] for line in found.history] == [3, 5]
    assert task.num_looks == 2


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_the_state_of_the_epoch_before(tmp_path):
    with pytest.raises(NotFiniteError, match=r"step 8.*learning rate \(now 0.001\)"):
        fit(Toy(spoilt=(7,)), CONFIG, CPU, out=tmp_path)
    tensors, numbers = read_state(tmp_path / STATE_FOLDER)
    assert numbers["epoch"] == 2
    assert all(part.isfinite().all() for part in tensors.values())
    assert fit(Toy(), CONFIG, CPU, out=tmp_path) == fit(Toy(), CONFIG, CPU)


def test_a_frozen_backbone_stays_as_it_is_with_its_batch_norm():
    task = Toy()
    before = copy.deepcopy(task.model.state_dict())
    fit(task, replace(CONFIG, freeze=True), CPU)
    after = task.model.state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"}


def test_the_average_warms_up_as_one_over_the_steps_and_copies_counters():
    model, average = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    with torch.no_grad():
        average.weight.fill_(3.0)
        model.running_mean.fill_(2.0)
        model.num_batches_tracked.fill_(7)
    average_(average, model, 0.75)
    assert average.weight.tolist() == [2.5, 2.5]
    assert average.running_mean.tolist() == [0.5, 0.5]
    assert int(average.num_batches_tracked) == 7


def test_what_is_measured_and_kept_is_the_average_of_the_weights():
    config = replace(CONFIG, epochs=2, clip_grad=0.0)
    task, plain = Toy(), Toy()
    steps = []
    original = plain.loss

    def recording(model, batch, device):
        steps.append(model.head.weight.detach().clone())
        return original(model, batch, device)

    plain.loss = recording
    fit(plain, replace(config, ema_decay=0.0), CPU)
    fit(task, config, CPU)
    weights = [*steps[1:], plain.watched[-1]["head.weight"]]
    average = steps[0]
    for number, weight in enumerate(weights):
        average = average.lerp(weight, 1 - min(config.ema_decay, (1 + number) / (10 + number)))
    torch.testing.assert_close(task.watched[-1]["head.weight"], average)
    assert not torch.allclose(task.watched[-1]["head.weight"], plain.watched[-1]["head.weight"])


def test_parts_of_a_step_add_up_to_the_whole():
    class Parted(Toy):
        def passes(self, model, batch, device):
            _, rows = batch
            for half in rows.chunk(2):
                yield {f"half{int(half is not rows)}": self.loss(model, (-1, half), device)["label"] / 2}

    class Whole(Toy):
        def loss(self, model, batch, device):
            _, rows = batch
            halves = [super(Whole, self).loss(model, (-1, half), device)["label"] / 2 for half in rows.chunk(2)]
            return {"both": halves[0] + halves[1]}

    config = replace(CONFIG, epochs=1)
    one, other = Parted(), Whole()
    fit(one, config, CPU)
    fit(other, config, CPU)
    for name, weight in one.model.named_parameters():
        torch.testing.assert_close(weight, other.model.get_parameter(name), rtol=1e-4, atol=1e-6)


def test_bfloat16_holds_in_training_and_in_measuring():
    dtypes = []

    class Watching(Toy):
        def loss(self, model, batch, device):
            dtypes.append(model(self.x[batch[1]]).dtype)
            return super().loss(model, batch, device)

        def evaluate(self, model, device):
            dtypes.append(model(self.x).dtype)
            return super().evaluate(model, device)

    fit(Watching(), replace(CONFIG, epochs=1), replace(CPU, precision="bfloat16"))
    assert dtypes == [torch.bfloat16] * 4


def test_torch_s_own_randomness_is_neither_used_nor_moved():
    torch.manual_seed(5)
    expected = torch.rand(3)
    results = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        task = Toy()
        fit(task, CONFIG, CPU)
        results.append(task.model.state_dict())
        if seed == 5:
            assert torch.equal(torch.rand(3), expected)
    assert same(*results)


@pytest.mark.parametrize("change", [{"lr": 0.5}, {"epochs": 9}, {"patience": 1}])
def test_a_run_with_other_numbers_is_not_gone_on_with(tmp_path, change):
    fit(Toy(), replace(CONFIG, epochs=1), CPU, out=tmp_path)
    with pytest.raises(CheckpointError, match=f"another .*{next(iter(change))}"):
        fit(Toy(), replace(CONFIG, **{"epochs": 1, **change}), CPU, out=tmp_path)


def test_a_run_of_another_task_is_not_gone_on_with(tmp_path):
    fit(Toy(), replace(CONFIG, epochs=1), CPU, out=tmp_path)
    other = Toy()
    other.identity = "another"
    with pytest.raises(CheckpointError, match="another task"):
        fit(other, replace(CONFIG, epochs=1), CPU, out=tmp_path)


@pytest.mark.parametrize("file", [TENSORS_FILE, NUMBERS_FILE])
@pytest.mark.parametrize("harm", ["cut", "gone", "changed"])
def test_a_damaged_state_is_refused(tmp_path, file, harm):
    fit(Toy(), replace(CONFIG, epochs=1), CPU, out=tmp_path)
    path = tmp_path / STATE_FOLDER / file
    content = path.read_bytes()
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if harm == "cut" else b"x" + content[1:])
    with pytest.raises(CheckpointError, match="damaged"):
        fit(Toy(), replace(CONFIG, epochs=1), CPU, out=tmp_path)


def test_the_state_is_json_and_safetensors_alone_and_tied_weights_are_kept(tmp_path):
    weight = torch.arange(6.0)
    write_state(tmp_path / "state", {"a": weight, "b": weight, "c": weight[2:]}, {"best": {"x": math.inf}})
    assert {path.name for path in (tmp_path / "state").iterdir()} == {TENSORS_FILE, NUMBERS_FILE}
    tensors, numbers = read_state(tmp_path / "state")
    assert json.loads((tmp_path / "state" / NUMBERS_FILE).read_text())["best"] == numbers["best"] == {"x": None}
    assert tensors["a"].tolist() == tensors["b"].tolist() == weight.tolist()
    assert tensors["c"].tolist() == [2.0, 3.0, 4.0, 5.0]
    assert read_state(tmp_path / "none") is None


def test_the_learning_rate_warms_up_linearly_and_falls_as_a_cosine():
    config = FitConfig(epochs=5, lr=1.0, min_lr=0.2, warmup_epochs=1.0)
    rates = [lr_schedule(step, 4, config) for step in range(20)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == 1.0
    assert rates[-1] == pytest.approx(0.2)
    assert rates[4 + 5] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 5 / 15)))


@pytest.mark.parametrize("warmup", [0.0, 1.0, 99.0])
def test_every_learning_rate_is_above_zero_and_at_most_the_one_asked_for(warmup):
    config = FitConfig(epochs=2, lr=1.0, min_lr=0.1, warmup_epochs=warmup)
    assert all(0 < lr_schedule(step, 3, config) <= 1.0 for step in range(6))


def test_layers_learn_the_slower_the_lower_they_are_and_vectors_do_not_decay():
    groups = parameter_groups(Model(), FitConfig(layer_decay=0.5, weight_decay=0.1))
    found = {}
    model = Model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in parameter_groups(model, FitConfig(layer_decay=0.5, weight_decay=0.1)):
        found.update({names[id(part)]: (group["lr_scale"], group["weight_decay"]) for part in group["params"]})
    assert len(groups) == 8
    assert found["head.weight"] == (1.0, 0.1)
    assert found["head.bias"] == (1.0, 0.0)
    assert found["backbone.blocks.1.weight"] == (0.5, 0.1)
    assert found["backbone.blocks.0.weight"] == (0.25, 0.1)
    assert found["backbone.stem.weight"] == (0.125, 0.1)
    assert found["backbone.bn.weight"] == (0.125, 0.0)


def test_layers_of_a_super_network_are_those_of_its_contract():
    config = ViTConfig(widths=(16, 32), depths=(1, 2), head_dim=16, patch_size=4, image_size=8, num_channels=1)

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = architecture(config).build(config)
            self.head = nn.Linear(32, 2)

    model = Wrapped()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for group in parameter_groups(model, FitConfig(layer_decay=0.5, weight_decay=0.1)):
        found.update({names[id(part)]: (group["lr_scale"], group["weight_decay"]) for part in group["params"]})
    assert found["head.weight"] == (1.0, 0.1)
    assert found["backbone.norm.weight"] == (0.5, 0.0)
    assert found["backbone.blocks.1.mlp.fc1.weight"] == (0.25, 0.1)
    assert found["backbone.patch_embed.proj.weight"] == (0.0625, 0.1)
    assert found["backbone.pos_embed"] == (0.0625, 0.0)


def test_gradients_are_clipped_to_the_norm_asked_for():
    norms = []

    class Watching(Toy):
        def num_steps(self):
            return 1

        def batches(self, epoch):
            yield epoch, torch.arange(8)

        def loss(self, model, batch, device):
            return {name: 1000.0 * value for name, value in super().loss(model, batch, device).items()}

    task = Watching()
    step = torch.optim.AdamW.step

    def watching_step(self, *arguments, **options):
        gradients = [part.grad for group in self.param_groups for part in group["params"] if part.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        return step(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watching_step)
        fit(task, replace(CONFIG, epochs=1, clip_grad=0.5), CPU)
        fit(Watching(), replace(CONFIG, epochs=1, clip_grad=0.0), CPU)
    assert norms[0] == pytest.approx(0.5, rel=1e-3)
    assert norms[1] > 10


@pytest.mark.parametrize("option", [{"patience": -1}, {"epochs": 0}, {"min_lr": 1.0}, {"lr": 0.0}, {"seed": -1}])
def test_numbers_out_of_range_are_refused(option):
    with pytest.raises(ConfigError, match=f"fit.{next(iter(option))}"):
        FitConfig(**option)
