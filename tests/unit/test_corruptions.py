import io

import numpy as np
import pytest
from PIL import Image

from poa.evaluate.corruptions import CORRUPTIONS, corrupt, frost_texture, plasma
from poa.randomness import generator

UNEVEN = ("elastic_transform", "glass_blur", "snow", "frost", "fog")
"""Their published numbers do not make every severity change more than the one before."""
STILL = ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform", "pixelate", "contrast")
"""What moves or mixes pixels only."""
CHANCE_FREE = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")


def picture(side, number=0, channels=3):
    """Rectangles of random colours on a ground of a random colour."""
    rng = generator(number, "picture")
    pixels = np.zeros((channels, side, side), np.uint8) + rng.integers(30, 220, (channels, 1, 1), dtype=np.uint8)
    for _ in range(12):
        top, left = rng.integers(0, side, 2)
        height, width = rng.integers(side // 8, side // 2, 2)
        pixels[:, top : top + height, left : left + width] = rng.integers(20, 230, (channels, 1, 1))
    return pixels


def damaged(name, severity, side, count=12):
    pictures = [picture(side, number) for number in range(count)]
    found = [corrupt(each, name, severity, generator(7, "test", n, severity)) for n, each in enumerate(pictures)]
    return np.stack(pictures).astype(float), np.stack(found).astype(float)


def distortions(name, side):
    both = (damaged(name, severity, side) for severity in range(1, 6))
    return [float(np.abs(found - clean).mean()) for clean, found in both]


def test_the_fifteen_of_imagenet_c_are_there_with_five_severities_for_both_sizes():
    assert len(CORRUPTIONS) == 15
    assert all(len(kind.small) == len(kind.large) == 5 for kind in CORRUPTIONS.values())


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_squares_of_any_side_and_channels_keep_their_shape_and_alpha(name, channels):
    for side in (8, 33, 67):
        before = picture(side, channels=channels)
        given = before.copy()
        for severity in (1, 5):
            found = corrupt(given, name, severity, generator(0, "test"))
            assert (found.dtype, found.shape) == (np.uint8, given.shape)
            assert np.array_equal(given, before)
            if channels == 4:
                assert np.array_equal(found[3], given[3])


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_same_draws_give_the_same_image_and_others_another(name):
    first, again, other = (corrupt(picture(32), name, 3, generator(0, "test", draw)) for draw in (1, 1, 2))
    assert np.array_equal(first, again)
    assert np.array_equal(first, other) == (name in CHANCE_FREE)


@pytest.mark.parametrize("side", [32, 96])
@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name not in UNEVEN])
def test_every_severity_changes_more_than_the_one_before(name, side):
    found = distortions(name, side)
    assert found == sorted(set(found))


@pytest.mark.parametrize("side", [32, 96])
@pytest.mark.parametrize("name", ["glass_blur", "snow", "frost", "fog"])
def test_the_highest_severity_changes_more_than_the_lowest(name, side):
    found = distortions(name, side)
    assert found[4] > found[0]


def test_elastic_severities_are_the_published_ones():
    found = distortions("elastic_transform", 96)
    assert found[1] > found[0] > found[4] > found[3] > found[2]


@pytest.mark.parametrize("side", [32, 96])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_lightest_severity_leaves_every_image_most_like_itself(name, side):
    clean, found = (each.reshape(12, -1) for each in damaged(name, 1, side))
    likeness = np.corrcoef(found, clean)[:12, 12:]
    assert likeness.argmax(axis=1).tolist() == list(range(12))
    assert np.abs(found - clean).mean() < 0.3 * 255


@pytest.mark.parametrize("side", [32, 96])
@pytest.mark.parametrize("name", STILL)
def test_an_image_of_one_colour_stays_as_it_is_where_pixels_only_move_and_mix(name, side):
    plain = np.full((3, side, side), 140, np.uint8)
    for severity in range(1, 6):
        assert np.abs(corrupt(plain, name, severity, generator(0, "test")).astype(int) - 140).max() <= 1


def test_noise_has_the_published_strength():
    grey = np.full((3, 64, 64), 128, np.uint8)
    noisy = corrupt(grey, "gaussian_noise", 1, generator(0, "test")).astype(float) / 255
    assert noisy.std() == pytest.approx(0.08, rel=0.03)
    shot = corrupt(grey, "shot_noise", 1, generator(0, "test")).astype(float) / 255
    assert shot.std() == pytest.approx((128 / 255 / 60) ** 0.5, rel=0.03)
    assert shot.mean() == pytest.approx(128 / 255, abs=0.003)
    salted = corrupt(grey, "impulse_noise", 5, generator(0, "test"))
    assert (salted == 255).mean() == pytest.approx(0.135, rel=0.1)
    assert (salted == 0).mean() == pytest.approx(0.135, rel=0.1)


def test_contrast_scales_deviations_from_the_mean():
    clean = picture(32).astype(float)
    mean = clean.mean(axis=(1, 2), keepdims=True)
    found = corrupt(picture(32), "contrast", 3, generator(0, "test"))
    assert np.abs(found - (mean + 0.4 * (clean - mean))).max() <= 1


def test_brightness_raises_the_value_and_keeps_the_hue():
    grey = np.full((1, 8, 8), 100, np.uint8)
    assert corrupt(grey, "brightness", 2, generator(0, "test")).ravel().tolist() == [126] * 64
    colour = np.array([120, 60, 30], np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
    found = corrupt(colour, "brightness", 5, generator(0, "test"))[:, 0, 0].astype(float)
    assert found[0] == pytest.approx(120 + 0.3 * 255, abs=1)
    assert found / found[0] == pytest.approx(np.array([1.0, 0.5, 0.25]), abs=0.01)


def test_jpeg_is_the_jpeg_of_that_quality():
    file = io.BytesIO()
    Image.fromarray(picture(32).transpose(1, 2, 0)).save(file, "JPEG", quality=58)
    expected = np.asarray(Image.open(file)).transpose(2, 0, 1)
    assert np.array_equal(corrupt(picture(32), "jpeg_compression", 3, generator(0, "test")), expected)


def test_pixelate_leaves_as_many_rows_as_the_coarse_image_has():
    noise = generator(0, "test").integers(0, 256, (3, 64, 64), dtype=np.uint8)
    found = corrupt(noise, "pixelate", 5, generator(0, "test"))
    assert len(np.unique(found.transpose(1, 0, 2).reshape(64, -1), axis=0)) == 16


def test_glass_of_no_blur_only_swaps_pixels():
    clean = generator(0, "test").integers(0, 256, (1, 32, 32), dtype=np.uint8)
    found = corrupt(clean, "glass_blur", 1, generator(1, "test"))
    assert np.array_equal(np.sort(found.ravel()), np.sort(clean.ravel()))
    assert (found != clean).mean() > 0.5


def test_motion_blur_smears_along_one_line_within_45_degrees():
    dot = np.zeros((1, 65, 65), np.uint8)
    dot[0, 32, 32] = 255
    for draw in range(5):
        found = corrupt(dot, "motion_blur", 5, generator(draw, "test"))[0]
        down, right = (np.argwhere(found > 2) - 32).T
        assert max(abs(right)) > 1
        assert (abs(down) <= abs(right) + 1).all()


def test_ice_and_clouds_are_between_0_and_1_and_the_same_for_the_same_number():
    ice, other = frost_texture(0, 32, 5), frost_texture(1, 32, 5)
    assert ice.shape == (64, 64, 3)
    assert 0.0 <= ice.min() < 0.4
    assert 0.8 < ice.max() <= 1.0
    assert not np.array_equal(ice, other)
    frost_texture.cache_clear()
    assert np.array_equal(frost_texture(0, 32, 5), ice)
    clouds = plasma(50, 2.0, generator(0, "test"))
    assert (clouds.shape, float(clouds.min()), float(clouds.max())) == ((50, 50), 0.0, 1.0)


def test_black_images_stay_finite():
    for name in CORRUPTIONS:
        assert corrupt(np.zeros((3, 16, 16), np.uint8), name, 5, generator(0, "test")).shape == (3, 16, 16)
