import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign, box_iou

from poa.config import DetectConfig, FitConfig
from poa.errors import CheckpointError, ConfigError, DataError, PoaWarning
from poa.models import TimmCandidate
from poa.tasks.dense.canvas import View, draw_view, on_canvas
from poa.tasks.detection import (
    DetectionData,
    DetectionTask,
    TrainingBatches,
    build_detector,
    check_detection,
    detection_picture,
    detections_on,
    shown_images,
    train_detection,
)
from poa.tasks.detection.cascade import CascadeRoIHeads, ClassAgnosticPredictor, _labelled
from poa.tasks.detection.model import Anchors, Letterbox, region_pool
from poa.tasks.detection.pyramid import Pyramid
from poa.tasks.detection.views import moved_boxes, moved_masks
from poa.tasks.parameters import parameter_groups
from tests.coco_images import CPU, TINY, changed, edited, member_of, opened, squares
from tests.contract.configs import IN_COLOUR


@pytest.fixture(scope="module")
def vit():
    return member_of("vit")


def random_targets(count, size, seed=0, *, masks=False):
    rng = torch.Generator().manual_seed(seed)
    targets = []
    for _ in range(count):
        corner = torch.rand(3, 2, generator=rng) * torch.tensor([size[1] * 0.5, size[0] * 0.5])
        sides = 8 + torch.rand(3, 2, generator=rng) * 12
        target = {"boxes": torch.cat([corner, corner + sides], dim=1), "labels": torch.tensor([1, 2, 1])}
        if masks:
            target["masks"] = (torch.rand(3, *size, generator=rng) > 0.5).to(torch.uint8)
        targets.append(target)
    return targets


def random_images(count, size, seed=0):
    return list(torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed)))


# --- pyramids


@pytest.mark.parametrize("name", sorted(IN_COLOUR))
@pytest.mark.parametrize("size", [(48, 64), (64, 96)])
def test_every_level_lies_at_its_stride(name, size):
    network = member_of(name).network(size)
    pyramid = Pyramid(network, 16)
    assert pyramid.strides[-1] == 16 * pyramid.strides[0]
    levels = pyramid(network, torch.rand(2, 3, *size))
    assert list(levels) == pyramid.names
    for stride, level in zip(pyramid.strides, levels.values(), strict=True):
        assert level.shape[:2] == (2, 16)
        for side, length in zip(level.shape[2:], size, strict=True):
            assert side in (length // stride, math.ceil(length / stride))


def test_anchors_are_where_torchvision_puts_them_if_no_side_is_rounded():
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.image_list import ImageList

    images = ImageList(torch.zeros(2, 3, 64, 128), [(64, 128)] * 2)
    levels = [torch.zeros(2, 8, 64 // stride, 128 // stride) for stride in (4, 8, 16)]
    theirs = AnchorGenerator(((32,), (64,), (128,)), ((0.5, 1.0, 2.0),) * 3)(images, levels)
    ours = Anchors((4, 8, 16), 8.0, (0.5, 1.0, 2.0))(images, levels)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


# --- models


class Adapter(nn.Module):
    """What torchvision's own detectors want: images to named maps."""

    def __init__(self, detector):
        super().__init__()
        self.network, self.pyramid = detector.backbone, detector.pyramid
        self.out_channels = TINY.channels

    def forward(self, images):
        return self.pyramid(self.network, images)


def test_losses_and_detections_equal_those_of_torchvisions_faster_rcnn(vit):
    config = changed(TINY, image_size=(64, 64), head_channels=1024, score_threshold=0.0, drop_path=0.0)
    detector = build_detector(vit, 2, config)
    theirs = FasterRCNN(
        Adapter(detector),
        num_classes=3,
        min_size=64,
        max_size=64,
        image_mean=[0.3] * 3,
        image_std=[0.3] * 3,
        rpn_anchor_generator=Anchors(detector.pyramid.strides, 3.0, (0.5, 1.0, 2.0)),
        rpn_pre_nms_top_n_train=100,
        rpn_pre_nms_top_n_test=50,
        rpn_post_nms_top_n_train=50,
        rpn_post_nms_top_n_test=50,
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2),
        box_score_thresh=0.0,
        box_batch_size_per_image=32,
    )
    theirs.transform = detector.transform
    theirs.rpn.load_state_dict(detector.rpn.state_dict())
    theirs.roi_heads.load_state_dict(detector.roi_heads.state_dict())
    images, targets = random_images(2, (64, 64)), random_targets(2, (64, 64))
    found = []
    for model in (detector, theirs):
        torch.manual_seed(0)
        found.append(model.train()(images, targets))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert value.item() == pytest.approx(found[1][name].item(), rel=1e-5), name
    for one, other in zip(detector.eval()(images), theirs.eval()(images), strict=True):
        assert len(one["boxes"]) > 10
        for name in ("boxes", "scores", "labels"):
            torch.testing.assert_close(one[name], other[name])


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("method", ["faster-rcnn", "cascade-rcnn"])
@pytest.mark.parametrize("name", sorted(IN_COLOUR))
def test_every_detector_on_every_architecture_learns_and_detects(name, method, masks):
    config = changed(TINY, method=method, masks=masks, score_threshold=0.0, max_detections=7)
    detector = build_detector(member_of(name), 2, config)
    torch.manual_seed(0)
    losses = detector.train()(random_images(2, (48, 64)), random_targets(2, (48, 64), masks=masks))
    boxes = {"faster-rcnn": {""}, "cascade-rcnn": {"_1", "_2", "_3"}}[method]
    expected = {f"loss_{part}{stage}" for part in ("classifier", "box_reg") for stage in boxes}
    expected |= {"loss_objectness", "loss_rpn_box_reg"} | ({"loss_mask"} if masks else set())
    assert set(losses) == expected
    assert all(value.item() > 0 and math.isfinite(value.item()) for value in losses.values())
    sum(losses.values()).backward()
    gradients = [parameter.grad for parameter in detector.backbone.parameters() if parameter.grad is not None]
    assert sum(float(gradient.abs().sum()) for gradient in gradients) > 0
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    with torch.inference_mode():
        found = detector.eval()([torch.rand(3, 60, 60), torch.rand(3, 30, 100)])
    for item, size in zip(found, [(60, 60), (30, 100)], strict=True):
        assert item["boxes"].shape == (7, 4)
        assert set(item["labels"].tolist()) <= {1, 2}
        assert float(item["boxes"].min()) >= 0
        assert float(item["boxes"][:, [1, 3]].max()) <= size[0] + 1e-3
        assert float(item["boxes"][:, [0, 2]].max()) <= size[1] + 1e-3
        assert ("masks" in item) == masks
        if masks:
            assert item["masks"].shape == (7, 1, *size)


@pytest.mark.parametrize("method", ["faster-rcnn", "cascade-rcnn"])
def test_images_without_objects_are_trained_on(vit, method):
    config = changed(TINY, method=method, masks=True)
    detector = build_detector(vit, 2, config).train()
    nothing = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, 48, 64, dtype=torch.uint8),
    }
    for targets in ([nothing, nothing], [nothing, *random_targets(1, (48, 64), masks=True)]):
        losses = detector(random_images(2, (48, 64)), targets)
        assert all(math.isfinite(value.item()) for value in losses.values())


class AgnosticTwin(nn.Module):
    """torchvision's predictor that gives every class the same correction."""

    def __init__(self, predictor):
        super().__init__()
        self.predictor = predictor

    def forward(self, x):
        logits, regression = self.predictor(x)
        return logits, regression.repeat(1, logits.shape[1])


def one_stage(pyramid, predictor):
    pool = region_pool(pyramid, 7)
    return RoIHeads(
        pool, nn.Sequential(nn.Flatten(), nn.Linear(16 * 49, 32)), predictor, 0.5, 0.5, 32, 0.25, None, 0.0, 0.5, 10
    )


def test_a_cascade_of_one_stage_equals_faster_rcnn(vit):
    torch.manual_seed(0)
    size = (48, 64)
    network = vit.network(size)
    pyramid = Pyramid(network, 16)
    levels = pyramid(network, torch.rand(2, 3, *size))
    first = one_stage(pyramid, ClassAgnosticPredictor(32, 3))
    faster = one_stage(pyramid, AgnosticTwin(first.box_predictor))
    faster.box_head = first.box_head
    cascade = CascadeRoIHeads([first], loss_weights=(1.0,))
    targets = random_targets(2, size)
    proposals = [torch.cat([target["boxes"] + shift for shift in (-3.0, 0.0, 2.0)]).clamp(min=0) for target in targets]
    results = []
    for heads in (cascade, faster):
        torch.manual_seed(1)
        losses = heads.train()(levels, list(proposals), [size] * 2, targets)[1]
        results.append((losses, heads.eval()(levels, list(proposals), [size] * 2)[0]))
    (ours, found), (theirs, expected) = results
    assert float(ours["loss_classifier_1"]) == pytest.approx(float(theirs["loss_classifier"]), rel=1e-6)
    assert float(ours["loss_box_reg_1"]) == pytest.approx(float(theirs["loss_box_reg"]), rel=1e-6)
    for one, other in zip(found, expected, strict=True):
        for name, value in other.items():
            torch.testing.assert_close(one[name], value)


def test_later_stages_of_a_cascade_demand_more_overlap(vit):
    heads = build_detector(vit, 2, changed(TINY, method="cascade-rcnn")).roi_heads
    truth = torch.tensor([[0.0, 0.0, 40.0, 40.0]])
    target = {"boxes": truth, "labels": torch.tensor([2])}
    boxes = torch.tensor([[0.0, 0.0, 40.0, side] for side in (18.0, 22.0, 26.0, 30.0)])
    assert box_iou(truth, boxes)[0].tolist() == pytest.approx([0.45, 0.55, 0.65, 0.75])
    found = [_labelled(stage, [boxes], [target])[0][0].tolist() for stage in heads.stages]
    assert found == [[0, 2, 2, 2], [0, 0, 2, 2], [0, 0, 0, 2]]


def test_frozen_batch_norms_stay_while_training_and_others_do_not():
    candidate = TimmCandidate(timm.create_model("test_resnet", num_classes=0), "timm:test_resnet", "x")
    for freeze in (True, False):
        detector = build_detector(candidate, 2, changed(TINY, freeze_batch_norm=freeze)).train()
        before = {name: value.clone() for name, value in detector.backbone.state_dict().items() if "running" in name}
        detector(random_images(2, (48, 64)), random_targets(2, (48, 64)))
        after = detector.backbone.state_dict()
        assert before
        assert all(torch.equal(value, after[name]) for name, value in before.items()) == freeze


def test_the_networks_layers_learn_slower_than_the_detector_and_not_at_all_if_frozen(vit):
    detector = build_detector(vit, 2, TINY)
    own = {id(parameter) for parameter in detector.backbone.parameters()}
    groups = parameter_groups(detector, FitConfig(layer_decay=0.5))
    scales = {True: set(), False: set()}
    for group in groups:
        for parameter in group["params"]:
            scales[id(parameter) in own].add(group["lr_scale"])
    assert scales[False] == {1.0}
    assert max(scales[True]) <= 1.0
    assert min(scales[True]) == 0.5 ** (len(detector.backbone.blocks) + 1)
    frozen = parameter_groups(detector, FitConfig(freeze=True))
    assert not any(id(parameter) in own for group in frozen for parameter in group["params"])


def test_fresh_weights_are_a_function_of_the_seed_and_leave_the_global_generator(vit):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, same, other = (build_detector(vit, 2, TINY, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert any(not torch.equal(value, other[name]) for name, value in one.items())


def test_letterboxing_equals_pillow_and_detections_come_back_to_the_image():
    pixels = np.random.default_rng(0).integers(0, 256, (90, 40, 3), dtype=np.uint8)
    image = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    letterbox = Letterbox((48, 64), [0.3] * 3, [0.5] * 3).eval()
    batch, _ = letterbox([image])
    assert batch.tensors.shape == (1, 3, 48, 64)
    assert batch.image_sizes == [(48, 21)]
    theirs = torch.from_numpy(np.array(Image.fromarray(pixels).resize((21, 48), Image.Resampling.BILINEAR)))
    expected = (theirs.permute(2, 0, 1) / 255 - 0.3) / 0.5
    assert float((batch.tensors[0, :, :, :21] - expected).abs().max()) < 0.01
    assert float(batch.tensors[0, :, :, 21:].abs().max()) == 0
    whole = [{"boxes": torch.tensor([[0.0, 0.0, 21.0, 48.0]])}]
    (back,) = letterbox.postprocess(whole, batch.image_sizes, [(90, 40)])
    assert back["boxes"][0].tolist() == pytest.approx([0, 0, 40, 90])


def test_targets_are_letterboxed_with_their_images():
    letterbox = Letterbox((48, 64), [0.3] * 3, [0.5] * 3)
    masks = torch.zeros(1, 96, 64, dtype=torch.uint8)
    masks[0, 20:40, 10:30] = 1
    target = {"boxes": torch.tensor([[10.0, 20.0, 30.0, 40.0]]), "labels": torch.tensor([1]), "masks": masks}
    _, (moved,) = letterbox([torch.rand(3, 96, 64)], [target])
    assert moved["boxes"][0].tolist() == [5, 10, 15, 20]
    assert moved["masks"].nonzero()[:, 1:].amin(0).tolist() == [10, 5]
    assert moved["masks"].nonzero()[:, 1:].amax(0).tolist() == [19, 14]
    assert target["boxes"][0, 0] == 10


def test_heads_are_float32_where_the_network_is_bfloat16(vit):
    detector = build_detector(vit, 2, TINY).train()
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = detector(random_images(2, (48, 64)), random_targets(2, (48, 64)))
    assert {value.dtype for value in losses.values()} == {torch.float32}


def test_a_size_that_the_network_cannot_take_is_refused(vit):
    with pytest.raises(ConfigError, match="multiples of its patches"):
        build_detector(vit, 2, changed(TINY, image_size=(50, 64)))


def test_a_network_without_intermediate_maps_is_refused():
    with pytest.raises(ConfigError, match="no intermediate maps"):
        Pyramid(nn.Conv2d(3, 3, 1), 8)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("image_size", (8, 64)),
        ("channels", 0),
        ("anchor_scale", 0.0),
        ("anchor_ratios", ()),
        ("score_threshold", 1.5),
        ("scale_range", (2.0, 1.0)),
        ("method", "yolo"),
        ("max_detections", 0),
    ],
)
def test_options_out_of_range_are_refused_by_name(option, value):
    with pytest.raises(ConfigError, match=rf"detect\.{option}"):
        DetectConfig(**{option: value})


# --- views


@pytest.mark.parametrize("seed", range(12))
def test_boxes_and_masks_stay_on_their_objects(seed):
    rng = np.random.default_rng(seed)
    size = (int(rng.integers(40, 90)), int(rng.integers(40, 90)))
    config = changed(TINY, scale_range=(0.6, 1.6))
    top, left = (int(rng.integers(0, side - 20)) for side in size)
    pixels = np.zeros(size, dtype=np.uint8)
    pixels[top : top + 16, left : left + 18] = 255
    view = draw_view(size, config.image_size, config.scale_range, config.flip_prob, rng)
    canvas = np.asarray(on_canvas(Image.fromarray(pixels), view, config.image_size, 0))
    (box,) = moved_boxes(np.array([[left, top, left + 18.0, top + 16.0]]), view, size, config.image_size)
    (mask,) = moved_masks(pixels[None] // 255, view, config.image_size)
    if min(box[2:] - box[:2]) < 2:
        return
    assert float(((canvas > 127) ^ (mask > 0)).mean()) < 0.03
    rows, columns = np.nonzero(canvas > 127)
    seen = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert np.abs(np.array(seen) - box).max() <= 1.0


def test_a_flip_turns_boxes_as_it_turns_pixels():
    view = View((20, 30), (0, 0), flip=True)
    (box,) = moved_boxes(np.array([[2.0, 3.0, 10.0, 9.0]]), view, (20, 30), (48, 64))
    assert box.tolist() == [20, 3, 28, 9]


def test_a_scale_of_one_without_flips_is_letterboxing_somewhere_on_the_canvas():
    config = changed(TINY, scale_range=(1.0, 1.0), flip_prob=0.0)
    views = [
        draw_view((90, 40), config.image_size, config.scale_range, config.flip_prob, np.random.default_rng(seed))
        for seed in range(50)
    ]
    assert {view.size for view in views} == {(48, 21)}
    assert {view.offset[0] for view in views} == {0}
    columns = {view.offset[1] for view in views}
    assert min(columns) >= 0
    assert max(columns) <= 64 - 21
    assert len(columns) > 10
    assert not any(view.flip for view in views)


# --- batches


def flattened(batch):
    return [batch.images, *(target[name] for target in batch.targets for name in sorted(target))]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(tmp_path, vit, num_workers):
    config = changed(TINY, masks=True)
    dataset = opened(squares(tmp_path), config)
    data = DetectionData(dataset, dataset)
    tasks = [DetectionTask(vit, data, config, batch_size=3, num_workers=number) for number in (0, num_workers)]
    for ours, theirs in zip(tasks[0].batches(1), tasks[1].batches(1), strict=True):
        for one, other in zip(flattened(ours), flattened(theirs), strict=True):
            assert torch.equal(one, other)


def test_an_epoch_has_every_image_once_and_the_next_another_order_and_other_views(tmp_path):
    dataset = opened(squares(tmp_path))
    batches = TrainingBatches(dataset, TINY, (0, 0, 0), 3, 0)
    assert len(batches) == 3
    epochs = [[batches[3 * epoch + step] for step in range(3)] for epoch in range(2)]
    assert [len(batch.images) for batch in epochs[0]] == [3, 3, 2]
    first, second = (torch.cat([batch.images for batch in epoch]) for epoch in epochs)
    assert not torch.equal(first, second)
    plain = changed(TINY, scale_range=(1.0, 1.0), flip_prob=0.0)
    same = TrainingBatches(dataset, plain, (0, 0, 0), 3, 0)
    for epoch in range(2):
        images = torch.cat([same[3 * epoch + step].images for step in range(3)])
        sums = sorted(int(image.sum()) for image in images)
        assert sums == sorted(int(np.asarray(dataset.load(index)).sum()) for index in range(8))
    other = TrainingBatches(dataset, TINY, (0, 0, 0), 3, 1)
    assert not torch.equal(other[0].images, batches[0].images)


def test_targets_of_a_batch_are_what_a_detector_takes(tmp_path):
    config = changed(TINY, masks=True, scale_range=(0.5, 2.5))
    dataset = opened(squares(tmp_path), config)
    batches = TrainingBatches(dataset, config, (76, 76, 76), 8, 0)
    for epoch in range(5):
        for target in batches[epoch].targets:
            sides = target["boxes"][:, 2:] - target["boxes"][:, :2]
            assert bool((sides >= 1).all())
            assert set(target["labels"].tolist()) <= {1, 2}
            assert target["masks"].shape == (len(target["labels"]), 48, 64)
            assert bool(target["masks"].flatten(1).any(dim=1).all())


# --- the task


def test_sets_of_other_classes_are_refused(tmp_path, vit):
    train, val = squares(tmp_path / "train"), squares(tmp_path / "val")
    edited(val, lambda document: document["categories"].append({"id": 3, "name": "green"}))
    with pytest.raises(DataError, match=r"has red, blue, .* has red, blue, green"):
        DetectionData(opened(train), opened(val))


def test_sets_opened_without_masks_are_refused_where_masks_are_asked_for(tmp_path, vit):
    dataset = opened(squares(tmp_path))
    with pytest.raises(DataError, match=r"without masks; .* needs images of 3 channels with masks"):
        check_detection([vit], DetectionData(dataset, dataset), changed(TINY, masks=True), FitConfig())
    with_masks = opened(squares(tmp_path), changed(TINY, masks=True))
    with pytest.raises(DataError, match=r"without masks, .* with masks"):
        DetectionData(dataset, with_masks)


def test_classes_without_a_training_object_are_warned_of(tmp_path, vit):
    file = edited(squares(tmp_path), lambda document: document["categories"].append({"id": 3, "name": "green"}))
    with pytest.warns(PoaWarning, match="no object of green"):
        DetectionData(opened(file), opened(file))


def test_what_is_measured_equals_pycocotools_on_the_annotation_file(tmp_path, vit):
    file = squares(tmp_path, count=5, size=(70, 50))
    dataset = opened(file)
    config = changed(TINY, score_threshold=0.0)
    task = DetectionTask(vit, DetectionData(dataset, dataset), config, batch_size=2)
    model = task.model.eval()
    with torch.inference_mode():
        figures = task.evaluate(model, torch.device("cpu"))
        results = []
        for index in range(len(dataset)):
            pixels = torch.from_numpy(np.array(dataset.load(index))).permute(2, 0, 1).float() / 255
            (found,) = model([pixels])
            for box, label, score in zip(
                *(found[name].tolist() for name in ("boxes", "labels", "scores")), strict=True
            ):
                left, top, right, bottom = box
                results.append(
                    {
                        "image_id": index + 1,
                        "category_id": label,
                        "score": score,
                        "bbox": [left, top, right - left, bottom - top],
                    }
                )
    coco = COCO(file)
    coco.dataset["info"] = {}
    evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert figures["AP"] == pytest.approx(evaluation.stats[0], abs=1e-5)
    assert figures["AP50"] == pytest.approx(evaluation.stats[1], abs=1e-5)


def test_a_run_that_was_stopped_ends_as_one_that_was_not_and_one_that_ended_is_read(tmp_path, vit):
    dataset = opened(squares(tmp_path / "data"))
    data = DetectionData(dataset, dataset)
    fit_config = FitConfig(epochs=2, batch_size=4, lr=1e-3, warmup_epochs=0.0)
    run = (data, TINY, fit_config, CPU)

    def stop(done, total, loss):
        if done == 3:
            raise KeyboardInterrupt

    def refuse(done, total, loss):
        raise AssertionError("it was there already")

    whole = train_detection(vit, *run)
    with pytest.raises(KeyboardInterrupt):
        train_detection(vit, *run, tmp_path / "run", stop)
    resumed = train_detection(vit, *run, tmp_path / "run")
    again = train_detection(vit, *run, tmp_path / "run", refuse)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["detector"]
    assert (whole.was_there, resumed.was_there, again.was_there) == (False, False, True)
    for other in (resumed, again):
        assert other.result == whole.result
        assert other.figures == whole.figures
        for name, value in whole.model.state_dict().items():
            assert torch.equal(value, other.model.state_dict()[name]), name
    with pytest.raises(CheckpointError, match="another network, other images or other numbers"):
        train_detection(vit, data, changed(TINY, masks=False, nms_threshold=0.4), fit_config, CPU, tmp_path / "run")


def test_the_best_epoch_is_chosen_on_the_validation_images_and_measured_on_the_test_images(tmp_path, vit):
    train, val, test = (opened(squares(tmp_path / str(seed), seed=seed, count=4)) for seed in range(3))
    fit_config = FitConfig(epochs=2, batch_size=4, lr=2e-3, warmup_epochs=0.0)
    config = changed(TINY, score_threshold=0.0)
    report = train_detection(vit, DetectionData(train, test, val), config, fit_config, CPU)
    task = DetectionTask(vit, DetectionData(train, test, val), config, batch_size=4)
    device = torch.device("cpu")
    assert task.measure(report.model, val, device) == report.result.best
    assert task.measure(report.model, test, device) == report.figures != report.result.best
    assert report.result.best["AP"] == max(line["AP"] for line in report.result.history)


def test_what_cannot_be_trained_is_refused_before_anything_is(tmp_path, vit):
    dataset = opened(squares(tmp_path))
    data = DetectionData(dataset, dataset)
    networks = [member_of("resnet"), vit]
    check_detection(networks, data, TINY, FitConfig())
    with pytest.raises(ConfigError, match="multiples of its patches"):
        check_detection(networks, data, changed(TINY, image_size=(50, 64)), FitConfig())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["faster-rcnn", "cascade-rcnn"])
def test_squares_are_learnt(tmp_path, vit, method):
    config = changed(TINY, method=method, masks=True)
    train, test = (
        opened(squares(tmp_path / name, count=count, seed=seed), config)
        for name, count, seed in (("train", 48, 0), ("test", 16, 1))
    )
    data = DetectionData(train, test)
    fit_config = FitConfig(epochs=10, batch_size=4, lr=3e-3, warmup_epochs=1.0, layer_decay=1.0, evaluate_every=10)
    untrained = DetectionTask(vit, data, config, batch_size=4)
    before = untrained.measure(untrained.model.eval(), test, torch.device("cpu"))
    losses = []
    report = train_detection(vit, data, config, fit_config, CPU, on_step=lambda *at: losses.append(at[2]))
    assert np.mean(losses[-12:]) < 0.75 * np.mean(losses[:12])
    assert report.figures["AP50"] > 0.5 > before["AP50"] + 0.3
    assert report.figures["mask AP50"] > 0.5


def test_a_picture_shows_the_truth_and_what_every_network_found(tmp_path, vit):
    config = changed(TINY, masks=True, score_threshold=0.0, max_detections=4)
    dataset = opened(squares(tmp_path), config)
    indices = shown_images(dataset, 2)
    assert indices == [0, 7]
    found = {str(seed): detections_on(build_detector(vit, 2, config, seed).eval(), dataset, indices) for seed in (0, 1)}
    figure = detection_picture(dataset, indices, found, min_score=0.0)
    assert [axis.get_title() for axis in figure.axes] == ["annotated", "0", "1", "", "", ""]
    assert [len(axis.patches) for axis in figure.axes] == [
        len(dataset.instances(0)),
        4,
        4,
        len(dataset.instances(7)),
        4,
        4,
    ]
    assert all(len(axis.images) == 1 + len(axis.patches) for axis in figure.axes)
    scores = [float(text.get_text()) for text in figure.axes[1].texts]
    assert scores == pytest.approx(found["0"][0]["scores"].tolist(), abs=0.006)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["red", "blue"]
    assert not detection_picture(dataset, [0], found, min_score=1.0).axes[1].patches
    with pytest.raises(ConfigError, match="index of one image or more"):
        detection_picture(dataset, [], found)
