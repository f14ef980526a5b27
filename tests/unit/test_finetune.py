import io
import json
from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.metrics import average_precision_score, log_loss, top_k_accuracy_score
from torch.nn import functional as F

from poa.backbones import architecture
from poa.config import DataConfig, ElasticConfig, FinetuneConfig, FitConfig, ViTConfig
from poa.data import BadImage, ImageSource, LabelledImages, hold_out, open_labelled, with_classes_of
from poa.deploy.export.transformers import save_transformers
from poa.errors import CheckpointError, ConfigError, DataError, ExtractionError
from poa.family import Family, FamilyCard, Preprocessing, load
from poa.models import family_members, open_models
from poa.runtime import Runtime
from poa.task_head import HEAD_FILE, HEAD_WEIGHTS_FILE
from poa.tasks.classify import ClassificationData, FinetuneTask, classification_data
from poa.tasks.elastic import ElasticFinetuneTask
from poa.tasks.finetune import finetune, finetune_family
from poa.tasks.fit import fit
from poa.tasks.images import LabelBatch, MeasuredImages, SkippedImages, TrainingImages, loaded
from poa.tasks.scores import MultiLabelScores, SingleLabelScores
from tests.contract.configs import SMALLEST
from tests.golden.reference import relative_error

CPU = Runtime(torch.device("cpu"), "float32", compile=False, num_workers=0)
VIT = ViTConfig(widths=(16, 32), depths=(1, 2), head_dim=16, patch_size=4, image_size=8, num_channels=1, drop_path=0.2)
PLAIN = FinetuneConfig(mixup=0.0, cutmix=0.0, randaugment_ops=0, label_smoothing=0.0, drop_path=0.0, flip_prob=0.0)
QUICK = FitConfig(epochs=1, batch_size=16, warmup_epochs=0.0, ema_decay=0.9)
NAMES = ("dark", "grey", "bright")


class Squares(ImageSource):
    """Images of three brightnesses with noise, or with `several` any of the classes "left", "top", "grey"."""

    def __init__(self, spec="squares", *, size=48, bad=(), num_channels=1, side=8):
        rng = np.random.default_rng(len(spec) + size)
        self.spec, self.skipped, self.bad = spec, (), set(bad)
        self.labels = rng.permutation(np.arange(size) % 3)
        self.class_names = NAMES
        noise = rng.integers(0, 60, (size, side, side, num_channels))
        self.pixels = (noise + 90 * self.labels[:, None, None, None]).astype(np.uint8)

    @classmethod
    def accepts(cls, spec):
        return spec == cls.__name__

    def __len__(self):
        return len(self.pixels)

    def load(self, index):
        if index in self.bad:
            raise BadImage("is broken")
        pixels = self.pixels[index]
        return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)

    def image_name(self, index):
        return f"square-{index}"

    @property
    def fingerprint(self):
        return f"{self.spec} {len(self)}"


def single(**options):
    source = Squares(**options)
    return LabelledImages(source, np.arange(len(source)), source.labels, NAMES)


def several(**options):
    source = Squares(**options)
    targets = np.stack([source.labels == 0, source.labels >= 1, np.arange(len(source)) % 5 == 0], axis=1)
    targets[source.labels == 0, 0] = np.arange((source.labels == 0).sum()) % 2 == 0
    return LabelledImages(source, np.arange(len(source)), targets, ("dark", "light", "fifth"))


def make_family(config=VIT, *, deviation=0.1):
    kind = architecture(config)
    backbone = kind.build(config)
    rng = torch.Generator().manual_seed(0)
    backbone.init_weights_(rng)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng), alpha=deviation)
    how = Preprocessing(config.image_size, config.num_channels, (0.5,), (0.25,))
    return Family(FamilyCard(kind, config, how), backbone)


@pytest.fixture(scope="module")
def family():
    return make_family()


def task_of(family, data=None, config=PLAIN, settings=QUICK, subnet=-1):
    data = data or classification_data(single(), single(spec="others", size=24))
    return FinetuneTask(family_members(family)[subnet], data, config, settings)


def elastic_of(family, data=None, config=PLAIN, settings=QUICK, elastic=None):
    data = data or classification_data(single(), single(spec="others", size=24))
    return ElasticFinetuneTask(family_members(family)[-1], data, config, elastic or ElasticConfig(), settings)


# Labels


def write_images(folder, names):
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 20 * number % 256, dtype=np.uint8)).save(path)


def write_table(folder, text):
    write_images(folder, ["a.png", "deep/b.png", "c.png"])
    (folder / "labels.csv").write_text(text)
    return str(folder)


def write_parquet(file, labels, metadata=None):
    stream = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(stream, "PNG")
    images = [stream.getvalue()] * len(labels)
    images[1] = b""
    table = pyarrow.table({"image": images, "label": labels})
    if metadata is not None:
        table = table.replace_schema_metadata({b"huggingface": json.dumps(metadata).encode()})
    pyarrow.parquet.write_table(table, file)
    return str(file)


ALLOWING = DataConfig(max_bad_share=0.5)


def test_a_table_gives_each_image_of_a_folder_its_classes_and_some_none(tmp_path):
    spec = write_table(tmp_path, "labels,image\nhot; wet,deep/b.png\n,a.png\ndry,c.png\n")
    found = open_labelled(spec, DataConfig(), 1, multi_label=True)
    assert found.class_names == ("dry", "hot", "wet")
    rows = {
        found.source.image_name(int(index)): row.tolist()
        for index, row in zip(found.indices, found.targets, strict=True)
    }
    assert rows == {"a.png": [False] * 3, "c.png": [True, False, False], "deep/b.png": [False, True, True]}
    assert found.num_without_label == 1
    assert found.counts.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,labels\na.png,x\nc.png,y\n", "no row for 1 images, 'deep/b.png'"),
        ("image,labels\na.png,x\nc.png,y\ndeep/b.png,x\nd.png,x\n", "1 images that are not there: d.png"),
        ("image,labels\na.png,x\na.png,y\ndeep/b.png,x\nc.png,x\n", "more than one row for 'a.png'"),
        ("image,labels\na.png,x\nc.png,x\ndeep/b.png,\n", "are of one class"),
        ("image,labels\na.png,\nc.png,\ndeep/b.png,\n", "are of one class"),
        ("file,class\na.png,x\n", "columns image,labels"),
        ("image,labels\na.png\n", "cut short"),
        ("", "columns image,labels"),
    ],
)
def test_a_table_that_cannot_be_right_is_refused(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        open_labelled(write_table(tmp_path, text), DataConfig(), 1, multi_label=True)


def test_a_folder_without_a_table_is_told_what_to_write(tmp_path):
    write_images(tmp_path, ["a.png"])
    with pytest.raises(DataError, match=r"there is no .*labels\.csv: .*image,labels"):
        open_labelled(str(tmp_path), DataConfig(), 1, multi_label=True)


def test_lists_of_numbers_and_of_names_in_parquet_are_several_labels(tmp_path):
    numbers = open_labelled(write_parquet(tmp_path / "n.parquet", [[2, 0], [1], []]), ALLOWING, 1, multi_label=True)
    assert numbers.class_names == ("0", "1", "2")
    assert numbers.targets.tolist() == [[True, False, True], [False] * 3]
    names = open_labelled(write_parquet(tmp_path / "t.parquet", [["b"], ["c"], ["a"]]), ALLOWING, 1, multi_label=True)
    assert names.class_names == ("a", "b")
    assert names.targets.tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize("form", [{"feature": {"names": ["x", "y", "z"]}}, [{"names": ["x", "y", "z"]}]])
def test_names_of_the_classes_are_read_from_the_metadata_of_lists(tmp_path, form):
    file = write_parquet(tmp_path / "n.parquet", [[2], [1], [0]], {"info": {"features": {"label": form}}})
    assert open_labelled(file, ALLOWING, 1, multi_label=True).class_names == ("x", "y", "z")


@pytest.mark.parametrize(
    ("labels", "message"),
    [([[0], [1], None], "has None"), ([[0], [1], [-1]], "class -1"), ([0, 1, 2], "has 0")],
)
def test_lists_that_cannot_be_labels_are_refused(tmp_path, labels, message):
    with pytest.raises(DataError, match=message):
        open_labelled(write_parquet(tmp_path / "n.parquet", labels), ALLOWING, 1, multi_label=True)


def test_a_column_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    file = write_parquet(tmp_path / "n.parquet", [[0], [1], [0]])
    with pytest.raises(DataError, match="no column 'tags'; its columns are image, label"):
        open_labelled(file, replace(ALLOWING, label_column="tags"), 1, multi_label=True)


def test_built_in_digits_have_not_several_labels():
    with pytest.raises(DataError, match="one label for each image"):
        open_labelled("digits", DataConfig(), 1, multi_label=True)


def test_classes_of_the_test_images_are_matched_by_name_not_by_number(tmp_path):
    write_images(tmp_path / "train", ["ant/1.png", "bee/1.png", "cat/1.png"])
    write_images(tmp_path / "test", ["bee/1.png", "cat/1.png", "cat/2.png"])
    train, test = (open_labelled(str(tmp_path / part), DataConfig(), 1) for part in ("train", "test"))
    assert test.targets.tolist() == [0, 1, 1]
    found = with_classes_of(test, train)
    assert (found.targets.tolist(), found.class_names) == ([1, 2, 2], ("ant", "bee", "cat"))


def test_several_labels_of_the_test_images_are_matched_by_name():
    train = several()
    other = replace(train, targets=train.targets[:, [2, 0]], class_names=("fifth", "dark"))
    found = with_classes_of(other, train)
    assert (found.targets[:, [0, 2]] == train.targets[:, [0, 2]]).all()
    assert not found.targets[:, 1].any()


def test_a_class_that_only_the_test_images_have_is_refused_with_the_nearest(tmp_path):
    write_images(tmp_path / "train", ["ant/1.png", "bee/1.png"])
    write_images(tmp_path / "test", ["ants/1.png", "bee/1.png"])
    train, test = (open_labelled(str(tmp_path / part), DataConfig(), 1) for part in ("train", "test"))
    with pytest.raises(DataError, match=r"'ants' \(did you mean 'ant'\?\)"):
        classification_data(train, test)


def test_a_fifth_of_every_class_is_held_out_and_no_image_is_on_both_sides():
    train, test = hold_out(single(size=60), 0.2, seed=0)
    assert test.counts.tolist() == [4, 4, 4]
    assert sorted([*train.indices, *test.indices]) == list(range(60))
    again, _ = hold_out(single(size=60), 0.2, seed=0)
    other, _ = hold_out(single(size=60), 0.2, seed=1)
    assert (again.indices == train.indices).all()
    assert (other.indices != train.indices).any()
    with pytest.raises(DataError, match="1 image only"):
        hold_out(single(size=60).at(np.array([0])), 0.2, seed=0)


def test_images_of_several_classes_are_held_out_so_that_rare_classes_stay():
    images = several(size=80)
    images.targets[:, 2] = False
    images.targets[17, 2] = True
    train, test = hold_out(images, 0.2, seed=0)
    assert train.counts[2] == 1
    assert sorted([*train.indices, *test.indices]) == list(range(80))
    assert (test.counts[:2] > 0).all()


def test_no_class_of_several_is_held_out_whole():
    targets = np.zeros((12, 4), dtype=bool)
    targets[:2, 0], targets[2:4, 1], targets[[0, 2], 2], targets[4:, 3] = True, True, True, True
    images = replace(several(size=12), targets=targets, class_names=tuple("abcd"))
    for seed in range(20):
        train, test = hold_out(images, 0.2, seed)
        assert (train.counts > 0).all()
        assert sorted([*train.indices, *test.indices]) == list(range(12))


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0])
def test_a_share_to_hold_out_that_is_none_is_refused(share):
    with pytest.raises(ConfigError, match="holdout"):
        classification_data(single(), None, holdout=share)


# Batches


STRONG = FinetuneConfig(color_jitter=0.4)


@pytest.mark.parametrize("num_channels", [1, 3])
def test_batches_are_the_same_for_any_number_of_workers_and_any_state_of_torch(num_channels):
    images = single(num_channels=num_channels, bad=[3])
    how = Preprocessing(8, num_channels, (0.5,), (0.5,))
    epochs = []
    for num_workers in (0, 2):
        torch.manual_seed(num_workers)
        batches = TrainingImages(images, STRONG, how, 16, seed=0)
        epochs.append(list(loaded(batches, 3, 6, num_workers, SkippedImages(images, 0.5))))
    for left, right in zip(*epochs, strict=True):
        assert torch.equal(left.images, right.images)
        assert torch.equal(left.targets, right.targets)
        assert (left.number, left.skipped) == (right.number, right.skipped)
    assert not torch.equal(epochs[0][0].images, TrainingImages(images, STRONG, how, 16, seed=1)[3].images)


def test_an_epoch_is_every_image_once_and_another_order_each_time():
    images = LabelledImages(Squares(size=30), np.arange(30), np.arange(30), tuple(map(str, range(30))))
    batches = TrainingImages(images, PLAIN, Preprocessing(8, 1, (0.5,), (0.5,)), 10, seed=0)
    orders = [torch.cat([batches[3 * epoch + step].targets for step in range(3)]).tolist() for epoch in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(30))
    assert orders[0] != orders[1]
    assert len(TrainingImages(images, PLAIN, batches.how, 100, seed=0)) == 1


def test_an_image_that_cannot_be_read_is_replaced_by_the_next_with_its_own_label():
    images = LabelledImages(Squares(size=6, bad=[2, 3]), np.arange(6), np.arange(6), tuple("abcdef"))
    batch = TrainingImages(images, PLAIN, Preprocessing(8, 1, (0.5,), (0.5,)), 6, seed=0)[0]
    assert sorted(batch.targets.tolist()) == [0, 1, 4, 4, 4, 5]
    assert {bad.name for bad in batch.skipped} == {"square-2", "square-3"}


def test_images_that_cannot_be_read_are_left_out_of_measuring_and_too_many_refused():
    images = single(size=10, bad=[0, 4, 5])
    batches = MeasuredImages(images, Preprocessing(8, 1, (0.5,), (0.5,)), 2)
    skipped = SkippedImages(images, 0.3)
    found = list(loaded(batches, 0, 5, 0, skipped))
    assert torch.cat([batch.targets for batch in found]).tolist() == images.targets[[1, 2, 3, 6, 7, 8, 9]].tolist()
    assert sorted(skipped.found) == ["square-0", "square-4", "square-5"]
    with pytest.raises(DataError, match="3 of 10 images"):
        list(loaded(batches, 0, 5, 0, SkippedImages(images, 0.2)))


def test_randaugment_is_refused_for_images_with_alpha(family):
    with pytest.raises(ConfigError, match="--randaugment-ops 0"):
        TrainingImages(single(), FinetuneConfig(), Preprocessing(8, 4, (0.5,), (0.5,)), 8, seed=0)


# Mixing and losses


def batch_of(task, number=0):
    return next(batch for batch in task.batches(0) if batch.number == number)


@pytest.mark.parametrize("config", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_mixing_is_a_function_of_the_seed_and_the_step(family, config):
    task = task_of(family, config=replace(PLAIN, **config))
    batch = batch_of(task)
    torch.manual_seed(1)
    first = task.mixed(batch, CPU.device)
    torch.manual_seed(2)
    expected = torch.rand(1)
    torch.manual_seed(2)
    again = task.mixed(batch, CPU.device)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    other = task.mixed(batch._replace(number=1), CPU.device)
    assert not torch.equal(first[0], other[0])
    torch.testing.assert_close(first[1].sum(dim=1), torch.ones(16))
    assert ((first[1] > 0).sum(dim=1) == 2).any()


def test_mixup_mixes_images_and_labels_alike(family):
    task = task_of(family, config=replace(PLAIN, mixup=1.0))
    batch = batch_of(task)
    images, shares = task.mixed(batch, CPU.device)
    plain = task.to_input(batch, CPU.device)
    row = int((batch.targets != batch.targets.roll(1)).nonzero()[0])
    own = shares[row, batch.targets[row]]
    torch.testing.assert_close(images[row], own * plain[row] + (1 - own) * plain.roll(1, 0)[row])


def test_without_mixing_images_stay_and_labels_are_smoothed(family):
    task = task_of(family, config=replace(PLAIN, label_smoothing=0.3, mixup=1.0, mix_prob=0.0))
    batch = batch_of(task)
    images, shares = task.mixed(batch, CPU.device)
    assert torch.equal(images, task.to_input(batch, CPU.device))
    torch.testing.assert_close(shares, F.one_hot(batch.targets, 3) * 0.7 + 0.1)
    logits = torch.randn(16, 3)
    expected = F.cross_entropy(logits, batch.targets, label_smoothing=0.3)
    torch.testing.assert_close(task.label_loss(logits, shares), expected)


def test_several_labels_are_smoothed_towards_one_half_and_learnt_by_binary_cross_entropy(family):
    data = classification_data(several(), several(spec="others"))
    task = task_of(family, data, config=replace(PLAIN, label_smoothing=0.2))
    assert task.metric == "map"
    batch = batch_of(task)
    _, shares = task.mixed(batch, CPU.device)
    torch.testing.assert_close(shares, torch.where(batch.targets, 0.9, 0.1))
    logits = torch.randn(16, 3)
    found = task.label_loss(logits, shares)
    torch.testing.assert_close(found, F.binary_cross_entropy(torch.sigmoid(logits), shares))


@pytest.mark.parametrize("num_classes", [2, 5, 9])
def test_scores_of_one_label_equal_scikit_learn(num_classes):
    rng = torch.Generator().manual_seed(num_classes)
    logits, targets = torch.randn(50, num_classes, generator=rng), torch.arange(50) % num_classes
    scores = SingleLabelScores()
    for rows in torch.arange(50).split(13):
        scores.add(logits[rows], targets[rows])
    found = scores.figures()
    classes = list(range(num_classes))
    assert found["accuracy"] == pytest.approx(float((logits.argmax(1) == targets).float().mean()))
    assert found["cross_entropy"] == pytest.approx(
        log_loss(targets, logits.double().softmax(1), labels=classes), rel=1e-5
    )
    assert ("top5" in found) == (num_classes > 5)
    if num_classes > 5:
        assert found["top5"] == pytest.approx(top_k_accuracy_score(targets, logits, k=5, labels=classes))


def test_scores_of_several_labels_are_the_mean_average_precision_of_classes_that_are_there():
    rng = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(40, 4, generator=rng), torch.rand(40, 4, generator=rng) < 0.3
    targets[:, 2] = False
    scores = MultiLabelScores()
    for rows in torch.arange(40).split(9):
        scores.add(logits[rows], targets[rows])
    expected = np.mean([average_precision_score(targets[:, k], logits[:, k]) for k in (0, 1, 3)])
    assert scores.figures()["map"] == pytest.approx(expected)


# One network


LEARNING = FitConfig(epochs=6, batch_size=16, lr=5e-3, warmup_epochs=1.0, layer_decay=0.9, ema_decay=0.5)


def opened(directory):
    return timm.create_model(f"local-dir:{directory}", pretrained=True).eval()


@pytest.mark.parametrize("subnet", [0, -1])
def test_a_fine_tuned_subnet_learns_and_opens_in_timm_with_its_classifier(family, tmp_path, subnet):
    task = task_of(family, subnet=subnet, settings=LEARNING)
    before = {name: part.clone() for name, part in family.supernet.state_dict().items()}
    report = finetune(task, LEARNING, CPU, tmp_path)
    assert report.result.best["accuracy"] > 0.9
    model = opened(tmp_path / "model")
    images = torch.randn(3, 1, 8, 8)
    with torch.inference_mode():
        assert relative_error(model(images), task.model(images)) < 1e-5
    assert model.num_classes == 3
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["num_classes"], config["label_names"]) == (3, list(NAMES))
    assert all(torch.equal(part, before[name]) for name, part in family.supernet.state_dict().items())
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["best"] == report.result.best
    assert len(metrics["history"]) == 6
    assert metrics["data"]["classes"] == list(NAMES)
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_several_labels_are_learnt(family, tmp_path):
    data = classification_data(several(size=64), None)
    report = finetune(task_of(family, data, settings=LEARNING), LEARNING, CPU, tmp_path)
    first = report.result.history[0]
    assert report.metric == "map"
    assert report.result.best["map"] >= first["map"]
    assert report.result.history[-1]["binary_cross_entropy"] < first["binary_cross_entropy"]
    assert json.loads((tmp_path / "model" / "poa.json").read_text())["multi_label"] is True


@pytest.mark.parametrize("name", sorted(SMALLEST))
def test_a_subnet_of_every_architecture_is_fine_tuned_for_another_image_size(name, tmp_path):
    config = replace(SMALLEST[name], num_channels=1)
    family = make_family(config, deviation=0.02)
    data = classification_data(single(size=12, side=32), single(spec="others", size=9, side=32))
    size = config.image_size * (1 if name == "swin" else 2)
    wanted = replace(PLAIN, image_size=size, drop_path=None)
    task = task_of(family, data, wanted, replace(QUICK, batch_size=6), subnet=0)
    assert task.drop_path == 0.1
    report = finetune(task, replace(QUICK, batch_size=6), CPU, tmp_path)
    assert report.difference < 1e-5
    with torch.inference_mode():
        assert opened(tmp_path / "model")(torch.randn(1, 1, size, size)).shape == (1, 3)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2, "in_chans": 1}),
        ("resnet10t", {"in_chans": 1}),
        (
            "swin_tiny_patch4_window7_224",
            {
                "img_size": 32,
                "patch_size": 2,
                "window_size": 2,
                "embed_dim": 8,
                "depths": [1, 1, 1, 1],
                "num_heads": [1, 1, 2, 2],
                "in_chans": 1,
            },
        ),
    ],
)
def test_networks_that_are_not_poa_s_are_fine_tuned_too(name, options, tmp_path):
    model = timm.create_model(name, num_classes=0, **options)
    shown = {"input_size": [1, 32, 32], "mean": [0.5], "std": [0.5], "num_classes": 0, "first_conv": None, "tag": "x"}
    described = {"architecture": name, "num_classes": 0, "num_features": model.num_features, "model_args": options}
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "config.json").write_text(json.dumps({**described, "pretrained_cfg": shown}))
    save_file(model.state_dict(), tmp_path / "net" / "model.safetensors")
    data = classification_data(single(size=12, side=32), single(spec="others", size=9, side=32))
    settings = replace(QUICK, batch_size=6)
    candidate = open_models([str(tmp_path / "net")])[0]
    task = FinetuneTask(candidate, data, replace(PLAIN, image_size=64, drop_path=None), settings)
    assert finetune(task, settings, CPU, tmp_path / "out").difference < 1e-5
    again = open_models([str(tmp_path / "out" / "model")])[0]
    assert (again.preprocessing.image_size, again.preprocessing.mean) == (64, (0.5,))


def test_a_network_without_stochastic_depth_has_none_by_default_and_refuses_what_is_asked():
    candidate = open_models(["timm:dla46x_c"], untrained_seed=0)[0]
    data = classification_data(single(num_channels=3), None)
    assert FinetuneTask(candidate, data, replace(PLAIN, drop_path=None), QUICK).drop_path == 0.0
    with pytest.raises(ConfigError, match="DLA has no stochastic depth; give --drop-path 0"):
        FinetuneTask(candidate, data, replace(PLAIN, drop_path=0.1), QUICK)


def test_an_image_size_that_the_network_cannot_take_is_refused_with_the_nearest(family):
    with pytest.raises(ConfigError, match="nearest is 8"):
        task_of(family, config=replace(PLAIN, image_size=9))


def test_interrupted_fine_tuning_goes_on_to_the_same_model(family, tmp_path):
    settings = replace(LEARNING, epochs=2)
    config = FinetuneConfig(drop_path=0.3)

    def stopping(done, total, loss):
        if done > 4:
            raise KeyboardInterrupt

    whole = finetune(task_of(family, config=config, settings=settings), settings, CPU, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        finetune(task_of(family, config=config, settings=settings), settings, CPU, tmp_path / "parts", stopping)
    parts = finetune(task_of(family, config=config, settings=settings), settings, CPU, tmp_path / "parts")
    assert parts.result == whole.result
    left, right = (load_file(tmp_path / part / "model" / "model.safetensors") for part in ("whole", "parts"))
    assert all(torch.equal(left[name], right[name]) for name in left)
    other = task_of(family, config=replace(config, mixup=0.1), settings=settings)
    with pytest.raises(CheckpointError, match="another task"):
        finetune(other, settings, CPU, tmp_path / "parts")


# A family at once


def fine_tuned(name, directory):
    """A family of that architecture after two steps, as it was trained and as it is read again."""
    config = replace(SMALLEST[name], num_channels=1)
    data = classification_data(single(size=12, side=32), single(spec="others", size=9, side=32))
    settings = replace(QUICK, batch_size=6, lr=1e-2)
    task = elastic_of(make_family(config, deviation=0.02), data, replace(PLAIN, drop_path=None), settings)
    finetune_family(task, settings, CPU, directory, [task.family.space.smallest])
    return task, load(directory)


@pytest.mark.parametrize("name", sorted(SMALLEST))
def test_every_size_with_its_classifier_gives_the_logits_of_the_family(name, tmp_path):
    task, family = fine_tuned(name, tmp_path)
    size = family.card.preprocessing.image_size
    images = torch.randn(2, 1, size, size)
    assert family.head.class_names == NAMES
    for subnet in family.subnets:
        model = family.extract(subnet)
        model.reset_classifier(3)
        head = family.head.state(family.supernet.layout.features, subnet.width)
        model.get_classifier().load_state_dict(head, strict=True)
        with torch.inference_mode():
            trained = task.model(images, subnet)
            assert relative_error(model(images), trained) < 1e-5
            assert relative_error(family.logits(images, subnet), trained) < 1e-5
    found = family.save_subnet(family.space.smallest, tmp_path / "cut")
    assert found.logits_relative_difference < 1e-5
    with torch.inference_mode():
        assert relative_error(opened(tmp_path / "cut")(images), task.model(images, family.space.smallest)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SMALLEST))
def test_every_size_written_with_its_classifier_opens_in_timm_with_the_logits_of_the_family(name, tmp_path):
    task, family = fine_tuned(name, tmp_path)
    size = family.card.preprocessing.image_size
    images = torch.randn(2, 1, size, size)
    for subnet in family.subnets:
        found = family.save_subnet(subnet, tmp_path / "cut" / str(subnet))
        assert found.logits_relative_difference < 1e-5
        with torch.inference_mode():
            assert relative_error(opened(tmp_path / "cut" / str(subnet))(images), task.model(images, subnet)) < 1e-5


def test_a_written_size_that_differs_in_its_logits_alone_is_refused(tmp_path, monkeypatch):
    family = elastic_of(make_family()).result({})
    right = Family.logits
    monkeypatch.setattr(Family, "logits", lambda *arguments: 1.001 * right(*arguments))
    with pytest.raises(ExtractionError, match="differs from the sub-network"):
        family.save_subnet("w16-d1", tmp_path / "net")
    assert not (tmp_path / "net").exists()


def test_the_classifier_takes_the_leading_channels_with_the_factor_for_fewer_inputs(family):
    task = elastic_of(family)
    head, images = task.model.head, torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        head.bias.normal_()
    for subnet in family.subnets:
        vectors = family.features(images, subnet)
        expected = vectors @ head.weight[:, : subnet.width].T * (32 / subnet.width) + head.bias
        torch.testing.assert_close(task.model(images, subnet), expected)


def test_a_family_learns_once_for_all_its_sizes(family, tmp_path):
    last_only = replace(LEARNING, epochs=12, evaluate_every=12)
    task = elastic_of(family, settings=last_only)
    report = finetune_family(task, last_only, CPU, tmp_path, family.subnets)
    assert list(report.subnets) == list(family.subnets)
    assert all(figures["accuracy"] > 0.9 for figures in report.subnets.values())
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert [each["subnet"] for each in metrics["subnets"]] == [str(subnet) for subnet in family.subnets]
    assert f"accuracy/{family.space.intact}" in metrics["history"][0]
    assert load(tmp_path).card.provenance["finetuned"]["best"] == metrics["best"]
    assert load(tmp_path).card.config == family.card.config


def test_each_step_trains_the_intact_network_and_the_subnet_that_the_space_draws(family):
    task, drawn = elastic_of(family), []
    forward = task.model.forward

    def watching(images, subnet, rows_rng=None):
        drawn.append(subnet)
        return forward(images, subnet, rows_rng)

    task.model.forward = watching
    for batch in task.batches(0):
        task.loss(task.model, batch, CPU.device)
    intact = family.space.intact
    assert drawn == [each for number in range(3) for each in (intact, family.space.draw(0, number))]


@pytest.mark.parametrize("is_several", [False, True])
def test_the_elastic_loss_is_poa_s_with_labels_for_targets(family, is_several):
    make = several if is_several else single
    data = classification_data(make(), make(spec="others"))
    elastic = ElasticConfig(intact_weight=0.3, distill_weight=2.0, distill_temp=0.5)
    task = elastic_of(family, data, elastic=elastic)
    batch = batch_of(task)
    images, shares = task.mixed(batch, CPU.device)
    intact = task.model(images, family.space.intact)
    small = task.model(images, family.space.draw(0, 0))
    found = task.loss(task.model, batch, CPU.device)
    if is_several:
        loss, soft = F.binary_cross_entropy_with_logits, torch.sigmoid(intact / 0.5)
    else:
        loss, soft = F.cross_entropy, (intact / 0.5).softmax(dim=1)
    torch.testing.assert_close(found["intact"], 0.3 * loss(intact, shares))
    torch.testing.assert_close(found["elastic"], 0.7 * loss(small, shares))
    torch.testing.assert_close(found["distill"], 0.7 * 2.0 * loss(small / 0.5, soft))
    assert "distill" not in elastic_of(family, data, elastic=replace(elastic, distill_weight=0.0)).loss(
        task.model, batch, CPU.device
    )


@pytest.mark.parametrize("make", [single, several])
def test_no_gradient_of_the_distillation_reaches_what_only_the_intact_network_has(family, make):
    data = classification_data(make(), make(spec="others"))
    task = elastic_of(family, data, elastic=ElasticConfig(distill_weight=3.0))
    number = next(n for n in range(20) if family.space.draw(0, n) == family.space.smallest)
    *_, last = task.passes(task.model.requires_grad_(True), batch_of(task)._replace(number=number), CPU.device)
    last["distill"].backward()
    assert task.model.head.weight.grad[:, :16].abs().sum() > 0
    assert task.model.head.weight.grad[:, 16:].abs().sum() == 0
    assert task.model.backbone.blocks[1].mlp.fc1.weight.grad is None


def test_a_space_of_one_network_is_fine_tuned_as_that_network():
    alone = make_family(replace(VIT, widths=(16,), depths=(1,)))
    task = elastic_of(alone)
    batch = batch_of(task)
    images, shares = task.mixed(batch, CPU.device)
    found = task.loss(task.model, batch, CPU.device)
    assert list(found) == ["intact"]
    torch.testing.assert_close(found["intact"], F.cross_entropy(task.model(images, alone.space.intact), shares))


def test_an_interrupted_elastic_fine_tuning_goes_on_to_the_same_family(family, tmp_path):
    settings, config = replace(LEARNING, epochs=2), FinetuneConfig(drop_path=0.3)

    def stopping(done, total, loss):
        if done > 4:
            raise KeyboardInterrupt

    wholes = elastic_of(family, config=config, settings=settings)
    expected = fit(wholes, settings, CPU)
    with pytest.raises(KeyboardInterrupt):
        fit(elastic_of(family, config=config, settings=settings), settings, CPU, out=tmp_path, on_step=stopping)
    parts = elastic_of(family, config=config, settings=settings)
    assert fit(parts, settings, CPU, out=tmp_path) == expected
    state = parts.model.state_dict()
    assert all(torch.equal(part, state[name]) for name, part in wholes.model.state_dict().items())


def test_a_damaged_classifier_or_one_of_another_family_is_refused(family, tmp_path):
    elastic_of(family).result({}).save(tmp_path / "family")
    weights = tmp_path / "family" / HEAD_WEIGHTS_FILE
    content = weights.read_bytes()
    for harm in ("changed", "gone"):
        weights.write_bytes(content[:-1] + b"x") if harm == "changed" else weights.unlink()
        with pytest.raises(CheckpointError, match="damaged"):
            load(tmp_path / "family")
    weights.write_bytes(content)
    assert load(tmp_path / "family").head is not None
    (tmp_path / "family" / HEAD_FILE).write_text("{}")
    with pytest.raises(CheckpointError, match="damaged"):
        load(tmp_path / "family")
    wide = replace(VIT, widths=(32, 64))
    elastic_of(make_family(wide)).result({}).save(tmp_path / "wide")
    for file in (HEAD_FILE, HEAD_WEIGHTS_FILE):
        (tmp_path / "family" / file).write_bytes((tmp_path / "wide" / file).read_bytes())
    with pytest.raises(CheckpointError, match="does not fit"):
        load(tmp_path / "family")


def test_what_has_no_classifier_says_so_and_transformers_keeps_one(family, tmp_path):
    with pytest.raises(ConfigError, match="no classifier"):
        family.logits(torch.randn(1, 1, 8, 8), "w16-d1")
    found = save_transformers(elastic_of(family).result({}), "w16-d1", tmp_path / "net")
    assert found.logits_relative_difference < 1e-5


@pytest.mark.parametrize(
    ("config", "message"),
    [({"image_size": 16}, "keeps the family's image size; got 16, it is 8"), ({"drop_path": 0.2}, "stochastic depth")],
)
def test_what_a_family_cannot_do_is_refused_before_training(config, message):
    family = make_family(VIT)
    if "drop_path" in config:
        family = make_family(replace(SMALLEST["resnet"], num_channels=1))
    with pytest.raises(ConfigError, match=message):
        elastic_of(family, config=replace(PLAIN, **config))


@pytest.mark.parametrize(
    "option",
    [
        {"label_smoothing": 1.0},
        {"mixup": -1.0},
        {"crop_scale": (0.5, 0.2)},
        {"randaugment_magnitude": 31},
        {"drop_path": 1.0},
        {"image_size": 0},
        {"mix_prob": 2.0},
    ],
)
def test_options_out_of_range_are_refused_by_their_names(option):
    with pytest.raises(ConfigError, match=f"--{next(iter(option)).replace('_', '-')}"):
        FinetuneConfig(**option)


def test_labels_of_the_measured_images_are_needed():
    test = several(spec="others")
    with pytest.raises(DataError, match="no test image has a label"):
        classification_data(several(), replace(test, targets=np.zeros_like(test.targets)))


def test_the_identity_tells_other_images_networks_and_options_apart(family):
    data = classification_data(single(), single(spec="others"))
    other = ClassificationData(single(size=45), data.test)
    relabelled = replace(data, train=replace(data.train, targets=np.roll(data.train.targets, 1)))
    tasks = [
        task_of(family, data),
        task_of(family, data, subnet=0),
        task_of(family, other),
        task_of(family, relabelled),
        task_of(family, data, config=replace(PLAIN, mixup=0.5)),
        elastic_of(family, data),
        elastic_of(family, data, elastic=ElasticConfig(intact_weight=0.4)),
    ]
    assert len({task.identity for task in tasks}) == len(tasks)
    assert task_of(family, data).identity == tasks[0].identity


def test_batches_keep_the_class_of_each_image():
    images = single()
    batches = MeasuredImages(images, Preprocessing(8, 1, (0.5,), (0.5,)), 10)
    found = LabelBatch(*batches[1])
    assert found.targets.tolist() == images.targets[10:20].tolist()
    assert np.array_equal(found.images[3, 0].numpy(), images.source.pixels[13, ..., 0])
