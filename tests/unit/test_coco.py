import json
import sys

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from poa.errors import DataError
from poa.tasks.detection import CocoDataset, CocoMetric, TrainingBatches
from tests.coco_images import TINY, changed, coco_entry, edited, opened, squares


def random_scene(rng, num_images=12, num_classes=3):
    """Truth and detections, as `CocoMetric` takes them: truth jittered, doubled, mislabelled and missed."""
    scenes = []
    for _ in range(num_images):
        count = int(rng.integers(0, 6))
        corner = rng.uniform(0, 120, (count, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(4, 120, (count, 2))], axis=1)
        labels = rng.integers(0, num_classes, count)
        again = rng.integers(0, count, 2 * count) if count else np.zeros(0, dtype=int)
        found = boxes[again] + rng.normal(0, 5, (len(again), 4))
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
        guess = np.where(rng.random(len(again)) < 0.8, labels[again], rng.integers(0, num_classes, len(again)))
        truth = {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "iscrowd": torch.tensor(rng.random(count) < 0.2, dtype=torch.int64),
            "area": torch.tensor((boxes[:, 2:] - boxes[:, :2]).prod(axis=1), dtype=torch.float32),
        }
        detections = {
            "boxes": torch.tensor(found, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(guess, dtype=torch.int64),
            "scores": torch.tensor(rng.permutation(1000)[: len(again)] / 1000, dtype=torch.float32),
        }
        scenes.append((detections, truth))
    return scenes


def with_masks(scenes, size=(240, 240)):
    """The same scenes with the ellipses in the boxes as masks."""
    rows, columns = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")

    def ellipses(boxes):
        middle, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
        across = (columns - middle[:, 0, None, None]) / half[:, 0, None, None]
        down = (rows - middle[:, 1, None, None]) / half[:, 1, None, None]
        return (across**2 + down**2) <= 1

    return [tuple({**part, "masks": ellipses(part["boxes"])} for part in scene) for scene in scenes]


def encoded(mask):
    run = coco_masks.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    return {**run, "counts": run["counts"].decode()}


def pycocotools_figures(scenes, kind, num_classes=3):
    def entries(part):
        for image, scene in enumerate(scenes, start=1):
            for number, box in enumerate(scene[part]["boxes"].tolist()):
                entry = {
                    "image_id": image,
                    "category_id": int(scene[part]["labels"][number]),
                    "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                }
                yield scene[part], number, entry

    truth, found = [], []
    for part, number, entry in entries(1):
        more = {"id": len(truth) + 1, "iscrowd": int(part["iscrowd"][number]), "area": float(part["area"][number])}
        if "masks" in part:
            more["segmentation"] = encoded(part["masks"][number])
        truth.append({**entry, **more})
    for part, number, entry in entries(0):
        more = {"score": float(part["scores"][number])}
        if kind == "segm":
            more["segmentation"] = encoded(part["masks"][number])
            del entry["bbox"]
        found.append({**entry, **more})
    coco = COCO()
    coco.dataset = {
        "info": {},
        "images": [{"id": image + 1, "height": 240, "width": 240} for image in range(len(scenes))],
        "categories": [{"id": label} for label in range(num_classes)],
        "annotations": truth,
    }
    coco.createIndex()
    evaluation = COCOeval(coco, coco.loadRes(found), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    return {**dict(zip(names, evaluation.stats[:6], strict=True)), "AR": evaluation.stats[8]}


def figures_of(scenes, *, masks=False, names=("a", "b", "c")):
    metric = CocoMetric(names, masks=masks)
    for found, truth in scenes:
        metric.add(found, truth)
    return metric.figures()


@pytest.mark.parametrize("seed", range(4))
def test_the_figures_of_boxes_equal_pycocotools(seed):
    scenes = random_scene(np.random.default_rng(seed))
    ours, theirs = figures_of(scenes), pycocotools_figures(scenes, "bbox")
    assert 0 < theirs["AP"] < 1
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, abs=1e-5), name
    per_class = [value for name, value in ours.items() if name.startswith("AP/")]
    assert np.mean(per_class) == pytest.approx(ours["AP"], abs=1e-5)


@pytest.mark.parametrize("seed", range(2))
def test_the_figures_of_masks_equal_pycocotools(seed):
    scenes = with_masks(random_scene(np.random.default_rng(seed)))
    ours, boxes, masks = (
        figures_of(scenes, masks=True),
        pycocotools_figures(scenes, "bbox"),
        pycocotools_figures(scenes, "segm"),
    )
    for name, value in boxes.items():
        assert ours[name] == pytest.approx(value, abs=1e-5), name
    for name, value in masks.items():
        assert ours[f"mask {name}"] == pytest.approx(value, abs=1e-5), name


def test_figures_of_sizes_and_classes_without_an_object_are_left_out():
    box = torch.tensor([[10.0, 10.0, 20.0, 20.0]])
    truth = {
        "boxes": box,
        "labels": torch.tensor([1]),
        "iscrowd": torch.tensor([0]),
        "area": torch.tensor([100.0]),
    }
    found = {"boxes": box, "labels": torch.tensor([1]), "scores": torch.tensor([0.9])}
    figures = figures_of([(found, truth)])
    assert figures == {name: pytest.approx(1.0) for name in ("AP", "AP50", "AP75", "APs", "AR", "AP/b")}


def test_a_missing_library_is_named_with_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(DataError, match=r'faster_coco_eval.*pip install "poa\[dense\]"'):
        CocoMetric(("a",), masks=False)


def test_a_clean_file_is_read_whole(tmp_path):
    file = squares(tmp_path)
    dataset = opened(file, changed(TINY, masks=True))
    document = json.loads(file.read_text())
    assert len(dataset) == 8
    assert dataset.class_names == ("red", "blue")
    assert dataset.counts.num_boxes == len(document["annotations"]) == sum(dataset.num_objects().values())
    assert dataset.counts.skipped_images == dataset.counts.skipped_annotations == ()
    coco = COCO(file)
    for index, key in enumerate(coco.getImgIds()):
        entries = coco.loadAnns(coco.getAnnIds(key))
        truth = dataset.truth(index)
        for number, entry in enumerate(entries):
            left, top, width, height = entry["bbox"]
            assert truth["boxes"][number].tolist() == [left, top, left + width, top + height]
            assert np.array_equal(truth["masks"][number].numpy(), coco.annToMask(entry).astype(bool))
            assert truth["labels"][number] == entry["category_id"] - 1


def append(number, **changes):
    def change(document):
        document["annotations"].append({**coco_entry(number, 1, (5, 5, 15, 15)), **changes})

    return change


BAD_OBJECTS = {
    "no width": ({"bbox": [5, 5, 0, 10]}, "no area"),
    "negative height": ({"bbox": [5, 5, 10, -3]}, "no area"),
    "not finite": ({"bbox": [5, float("nan"), 10, 10]}, "not finite"),
    "infinite": ({"bbox": [5, 5, float("inf"), 10]}, "not finite"),
    "three numbers": ({"bbox": [5, 5, 10]}, "not four numbers"),
    "words": ({"bbox": ["a", 5, 10, 10]}, "not four numbers"),
    "outside": ({"bbox": [70, 5, 10, 10]}, "outside of its image of 64×48"),
    "unknown image": ({"image_id": 99}, "no image of id 99"),
    "unknown category": ({"category_id": 7}, "no category of id 7"),
    "odd category": ({"category_id": [1]}, "category_id"),
    "id that is taken": ({"id": 1}, "another annotation has its id"),
}


@pytest.mark.parametrize("what", BAD_OBJECTS)
def test_unusable_annotations_are_left_out_and_reported_with_reasons(tmp_path, what):
    changes, reason = BAD_OBJECTS[what]
    file = squares(tmp_path)
    clean = opened(file).counts
    edited(file, append(777, **changes))
    number = changes.get("id", 777)
    with pytest.raises(DataError, match=f"(?s)1 of .* annotations .*annotation {number}.*{reason}.*max-bad-share to"):
        opened(file)
    counts = opened(file, changed(TINY, max_bad_share=0.5)).counts
    ((name, why),) = counts.skipped_annotations
    assert f"annotation {number}" in name
    assert reason in why
    assert counts.num_boxes == clean.num_boxes


def test_annotations_that_lack_what_they_need_are_reported(tmp_path):
    def change(document):
        document["annotations"] += [{"id": 900, "image_id": 1}, "nonsense"]

    counts = opened(edited(squares(tmp_path), change), changed(TINY, max_bad_share=0.5)).counts
    assert [reason for _, reason in counts.skipped_annotations] == ["it has no category_id", "it is no JSON object"]


def test_boxes_that_reach_out_of_the_image_are_cut_and_counted(tmp_path):
    file = edited(squares(tmp_path), append(777, bbox=[-5, 40, 20, 30]))
    dataset = opened(file)
    assert dataset.counts.num_clipped == 1
    assert dataset.counts.skipped_annotations == ()
    assert dataset.instances(0)[-1].box == (0.0, 40.0, 15.0, 48.0)


def bad_image(what):
    def change(document):
        entry = document["images"][2]
        match what:
            case "missing":
                entry["file_name"] = "gone.png"
            case "other size":
                entry["width"] = 65
            case "same id":
                entry["id"] = 1
            case "no name":
                del entry["file_name"]

    return change


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("missing", "cannot be read: No such file"),
        ("other size", "is 64×48 pixels .* say 65×48"),
        ("same id", "its id 1 is also that of 1.png"),
        ("no name", "its file_name is None"),
    ],
)
def test_unusable_images_are_left_out_with_their_annotations(tmp_path, what, reason):
    file = edited(squares(tmp_path), bad_image(what))
    with pytest.raises(DataError, match=f"(?s)1 of 8 images .*{reason}.*max-bad-share to 0.126"):
        opened(file)
    counts = opened(file, changed(TINY, max_bad_share=0.5)).counts
    assert counts.num_images == 7
    assert len(counts.skipped_images) == 1
    total = counts.num_boxes + counts.num_lost + len(counts.skipped_annotations)
    assert total == len(json.loads(file.read_text())["annotations"])


def test_files_that_cannot_be_decoded_are_found_before_training(tmp_path):
    file = squares(tmp_path)
    whole = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(whole[: len(whole) // 2])
    counts = opened(file, changed(TINY, max_bad_share=0.5)).counts
    assert counts.skipped_images[0].name == "3.png"
    assert counts.num_lost > 0


def test_images_without_a_stated_size_are_measured(tmp_path):
    def change(document):
        for entry in document["images"]:
            del entry["width"], entry["height"]

    assert opened(edited(squares(tmp_path), change), changed(TINY, masks=True)).truth(0)["masks"].shape[1:] == (48, 64)


def test_images_without_objects_are_kept_and_counted(tmp_path):
    def change(document):
        document["annotations"] = [entry for entry in document["annotations"] if entry["image_id"] > 3]

    dataset = opened(edited(squares(tmp_path), change))
    assert (dataset.counts.num_images, dataset.counts.num_negatives) == (8, 3)
    assert dataset.truth(0)["boxes"].shape == (0, 4)


def test_a_file_without_any_object_is_refused(tmp_path):
    file = squares(tmp_path)
    edited(file, lambda document: document.update(annotations=[]))
    with pytest.raises(DataError, match="holds no object to detect: 8 usable images, 0 crowds"):
        opened(file)
    edited(file, lambda document: document.update(annotations=[coco_entry(1, 1, (1, 1, 9, 9), iscrowd=1)]))
    with pytest.raises(DataError, match="1 crowds"):
        opened(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON file"),
        ("[]", "must be a COCO annotation file.*got list"),
        ('{"images": []}', "got the keys images"),
        ('{"images": [], "annotations": [], "categories": [1]}', "whole number `id` and a `name`"),
        ('{"images": [], "annotations": [], "categories": []}', "it holds nothing"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}',
            "the id 1 more than once",
        ),
    ],
)
def test_files_that_are_no_annotations_are_refused(tmp_path, content, message):
    file = tmp_path / "boxes.json"
    file.write_text(content)
    with pytest.raises(DataError, match=message):
        opened(file)
    with pytest.raises(DataError, match="cannot be read: No such file"):
        opened(tmp_path / "none.json")


def test_categories_of_one_name_are_told_apart(tmp_path):
    file = edited(squares(tmp_path), lambda document: document["categories"].append({"id": 9, "name": "red"}))
    assert opened(file).class_names == ("red (1)", "blue", "red (9)")


BAD_MASKS = {
    "missing": (None, "segmentation is missing"),
    "empty": ([], "segmentation is missing"),
    "two points": ([[1, 1, 5, 5]], "less than three points"),
    "odd": ([[1, 1, 5, 5, 9, 9, 3]], "less than three points"),
    "not finite": ([[1, 1, 5, 5, float("nan"), 9]], "no finite numbers"),
    "off the image": ([[100, 100, 110, 100, 110, 110]], "covers no pixel"),
    "other size": ({"size": [10, 10], "counts": [100]}, "of another size"),
    "broken counts": ({"size": [48, 64], "counts": [5, 5]}, "is broken"),
    "broken code": ({"size": [48, 64], "counts": "zzz"}, "is broken"),
}


@pytest.mark.parametrize("what", BAD_MASKS)
def test_unusable_segmentations_count_only_where_masks_are_asked_for(tmp_path, what):
    segmentation, reason = BAD_MASKS[what]
    file = edited(squares(tmp_path), append(777, segmentation=segmentation))
    assert opened(file).counts.skipped_annotations == ()
    with pytest.raises(DataError, match=f"(?s)annotation 777 on 1.png: its segmentation.*{reason.split()[-1]}"):
        opened(file, changed(TINY, masks=True))
    ((_, why),) = opened(file, changed(TINY, masks=True, max_bad_share=0.5)).counts.skipped_annotations
    assert reason in why


def test_polygons_and_run_lengths_give_the_same_masks(tmp_path):
    def change(document):
        for entry in document["annotations"][::2]:
            mask = coco_masks.merge(coco_masks.frPyObjects(entry["segmentation"], 48, 64))
            entry["segmentation"] = {"size": [48, 64], "counts": mask["counts"].decode()}
        flat = coco_masks.decode(mask).flatten(order="F")
        runs = np.diff(np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1], [True]])))
        entry["segmentation"] = {"size": [48, 64], "counts": ([] if flat[0] == 0 else [0]) + runs.tolist()}

    config = changed(TINY, masks=True)
    polygons = opened(squares(tmp_path / "one"), config)
    runs = opened(edited(squares(tmp_path / "two"), change), config)
    for index in range(len(polygons)):
        assert torch.equal(polygons.truth(index)["masks"], runs.truth(index)["masks"])


def test_crowds_are_not_trained_on_and_no_false_positives(tmp_path):
    file = edited(squares(tmp_path), append(777, iscrowd=1, bbox=[0, 0, 60, 40]))
    dataset = opened(file)
    assert dataset.counts.num_crowds == 1
    assert dataset.truth(0)["iscrowd"].tolist()[-1] == 1
    batches = TrainingBatches(dataset, changed(TINY, scale_range=(1.0, 1.0)), (0, 0, 0), 8, 0)
    assert sum(len(target["labels"]) for target in batches[0].targets) == dataset.counts.num_boxes


def test_a_folder_without_any_of_the_images_is_refused(tmp_path):
    file = squares(tmp_path)
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match=r"none of the 8 images of .* is in .*other; the first is '1.png'"):
        CocoDataset(file, tmp_path / "other", TINY)
