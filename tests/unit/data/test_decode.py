import io
import os
import warnings

import numpy as np
import pytest
from PIL import Image

from poa.data import BadImage, decode_image
from poa.data.decode import MODES
from poa.errors import ConfigError
from tests.hostile_images import (
    BLUE_RIGHT,
    RED_LEFT,
    SIDE,
    broken_files,
    encoded,
    picture,
    ramp,
    valid_files,
)

LIMIT = 1_000_000
VALID, BROKEN = valid_files(), broken_files()


def pixels_of(name, num_channels=3):
    return np.asarray(decode_image(VALID[name], num_channels, LIMIT)).astype(int)


@pytest.mark.parametrize("num_channels", [1, 3, 4])
@pytest.mark.parametrize("name", sorted(VALID))
def test_odd_files_decode_to_the_mode_asked_for(name, num_channels):
    image = decode_image(VALID[name], num_channels, LIMIT)
    assert image.mode == MODES[num_channels]
    assert min(image.size) >= 1
    image.tobytes()


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_broken_files_are_bad_images_with_a_reason_on_one_line(name):
    with pytest.raises(BadImage) as caught:
        decode_image(BROKEN[name], 3, LIMIT)
    assert 5 < len(caught.value.reason) < 300
    assert caught.value.reason.isprintable()


@pytest.mark.parametrize(
    "name", ["cmyk.jpg", "progressive.jpg", "lossless.webp", "plain.bmp", "plain.ppm", "png-content.jpg"]
)
def test_colours_stay_near_the_original(name):
    pixels = pixels_of(name)
    np.testing.assert_allclose(pixels[16, 6], RED_LEFT, atol=6)
    np.testing.assert_allclose(pixels[16, 26], BLUE_RIGHT, atol=6)
    np.testing.assert_allclose(pixels[3, 3], 0, atol=6)


@pytest.mark.parametrize("name", ["animated.gif", "animated.webp", "multi-page.tif"])
def test_the_first_frame_is_taken(name):
    np.testing.assert_allclose(pixels_of(name)[16, 6], RED_LEFT, atol=40)


@pytest.mark.parametrize("name", ["rotated.jpg", "rotated.png"])
def test_exif_orientation_is_applied(name):
    pixels = pixels_of(name)
    assert pixels.shape == (SIDE, 2 * SIDE, 3)
    np.testing.assert_allclose(pixels[6, 10], RED_LEFT, atol=6)
    np.testing.assert_allclose(pixels[26, 32], BLUE_RIGHT, atol=6)
    np.testing.assert_allclose(pixels[2, 60], 0, atol=6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_agrees_with_pillow(orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(picture(20, 30), "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert decode_image(content, 3, LIMIT).tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["sixteen-bit.png", "sixteen-bit.tif", "thirty-two-bit.tif", "float.tif"])
def test_deep_greys_keep_their_range_and_do_not_saturate(name):
    np.testing.assert_allclose(pixels_of(name, 1), ramp() * 255, atol=1)


def test_floats_beyond_one_are_stretched():
    pixels = pixels_of("float-large.tiff", 1)
    assert (pixels.min(), pixels.max()) == (0, 255)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 100, 255]]), [0, 100, 255]),
        (np.array([[-100, 0, 100]]), [0, 128, 255]),
        (np.array([[0, 500_000, 1_000_000]]), [0, 128, 255]),
        (np.array([[70_000, 70_000]]), [0, 0]),
    ],
)
def test_integers_are_scaled_by_their_range(values, expected):
    content = encoded(Image.fromarray(values.astype(np.int32)), "TIFF")
    np.testing.assert_allclose(np.asarray(decode_image(content, 1, LIMIT))[0], expected, atol=1)


def test_floats_that_are_not_finite_count_as_the_least():
    values = np.array([[np.nan, 0.25, 1.0, -np.inf]], dtype=np.float32)
    content = encoded(Image.fromarray(values), "TIFF")
    assert np.asarray(decode_image(content, 1, LIMIT))[0].tolist() == [64, 64, 255, 64]
    nothing = encoded(Image.fromarray(np.full((2, 2), np.nan, dtype=np.float32)), "TIFF")
    with pytest.raises(BadImage, match="finite"):
        decode_image(nothing, 1, LIMIT)


@pytest.mark.parametrize("name", ["rgba.png", "la.png"])
def test_transparency_is_laid_over_white(name):
    pixels = pixels_of(name)
    assert (pixels[16, 2] == 255).all()
    assert (pixels[16, 26] < 255).any()


def test_transparent_colours_are_laid_over_white_too():
    assert (pixels_of("colour-key.png")[16, 26] == 255).all()
    assert pixels_of("colour-key.png")[16, 6].tolist() == list(RED_LEFT)


def test_alpha_is_kept_where_it_is_asked_for():
    pixels = pixels_of("rgba.png", 4)
    assert pixels[16, 2, 3] == 0
    assert pixels[16, 26].tolist() == [*BLUE_RIGHT, 255]
    assert (pixels_of("plain.bmp", 4)[..., 3] == 255).all()


def test_the_limit_of_pixels_is_ours_and_not_pillows():
    large = encoded(Image.new("1", (12_000, 10_000)), "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(large, 1, 120_000_000).size == (12_000, 10_000)
        with pytest.raises(BadImage, match=r"pixels"):
            decode_image(large, 1, 119_999_999)


def test_pillows_own_limit_is_left_as_it_was():
    before = Image.MAX_IMAGE_PIXELS
    decode_image(VALID["plain.bmp"], 3, 5000)
    with pytest.raises(BadImage):
        decode_image(BROKEN["bomb.png"], 3, 5000)
    assert before == Image.MAX_IMAGE_PIXELS


def test_other_numbers_of_channels_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"model\.num_channels.*got 2"):
        decode_image(VALID["plain.bmp"], 2, LIMIT)


def test_paths_that_hold_no_file_are_bad_images(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "absent.png", tmp_path, tmp_path / "pipe.png"):
        with pytest.raises(BadImage):
            decode_image(path, 3, LIMIT)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"])
def test_damaged_files_decode_or_are_bad_images_and_nothing_else(kind):
    content = encoded(picture(), kind)
    rng = np.random.default_rng(1)
    reasons = []
    for _ in range(150):
        damaged = bytearray(content)
        for place in rng.integers(0, min(len(content), 400), 4):
            damaged[place] = rng.integers(256)
        try:
            decode_image(bytes(damaged[: rng.integers(1, len(content) + 1)]), 3, LIMIT)
        except BadImage as error:
            reasons.append(error.reason)
    assert reasons
    assert all(reason.isprintable() for reason in reasons)
