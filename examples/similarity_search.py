"""Images that look alike: the nearest ones of some queries, by the cosine between their vectors.

    poa embed RUN PHOTOS --subnet intact --out photos.parquet
    python examples/similarity_search.py photos.parquet PHOTOS --queries 0 17 --picture alike.png
    python examples/similarity_search.py photos.parquet PHOTOS --queries new.jpg --model RUN --subnet intact

FEATURES is what `poa embed` wrote of IMAGES. A query is the number of a row, or an image file; files need the model
that made the vectors. With --model, FEATURES is made first if it is not there.
"""

from __future__ import annotations

import argparse
import sys
from itertools import chain
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors

from poa.cli.main import main as poa
from poa.config import DataConfig
from poa.data import decode_image, eval_transform, normalize, open_source
from poa.embed import read_vectors
from poa.models import open_models

mpl.use("Agg")
from matplotlib import pyplot as plt


def vector_of(file: str, model: str, subnet: str | None) -> np.ndarray:
    """The vector of one image file, as `poa embed` computes it."""
    network = open_models([model], [subnet] if subnet else ["all"])[0]
    how = network.preprocessing
    image = decode_image(file, how.num_channels, DataConfig().max_pixels)
    pixels = eval_transform(image, how.image_size, how.crop_pct, how.interpolation)
    with torch.inference_mode():
        return network.features(normalize(torch.from_numpy(pixels[None]), how.mean, how.std)).cls[0].numpy()


def draw(file: Path, rows: list[list[tuple[str, np.ndarray]]]) -> None:
    """A row of pictures with titles for each query, itself the first."""
    size = (1.2 * len(rows[0]), 1.4 * len(rows))
    figure, axes = plt.subplots(len(rows), len(rows[0]), figsize=size, squeeze=False)
    for axis, (title, image) in zip(axes.flat, chain.from_iterable(rows), strict=True):
        axis.imshow(image)
        axis.set_title(title, fontsize=8)
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> int:
    """Embeds where asked to, searches, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("features", type=Path)
    parser.add_argument("images")
    parser.add_argument("--queries", nargs="+", default=["0"])
    parser.add_argument("--num-neighbours", type=int, default=8)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--subnet")
    arguments = parser.parse_args()
    chosen = ["--subnet", arguments.subnet] if arguments.subnet else []
    if not arguments.features.exists() and arguments.model:
        poa(["embed", arguments.model, arguments.images, *chosen, "--out", str(arguments.features)])

    names, _, vectors = read_vectors(arguments.features)
    rows = [int(query) if query.isdecimal() else None for query in arguments.queries]
    if any(row is not None and row >= len(names) for row in rows):
        parser.error(f"{arguments.features} has rows 0 to {len(names) - 1}.")
    if None in rows and not arguments.model:
        parser.error("a query that is an image file needs the model that made the vectors: --model, --subnet.")
    queries = [
        vectors[row] if row is not None else vector_of(query, arguments.model, arguments.subnet)
        for row, query in zip(rows, arguments.queries, strict=True)
    ]
    index = NearestNeighbors(n_neighbors=arguments.num_neighbours + 1, metric="cosine").fit(vectors)
    distances, found = index.kneighbors(np.stack(queries))

    source = open_source(arguments.images, DataConfig(), 3)
    place = {source.image_name(number): number for number in range(len(source))}
    pictures = []
    for query, row, far, near in zip(arguments.queries, rows, distances, found, strict=True):
        kept = [(float(1 - d), int(n)) for d, n in zip(far, near, strict=True) if n != row][: arguments.num_neighbours]
        print(
            f"{query if row is None else names[row]}: " + ", ".join(f"{names[n]} ({cosine:.3f})" for cosine, n in kept)
        )
        first = decode_image(query, 3, DataConfig().max_pixels) if row is None else source.load(place[names[row]])
        shown = [("query", first), *((f"{cosine:.3f}", source.load(place[names[n]])) for cosine, n in kept)]
        pictures.append([(title, np.asarray(image)) for title, image in shown])
    if arguments.picture:
        draw(arguments.picture, pictures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
