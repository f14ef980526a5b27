"""All images on a map: what is near in feature space is near in the picture."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from poa.config.checks import require, require_positive
from poa.errors import DataError, PoaWarning
from poa.evaluate.pictures.pca import aligned
from poa.randomness import derived_seed

NUM_COMPONENTS = 50
"""Principal components that are kept before the embedding (van der Maaten and Hinton, 2008)."""
MIN_IMAGES = 5
_START_DEVIATION = 1e-4
"""Of the first coordinate before t-SNE starts (Kobak and Berens, 2019)."""


@dataclass(frozen=True)
class EmbeddingConfig:
    """How vectors become points of a plane."""

    map: Literal["tsne", "umap"] = "tsne"
    """t-SNE (scikit-learn), or UMAP (needs umap-learn)."""
    perplexity: float = 30.0
    """Of t-SNE; less where there are fewer than three times as many images."""
    num_neighbors: int = 15
    """Of UMAP; fewer where there are fewer images."""

    def __post_init__(self) -> None:
        require(self.map in ("tsne", "umap"), "map", self.map, "tsne or umap")
        require_positive("perplexity", self.perplexity)
        require(self.num_neighbors >= 2, "num_neighbors", self.num_neighbors, "2 or more")

    def check(self) -> None:
        """Refuses UMAP where it is not installed.

        Raises:
            DataError: `pip install umap-learn` is needed.
        """
        if self.map == "umap":
            _umap()


def embed(
    vectors: Sequence[Float[Tensor, "N _"]], reference: int, config: EmbeddingConfig, seed: int
) -> list[Float[np.ndarray, "N 2"]]:
    """The images as points, for each network: normalised vectors, 50 principal components, then t-SNE or UMAP.

    All maps start from the first two components of the reference's vectors, and each is turned and mirrored to be
    nearest to the reference's: what differs between them is what the networks see. Points have mean 0. The same input
    and seed give the same points.

    Args:
        vectors: the class vectors of the same images by several networks.
        reference: the position of the network that the others' maps follow.
        config: how.
        seed: of what t-SNE and UMAP draw.

    Raises:
        DataError: there are fewer than 5 images, or UMAP is asked for and not installed.
    """
    num_images = len(vectors[reference])
    if num_images < MIN_IMAGES:
        raise DataError(f"a map of images needs {MIN_IMAGES} images or more; got {num_images}.")
    rows = [_components(part) for part in vectors]
    start = rows[reference][:, :2]
    start = (start / max(float(start[:, 0].std()), 1e-12) * _START_DEVIATION).astype(np.float32)
    drawn = derived_seed(seed, "embedding") % 2**32
    if config.map == "tsne":
        found = _tsne(rows, start, config.perplexity, drawn)
    else:
        found = _umap_points(rows, start, config.num_neighbors, drawn)
    points = [part.astype(np.float64) - part.mean(axis=0, dtype=np.float64) for part in found]
    return [aligned(part, points[reference]).astype(np.float32) for part in points]


def _components(vectors: Float[Tensor, "N C"]) -> np.ndarray:
    """The first 50 principal components of the normalised vectors, or as many as there are (2 at the least)."""
    from sklearn.decomposition import PCA

    rows = F.normalize(vectors.float(), dim=1).cpu().numpy()
    found = PCA(min(NUM_COMPONENTS, *rows.shape), svd_solver="covariance_eigh").fit_transform(rows)
    return np.pad(found, ((0, 0), (0, max(0, 2 - found.shape[1]))))


def _tsne(rows: Sequence[np.ndarray], start: np.ndarray, perplexity: float, seed: int) -> list[np.ndarray]:
    from sklearn.manifold import TSNE

    fitting = min(perplexity, (len(start) - 1) / 3)
    if fitting < perplexity:
        text = f"t-SNE of {len(start)} images has a perplexity of {fitting:g} instead of {perplexity:g}."
        warnings.warn(text, PoaWarning, stacklevel=3)
    return [TSNE(perplexity=fitting, init=start, random_state=seed).fit_transform(part) for part in rows]


def _umap_points(rows: Sequence[np.ndarray], start: np.ndarray, num_neighbors: int, seed: int) -> list[np.ndarray]:
    fitting = min(num_neighbors, len(start) - 1)
    if fitting < num_neighbors:
        text = f"UMAP of {len(start)} images looks at {fitting} neighbours instead of {num_neighbors}."
        warnings.warn(text, PoaWarning, stacklevel=3)
    spread = start / _START_DEVIATION
    kind = _umap()
    return [kind(n_neighbors=fitting, init=spread, random_state=seed, n_jobs=1).fit_transform(part) for part in rows]


def _umap() -> type:
    try:
        from umap import UMAP
    except ImportError as error:
        raise DataError(
            "UMAP needs umap-learn, which is not installed: pip install umap-learn, or --map tsne."
        ) from error
    kind: type = UMAP
    return kind
