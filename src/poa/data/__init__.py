"""Images: where they come from, how they are decoded, augmented, masked and put into batches."""

from poa.data.augment import MultiCrop, eval_transform, normalize
from poa.data.bad_images import BadImageLog
from poa.data.base import ImageSource, SkippedImage
from poa.data.decode import BadImage, decode_image
from poa.data.labels import LabelledImages, hold_out, open_labelled, with_classes_of
from poa.data.loader import (
    Batch,
    BatchLoader,
    MultiCropBatches,
    first_readable,
    make_loader,
    resolve_num_workers,
)
from poa.data.masking import batch_masks, block_mask
from poa.data.sampler import EpochPlan, some_images
from poa.data.shards import ShardSource
from poa.data.sources import SOURCES, open_source
from poa.data.stream import BatchStream
from poa.data.views import ViewDraw, ViewRecipe, apply_view, draw_view

__all__ = [
    "SOURCES",
    "BadImage",
    "BadImageLog",
    "Batch",
    "BatchLoader",
    "BatchStream",
    "EpochPlan",
    "ImageSource",
    "LabelledImages",
    "MultiCrop",
    "MultiCropBatches",
    "ShardSource",
    "SkippedImage",
    "ViewDraw",
    "ViewRecipe",
    "apply_view",
    "batch_masks",
    "block_mask",
    "decode_image",
    "draw_view",
    "eval_transform",
    "first_readable",
    "hold_out",
    "make_loader",
    "normalize",
    "open_labelled",
    "open_source",
    "resolve_num_workers",
    "some_images",
    "with_classes_of",
]
