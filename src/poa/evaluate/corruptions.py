"""The fifteen common corruptions of ImageNet-C at five severities (Hendrycks & Dietterich, ICLR 2019), computed.

Squares of 64 pixels a side and more use ImageNet-C's published numbers, lengths in pixels times side / 224; smaller
ones use CIFAR-10-C's, made for 32 pixels, as they are. Two are made in another way than the authors', and so are alike,
not equal: frost is drawn instead of cut from photographs, and fog's map sums octaves of noise instead of moving
midpoints. The published numbers do not always rise: a higher severity of elastic_transform, glass_blur, snow or frost
may change the pixels less.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from poa.randomness import generator

Pixels = Float[np.ndarray, "s s c"]
"""A grey or colour image, values 0-1; functions may give back values beyond."""
Numbers = tuple[float, ...]

NUM_SEVERITIES = 5
MIN_SIDE = 8
SMALL_SIDE = 64
"""Below this side, CIFAR-10-C's numbers are used."""
NUM_TEXTURES = 6
"""Kinds of ice that frost is cut out of."""
_IMAGENET_SIDE = 224
_BLUE_WHITE = (0.80, 0.91, 1.0)


@dataclass(frozen=True)
class _Setting:
    """What a corruption is told: its numbers, and by how much lengths in pixels are multiplied."""

    numbers: Numbers
    scale: float
    is_small: bool


_Damage = Callable[[Pixels, _Setting, np.random.Generator], Pixels]


@dataclass(frozen=True)
class _Kind:
    damage: _Damage
    small: Sequence[Numbers]
    """CIFAR-10-C's numbers at severities 1-5."""
    large: Sequence[Numbers]
    """ImageNet-C's."""


def corrupt(
    pixels: UInt8[np.ndarray, "c s s"], name: str, severity: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "c s s"]:
    """The image damaged; alpha, if there is one, stays as it is.

    Args:
        pixels: a square of 1, 3 or 4 channels and `MIN_SIDE` pixels a side or more.
        name: one of `CORRUPTIONS`.
        severity: 1 (light) to 5.
        rng: the same state gives the same image.
    """
    kind, side = CORRUPTIONS[name], pixels.shape[-1]
    is_small = side < SMALL_SIDE
    numbers = (kind.small if is_small else kind.large)[severity - 1]
    setting = _Setting(numbers, 1.0 if is_small else side / _IMAGENET_SIDE, is_small)
    colour = np.ascontiguousarray(pixels[:3].transpose(1, 2, 0), dtype=np.float32) / np.float32(255.0)
    found = kind.damage(colour, setting, rng)
    damaged = np.rint(np.clip(found, 0.0, 1.0) * 255.0).astype(np.uint8).transpose(2, 0, 1)
    return np.asarray(np.concatenate([damaged, pixels[3:]]))


def _gaussian_noise(x: Pixels, how: _Setting, rng: np.random.Generator) -> Pixels:
    return np.asarray(x + how.numbers[0] * rng.standard_normal(x.shape, dtype=np.float32))


def _shot_noise(x: Pixels, how: _Setting, rng: np.random.Generator) -> Pixels:
    (photons,) = how.numbers
    return (rng.poisson(x * photons) / photons).astype(np.float32)


def _impulse_noise(x: Pixels, how: _Setting, rng: np.random.Generator) -> Pixels:
    (share,) = how.numbers
    draws = rng.random(x.shape, dtype=np.float32)
    return np.where(draws < share, (draws < share / 2).astype(np.float32), x)


def _defocus_blur(x: Pixels, how: _Setting, rng: np.random.Generator) -> Pixels:
    del rng
    radius, sigma = how.numbers[0] * how.scale, how.numbers[1]
    return _filtered(x, _disc(radius, sigma))


def _glass_blur(x: Pixels, how: _Setting, rng: np.random.Generator) -> Pixels:
    sigma, reach, rounds = how.numbers[0] * how.scale, max(1, round(how.numbers[1] * how.scale)), int(how.numbers[2])
    x = _gaussian(x, sigma)
    places = np.arange(x.shape[0] * x.shape[1]).reshape(x.shape[:2])
    swapped = places.ravel().tolist()
    inner = places[reach + 1 : len(x) - reach + 1, reach + 1 : len(x) - reach + 1]
    for _ in range(rounds):
        down, right = rng.integers(-reach, reach, (2, *inner.shape))
        others = inner + down * len(x) + right
        for one, other in zip(inner.ravel()[::-1].tolist(), others.ravel()[::-1].tolist(), strict=True):
            swapped[one], swapped[other] = swapped[other], swapped[one]
    return _gaussian(x.reshape(-1, x.shape[2])[swapped].reshape(x.shape), sigma)


def _motion_blur(x: Pixels, how: _Setting, rng: np.random.Generator) -> Pixels:
    radius, sigma = (number * how.scale for number in how.numbers)
    return _filtered(x, _streak(radius, sigma, rng.uniform(-45.0, 45.0)))


def _zoom_blur(x: Pixels, how: _Setting, rng: np.random.Generator) -> Pixels:
    del rng
    most, step = how.numbers
    factors = np.arange(1.0, most + step / 2, step)
    return np.asarray(np.mean([x, *(_zoomed(x, factor) for factor in factors)], axis=0))


def _snow(x: Pixels, how: _Setting, rng: np.random.Generator) -> Pixels:
    mean, spread, zoom, least, radius, sigma, keep = how.numbers
    flakes = rng.normal(mean, spread, x.shape[:2]).astype(np.float32)
    flakes = _zoomed(flakes, max(1.0, zoom * how.scale))
    flakes = np.clip(np.where(flakes < least, 0.0, flakes), 0.0, 1.0).astype(np.float32)
    streak = _streak(radius * how.scale, sigma * how.scale, rng.uniform(-135.0, -45.0))
    flakes = _filtered(flakes[..., None], streak)
    pale = np.maximum(x, 1.5 * _grey(x) + 0.5)
    return np.asarray(keep * x + (1.0 - keep) * pale + flakes + flakes[::-1, ::-1])


def _frost(x: Pixels, how: _Setting, rng: np.random.Generator) -> Pixels:
    keep, cover = how.numbers
    ice = frost_texture(int(rng.integers(NUM_TEXTURES)), len(x), fineness=5 if how.is_small else 1)
    top, left = rng.integers(0, len(ice) - len(x) + 1, 2)
    ice = ice[top : top + len(x), left : left + len(x)]
    return keep * x + cover * (ice if x.shape[2] == 3 else _grey(np.ascontiguousarray(ice)))


def _fog(x: Pixels, how: _Setting, rng: np.random.Generator) -> Pixels:
    thickness, decay = how.numbers
    most = float(x.max())
    return (x + thickness * plasma(len(x), decay, rng)[..., None]) * (most / (most + thickness) if most else 0.0)


def _brightness(x: Pixels, how: _Setting, rng: np.random.Generator) -> Pixels:
    del rng
    if x.shape[2] == 1:
        return x + how.numbers[0]
    hsv = cv2.cvtColor(x, cv2.COLOR_RGB2HSV)
    hsv[..., 2] = np.clip(hsv[..., 2] + how.numbers[0], 0.0, 1.0)
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))


def _contrast(x: Pixels, how: _Setting, rng: np.random.Generator) -> Pixels:
    del rng
    mean = x.mean(axis=(0, 1), keepdims=True)
    return np.asarray((x - mean) * how.numbers[0] + mean)


def _elastic_transform(x: Pixels, how: _Setting, rng: np.random.Generator) -> Pixels:
    side = len(x) if how.is_small else len(x) * 244 / 224  # the published numbers are shares of 244 pixels
    strength, sigma, jump = (number * side for number in how.numbers)
    third, middle = len(x) // 3, len(x) // 2
    corners = np.array([[1, 1], [1, -1], [-1, -1]], dtype=np.float32) * third + middle
    moved = corners + rng.uniform(-jump, jump, (3, 2)).astype(np.float32)
    affine = cv2.getAffineTransform(corners, moved)
    x = _with_channels(cv2.warpAffine(x, affine, x.shape[:2], borderMode=cv2.BORDER_REFLECT_101))
    if strength == 0:
        return x
    fields = [
        strength * _gaussian(rng.uniform(-1.0, 1.0, x.shape[:2]).astype(np.float32), sigma)[..., 0] for _ in range(2)
    ]
    rows, columns = np.indices(x.shape[:2], dtype=np.float32)
    across, down = columns + fields[0], rows + fields[1]
    return _with_channels(cv2.remap(x, across, down, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT))


def _pixelate(x: Pixels, how: _Setting, rng: np.random.Generator) -> Pixels:
    del rng
    coarse = max(1, int(len(x) * how.numbers[0]))
    image = _as_image(x)
    return _as_pixels(image.resize((coarse, coarse), Image.Resampling.BOX).resize(image.size, Image.Resampling.BOX))


def _jpeg_compression(x: Pixels, how: _Setting, rng: np.random.Generator) -> Pixels:
    del rng
    file = io.BytesIO()
    _as_image(x).save(file, "JPEG", quality=int(how.numbers[0]))
    return _as_pixels(Image.open(file, formats=("JPEG",)))


def plasma(side: int, decay: float, rng: np.random.Generator) -> Float[np.ndarray, "s s"]:
    """A cloudy map with values from 0 to 1: noise of 2, 4, 8, … cells a side, each octave 1 / decay² as strong."""
    found = np.zeros((side, side), np.float32)
    for octave in range(math.ceil(math.log2(side))):
        cells = 2 ** (octave + 1)
        noise = rng.uniform(-1.0, 1.0, (cells + 1, cells + 1)).astype(np.float32)
        found += decay ** (-2.0 * octave) * cv2.resize(noise, (side, side), interpolation=cv2.INTER_CUBIC)
    found -= found.min()
    return found / max(float(found.max()), 1e-6)


@lru_cache(maxsize=2 * NUM_TEXTURES)
def frost_texture(number: int, side: int, fineness: int = 1) -> Float[np.ndarray, "t t 3"]:
    """Bluish-white ice with values from 0 to 1: fern-like crystals that branch at 60 degrees, on a cloudy film.

    ImageNet-C cuts it from photographs; this is drawn, so that nothing needs to be shipped. It is twice as wide as the
    image that is cut out of it.

    Args:
        number: which ice; the same number gives the same.
        side: of the image, in pixels.
        fineness: drawn this many times larger and scaled down, as CIFAR-10-C does with its photographs.
    """
    rng = generator(0, "frost", number)
    size = 2 * side * fineness
    canvas = np.zeros((size, size), np.float32)
    for _ in range(rng.integers(80, 100)):
        start, heading = rng.uniform(0.0, size, 2), rng.uniform(0.0, 2.0 * math.pi)
        for arm in range(6):
            _draw_fern(canvas, start, heading + arm * math.pi / 3, size * rng.uniform(0.05, 0.2), rng)
    ice = 0.35 * canvas + 0.6 * _gaussian(canvas, size / 80)[..., 0] + 0.6 * plasma(size, 1.5, rng)
    small = cv2.resize(ice, (2 * side, 2 * side), interpolation=cv2.INTER_AREA)
    return np.clip(small, 0.0, 1.0)[..., None] * np.array(_BLUE_WHITE, np.float32)


def _draw_fern(
    canvas: Float[np.ndarray, "t t"],
    start: Float[np.ndarray, "2"],
    angle: float,
    length: float,
    rng: np.random.Generator,
) -> None:
    """Draws a stem with needles on both sides that grow shorter towards its tip."""
    num_needles = 14
    needles = np.arange(1, num_needles)
    direction = np.array([math.cos(angle), math.sin(angle)])
    roots = start + length * needles[:, None] / num_needles * direction
    reach = 0.45 * length * (1.0 - needles / num_needles) * rng.uniform(0.6, 1.0, len(needles))
    tips = [
        roots + reach[:, None] * np.array([math.cos(angle + turn), math.sin(angle + turn)])
        for turn in (-math.pi / 3, math.pi / 3)
    ]
    first = np.concatenate([start[None], roots, roots])
    last = np.concatenate([(start + length * direction)[None], *tips])
    ends = np.rint(16 * np.stack([first, last], axis=1)).astype(int).tolist()
    for (one, other), light in zip(ends, rng.uniform(0.4, 1.0, len(ends)), strict=True):
        cv2.line(canvas, one, other, light, 1, cv2.LINE_AA, shift=4)


def _disc(radius: float, sigma: float) -> Float[np.ndarray, "k k"]:
    """An even disc, its edge softened by a Gaussian over 3 pixels (5 for radii above 8), as the authors do."""
    reach = max(1, math.ceil(radius)) + 2
    offsets = np.arange(-reach, reach + 1, dtype=np.float32)
    kernel = (offsets[:, None] ** 2 + offsets**2 <= radius**2).astype(np.float32)
    width = 3 if radius <= 8 else 5
    return np.asarray(cv2.GaussianBlur(kernel / kernel.sum(), (width, width), sigma))


def _streak(radius: float, sigma: float, degrees: float) -> Float[np.ndarray, "k k"]:
    """One half of a Gaussian along a line: 2 · radius + 1 steps of a pixel from the centre (ImageMagick's blur)."""
    num_steps = max(2, 2 * round(radius) + 1)
    weights = np.exp(-0.5 * (np.arange(num_steps) / max(sigma, 1e-3)) ** 2)
    kernel = np.zeros((2 * num_steps + 3, 2 * num_steps + 3), np.float32)
    centre, angle = num_steps + 1, math.radians(degrees)
    for step, weight in enumerate(weights / weights.sum()):
        y, x = centre + step * math.sin(angle), centre + step * math.cos(angle)
        top, left = int(y), int(x)
        for row, share in ((top, top + 1 - y), (top + 1, y - top)):
            kernel[row, left] += weight * share * (left + 1 - x)
            kernel[row, left + 1] += weight * share * (x - left)
    return kernel


def _filtered(x: Pixels, kernel: Float[np.ndarray, "k k"]) -> Pixels:
    return _with_channels(cv2.filter2D(x, -1, kernel, borderType=cv2.BORDER_REPLICATE))


def _gaussian(x: Float[np.ndarray, "s s *c"], sigma: float) -> Pixels:
    if sigma < 1e-3:
        return _with_channels(x)
    reach = max(1, math.ceil(3 * sigma))
    blurred = cv2.GaussianBlur(x, (2 * reach + 1, 2 * reach + 1), sigma, borderType=cv2.BORDER_REFLECT)
    return _with_channels(blurred)


def _zoomed(x: Float[np.ndarray, "s s *c"], factor: float) -> Float[np.ndarray, "s s *c"]:
    """The middle of the image, enlarged to its size."""
    shift = (1.0 - factor) * (len(x) - 1) / 2.0
    matrix = np.array([[factor, 0.0, shift], [0.0, factor, shift]])
    return np.asarray(cv2.warpAffine(x, matrix, x.shape[:2], flags=cv2.INTER_LINEAR)).reshape(x.shape)


def _grey(x: Pixels) -> Float[np.ndarray, "s s 1"]:
    return x if x.shape[2] == 1 else _with_channels(cv2.cvtColor(x, cv2.COLOR_RGB2GRAY))


def _with_channels(x: Float[np.ndarray, "s s *c"]) -> Pixels:
    """OpenCV drops a single channel."""
    return np.asarray(x).reshape(*x.shape[:2], -1)


def _as_image(x: Pixels) -> Image.Image:
    pixels = np.rint(np.clip(x, 0.0, 1.0) * 255.0).astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _as_pixels(image: Image.Image) -> Pixels:
    return _with_channels(np.asarray(image, dtype=np.float32) / 255.0)


def _numbers(*rows: float | int | tuple[float | int, ...]) -> list[Numbers]:
    return [tuple(map(float, row)) if isinstance(row, tuple) else (float(row),) for row in rows]


CORRUPTIONS: dict[str, _Kind] = {
    "gaussian_noise": _Kind(
        _gaussian_noise, _numbers(0.04, 0.06, 0.08, 0.09, 0.10), _numbers(0.08, 0.12, 0.18, 0.26, 0.38)
    ),
    "shot_noise": _Kind(_shot_noise, _numbers(500, 250, 100, 75, 50), _numbers(60, 25, 12, 5, 3)),
    "impulse_noise": _Kind(
        _impulse_noise, _numbers(0.01, 0.02, 0.03, 0.05, 0.07), _numbers(0.03, 0.06, 0.09, 0.17, 0.27)
    ),
    "defocus_blur": _Kind(
        _defocus_blur,
        _numbers((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        _numbers((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    "glass_blur": _Kind(
        _glass_blur,
        _numbers((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        _numbers((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    ),
    "motion_blur": _Kind(
        _motion_blur,
        _numbers((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        _numbers((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    ),
    "zoom_blur": _Kind(
        _zoom_blur,
        _numbers((1.05, 0.01), (1.10, 0.01), (1.15, 0.01), (1.20, 0.01), (1.25, 0.01)),
        _numbers((1.10, 0.01), (1.15, 0.01), (1.20, 0.02), (1.24, 0.02), (1.30, 0.03)),
    ),
    "snow": _Kind(
        _snow,
        _numbers(
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        _numbers(
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "frost": _Kind(
        _frost,
        _numbers((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        _numbers((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    ),
    "fog": _Kind(
        _fog,
        _numbers((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        _numbers((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    "brightness": _Kind(_brightness, _numbers(0.05, 0.1, 0.15, 0.2, 0.3), _numbers(0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": _Kind(_contrast, _numbers(0.75, 0.5, 0.4, 0.3, 0.15), _numbers(0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": _Kind(
        _elastic_transform,
        _numbers((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        _numbers((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
    ),
    "pixelate": _Kind(_pixelate, _numbers(0.95, 0.9, 0.85, 0.75, 0.65), _numbers(0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": _Kind(_jpeg_compression, _numbers(80, 65, 58, 50, 40), _numbers(25, 18, 15, 10, 7)),
}
"""By ImageNet-C's names, in its order: noise, blur, weather, digital."""
