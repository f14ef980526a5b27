"""Detectors: a timm network, a feature pyramid, and torchvision's region proposals and heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from poa.config import DetectConfig
from poa.errors import ConfigError
from poa.models import Candidate
from poa.randomness import derived_seed
from poa.tasks.dense.canvas import fitted
from poa.tasks.detection.cascade import (
    STAGE_IOUS,
    STAGE_WEIGHTS,
    CascadeRoIHeads,
    ClassAgnosticPredictor,
    MaskHead,
    Target,
)
from poa.tasks.detection.pyramid import Pyramid

_FASTER_IOU = 0.5
_FASTER_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
_BOX_CELLS, _MASK_CELLS = 7, 14


class Detector(nn.Module):
    """A detector with torchvision's contract, `GeneralizedRCNN`'s: images of any size in, boxes in their pixels out.

    Attributes:
        backbone: the timm network.
        pyramid: makes levels of its maps at four scales.
        transform: normalises and letterboxes, and takes detections back.
        rpn: proposes regions.
        roi_heads: classifies and corrects them, and segments them if it has a mask head.
    """

    def __init__(
        self, backbone: nn.Module, pyramid: Pyramid, transform: Letterbox, rpn: nn.Module, roi_heads: nn.Module
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pyramid = pyramid
        self.transform = transform
        self.rpn = rpn
        self.roi_heads = roi_heads

    def forward(
        self, images: list[Float[Tensor, "C _ _"]], targets: list[Target] | None = None
    ) -> dict[str, Tensor] | list[Target]:
        """Losses by name while training, else for each image its detections, best first.

        Whatever follows the pyramid is computed in float32, also under autocast: a bfloat16 cannot hold the
        coordinates of a box to the pixel.

        Args:
            images: values 0 to 1.
            targets: while training, for each image `boxes` [N, 4] (left, top, right, bottom in pixels), `labels` [N]
                counted from 1, and with a mask head `masks` [N, h, w] of zeros and ones.

        Returns:
            Detections have `boxes` [M, 4], `scores` [M], `labels` [M], and with a mask head `masks` [M, 1, h, w], the
            chance of each pixel.
        """
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        batch, targets = self.transform(images, targets)
        levels = self.pyramid(self.backbone, batch.tensors)
        with torch.autocast(batch.tensors.device.type, enabled=False):
            levels = {name: level.float() for name, level in levels.items()}
            regions, losses = self.rpn(batch, levels, targets)
            detections, head_losses = self.roi_heads(levels, regions, batch.image_sizes, targets)
            if self.training:
                return {**losses, **head_losses}
            found: list[Target] = self.transform.postprocess(detections, batch.image_sizes, sizes)
        return found


class Letterbox(GeneralizedRCNNTransform):  # type: ignore[misc]
    """torchvision's transform to one fixed size, for networks that are made for one.

    An image is resized with its aspect kept (bilinear with antialiasing, as Pillow does) so that it just fits, and
    stands in the upper left corner; the rest has the mean colour.

    Args:
        size: height and width.
        mean: of every channel, values 0-1.
        std: likewise.
    """

    def __init__(self, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(min(size), max(size), list(mean), list(std))
        self.size = size

    def resize(
        self, image: Float[Tensor, "C _ _"], target: Target | None = None
    ) -> tuple[Float[Tensor, "C _ _"], Target | None]:
        """The image, and its boxes and masks, as large as fits."""
        before = (image.shape[-2], image.shape[-1])
        after = fitted(before, self.size)
        if after == before:
            return image, target
        image = F.interpolate(image[None], after, mode="bilinear", antialias=True)[0]
        if target is not None:
            target = {**target, "boxes": resize_boxes(target["boxes"], before, after)}
            if "masks" in target:
                masks = target["masks"][:, None].float()
                target["masks"] = F.interpolate(masks, after, mode="nearest-exact")[:, 0].to(torch.uint8)
        return image, target

    def batch_images(self, images: list[Float[Tensor, "C _ _"]], size_divisible: int = 1) -> Float[Tensor, "B C H W"]:
        """The images in the upper left corners of a batch of the fixed size."""
        del size_divisible
        batch = images[0].new_zeros(len(images), images[0].shape[0], *self.size)
        for row, image in zip(batch, images, strict=True):
            row[:, : image.shape[-2], : image.shape[-1]] = image
        return batch


class Anchors(AnchorGenerator):  # type: ignore[misc]
    """torchvision's anchors at strides that are known; its own guesses them, wrongly where a stage rounds a side.

    Args:
        strides: of the levels, finest first.
        scale: side of the anchors over the stride.
        ratios: height over width.
    """

    def __init__(self, strides: Sequence[int], scale: float, ratios: Sequence[float]) -> None:
        super().__init__(tuple((scale * stride,) for stride in strides), (tuple(ratios),) * len(strides))
        self.strides = tuple(strides)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Float[Tensor, "A 4"]]:
        """The anchors of each image: left, top, right, bottom."""
        like = feature_maps[0]
        self.set_cell_anchors(like.dtype, like.device)
        sides = [[torch.tensor(stride, device=like.device)] * 2 for stride in self.strides]
        levels = self.grid_anchors([list(level.shape[-2:]) for level in feature_maps], sides)
        return [torch.cat(levels)] * len(image_list.image_sizes)


def build_detector(candidate: Candidate, num_classes: int, config: DetectConfig, seed: int = 0) -> Detector:
    """A detector on a copy of the candidate's network, ready to be trained.

    Args:
        candidate: the network; its mean and standard deviation normalise the images.
        num_classes: classes of objects, without the background.
        config: the detector.
        seed: of the fresh weights.

    Raises:
        ConfigError: the network cannot take images of that size, or gives no intermediate maps.
    """
    how = candidate.preprocessing
    network = candidate.network(config.image_size, drop_path=config.drop_path).cpu()
    if config.freeze_batch_norm:
        network = freeze_batch_norm_2d(network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, "detector"))
        pyramid = _checked(Pyramid(network, config.channels), network, candidate, config.image_size)
        transform = Letterbox(config.image_size, how.per_channel(how.mean), how.per_channel(how.std))
        rpn = _proposals(pyramid, config)
        return Detector(network, pyramid, transform, rpn, _heads(pyramid, num_classes + 1, config))


@torch.no_grad()
def _checked(pyramid: Pyramid, network: nn.Module, candidate: Candidate, sides: tuple[int, int]) -> Pyramid:
    """The pyramid, once it has made levels of an empty image."""
    try:
        pyramid(network.eval(), torch.zeros(1, candidate.preprocessing.num_channels, *sides))
    except RuntimeError as error:
        raise ConfigError(
            f"{candidate.name} cannot take images of {sides[0]}×{sides[1]}: {error} Choose another --detect.image-size."
        ) from error
    return pyramid


def _proposals(pyramid: Pyramid, config: DetectConfig) -> RegionProposalNetwork:
    anchors = Anchors(pyramid.strides, config.anchor_scale, config.anchor_ratios)
    number = config.num_proposals
    return RegionProposalNetwork(
        anchors,
        RPNHead(config.channels, len(config.anchor_ratios)),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2 * number, "testing": number},
        post_nms_top_n={"training": number, "testing": number},
        nms_thresh=0.7,
    )


def _heads(pyramid: Pyramid, num_classes: int, config: DetectConfig) -> nn.Module:
    mask = _mask_head(pyramid, num_classes, config) if config.masks else None
    if config.method == "cascade-rcnn":
        pairs = zip(STAGE_IOUS, STAGE_WEIGHTS, strict=True)
        stages = [
            _box_heads(pyramid, config, ClassAgnosticPredictor(config.head_channels, num_classes), iou, weights)
            for iou, weights in pairs
        ]
        return CascadeRoIHeads(stages, mask=mask)
    predictor = FastRCNNPredictor(config.head_channels, num_classes)
    heads: nn.Module = _box_heads(pyramid, config, predictor, _FASTER_IOU, _FASTER_WEIGHTS)
    if mask is not None:
        heads.mask_roi_pool, heads.mask_head, heads.mask_predictor = mask
    return heads


def _box_heads(
    pyramid: Pyramid,
    config: DetectConfig,
    predictor: nn.Module,
    iou: float,
    weights: tuple[float, float, float, float],
) -> RoIHeads:
    return RoIHeads(
        region_pool(pyramid, _BOX_CELLS),
        TwoMLPHead(config.channels * _BOX_CELLS**2, config.head_channels),
        predictor,
        fg_iou_thresh=iou,
        bg_iou_thresh=iou,
        batch_size_per_image=config.regions_per_image,
        positive_fraction=0.25,
        bbox_reg_weights=weights,
        score_thresh=config.score_threshold,
        nms_thresh=config.nms_threshold,
        detections_per_img=config.max_detections,
    )


def _mask_head(pyramid: Pyramid, num_classes: int, config: DetectConfig) -> MaskHead:
    channels = config.mask_channels
    return MaskHead(
        region_pool(pyramid, _MASK_CELLS),
        MaskRCNNHeads(config.channels, (channels,) * 4, dilation=1),
        MaskRCNNPredictor(channels, channels, num_classes),
    )


def region_pool(pyramid: Pyramid, num_cells: int) -> MultiScaleRoIAlign:
    """RoIAlign over the pyramid's levels with their true scales; torchvision would round them to powers of two."""
    strides = pyramid.strides[:-1]
    pool: Any = MultiScaleRoIAlign(pyramid.names[:-1], output_size=num_cells, sampling_ratio=2)
    finest = round(math.log2(strides[0]))
    pool.scales = [1 / stride for stride in strides]
    pool.map_levels = LevelMapper(finest, finest + len(strides) - 1)
    return pool
