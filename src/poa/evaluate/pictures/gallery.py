"""All pictures of some networks on one source of images, and the page that shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from poa.config.checks import require, require_non_negative
from poa.data import ImageSource
from poa.errors import CheckpointError, ConfigError, DataError
from poa.evaluate.clustering import clusters
from poa.evaluate.features import DEFAULT_LOADING, Extraction, Loading, extract_features
from poa.evaluate.health import cka, neighbour_overlap
from poa.evaluate.pictures import texts
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
from poa.evaluate.pictures.embedding import MIN_IMAGES, EmbeddingConfig, embed
from poa.evaluate.pictures.page import PAGE_FILE, Drawn, Section, Table, drawn, write_page
from poa.evaluate.pictures.prototypes import cluster_scores, head_scores, most_used, top_images
from poa.evaluate.pictures.reading import as_pixels, check_networks, heading_of, read, reference_of
from poa.files import check_writable
from poa.models import Candidate, FamilyMember
from poa.objective.heads import ProjectionHead, ProjectionHeads
from poa.randomness import generator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_NEIGHBORS = 10
"""Of the neighbour overlap; fewer where there are fewer images."""

NUM_STARTS = 4
"""Of k-means."""

OnProgress = Callable[[str, int, int], None]
"""Called with what is done, how much of it, and how much there is in all."""


@dataclass(frozen=True)
class GalleryConfig:
    """What the pictures are made of."""

    num_images: int = 6
    """Images whose patches are shown."""
    map_images: int = 1000
    """Images, at the most, of the map, of the prototypes and of the figures in the table, drawn at random."""
    image_size: int | None = None
    """Side at which the networks see the images whose patches are shown, for finer maps; their own by default."""
    num_prototypes: int = 8
    """Prototypes that are shown."""
    num_top: int = 6
    """Images of each prototype."""
    head: int = 0
    """Of a run's projection heads the one whose prototypes are shown, counted from 0."""
    num_matches: int = 10
    """Lines between two images."""
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    """The map of the images."""
    seed: int = 0
    """Of the choice of images, the clusters and the map."""

    def __post_init__(self) -> None:
        for name, least in (("num_images", 1), ("num_prototypes", 2), ("num_top", 1), ("num_matches", 1)):
            require(getattr(self, name) >= least, name, getattr(self, name), f"{least} or more")
        least = self.least_images
        require(self.map_images >= least, "map_images", self.map_images, f"{least} or more for the other numbers")
        require(self.head >= 0, "head", self.head, "0 or more")
        require_non_negative("seed", self.seed)

    @property
    def least_images(self) -> int:
        """The images that are needed."""
        return max(MIN_IMAGES, self.num_images + 1, self.num_prototypes, self.num_top)


DEFAULT_GALLERY = GalleryConfig()


def write_gallery(
    out: Path,
    candidates: Sequence[Candidate],
    source: ImageSource,
    config: GalleryConfig = DEFAULT_GALLERY,
    *,
    heads: ProjectionHeads | None = None,
    loading: Loading = DEFAULT_LOADING,
    on_progress: OnProgress | None = None,
) -> Path:
    """Draws every picture as PNG into `out`, and `index.html` that shows them and needs no other file.

    Nothing is written until everything is drawn. The same arguments give the same files.

    Args:
        out: the directory; it is made, pictures of the same name are replaced.
        candidates: networks, at most `MAX_NETWORKS`; each runs on the device that it is on.
        source: the images; classes, where it has them, colour the map.
        config: what the pictures are made of.
        heads: the projection heads of the run that all candidates are of; without them centres of clusters stand in
            for prototypes.
        loading: how the images are read.
        on_progress: called as the work goes on.

    Returns:
        The page's path.

    Raises:
        ConfigError: there are too many networks, they take images of different numbers of channels, one gives no maps
            or none at `config.image_size`, or there is no head of that number.
        DataError: the source has too few images, more than allowed cannot be read, or umap-learn is missing.
        CheckpointError: `out` cannot be written.
    """
    say = on_progress or (lambda what, done, total: None)  # noqa: ARG005
    check_writable(out / PAGE_FILE)
    check_networks(candidates, config.image_size)
    config.embedding.check()
    _check_heads(candidates, heads, config.head)
    _check_count(source, len(source), config)
    order = generator(config.seed, "pictures").permutation(len(source))[: config.map_images]
    with extract_features(
        candidates,
        source,
        indices=order,
        loading=loading,
        on_progress=lambda done: say("images", done, len(order)),
    ) as extraction:
        _check_count(source, len(extraction.indices), config)
        drawing = _Drawing(candidates, extraction, config, heads)
        parts = []
        for number, (part, figure) in enumerate(drawing.figures(), start=1):
            parts.append((part, drawn(figure)))
            say("pictures", number, drawing.num_figures)
        return _write(out, drawing, parts)


def _write(out: Path, drawing: _Drawing, parts: Sequence[tuple[texts.Part, Drawn]]) -> Path:
    page = out / PAGE_FILE
    sections = [Section(part.heading, part.text, picture) for part, picture in parts]
    try:
        for part, picture in parts:
            picture.light.save(out / f"{part.file}.png")
        write_page(page, texts.TITLE, drawing.notes(), drawing.table(), sections)
    except OSError as error:
        raise CheckpointError(f"cannot write into {out}: {error.strerror}.") from error
    return page


def _check_count(source: ImageSource, num_images: int, config: GalleryConfig) -> None:
    if num_images < config.least_images:
        raise DataError(
            f"{source.spec} gives {num_images} images, the pictures need {config.least_images}. Give more, or ask for "
            f"fewer with --num-images (now {config.num_images}), --num-prototypes ({config.num_prototypes}) and "
            f"--num-top ({config.num_top}); {MIN_IMAGES} is the least."
        )


def _check_heads(candidates: Sequence[Candidate], heads: ProjectionHeads | None, head: int) -> None:
    if heads is None:
        require(head == 0, "head", head, "left out: these networks have no projection heads")
        return
    if not all(isinstance(candidate, FamilyMember) for candidate in candidates):
        raise ConfigError("projection heads belong to one family's sub-networks; other networks cannot be among them.")
    require(head < len(heads.heads), "head", head, f"0 to {len(heads.heads) - 1}: the run has {len(heads.heads)} heads")


class _Drawing:
    """The table and the figures of one gallery."""

    num_figures = len(texts.PARTS)

    def __init__(
        self,
        candidates: Sequence[Candidate],
        extraction: Extraction,
        config: GalleryConfig,
        heads: ProjectionHeads | None,
    ) -> None:
        self.candidates, self.extraction, self.config, self.heads = candidates, extraction, config, heads
        self.vectors = [extraction.of(candidate.name).cls for candidate in candidates]
        self.largest = reference_of(candidates)
        self.headings = [heading_of(candidate) for candidate in candidates]
        shown = list(range(config.num_images))
        self.partners = self._nearest(shown)
        images = [self._image(position) for position in shown + self.partners]
        readings = read(candidates, images, image_size=config.image_size)
        self.shown = [one.of(slice(None, len(shown))) for one in readings]
        self.paired = [one.of(slice(len(shown), None)) for one in readings]

    def figures(self) -> Iterator[tuple[texts.Part, Figure]]:
        """Each with what the page says of it."""
        parts = texts.PARTS
        yield parts["overview"], across_sizes(self.shown, title="")
        yield parts["attention"], draw_attention(self.shown, title="")
        yield parts["colours"], draw_pca(self.shown, title="")
        yield parts["foreground"], draw_pca(self.shown, title="", only_foreground=True)
        yield parts["matches"], draw_matches(self.shown, self.paired, self.config.num_matches, title="")
        yield self._prototypes()
        yield texts.map_part(self.config.embedding.map), self._map()

    def notes(self) -> list[str]:
        """Paragraphs for the page."""
        largest = self.candidates[self.largest]
        found = [
            texts.table_note(largest.name, len(self.extraction.indices), is_intact=largest.is_intact),
            texts.data_note(self.extraction.source.spec, self.config.seed, self.config.image_size),
        ]
        if self.extraction.skipped:
            found.append(texts.skipped_note(self.extraction.skipped))
        return found

    def table(self) -> Table:
        """A row for each network: its size, and how far it agrees with the largest one."""
        target = self.vectors[self.largest]
        k = min(NUM_NEIGHBORS, len(target) - 2)
        matches = agreement(self.shown, self.paired)
        rows = [
            (
                candidate.name,
                f"{candidate.num_params:,}",
                f"{cka(vectors, target):.3f}",
                f"{neighbour_overlap(vectors, target, k):.1%}",
                _share(found),
                reading.maps.saliency_name,
            )
            for candidate, vectors, found, reading in zip(
                self.candidates, self.vectors, matches, self.shown, strict=True
            )
        ]
        return Table(texts.columns(k), tuple(rows))

    def _image(self, position: int) -> Image.Image:
        """The image at that row of the vectors."""
        return self.extraction.source.load(int(self.extraction.indices[position]))

    def _nearest(self, shown: Sequence[int]) -> list[int]:
        """For each image the other one that is nearest to it in the largest network."""
        rows = F.normalize(self.vectors[self.largest].float(), dim=1)
        similarity = rows[shown] @ rows.T
        similarity[range(len(shown)), shown] = -torch.inf
        nearest: list[int] = similarity.argmax(dim=1).tolist()
        return nearest

    def _prototypes(self) -> tuple[texts.Part, Figure]:
        if self.heads is None:
            scores, names = self._cluster_scores()
            part = texts.PARTS["prototypes"]
        else:
            scores, names = self._head_scores(self.heads)
            part = texts.head_part(self.config.head, len(self.heads.heads), self.heads)
        top = [top_images(each, self.config.num_top) for each in scores]
        positions = torch.cat(top, dim=1).unique().tolist()
        pixels = as_pixels(
            [self._image(position) for position in positions], self.candidates[self.largest].preprocessing
        )
        thumbnails = dict(zip(positions, pixels, strict=True))
        return part, draw_prototypes(thumbnails, dict(zip(self.headings, top, strict=True)), names, title="")

    def _cluster_scores(self) -> tuple[list[torch.Tensor], list[str]]:
        found = clusters(self.vectors[self.largest], self.config.num_prototypes, NUM_STARTS, (self.config.seed, 0))
        _, assigned = found.unique(return_inverse=True)
        names = [f"cluster {number + 1}" for number in range(int(assigned.max()) + 1)]
        return [cluster_scores(vectors, assigned) for vectors in self.vectors], names

    def _head_scores(self, heads: ProjectionHeads) -> tuple[list[torch.Tensor], list[str]]:
        head = cast(ProjectionHead, heads.heads[self.config.head])
        members = [candidate for candidate in self.candidates if isinstance(candidate, FamilyMember)]
        scores = [
            head_scores(head, vectors, member.subnet.width)
            for member, vectors in zip(members, self.vectors, strict=True)
        ]
        chosen = most_used(scores[self.largest], self.config.num_prototypes)
        return [each[:, chosen] for each in scores], [f"prototype {number}" for number in chosen.tolist()]

    def _map(self) -> Figure:
        points = embed(self.vectors, self.largest, self.config.embedding, self.config.seed)
        source = self.extraction.source
        return draw_embedding(
            dict(zip(self.headings, points, strict=True)),
            None if source.labels is None else np.asarray(source.labels)[self.extraction.indices],
            source.class_names,
            title="",
        )


def _share(found: Agreement) -> str:
    return "other grid" if found.share is None else f"{found.share:.1%}"
