import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from poa.config import AugmentConfig
from poa.data import MultiCrop, eval_transform, normalize
from poa.errors import ConfigError
from poa.randomness import generator
from tests.hostile_images import picture

QUIET = {
    "flip_prob": 0.0,
    "jitter_prob": 0.0,
    "grayscale_prob": 0.0,
    "solarize_prob": 0.0,
    "global_scale": (1.0, 1.0),
    "local_scale": (1.0, 1.0),
    "aspect": (1.0, 1.0),
}


def draws(seed=0):
    return lambda crop: generator(seed, "augment", crop)


@pytest.mark.parametrize("num_channels", [1, 3, 4])
@pytest.mark.parametrize("num_local", [0, 3])
def test_crops_have_the_shapes_configured(num_channels, num_local):
    crops = MultiCrop(AugmentConfig(num_local_crops=num_local, local_size=8), 16, num_channels)
    views, local = crops(picture().convert({1: "L", 3: "RGB", 4: "RGBA"}[num_channels]), draws())
    assert views.shape == (2, num_channels, 16, 16)
    assert local.shape == (num_local, num_channels, 8, 8)
    assert views.dtype == local.dtype == np.uint8


def test_every_crop_depends_on_its_own_generator_only():
    crops = MultiCrop(AugmentConfig(num_local_crops=2, local_size=8), 16, 3)
    one = crops(picture(), draws())
    other = crops(picture(), lambda crop: generator(0 if crop in (1, 3) else 7, "augment", crop))
    assert (one[0][1] == other[0][1]).all()
    assert (one[1][1] == other[1][1]).all()
    assert (one[0][0] != other[0][0]).any()
    assert (one[1][0] != other[1][0]).any()


def test_the_blur_probabilities_belong_to_view_one_view_two_and_local_crops():
    for place in range(3):
        probs = tuple(float(place == kind) for kind in range(3))
        config = AugmentConfig(**{**QUIET, "blur_probs": probs, "local_size": 32, "blur_sigma": (1.5, 2.0)})
        views, local = MultiCrop(config, 32, 3)(picture(), draws())
        plain = np.asarray(picture()).transpose(2, 0, 1)
        changed = [(view != plain).any() for view in (views[0], views[1], local[0])]
        assert changed == [place == kind for kind in range(3)]


def test_only_the_second_view_is_solarised():
    config = AugmentConfig(**{**QUIET, "solarize_prob": 1.0, "blur_probs": (0.0, 0.0, 0.0), "local_size": 32})
    views, local = MultiCrop(config, 32, 3)(picture(), draws())
    plain = np.asarray(picture()).transpose(2, 0, 1)
    assert (views[0] == plain).all()
    assert (views[1] == np.where(plain >= 128, 255 - plain, plain)).all()
    assert all((crop == plain).all() for crop in local)


def test_global_and_local_crops_cover_their_shares_of_the_image():
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (256, 1)))
    config = AugmentConfig(**{**QUIET, "blur_probs": (0.0,) * 3, "global_scale": (0.8, 1), "local_scale": (0.05, 0.1)})
    views, local = MultiCrop(config, 64, 1)(ramp, draws())
    assert (np.ptp(views, axis=(1, 2, 3)) > 200).all()
    assert (np.ptp(local, axis=(1, 2, 3)) < 100).all()


def test_other_numbers_of_channels_are_refused():
    with pytest.raises(ConfigError, match="num_channels"):
        MultiCrop(AugmentConfig(), 32, 2)


@pytest.mark.parametrize("mean", [(0.5,), (0.485, 0.456, 0.406)])
def test_normalize_subtracts_the_mean_and_divides_by_the_deviation(mean):
    crops = torch.randint(0, 256, (2, 5, 3, 4, 6), dtype=torch.uint8)
    kept = crops.clone()
    std = tuple(value / 2 for value in mean)
    result = normalize(crops, mean, std)
    shift, scale = (np.array(values).reshape(-1, 1, 1) for values in (mean, std))
    np.testing.assert_allclose(result.numpy(), (crops.numpy() / 255.0 - shift) / scale, atol=1e-5)
    assert result.dtype == torch.float32
    assert (crops == kept).all()


@pytest.mark.parametrize(("size", "crop_pct"), [(32, 1.0), (32, 0.875), (50, 0.9), (64, 0.95)])
@pytest.mark.parametrize("shape", [(100, 70), (70, 101), (64, 64), (20, 299), (9, 9)])
def test_the_evaluation_transform_is_that_of_timm(size, crop_pct, shape):
    noise = np.random.default_rng(0).integers(0, 256, (*shape[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    theirs = create_transform(size, interpolation="bicubic", crop_pct=crop_pct, mean=(0.0,) * 3, std=(1.0,) * 3)
    expected = (theirs(image) * 255).round().numpy()
    assert (eval_transform(image, size, crop_pct) == expected).all()


def test_the_evaluation_transform_of_very_long_images_is_timms_up_to_rounding():
    for size in ((20, 400), (400, 20)):
        image = picture(*size)
        expected = create_transform(32, interpolation="bicubic", crop_pct=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)(image)
        assert np.abs(eval_transform(image, 32) / 255.0 - expected.numpy()).max() <= 2 / 255


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("shape", [(1, 1), (20_000, 1), (1, 20_000)])
def test_the_evaluation_transform_takes_images_of_any_shape(mode, shape):
    square = eval_transform(picture(*shape).convert(mode), 24, 0.9)
    assert square.shape == (len(mode), 24, 24)
    assert square.dtype == np.uint8
