"""What the page of pictures says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

from poa.data import SkippedImage
from poa.objective.heads import ProjectionHead, ProjectionHeads

TITLE = "What shrinking loses"


class Part(NamedTuple):
    """A figure's file name without its ending, its heading, and the paragraph over it."""

    file: str
    heading: str
    text: str


_MAP = (
    "Every point is an image, near those whose class vectors are like its own. All maps start from the same points, "
    "and each is turned to fit the largest network's. Axes and distances between groups have no meaning."
)
PARTS = {
    "overview": Part(
        "overview",
        "Side by side",
        "Every network on the same images: where it looks, and its patch vectors in colour. The table says which "
        "networks show the attention of their class token and which the cosine of every patch vector.",
    ),
    "attention": Part(
        "attention",
        "Attention",
        "The class token's attention to the patches in the last block: the mean of the heads, then each head, each "
        "scaled to its own range. Networks without a class token show the cosine of every patch vector with the class "
        "vector instead.",
    ),
    "colours": Part(
        "patch-colours",
        "Patches in colour",
        "The first three principal components of the patch vectors of all these images as red, green and blue. Those "
        "of every network are rotated towards the largest one's: the same colour stands for the same content.",
    ),
    "foreground": Part(
        "foreground-colours",
        "Foreground in colour",
        "The same of the foreground alone: the patches on one side of the largest network's first component, the side "
        "with fewer of the images' borders. The rest is black.",
    ),
    "matches": Part(
        "matches",
        "Correspondence",
        "Each image beside the one whose class vector is nearest to its own in the largest network. Lines join patches "
        "that are each other's nearest by cosine, the most similar pairs: solid where the largest network has the pair "
        "too, dashed where it has not. The headings count all pairs, and how many of the largest network's are found.",
    ),
    "prototypes": Part(
        "prototypes",
        "Prototypes",
        "No projection head is at hand (a run directory of one family has them), so k-means centres stand in: clusters "
        "of the largest network's class vectors, and the images nearest to each cluster's centre in each network.",
    ),
    "map": Part("map", "Map of the images", _MAP),
}
"""The parts of the page."""


def map_part(kind: str) -> Part:
    """What is said of a map of that kind."""
    name = {"tsne": "t-SNE", "umap": "UMAP"}[kind]
    return PARTS["map"]._replace(text=f"{name} of the class vectors. {PARTS['map'].text}")


def head_part(head: int, num_heads: int, heads: ProjectionHeads) -> Part:
    """What is said of a real head's prototypes."""
    count = cast(ProjectionHead, heads.heads[head]).last_layer.weight_v.shape[0]
    return Part(
        "prototypes",
        "Prototypes",
        f"The images that prototypes of the teacher's projection head {head} like best ({count:,} prototypes; the run "
        f"has {num_heads} heads, all sub-networks share them). Shown are the prototypes that are the best of the most "
        f"images in the largest network.",
    )


def columns(k: int) -> tuple[str, ...]:
    """The heads of the table's columns."""
    return ("network", "parameters", "CKA", f"{k} nearest images shared", "matches shared", "attention map shows")


def table_note(largest: str, num_images: int, *, is_intact: bool) -> str:
    """What the table's figures are."""
    kind = "the intact network" if is_intact else "the largest network shown"
    return (
        f"Compared with {largest}, {kind}, on {num_images:,} images: CKA is 1 for class vectors that differ by a "
        "rotation and a scale and about 0 for unrelated ones; then the share of each image's nearest images, and of "
        "the matches of patches below, that are the same in both networks."
    )


def data_note(spec: str, seed: int, image_size: int | None) -> str:
    """Where the images are from."""
    size = "" if image_size is None else f" Patches are shown for images of {image_size} × {image_size} pixels."
    return f"Images of {spec}, drawn with seed {seed}.{size}"


def skipped_note(skipped: Sequence[SkippedImage], num_named: int = 5) -> str:
    """Which images could not be read."""
    listed = "; ".join(f"{bad.name}: {bad.reason}" for bad in skipped[:num_named])
    more = f"; and {len(skipped) - num_named} more" if len(skipped) > num_named else ""
    return f"{len(skipped)} images could not be read and were left out: {listed}{more}."
