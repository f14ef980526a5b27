"""The sources of images, and how a spec is resolved to one."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from poa.config import DataConfig
from poa.data.base import ImageSource, SkippedImage, printable
from poa.data.digits import SPECS, DigitsSource
from poa.data.folder import IMAGE_EXTENSIONS, FolderSource
from poa.data.parquet import ParquetInOrder, ParquetSource
from poa.data.shards import ShardSource
from poa.data.tar import TarSource
from poa.errors import DataError

SOURCES: dict[str, type[ImageSource]] = {
    "digits": DigitsSource,
    "shards": ShardSource,
    "parquet": ParquetSource,
    "tar": TarSource,
    "folder": FolderSource,
}
"""Every kind of source, in the order in which they are asked whether they accept a spec."""

_KINDS = (
    f"a folder of images, a .parquet or .tar file, a folder of either, a pattern like shards-{{0000..0009}}.tar, the "
    f"URL of one of these, or {', '.join(map(repr, SPECS))}"
)


def open_source(
    spec: str, config: DataConfig, num_channels: int, *, require_labels: bool = False, in_order: bool = False
) -> ImageSource:
    """The source that a spec names.

    Args:
        spec: a folder of images, a .parquet or .tar file, a folder of either, a pattern like `shards-{0000..0009}.tar`,
            the URL of one of these, "digits", "digits:train" or "digits:test".
        config: columns, limits, the index and the cache of shards; its own `source` is not looked at.
        num_channels: channels of the images that `load` gives: 1, 3 or 4.
        require_labels: refuse a source without labels.
        in_order: the images will be loaded in order; Parquet then keeps one row group in memory, not all.

    Raises:
        DataError: there is no such source, it is empty, lacks the labels required, or more than
            `config.max_bad_share` of its images are unusable already in the listing.
        ConfigError: `num_channels` is not 1, 3 or 4.
    """
    if not (spec and config.index):
        _refuse_unusable(spec)
    kind = ShardSource if config.index else next((kind for kind in SOURCES.values() if kind.accepts(spec)), None)
    if kind is None:
        raise DataError(f"{spec!r} is not a folder, nor a regular file that can be read. Give {_KINDS}.")
    source = (ParquetInOrder if in_order and kind is ParquetSource else kind)(spec, config, num_channels)
    _refuse_empty(source)
    check_bad_share(source.skipped, len(source) + len(source.skipped), config.max_bad_share)
    if require_labels and source.labels is None:
        raise DataError(
            f"{spec!r} has no labels, and this needs them. In a folder, labels are the first-level folders: "
            f"every image must lie in one of two or more (cat/1.jpg, dog/2.jpg). In tar archives, they are .cls "
            f"members with the images' keys (1.cls beside 1.jpg), or folders as before. In Parquet, they are a "
            f"column of integers from 0 without gaps in the rows, named by --data.label-column."
        )
    return source


def check_bad_share(
    bad: Sequence[SkippedImage],
    num_images: int,
    max_share: float,
    where: str = "",
    *,
    what: str = "images",
    option: str = "--data.max-bad-share",
) -> None:
    """Refuses data of which too much is unusable.

    Args:
        bad: the unusable images, or other parts.
        num_images: all of them, the unusable ones included.
        max_share: the greatest share of them that is accepted.
        where: a sentence for the message that says where all are listed.
        what: what they are, for the message.
        option: which sets `max_share`.

    Raises:
        DataError: len(bad) / num_images > max_share.
    """
    if len(bad) <= max_share * num_images:
        return
    listed = "".join(f"\n  {name}: {reason}" for name, reason in bad[:5])
    more = f"\n  and {len(bad) - 5} more" if len(bad) > 5 else ""
    raise DataError(
        f"{len(bad)} of {num_images} {what} cannot be used, more than the share of {max_share:g} that "
        f"{option} accepts:{listed}{more}\n{where}"
        f"Mend or remove them, or raise {option} to {_share_above(len(bad) / num_images):g}."
    )


def _share_above(share: float) -> float:
    """The share rounded up to three digits, at most 1."""
    return min(1.0, (int(share * 1000) + 1) / 1000)


def _refuse_unusable(spec: str) -> None:
    if not spec:
        raise DataError(f"no source of images was given. Give {_KINDS} (--data).")
    if DigitsSource.accepts(spec) or ShardSource.accepts(spec):
        return
    path = Path(spec).expanduser()
    try:
        missing = not path.exists()
    except (OSError, ValueError) as error:
        raise DataError(f"{printable(spec)!r} cannot be a path: {error}. Give {_KINDS}.") from error
    if missing and not TarSource.accepts(spec):
        raise DataError(f"there is no {printable(spec)!r}{_nearest(path, spec)}. Give {_KINDS}.")
    if not path.is_file() or ParquetSource.accepts(spec) or TarSource.accepts(spec):
        return
    if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS:
        raise DataError(f"{spec!r} is a single image. Give the folder that it lies in: {str(path.parent)!r}.")
    raise DataError(f"{spec!r} is a file of a kind that is not read as a source. Give {_KINDS}.")


def _nearest(path: Path, spec: str) -> str:
    """A hint at the existing sibling, or the built-in spec, that is spelt most alike."""
    try:
        siblings = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        siblings = []
    if close := difflib.get_close_matches(spec, SPECS, n=1, cutoff=0.8):
        return f"; did you mean {close[0]!r}?"
    close = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.6)
    return f"; did you mean {printable(str(path.parent / close[0]))!r}?" if close else ""


def _refuse_empty(source: ImageSource) -> None:
    if len(source):
        return
    unusable = "".join(f"\n  {name}: {reason}" for name, reason in source.skipped[:5])
    listed = f" {len(source.skipped)} were found that cannot be used:{unusable}" if unusable else ""
    if isinstance(source, FolderSource | TarSource):
        raise DataError(
            f"no images found in {source.spec!r}: {source.num_files_seen} files were seen, at any depth; "
            f"those ending in {', '.join(IMAGE_EXTENSIONS)} (upper or lower case) count.{listed}"
        )
    what = "its index has none" if isinstance(source, ShardSource) else "it has no row with image bytes"
    raise DataError(f"no images found in {source.spec!r}: {what}.{listed}")
