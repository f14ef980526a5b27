"""Small networks, and images of squares with COCO annotations."""

import json

import numpy as np
import torch
from PIL import Image

from poa.backbones import ARCHITECTURES
from poa.config import DetectConfig
from poa.family import Family, FamilyCard, Preprocessing
from poa.models import family_members
from poa.runtime import Runtime
from poa.tasks.detection import CocoDataset
from tests.contract.configs import IN_COLOUR

SMALL = {"channels": 16, "head_channels": 32, "mask_channels": 16, "num_proposals": 50, "regions_per_image": 32}
TINY = DetectConfig(image_size=(48, 64), anchor_scale=3.0, **SMALL)
CPU = Runtime(torch.device("cpu"), "float32", False, 0)


def member_of(name, *, stacked=1):
    config = IN_COLOUR[name]
    kind = ARCHITECTURES[name]
    backbone = kind.build(config)
    backbone.init_weights_(torch.Generator().manual_seed(stacked))
    card = FamilyCard(kind, config, Preprocessing(config.image_size, 3, (0.3,), (0.3,)), weights_sha256="x")
    return family_members(Family(card, backbone))[-1]


def changed(config, **options):
    return DetectConfig(**{**{name: getattr(config, name) for name in config.__dataclass_fields__}, **options})


def coco_entry(number, image, box, category=1, **more):
    left, top, right, bottom = (float(value) for value in box)
    polygon = [[left, top, right, top, right, bottom, left, bottom]]
    entry = {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": [left, top, right - left, bottom - top],
        "area": (right - left) * (bottom - top),
        "iscrowd": 0,
        "segmentation": polygon,
    }
    return {**entry, **more}


def squares(folder, *, count=8, size=(48, 64), seed=0):
    """Bright red and blue squares on dark noise, with COCO annotations; the path of the annotation file."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for key in range(1, count + 1):
        pixels = rng.integers(0, 40, (*size, 3), dtype=np.uint8)
        for _ in range(int(rng.integers(1, 3))):
            side = int(rng.integers(10, 20))
            top, left = int(rng.integers(0, size[0] - side)), int(rng.integers(0, size[1] - side))
            kind = int(rng.integers(2))
            pixels[top : top + side, left : left + side] = ((220, 60, 40), (40, 80, 230))[kind]
            entry = coco_entry(len(annotations) + 1, key, (left, top, left + side, top + side), kind + 1)
            annotations.append(entry)
        Image.fromarray(pixels).save(folder / f"{key}.png")
        images.append({"id": key, "file_name": f"{key}.png", "height": size[0], "width": size[1]})
    document = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "red"}, {"id": 2, "name": "blue"}],
    }
    file = folder / "boxes.json"
    file.write_text(json.dumps(document))
    return file


def edited(file, change):
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))
    return file


def opened(file, config=TINY):
    return CocoDataset(file, file.parent, config)
