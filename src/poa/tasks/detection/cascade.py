"""Cascade R-CNN (Cai & Vasconcelos, 2018; arXiv 1712.00726) out of torchvision's parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import clip_boxes_to_image

STAGE_IOUS = (0.5, 0.6, 0.7)
"""IoU with an object from which on a region is an example of it, stage by stage (section 4 of the paper)."""
STAGE_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
"""Of the box regression's targets: later stages correct smaller errors."""
STAGE_LOSSES = (1.0, 0.5, 0.25)
"""Weight of each stage's losses, as mmdetection trains."""

Target = dict[str, Tensor]


class ClassAgnosticPredictor(nn.Module):
    """Scores of every class, background first, and one box correction for all of them."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(in_channels, num_classes)
        self.bbox_pred = nn.Linear(in_channels, 4)

    def forward(self, x: Float[Tensor, "R C"]) -> tuple[Float[Tensor, "R K"], Float[Tensor, "R 4"]]:
        """Logits and corrections of R regions."""
        return self.cls_score(x), self.bbox_pred(x)


class MaskHead(NamedTuple):
    """What segments a region, as in torchvision's `RoIHeads`."""

    pool: nn.Module
    head: nn.Module
    predictor: nn.Module


class _Regions(NamedTuple):
    """Regions of each image; pooling needs the maps and the images' sizes."""

    features: dict[str, Tensor]
    image_shapes: list[tuple[int, int]]
    boxes: list[Tensor]

    def moved(self, boxes: list[Tensor]) -> _Regions:
        """The same images with these boxes."""
        return self._replace(boxes=boxes)


class CascadeRoIHeads(nn.Module):
    """Stages of box heads, each on the boxes that the one before corrected; it stands where `RoIHeads` stands.

    The first stage samples regions; later ones label the same regions anew with their own IoU. Scores are the mean
    over the stages, boxes those of the last. Masks are learnt on the first stage's regions.

    Args:
        stages: torchvision's `RoIHeads` without a mask head, each with its IoU, regression weights, box head and a
            `ClassAgnosticPredictor`. Of the first, the sampler counts; of the last, the thresholds of detections.
        loss_weights: of each stage.
        mask: segments the detections.
    """

    def __init__(
        self,
        stages: Sequence[RoIHeads],
        loss_weights: Sequence[float] = STAGE_LOSSES,
        mask: MaskHead | None = None,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.loss_weights = tuple(loss_weights)
        self.has_mask = mask is not None
        if mask is not None:
            self.mask_pool, self.mask_head, self.mask_predictor = mask

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[Target] | None = None,
    ) -> tuple[list[Target], dict[str, Tensor]]:
        """As `RoIHeads.forward`; the losses are those of Faster R-CNN with the stage (1, 2, 3) after their names."""
        regions = _Regions(features, image_shapes, proposals)
        if self.training:
            return [], self._losses(regions, targets or [])
        found = self._detect(regions)
        if self.has_mask:
            labels = [item["labels"] for item in found]
            logits = self._mask_logits(regions.moved([item["boxes"] for item in found]))
            for item, mask in zip(found, maskrcnn_inference(logits, labels), strict=True):
                item["masks"] = mask
        return found, {}

    def _losses(self, regions: _Regions, targets: list[Target]) -> dict[str, Tensor]:
        first: Any = self.stages[0]
        boxes, matched, labels, goals = first.select_training_samples(regions.boxes, targets)
        regions = regions.moved(boxes)
        losses: dict[str, Tensor] = {}
        if self.has_mask:
            losses["loss_mask"] = self._mask_loss(regions, matched, labels, targets)
        for number, (stage, weight) in enumerate(zip(self.stages, self.loss_weights, strict=True), start=1):
            if number > 1:
                labels, goals = _labelled(stage, regions.boxes, targets)
            logits, regression = _head(stage, regions)
            classifier, box_reg = fastrcnn_loss(logits, regression.repeat(1, logits.shape[1]), labels, goals)
            losses[f"loss_classifier_{number}"] = weight * classifier
            losses[f"loss_box_reg_{number}"] = weight * box_reg
            regions = regions.moved(_corrected(stage, regression.detach(), regions))
        return losses

    def _detect(self, regions: _Regions) -> list[Target]:
        probabilities = []
        for number, stage in enumerate(self.stages, start=1):
            logits, regression = _head(stage, regions)
            probabilities.append(logits.softmax(dim=1))
            if number < len(self.stages):
                regions = regions.moved(_corrected(stage, regression, regions))
        mean = torch.stack(probabilities).mean(dim=0)
        last: Any = self.stages[-1]
        # It takes the softmax of what it is given; that of the logarithm is the mean itself.
        found = last.postprocess_detections(
            mean.log(), regression.repeat(1, mean.shape[1]), regions.boxes, regions.image_shapes
        )
        return [{"boxes": box, "scores": score, "labels": label} for box, score, label in zip(*found, strict=True)]

    def _mask_loss(
        self, regions: _Regions, matched: list[Tensor], labels: list[Tensor], targets: list[Target]
    ) -> Tensor:
        objects = [label > 0 for label in labels]
        boxes = [box[chosen] for box, chosen in zip(regions.boxes, objects, strict=True)]
        matched = [index[chosen] for index, chosen in zip(matched, objects, strict=True)]
        masks, classes = [target["masks"] for target in targets], [target["labels"] for target in targets]
        loss: Tensor = maskrcnn_loss(self._mask_logits(regions.moved(boxes)), boxes, masks, classes, matched)
        return loss

    def _mask_logits(self, regions: _Regions) -> Tensor:
        logits: Tensor = self.mask_predictor(self.mask_head(_pooled(self.mask_pool, regions)))
        return logits


def _pooled(pool: nn.Module, regions: _Regions) -> Tensor:
    pooled: Tensor = pool(regions.features, regions.boxes, regions.image_shapes)
    return pooled


def _head(stage: RoIHeads, regions: _Regions) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = stage.box_predictor(stage.box_head(_pooled(stage.box_roi_pool, regions)))
    return found


def _corrected(stage: RoIHeads, regression: Tensor, regions: _Regions) -> list[Tensor]:
    """The regions' boxes after the stage's regression, within the images."""
    moved = stage.box_coder.decode(regression, regions.boxes).reshape(-1, 4)
    per_image = moved.split([len(box) for box in regions.boxes])
    return [clip_boxes_to_image(box, shape) for box, shape in zip(per_image, regions.image_shapes, strict=True)]


def _labelled(stage: RoIHeads, boxes: list[Tensor], targets: list[Target]) -> tuple[list[Tensor], list[Tensor]]:
    """Class and box correction of every region, by the stage's IoU."""
    truth = [target["boxes"].to(boxes[0].dtype) for target in targets]
    matched, labels = stage.assign_targets_to_proposals(boxes, truth, [target["labels"] for target in targets])
    # An image without objects has background only, whose correction does not count.
    padded = [box if len(box) else box.new_tensor([[0.0, 0.0, 1.0, 1.0]]) for box in truth]
    goals = [box[index] for box, index in zip(padded, matched, strict=True)]
    return labels, list(stage.box_coder.encode(goals, boxes))
