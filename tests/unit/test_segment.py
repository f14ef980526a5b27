import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_masks
from sklearn.metrics import jaccard_score
from torchmetrics.classification import MulticlassJaccardIndex

from poa.backbones import ARCHITECTURES
from poa.config import FitConfig
from poa.config.segment import SegmentConfig
from poa.data import SkippedImage
from poa.errors import ConfigError, DataError, PoaWarning
from poa.family import Family, FamilyCard, Preprocessing
from poa.models import family_members
from poa.runtime import Runtime
from poa.tasks.fit import NotFiniteError
from poa.tasks.segmentation.batches import MeasuredMasks, TrainingCrops
from poa.tasks.segmentation.data import IGNORED, open_segmentation, read_classes
from poa.tasks.segmentation.pictures import class_colours, segmentation_picture
from poa.tasks.segmentation.task import (
    SegmentationTask,
    check_networks,
    confusion_matrix,
    figures_of,
    known_report,
    result_folder,
    train_segmentation,
)
from tests.contract.configs import SMALLEST

CPU = Runtime(torch.device("cpu"), "float32", False, 0)
HOW = Preprocessing(16, 3, (0.5,), (0.25,))
COLOURS = np.array([(200, 40, 40), (40, 200, 40), (40, 40, 200)], dtype=np.uint8)
SMALL = SegmentConfig(image_size=(32, 48), channels=8, color_jitter=0.0, scale_range=(0.8, 1.25))
QUICK = FitConfig(epochs=3, batch_size=4, lr=1e-2, warmup_epochs=0.0)


def member_of(name="vit", place=-1):
    config, kind = replace(SMALLEST[name], num_channels=3), ARCHITECTURES[name]
    backbone = kind.build(config)
    backbone.init_weights_(torch.Generator().manual_seed(0))
    how = replace(HOW, image_size=config.image_size)
    return family_members(Family(FamilyCard(kind, config, how, weights_sha256="x"), backbone))[place]


def blocks(rng, rows=4, columns=6):
    """A mask of squares of 8 pixels, each of one class."""
    return np.kron(rng.integers(0, 3, (rows, columns)), np.ones((8, 8), dtype=int)).astype(np.uint8)


def write_pair(folder, name, mask, image=None):
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    pixels = COLOURS[np.minimum(mask, 2)] if image is None else image
    Image.fromarray(pixels).save(folder / "images" / f"{name}.png")
    Image.fromarray(mask).save(folder / "masks" / f"{name}.png")


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 4)):
        for number in range(count):
            write_pair(tmp_path / part, str(number), blocks(rng))
    return tmp_path


def opened(folder, config=SMALL, **arguments):
    return open_segmentation(str(folder / "train"), str(folder / "test"), config, **arguments)


class Truthful(torch.nn.Module):
    """Sees the class in the colour."""

    def forward(self, images):
        return images * 10.0


def test_figures_equal_those_of_torchmetrics_and_scikit_learn():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 5, (6, 20, 30)).astype(np.uint8)
    found = np.where(rng.random(truth.shape) < 0.6, truth, rng.integers(0, 6, truth.shape))
    truth[rng.random(truth.shape) < 0.1] = IGNORED
    confusion = sum(
        confusion_matrix(torch.from_numpy(one), torch.from_numpy(other), 7)
        for one, other in zip(truth, found, strict=True)
    )
    figures = figures_of(confusion, list("abcdefg"))
    metric = MulticlassJaccardIndex(num_classes=7, average="macro", ignore_index=IGNORED)
    assert figures["miou"] == pytest.approx(
        float(metric(torch.from_numpy(found), torch.from_numpy(truth).long())), rel=1e-6
    )
    used = truth != IGNORED
    each = jaccard_score(truth[used], found[used], labels=range(6), average=None)
    assert [figures[f"iou/{name}"] for name in "abcdef"] == pytest.approx(each.tolist())
    assert figures["miou"] == pytest.approx(each.mean())
    assert figures["pixel_accuracy"] == pytest.approx((truth[used] == found[used]).mean())
    assert "iou/g" not in figures


def test_a_class_that_is_found_but_is_not_there_counts_as_zero():
    truth, found = torch.zeros(2, 2, dtype=torch.uint8), torch.tensor([[0, 0], [0, 1]])
    assert figures_of(confusion_matrix(truth, found, 3), "abc") == {
        "miou": pytest.approx(0.375),
        "pixel_accuracy": 0.75,
        "iou/a": 0.75,
        "iou/b": 0.0,
    }


def test_masks_with_a_palette_are_read_by_index_and_ignored_ids_are_left_out(folder):
    mask = blocks(np.random.default_rng(1))
    mask[:8, :8] = 4
    picture = Image.fromarray(mask).convert("P")
    picture = Image.frombytes("P", picture.size, mask.tobytes())
    picture.putpalette([200, 10, 10, 3, 3, 3, 90, 90, 90, 7, 7, 7, 8, 8, 8])
    picture.save(folder / "train" / "masks" / "0.png")
    (folder / "classes.json").write_text(json.dumps({"classes": ["red", "green", "blue", "none"], "ignore_index": 4}))
    with pytest.warns(PoaWarning, match="no pixel of none: these classes cannot be learnt"):
        data = opened(folder)
    assert data.class_names == ("red", "green", "blue", "none")
    found = data.train.load(0)[1]
    assert (found[:8, :8] == IGNORED).all()
    assert (found[8:] == mask[8:]).all()
    assert data.train.pixels.sum() == 8 * mask.size - 64


def test_without_names_every_id_up_to_the_largest_is_a_class(folder):
    mask = blocks(np.random.default_rng(1))
    mask[0, 0] = IGNORED
    Image.fromarray(mask).save(folder / "train" / "masks" / "0.png")
    assert opened(folder).class_names == ("class 0", "class 1", "class 2")


def test_a_name_at_the_ignored_place_is_no_class(folder):
    (folder / "classes.json").write_text(json.dumps({"names": ["void", "road", "car"], "ignore_index": 0}))
    data = opened(folder)
    assert data.class_names == ("road", "car")
    ids = np.stack([np.array(Image.open(file)) for file in sorted((folder / "train" / "masks").iterdir())])
    assert data.train.pixels.tolist() == [(ids == 1).sum(), (ids == 2).sum()]
    assert (data.train.load(3)[1] == np.array([IGNORED, 0, 1])[ids[3]]).all()


@pytest.mark.parametrize(
    "described",
    [[], {"names": []}, {"names": [1]}, {"names": ["a", "a"]}, {"names": ["a"], "ignore_index": 300}, {"name": ["a"]}],
)
def test_files_that_name_no_classes_are_refused(tmp_path, described):
    (tmp_path / "classes.json").write_text(json.dumps(described))
    with pytest.raises(DataError, match="must hold"):
        read_classes(tmp_path / "classes.json")


def no_mask(folder):
    (folder / "masks" / "0.png").unlink()


def other_size(folder):
    Image.new("L", (10, 12)).save(folder / "masks" / "0.png")


def colours(folder):
    Image.new("RGB", (48, 32)).save(folder / "masks" / "0.png")


def damaged(folder):
    content = (folder / "masks" / "0.png").read_bytes()
    (folder / "masks" / "0.png").write_bytes(content[: len(content) // 2])


def damaged_image(folder):
    content = (folder / "images" / "0.png").read_bytes()
    (folder / "images" / "0.png").write_bytes(content[: len(content) // 2])


def unknown_id(folder):
    Image.new("L", (48, 32), 7).save(folder / "masks" / "0.png")


BAD_PAIRS = {
    no_mask: r"has no mask \(masks/0.png\)",
    other_size: "is 48×32 pixels .* its mask is 10×12",
    colours: "mode RGB; it must hold ids",
    damaged: "its mask cannot be read",
    damaged_image: "cannot be decoded|truncated",
    unknown_id: "the id 7, which no class has .ids of classes are 0 to 2, 255 is left out",
}


@pytest.mark.parametrize("spoil", BAD_PAIRS, ids=lambda spoil: spoil.__name__)
def test_pairs_that_cannot_be_used_are_refused_or_left_out_and_counted(folder, spoil):
    (folder / "classes.json").write_text(json.dumps({"names": ["a", "b", "c"]}))
    spoil(folder / "train")
    with pytest.raises(DataError, match=rf"(?s)1 of 8 images of .*{BAD_PAIRS[spoil]}") as caught:
        opened(folder)
    assert "--segment.max-bad-share to 0.126" in str(caught.value)
    data = opened(folder, replace(SMALL, max_bad_share=0.126))
    assert len(data.train) == 7
    assert [type(bad) for bad in data.skipped] == [SkippedImage]
    assert data.train.image_name(0) == "1.png"


def test_sets_that_do_not_fit_together_or_hold_nothing_are_refused(folder, tmp_path):
    with pytest.raises(DataError, match=r"there is no folder .*masks"):
        open_segmentation(str(folder / "train" / "images"), str(folder / "test"), SMALL)
    with pytest.raises(DataError, match=r"there is no .*nowhere"):
        open_segmentation(str(folder / "nowhere"), str(folder / "test"), SMALL)
    for number in range(4):
        Image.new("L", (48, 32), IGNORED).save(folder / "test" / "masks" / f"{number}.png")
    with pytest.raises(DataError, match=r"no pixel of .*test is of a class"):
        opened(folder)
    (tmp_path / "other.json").write_text(json.dumps({"names": ["a"]}))
    with pytest.raises(DataError, match=r"(?s)8 of 8 images .* which no class has"):
        opened(folder, classes=tmp_path / "other.json")


def coco_file(folder, **changes):
    (folder / "images").mkdir(parents=True)
    Image.fromarray(np.zeros((32, 48, 3), dtype=np.uint8)).save(folder / "images" / "a.png")
    run_lengths = coco_masks.encode(np.asfortranarray(np.eye(32, 48, dtype=np.uint8)))
    run_lengths["counts"] = run_lengths["counts"].decode()
    objects = [
        {"category_id": 9, "bbox": [8, 8, 8, 8], "segmentation": [[8, 8, 16, 8, 16, 16, 8, 16]]},
        {"category_id": 4, "bbox": [0, 0, 24, 32], "segmentation": [[0, 0, 24, 0, 24, 32, 0, 32]]},
        {"category_id": 9, "bbox": [0, 0, 32, 32], "segmentation": run_lengths},
    ]
    document = {
        "images": [{"id": 1, "file_name": "a.png", "width": 48, "height": 32}],
        "annotations": [{"id": number, "image_id": 1, **item} for number, item in enumerate(objects)],
        "categories": [{"id": 9, "name": "cell"}, {"id": 4, "name": "ground"}],
        **changes,
    }
    (folder / "annotations.json").write_text(json.dumps(document))
    return str(folder / "annotations.json")


def test_objects_of_coco_files_are_painted_the_smaller_in_front(tmp_path):
    file = coco_file(tmp_path)
    data = open_segmentation(file, file, SMALL)
    assert data.class_names == ("background", "ground", "cell")
    wanted = np.zeros((32, 48), dtype=np.uint8)
    wanted[:, :24] = 1
    wanted[8:16, 8:16] = 2
    wanted[np.eye(32, 48, dtype=bool)] = 2
    assert (data.train.load(0)[1] == wanted).all()
    without = open_segmentation(file, file, replace(SMALL, background="ignore"))
    assert without.class_names == ("ground", "cell")
    assert (without.train.load(0)[1] == np.where(wanted, wanted.astype(int) - 1, IGNORED)).all()
    assert without.fingerprint != data.fingerprint


def test_coco_files_with_bad_objects_or_other_classes_are_refused(tmp_path, folder):
    good = coco_file(tmp_path / "good")
    bad = coco_file(
        tmp_path / "bad", annotations=[{"id": 1, "image_id": 1, "category_id": 9, "bbox": [0, 0, 4, 4]}] * 2
    )
    with pytest.raises(DataError, match=r"2 of 2 annotations .*--segment.max-bad-share"):
        open_segmentation(good, bad, SMALL)
    document = json.loads((tmp_path / "good" / "annotations.json").read_text())
    document["annotations"][0]["segmentation"] = [[1, 1]]
    worse = coco_file(tmp_path / "worse", annotations=document["annotations"])
    with pytest.raises(DataError, match=r"1 of 3 annotations .*--segment.max-bad-share"):
        open_segmentation(worse, good, SMALL)
    with pytest.raises(
        DataError, match=r"test has the classes class 0, .* which is trained on, has background, ground, cell"
    ):
        open_segmentation(good, str(folder / "test"), SMALL)


def test_masks_move_with_their_images_and_batches_are_functions_of_the_seed(folder):
    data = opened(folder)
    config = replace(SMALL, scale_range=(0.5, 2.0))
    num_left_out = 0
    crops = TrainingCrops(data.train, config, (32, 48), HOW, 4, seed=1)
    again = TrainingCrops(data.train, config, (32, 48), HOW, 4, seed=1)
    assert len(crops) == 2
    for number in (5, 0, 3, 9):
        images, masks = crops[number]
        found = (images[:, None].int() - torch.from_numpy(COLOURS)[None, :, :, None, None].int()).abs().sum(2).argmin(1)
        used = masks != IGNORED
        assert (found[used] == masks[used]).float().mean() > 0.93
        assert (images.permute(0, 2, 3, 1)[~used] == 128).all()
        num_left_out += int((~used).sum())
        assert torch.equal(again[number].images, images)
        assert torch.equal(again[number].masks, masks)
    assert num_left_out > 100
    assert not torch.equal(crops[0].images, crops[2].images)
    assert not torch.equal(crops[0].images, TrainingCrops(data.train, config, (32, 48), HOW, 4, seed=2)[0].images)


def test_colour_changes_images_alone(folder):
    data = opened(folder)
    plain, coloured = (
        TrainingCrops(data.train, replace(SMALL, color_jitter=strength), (32, 48), HOW, 4, seed=1)[0]
        for strength in (0.0, 0.5)
    )
    assert torch.equal(plain.masks, coloured.masks)
    assert not torch.equal(plain.images, coloured.images)


@pytest.mark.parametrize("canvas", [(32, 48), (64, 64), (64, 32)])
def test_a_network_that_sees_the_truth_is_measured_as_such_at_any_size(folder, canvas):
    rng = np.random.default_rng(3)
    write_pair(folder / "test", "tall", blocks(rng, 8, 3))
    data = opened(folder)
    task = SegmentationTask(member_of(), data, "linear", replace(SMALL, image_size=canvas), QUICK)
    figures = task.measure(Truthful(), torch.device("cpu"), data.test)
    assert figures["miou"] > (0.99 if canvas == (32, 48) else 0.85)
    batch = MeasuredMasks(data.test, canvas, HOW, 5)[0]
    for truth, found in zip(batch.masks, task.predict(Truthful(), batch, torch.device("cpu")), strict=True):
        assert truth.shape == found.shape


@pytest.mark.parametrize("head", ["linear", "upernet"])
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_both_heads_learn_on_every_architecture(folder, name, head):
    data, losses = opened(folder), []
    member = member_of(name, 0)
    config = replace(SMALL, image_size=(64, 96), drop_path=0.0)
    task = SegmentationTask(member, data, head, config, QUICK)
    before = {key: value.clone() for key, value in task.model.backbone.state_dict().items()}
    report = train_segmentation(task, QUICK, CPU, shown=[0], on_step=lambda _done, _total, loss: losses.append(loss))
    assert np.mean(losses[-2:]) < 0.9 * np.mean(losses[:2])
    assert {"miou", "pixel_accuracy", "iou/class 0"} <= set(report.figures)
    assert report.predictions[0].shape == (32, 48)
    after = task.model.backbone.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items()) == (head == "linear")


def test_a_linear_head_finds_what_is_there(folder):
    data = opened(folder)
    config = replace(SMALL, scale_range=(1.0, 1.0), image_size=(64, 96))
    task = SegmentationTask(member_of(), data, "linear", config, QUICK)
    report = train_segmentation(task, replace(QUICK, epochs=30, lr=0.1, evaluate_every=30), CPU)
    assert report.figures["miou"] > 0.6


def test_a_result_is_given_back_and_a_run_that_was_stopped_goes_on(folder):
    data, member = opened(folder), member_of()
    where = result_folder(folder / "out", member, data, "linear", SMALL, QUICK)
    assert where != result_folder(folder / "out", member, data, "linear", SMALL, replace(QUICK, seed=1))
    assert known_report(where, [0, 2]) is None

    def stop(done, _total, _loss):
        if done == 5:
            raise KeyboardInterrupt

    def train(**arguments):
        task = SegmentationTask(member, data, "linear", SMALL, QUICK)
        return train_segmentation(task, QUICK, CPU, out=where, shown=[0, 2], **arguments)

    with pytest.raises(KeyboardInterrupt):
        train(on_step=stop)
    steps = []
    report = train(on_step=lambda done, _total, _loss: steps.append(done))
    assert steps == [5, 6]
    known = known_report(where, [0, 2])
    assert known.is_known
    assert known.figures == report.figures
    assert known.history == report.history
    assert all((a == b).all() for a, b in zip(known.predictions, report.predictions, strict=True))
    assert not (where / "state").exists()
    straight = SegmentationTask(member, data, "linear", SMALL, QUICK)
    assert train_segmentation(straight, QUICK, CPU).figures == report.figures


def test_the_best_epoch_is_chosen_by_validation_images_where_there_are_some(folder):
    rng = np.random.default_rng(5)
    for number in range(2):
        write_pair(folder / "val", str(number), blocks(rng))
    data = opened(folder, val=str(folder / "val"))
    task = SegmentationTask(member_of(), data, "linear", SMALL, QUICK)
    report = train_segmentation(task, QUICK, CPU)
    chosen = report.history[report.best_epoch - 1]
    assert chosen["miou"] == max(each["miou"] for each in report.history)
    assert report.figures == task.measure(task.model, torch.device("cpu"), data.test)
    assert report.figures["miou"] != chosen["miou"]


def test_an_image_without_labels_does_not_spoil_the_loss(folder):
    task = SegmentationTask(member_of(), opened(folder), "linear", SMALL, QUICK)
    batch = task.training[0]
    empty = batch._replace(masks=torch.full_like(batch.masks, IGNORED))
    assert float(task.loss(task.model, empty, torch.device("cpu"))["pixel"].detach()) == 0.0
    with pytest.raises(NotFiniteError):
        train_segmentation(task, replace(QUICK, lr=1e30, clip_grad=0.0, epochs=20), CPU)


def test_what_cannot_be_trained_is_refused_before_it_is(folder, monkeypatch):
    data = opened(folder)
    with pytest.raises(ConfigError, match=r"two images in a batch; got --fit.batch-size 1 and 8"):
        SegmentationTask(member_of(), data, "upernet", SMALL, replace(QUICK, batch_size=1))
    with pytest.raises(ConfigError, match="multiples of its patches"):
        check_networks([member_of()], "linear", replace(SMALL, image_size=(33, 48)), QUICK)
    grey = member_of()
    grey.preprocessing = replace(HOW, num_channels=1)
    with pytest.raises(ConfigError, match="images of 1 and 3 channels"):
        check_networks([grey, member_of()], "linear", SMALL, QUICK)
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch.decoders.upernet.decoder", None)
    with pytest.raises(DataError, match=r'pip install "poa\[dense\]"'):
        check_networks([member_of()], "upernet", SMALL, QUICK)


@pytest.mark.parametrize(
    "numbers",
    [{"image_size": (8, 32)}, {"num_maps": 0}, {"flip_prob": 2.0}, {"scale_range": (2.0, 1.0)}, {"background": "x"}],
)
def test_numbers_out_of_range_are_refused_by_name(numbers):
    with pytest.raises(ConfigError, match=f"segment.{next(iter(numbers))} must be"):
        SegmentConfig(**numbers)


def test_the_picture_has_a_column_for_each_network_and_a_legend_of_the_classes_shown(folder):
    data = opened(folder)
    found = [np.ones((32, 48), dtype=np.uint8)] * 2
    figure = segmentation_picture(data.test, [0, 2], {"one": found, "two": found})
    assert [axis.get_title() for axis in figure.axes[:4]] == ["image", "truth", "one", "two"]
    assert len(figure.axes) == 8
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["class 0", "class 1", "class 2"]
    with pytest.raises(ConfigError, match="got none"):
        segmentation_picture(data.test, [], {})
    assert len({tuple(colour) for colour in class_colours(150)[:150].tolist()}) == 150
