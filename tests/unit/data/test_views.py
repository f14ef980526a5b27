import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as F
from torchvision.transforms import v2

from poa.config import AugmentConfig
from poa.data import ViewDraw, ViewRecipe, apply_view, draw_view
from poa.randomness import generator
from tests.hostile_images import picture

CONFIG = AugmentConfig()
RECIPE = ViewRecipe(CONFIG, 32, CONFIG.global_scale, 0.5, 0.2)
STILL = dict.fromkeys(("flip_prob", "jitter_prob", "grayscale_prob", "solarize_prob"), 0.0)


def smooth_image(width=80, height=60, mode="RGB"):
    colours = np.random.default_rng(0).integers(0, 256, (6, 8, 4), dtype=np.uint8)
    image = Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def still(image, **changes):
    """The draw that changes nothing, with changes."""
    return ViewDraw(box=(0, 0, *image.size), size=image.width, **changes)


def many_draws(recipe, image, count=4000):
    return [draw_view(image, recipe, generator(1, "view", index)) for index in range(count)]


def assert_rate(hits, probability):
    hits = np.asarray(hits)
    assert abs(hits.mean() - probability) <= 4 * math.sqrt(probability * (1 - probability) / len(hits))


def assert_same_moments(ours, theirs):
    """Means and standard deviations agree within 4.5 standard errors."""
    ours, theirs = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    error = math.hypot(ours.std() / math.sqrt(len(ours)), theirs.std() / math.sqrt(len(theirs)))
    assert abs(ours.mean() - theirs.mean()) <= 4.5 * error
    squares = (ours - ours.mean()) ** 2, (theirs - theirs.mean()) ** 2
    error = math.hypot(*(square.std() / math.sqrt(len(square)) for square in squares))
    assert abs(squares[0].mean() - squares[1].mean()) <= 4.5 * error


@settings(max_examples=300, deadline=None)
@given(
    size=st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    scale=st.tuples(st.floats(1e-4, 1), st.floats(1e-4, 1)).map(sorted),
    aspect=st.tuples(st.floats(0.05, 20), st.floats(0.05, 20)).map(sorted),
    seed=st.integers(0, 2**32),
)
def test_the_box_lies_within_the_image_and_is_not_empty(size, scale, aspect, seed):
    recipe = ViewRecipe(AugmentConfig(aspect=tuple(aspect)), 8, tuple(scale), 0.5, 0.5)
    left, top, right, bottom = draw_view(Image.new("1", size).convert("L"), recipe, generator(seed, "view")).box
    assert 0 <= left < right <= size[0]
    assert 0 <= top < bottom <= size[1]


@pytest.mark.parametrize("size", [(1, 1), (20_000, 1), (1, 20_000), (3, 2)])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_images_of_any_shape_give_views_of_the_size_asked_for(size, mode):
    image = picture(*size).convert(mode)
    for seed in range(5):
        view = apply_view(image, draw_view(image, RECIPE, generator(seed, "view")))
        assert view.shape == (len(mode), 32, 32)
        assert view.dtype == np.uint8


@pytest.mark.parametrize("scale", [(0.32, 1.0), (0.05, 0.32)])
@pytest.mark.parametrize("size", [(500, 375), (90, 300)])
def test_boxes_are_distributed_as_those_of_torchvision(size, scale):
    torch.manual_seed(0)
    image = Image.new("RGB", size)
    boxes = np.array([draw.box for draw in many_draws(ViewRecipe(CONFIG, 8, scale, 0, 0), image, 3000)])
    theirs = np.array([transforms.RandomResizedCrop.get_params(image, scale, CONFIG.aspect) for _ in range(3000)])
    top, left, height, width = theirs.T
    assert_same_moments(boxes[:, 0], left)
    assert_same_moments(boxes[:, 1], top)
    assert_same_moments(boxes[:, 2] - boxes[:, 0], width)
    assert_same_moments(boxes[:, 3] - boxes[:, 1], height)


def test_without_a_fitting_box_the_largest_central_one_is_taken():
    draw = draw_view(Image.new("RGB", (1000, 10)), RECIPE, generator(0, "view"))
    assert draw.box == (493, 0, 506, 10)
    draw = draw_view(Image.new("RGB", (10, 1000)), RECIPE, generator(0, "view"))
    assert draw.box == (0, 493, 10, 506)


def test_operations_are_applied_as_often_as_configured():
    draws = many_draws(RECIPE, Image.new("RGB", (60, 40)))
    assert_rate([draw.flip for draw in draws], 0.5)
    assert_rate([bool(draw.jitter) for draw in draws], 0.8)
    assert_rate([draw.grayscale for draw in draws], 0.2)
    assert_rate([draw.blur_sigma > 0 for draw in draws], 0.5)
    assert_rate([draw.solarize < 256 for draw in draws], 0.2)


def test_amounts_are_uniform_over_their_ranges():
    draws = [draw for draw in many_draws(RECIPE, Image.new("RGB", (60, 40))) if draw.jitter]
    ranges = {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.8, 1.2), "hue": (-0.1, 0.1)}
    for operation, (low, high) in ranges.items():
        amounts = np.array([dict(draw.jitter)[operation] for draw in draws])
        assert_same_moments(amounts, np.linspace(low, high, 100_000))
        assert low <= amounts.min() < amounts.max() <= high
    sigmas = [draw.blur_sigma for draw in draws if draw.blur_sigma]
    assert_same_moments(sigmas, np.linspace(0.1, 2.0, 100_000))


def test_jitter_comes_in_every_order_equally_often():
    orders = [tuple(name for name, _ in draw.jitter) for draw in many_draws(RECIPE, Image.new("RGB", (60, 40)))]
    orders = [order for order in orders if order]
    names, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(names) == 24
    assert ((counts - len(orders) / 24) ** 2 / (len(orders) / 24)).sum() < 23 + 4 * math.sqrt(46)


def test_grey_images_have_brightness_and_contrast_only():
    for draw in many_draws(RECIPE, Image.new("L", (60, 40)), 200):
        assert not draw.grayscale
        assert {name for name, _ in draw.jitter} in (set(), {"brightness", "contrast"})


def test_operations_of_strength_zero_are_left_out():
    config = AugmentConfig(brightness=0.0, hue=0.0, jitter_prob=1.0)
    for draw in many_draws(ViewRecipe(config, 8, (0.5, 1), 0, 0), Image.new("RGB", (9, 9)), 50):
        assert {name for name, _ in draw.jitter} == {"contrast", "saturation"}


def test_draws_are_as_many_whatever_the_image_and_the_probabilities_are():
    quiet = ViewRecipe(AugmentConfig(**STILL), 8, (0.1, 0.2), 0.0, 0.0)
    rngs = [generator(0, "view") for _ in range(3)]
    draw_view(Image.new("RGB", (60, 40)), RECIPE, rngs[0])
    draw_view(Image.new("L", (1, 9000)), RECIPE, rngs[1])
    draw_view(Image.new("RGBA", (60, 40)), quiet, rngs[2])
    assert len({rng.random() for rng in rngs}) == 1


@pytest.mark.parametrize(
    ("operation", "amounts", "most"),
    [("brightness", (0.6, 1.3), 1), ("contrast", (0.6, 1.4), 1), ("saturation", (0.8, 1.2), 1)],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_colour_operations_are_those_of_torchvision(operation, amounts, most, mode):
    if mode == "L" and operation == "saturation":
        return
    image = smooth_image(64, 64, mode)
    for amount in amounts:
        view = apply_view(image, still(image, jitter=((operation, amount),)))
        expected = np.asarray(getattr(F, f"adjust_{operation}")(image, amount)).astype(int)
        expected = expected.reshape(64, 64, -1).transpose(2, 0, 1)
        assert np.abs(view - expected).max() <= most


@pytest.mark.parametrize("amount", [-0.1, 0.04, 0.1, 0.5])
def test_hue_is_nearer_to_the_exact_formula_than_torchvisions_of_pil_images(amount):
    image = smooth_image(64, 64)
    exact = F.adjust_hue(F.to_tensor(image), amount).numpy() * 255
    theirs = np.asarray(F.adjust_hue(image, amount)).astype(float).transpose(2, 0, 1)
    view = apply_view(image, still(image, jitter=(("hue", amount),)))
    assert np.abs(view - exact).mean() <= min(1.0, np.abs(theirs - exact).mean())


def test_grayscale_and_flip_are_those_of_torchvision():
    image = smooth_image(64, 64)
    gray = np.asarray(F.rgb_to_grayscale(image, 3)).astype(int).transpose(2, 0, 1)
    assert np.abs(apply_view(image, still(image, grayscale=True)) - gray).max() <= 1
    flipped = np.asarray(F.hflip(image)).transpose(2, 0, 1)
    assert (apply_view(image, still(image, flip=True)) == flipped).all()


@pytest.mark.parametrize("threshold", [0, 128, 255, 256])
def test_solarising_is_that_of_torchvision(threshold):
    image = smooth_image(64, 64)
    expected = np.asarray(F.solarize(image, threshold)).transpose(2, 0, 1)
    assert (apply_view(image, still(image, solarize=threshold)) == expected).all()


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_is_that_of_torchvision(sigma):
    image = smooth_image(64, 64)
    expected = F.gaussian_blur(F.pil_to_tensor(image), [9, 9], [sigma, sigma]).numpy().astype(int)
    assert np.abs(apply_view(image, still(image, blur_kernel=9, blur_sigma=sigma)) - expected).max() <= 1


def test_crops_are_resized_as_by_torchvision():
    image = smooth_image(300, 200)
    box = (17, 30, 217, 180)
    expected = F.resized_crop(image, 30, 17, 150, 200, [48, 48], F.InterpolationMode.BICUBIC)
    view = apply_view(image, ViewDraw(box=box, size=48))
    assert (view == np.asarray(expected).transpose(2, 0, 1)).all()


def test_alpha_is_not_recoloured():
    image = smooth_image(64, 64, "RGBA")
    jitter = (("brightness", 1.4), ("hue", 0.1), ("contrast", 0.6), ("saturation", 0.8))
    plain = apply_view(image, still(image))
    coloured = apply_view(image, still(image, jitter=jitter, grayscale=True, solarize=100))
    assert (plain[3] == coloured[3]).all()
    assert (plain[:3] != coloured[:3]).any()
    opaque = Image.fromarray(plain[:3].transpose(1, 2, 0).copy())
    expected = apply_view(opaque, still(opaque, jitter=jitter, grayscale=True, solarize=100))
    assert (coloured[:3] == expected).all()


def test_large_crops_are_not_taken_for_bombs(monkeypatch):
    monkeypatch.setattr("poa.data.views._LARGE", 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    image = Image.new("RGB", (100, 100))
    assert apply_view(image, still(image)).shape == (3, 100, 100)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_views_have_the_moments_of_torchvisions_whole_recipe():
    image = smooth_image(160, 120)
    theirs = v2.Compose(
        [
            v2.RandomResizedCrop(24, scale=CONFIG.global_scale, ratio=CONFIG.aspect, interpolation=3),
            v2.RandomHorizontalFlip(0.5),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], p=0.5),
            v2.RandomSolarize(128, p=0.2),
            v2.PILToTensor(),
        ]
    )
    torch.manual_seed(0)
    recipe = ViewRecipe(CONFIG, 24, CONFIG.global_scale, 0.5, 0.2)
    draws = many_draws(recipe, image, 2500)
    ours = np.stack([apply_view(image, draw) for draw in draws]).astype(float)
    other = np.stack([theirs(image).numpy() for _ in range(700)]).astype(float)
    for statistic in (
        lambda views: views[:, 0].mean(axis=(1, 2)),
        lambda views: views[:, 2].mean(axis=(1, 2)),
        lambda views: views.std(axis=(1, 2, 3)),
        lambda views: (views.max(axis=1) - views.min(axis=1)).mean(axis=(1, 2)),
        lambda views: np.abs(np.diff(views, axis=3)).mean(axis=(1, 2, 3)),
        lambda views: views[:, 1, :, :12].mean(axis=(1, 2)) - views[:, 1, :, 12:].mean(axis=(1, 2)),
    ):
        assert_same_moments(statistic(ours), statistic(other))
