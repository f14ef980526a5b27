"""Pictures of what networks see, several sizes side by side."""

from poa.evaluate.pictures.attention import Maps, compute_maps
from poa.evaluate.pictures.correspondence import Matches, are_shared, mutual_matches
from poa.evaluate.pictures.draw import (
    Agreement,
    across_sizes,
    agreement,
    draw_attention,
    draw_embedding,
    draw_matches,
    draw_pca,
    draw_prototypes,
)
from poa.evaluate.pictures.embedding import EmbeddingConfig, embed
from poa.evaluate.pictures.gallery import GalleryConfig, write_gallery
from poa.evaluate.pictures.pca import colours
from poa.evaluate.pictures.prototypes import cluster_scores, head_scores, most_used, top_images
from poa.evaluate.pictures.reading import MAX_NETWORKS, Reading, read

__all__ = [
    "MAX_NETWORKS",
    "Agreement",
    "EmbeddingConfig",
    "GalleryConfig",
    "Maps",
    "Matches",
    "Reading",
    "across_sizes",
    "agreement",
    "are_shared",
    "cluster_scores",
    "colours",
    "compute_maps",
    "draw_attention",
    "draw_embedding",
    "draw_matches",
    "draw_pca",
    "draw_prototypes",
    "embed",
    "head_scores",
    "most_used",
    "mutual_matches",
    "read",
    "top_images",
    "write_gallery",
]
