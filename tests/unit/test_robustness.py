import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import poa.evaluate.features as features_module
from poa.backbones import architecture
from poa.backbones.base import Features
from poa.config import DataConfig
from poa.data import BadImage, normalize, open_source
from poa.errors import ConfigError, DataError
from poa.evaluate import Knn, Loading, Vectors, evaluate, extract_features, split, sweep
from poa.evaluate.damage import BackgroundSwap, Corruption, PatchDrop, PatchShuffle, check_masks, patch_grid, resampled
from poa.evaluate.logistic import predicted
from poa.evaluate.looks import PLAIN, RandomView, salience
from poa.evaluate.report import Result
from poa.evaluate.robustness import KINDS, Robustness
from poa.family import Family, FamilyCard, Preprocessing
from poa.models import TimmCandidate, family_members
from poa.timm_models import create_timm_model
from tests.contract.configs import IN_COLOUR
from tests.unit.test_evaluate import CountingSource, digits, family  # noqa: F401 (a fixture)
from tests.unit.test_sweep import Fingerprinted, StopError, stopping_after

FEW = Robustness(corruptions=("fog", "gaussian_noise"), drops=(0.5,), drop_by=("random", "most"), shuffles=(2,), k=1)
LOOKS = (PLAIN, *FEW.test_looks.values())


def vectors(networks, source, looks=LOOKS, **options):
    """Class vectors by network and look."""
    names = [look.name for look in looks]
    with extract_features(networks, source, looks=looks, **options) as found:
        return {(each.name, name): found.of(each.name, name).cls.clone() for each in networks for name in names}


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[key], rows) for key, rows in expected.items())


def batch(count=5, side=16, channels=3):
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(0))


def dropped(before, after, grid):
    """Which patches are zero, by image; all others are asserted to be as before."""
    tile = before.shape[-1] // grid
    is_zero = (after == 0).all(dim=1).unflatten(2, (grid, tile)).unflatten(1, (grid, tile)).permute(0, 1, 3, 2, 4)
    found = is_zero.all(dim=(3, 4))
    mask = found.repeat_interleave(tile, 1).repeat_interleave(tile, 2).unsqueeze(1)
    assert torch.equal(after, before.masked_fill(mask, 0.0))
    return found.flatten(1)


def test_looks_are_the_same_whatever_the_workers_and_the_batches(family):  # noqa: F811
    source, networks = CountingSource("a"), family_members(family)[:2]
    expected = vectors(networks, source, loading=Loading(batch_size=8))
    assert same(vectors(networks, source, loading=Loading(batch_size=8, num_workers=2)), expected)
    for key, rows in vectors(networks, source, loading=Loading(batch_size=11)).items():
        torch.testing.assert_close(rows, expected[key], rtol=1e-4, atol=1e-5)


def test_every_image_is_decoded_once_for_all_looks(family):  # noqa: F811
    source = CountingSource("a")
    vectors(family_members(family), source)
    assert source.loads.tolist() == [1] * 30


def test_another_seed_is_another_damage(family):  # noqa: F811
    networks, source = family_members(family)[:1], CountingSource("a")
    for one, other in [
        (Corruption("fog", 3, 0), Corruption("fog", 3, 1)),
        (PatchDrop(0.5, seed=0), PatchDrop(0.5, seed=1)),
        (PatchShuffle(4, 0), PatchShuffle(4, 1)),
    ]:
        found = vectors(networks, source, (one, other))
        assert not torch.equal(*found.values())


@pytest.mark.parametrize("share", [0.0, 0.25, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("by", ["random", "most", "least"])
def test_drop_sets_exactly_the_share_of_patches_to_the_mean(share, by):
    images, maps = batch(), torch.rand(5, 4, 4, generator=torch.Generator().manual_seed(1))
    after = PatchDrop(share, by)(images, (3, 1, 4, 15, 9), None if by == "random" else maps)
    assert dropped(images, after, 4).sum(dim=1).tolist() == [round(share * 16)] * 5


def test_what_a_smaller_share_drops_a_larger_drops_too():
    images, indices = batch(), tuple(range(5))
    few, many = (dropped(images, PatchDrop(share)(images, indices, None), 4) for share in (0.25, 0.75))
    assert (many | ~few).all()
    assert not torch.equal(few[0], few[1])


@pytest.mark.parametrize("by", ["most", "least"])
def test_salient_drop_takes_the_patches_of_highest_or_lowest_salience(by):
    images, maps = batch(), torch.rand(5, 4, 4, generator=torch.Generator().manual_seed(1))
    found = dropped(images, PatchDrop(0.25, by)(images, tuple(range(5)), maps), 4)
    ordered = maps.flatten(1).argsort(dim=1, descending=by == "most")
    for row, order in zip(found, ordered, strict=True):
        assert set(row.nonzero().flatten().tolist()) == set(order[:4].tolist())


def test_where_salience_says_nothing_patches_are_dropped_at_random():
    images, indices = batch(), tuple(range(5))
    random = PatchDrop(0.5)(images, indices, None)
    assert torch.equal(PatchDrop(0.5, "most")(images, indices, torch.ones(5, 1, 1)), random)


def test_salience_is_averaged_or_stretched_to_the_grid():
    maps = torch.arange(16.0).view(1, 4, 4)
    assert resampled(maps, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert torch.equal(resampled(maps, 4), maps)
    assert resampled(maps, 8).shape == (1, 8, 8)


def test_patches_are_of_about_four_pixels_and_at_most_fourteen_a_side():
    assert [patch_grid(side) for side in (8, 28, 32, 64, 224, 518)] == [4, 7, 8, 14, 14, 14]


@pytest.mark.parametrize(("side", "grid"), [(16, 2), (16, 4), (17, 4), (15, 2)])
def test_shuffle_keeps_the_tiles_and_the_margin(side, grid):
    images = batch(side=side)
    after = PatchShuffle(grid)(images, tuple(range(5)), None)
    tile = side // grid
    first = (side - grid * tile) // 2
    inner = slice(first, first + grid * tile)

    def tiles(pixels):
        cut = pixels[:, inner, inner].unfold(1, tile, tile).unfold(2, tile, tile).permute(1, 2, 0, 3, 4)
        return sorted(map(tuple, cut.flatten(0, 1).flatten(1).tolist()))

    for before, found in zip(images, after, strict=True):
        assert tiles(before) == tiles(found)
        margin = torch.ones(side, side, dtype=torch.bool)
        margin[inner, inner] = False
        assert torch.equal(before[:, margin], found[:, margin])
    assert not torch.equal(images, after)


def member_of(name):
    if name == "timm":
        model = create_timm_model("timm:test_efficientnet.r160_in1k", pretrained=False, empty=False)
        return TimmCandidate(model, "timm:test_efficientnet", "none")
    kind = architecture(IN_COLOUR[name])
    backbone = kind.build(IN_COLOUR[name])
    backbone.init_weights_(torch.Generator().manual_seed(0))
    how = Preprocessing(32, 3, (0.5,), (0.25,))
    return family_members(Family(FamilyCard(kind, IN_COLOUR[name], how), backbone))[-1]


@pytest.mark.parametrize("name", [*IN_COLOUR, "timm"])
def test_salient_drop_follows_the_network_itself_whatever_it_is(name):
    network, source = member_of(name), CountingRGB("a", size=3)
    look, how = PatchDrop(0.5, "most"), network.preprocessing
    for looks in ([PLAIN, look], [look]):
        found = vectors([network], source, looks)[network.name, look.name]
        with extract_features([network], source) as plain:
            clean = plain.of(network.name).cls
        pixels = torch.from_numpy(np.stack([PLAIN(shown(source, index), how) for index in range(3)]))
        images = normalize(pixels, how.mean, how.std)
        with torch.inference_mode():
            maps = salience(network.features(images))
            expected = network.features(look(images, (0, 1, 2), maps)).cls
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert not torch.equal(found, clean)


class CountingRGB(CountingSource):
    def load(self, index):
        return super().load(index).convert("RGB").resize((32, 32))


def shown(source, index):
    from poa.evaluate.looks import Shown

    return Shown(source.load(index), index, source, np.arange(len(source)))


def test_salience_is_the_cosine_with_the_class_vector_or_with_the_mean_patch():
    patches = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    found = salience(Features(patches[:, 5], patches))
    assert (found.flatten(1).argmax(dim=1) == 5).all()
    wide = salience(Features(torch.zeros(2, 7), patches))
    torch.testing.assert_close(wide, salience(Features(patches.mean(dim=1), patches)))
    with pytest.raises(ConfigError, match="a square of patches; the network has 8"):
        salience(Features(patches[:, 0], patches[:, 1:]))


def robustness_of(family, protocol, train, test, **options):  # noqa: F811
    return evaluate([protocol], family_members(family), split(train, test, [protocol]), **options)


def test_the_clean_figure_is_that_of_knn_and_damage_lowers_it(family):  # noqa: F811
    protocols = [Robustness(corruptions=("fog",), drops=(0.75,), shuffles=(4,), k=10), Knn(k=(10,))]
    report = evaluate(protocols, family_members(family), split(digits("train"), digits("test"), protocols))
    for ours, plain in zip(report.of("robustness"), report.of("knn"), strict=True):
        assert ours.figures["accuracy_clean"] == plain.value
        assert ours.value < plain.value
        assert ours.figures["drop_random_75"] < plain.value - 0.2


def test_figures_average_kinds_of_damage_alike(family):  # noqa: F811
    protocol = Robustness(
        corruptions=("fog", "snow"), severities=(1, 5), drops=(0.25, 0.5), drop_by=("least",), shuffles=(2,), k=1
    )
    (figures,) = [robustness_of(family, protocol, CountingSource("train"), CountingSource("test")).results[0].figures]
    assert list(figures) == [
        *("accuracy_damaged", "accuracy_clean", "retained", "accuracy_corrupt", "accuracy_drop_least"),
        *("accuracy_shuffle", "corrupt_fog_1", "corrupt_fog_5", "corrupt_snow_1", "corrupt_snow_5"),
        *("drop_least_25", "drop_least_50", "shuffle_2"),
    ]
    assert figures["accuracy_clean"] == 1.0
    means = []
    for kind in KINDS:
        members = [value for name, value in figures.items() if name.startswith(kind)]
        if members:
            means.append(np.mean(members))
            assert figures[f"accuracy_{kind}"] == pytest.approx(means[-1])
    assert figures["accuracy_damaged"] == pytest.approx(np.mean(means)) == figures["retained"]


def test_logistic_regression_is_learnt_once_from_the_clean_vectors():
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    rows = torch.randn(3, 8, generator=rng)[labels] + 0.5 * torch.randn(60, 8, generator=rng)
    protocol = Robustness(corruptions=("fog",), drops=(), shuffles=(2,), classifier="logistic")
    under = {name: rows + number for number, name in enumerate(protocol.test_looks, 1)}
    found = protocol.evaluate(Vectors(rows, labels, 3), Vectors(rows, labels, 3, under=under))
    for name, damaged in under.items():
        right = predicted(rows, labels, damaged, protocol.strength) == labels
        assert found[name] == pytest.approx(float(right.double().mean()))


def test_only_the_sample_is_damaged_and_it_has_the_classes_in_proportion(family):  # noqa: F811
    protocol = Robustness(corruptions=(), drops=(0.5,), drop_by=("random",), shuffles=(), k=1, max_images=10)
    labels = torch.tensor([0] * 12 + [1] * 6 + [2] * 12)
    rows = protocol.test_sample(labels)
    assert labels[rows].bincount().tolist() == [4, 2, 4]
    test = CountingSource("test")
    networks = family_members(family)[:1]
    with extract_features(networks, test, looks={PLAIN: None, PatchDrop(0.5): rows.numpy()}) as found:
        name = networks[0].name
        part, look = found.of(name, PatchDrop(0.5).name), PatchDrop(0.5).name
        assert torch.equal(found.rows(look), rows)
        assert torch.equal(part.labels, found.of(name).labels[rows])
        whole = vectors(networks, test, (look := PatchDrop(0.5),))[name, look.name]
        torch.testing.assert_close(part.cls, whole[rows], rtol=1e-4, atol=1e-5)
    report = robustness_of(family, protocol, CountingSource("train"), test)
    assert report.num_test == 30
    assert all(round(10 * result.value, 6) % 1 == 0 for result in report.results)


@pytest.mark.parametrize("stop", [8, 24])
def test_a_stopped_extraction_of_looks_goes_on_and_ends_as_one_that_never_stopped(family, tmp_path, monkeypatch, stop):  # noqa: F811
    monkeypatch.setattr(features_module, "FLUSH_SECONDS", 0.0)
    networks, loading = family_members(family)[:2], Loading(batch_size=8, max_bad_share=0.5)
    looks = dict.fromkeys(LOOKS) | {Corruption("snow", 1): np.array([1, 2, 20, 29]), PatchDrop(0.25): np.array([28])}
    bad = [2, 13]
    expected = vectors(networks, CountingSource("a", bad=bad), looks, loading=loading)
    options = {"loading": loading, "store": tmp_path}
    with pytest.raises(StopError):
        vectors(networks, CountingSource("a", bad=bad), looks, on_progress=stopping_after(stop), **options)
    again = CountingSource("a", bad=bad)
    assert same(vectors(networks, again, looks, **options), expected)
    assert again.loads.tolist() == [0] * stop + [1] * (30 - stop)
    done = CountingSource("a", bad=bad)
    assert same(vectors(networks, done, looks, **options), expected)
    assert done.loads.sum() == 0


def test_looks_added_later_are_computed_and_the_plain_one_is_not_again(family, tmp_path, monkeypatch):  # noqa: F811
    (network,), source = family_members(family)[:1], CountingSource("a")
    expected = vectors([network], source)
    vectors([network], source, (PLAIN,), store=tmp_path)
    passes, plain = [], network.last_blocks
    monkeypatch.setattr(network, "last_blocks", lambda *given: passes.append(1) or plain(*given))
    assert same(vectors([network], source, store=tmp_path), expected)
    assert len(passes) == len(LOOKS)  # salience needs the plain images once more


def test_each_look_costs_one_pass_and_networks_share_what_they_see(family, monkeypatch):  # noqa: F811
    networks, passes, normalised = family_members(family), [], []
    for network in networks:
        plain = network.last_blocks
        monkeypatch.setattr(network, "last_blocks", lambda *given, plain=plain: passes.append(1) or plain(*given))
    monkeypatch.setattr(features_module, "normalize", lambda *given: normalised.append(1) or normalize(*given))
    vectors(networks, CountingSource("a"), loading=Loading(batch_size=30))
    assert len(passes) == len(LOOKS) * len(networks)
    assert len(normalised) == 3  # plain and two corruptions


def test_a_sweep_with_robustness_equals_it_alone_and_later_protocols_do_not_damage_again(family, tmp_path, monkeypatch):  # noqa: F811
    networks = family_members(family)[:2]
    train, test = Fingerprinted("train"), Fingerprinted("test")
    alone = evaluate([FEW], networks, split(train, test, [FEW])).results
    data = split(train, test, [FEW, Knn(k=(1,))])
    assert sweep([FEW], networks, data, tmp_path).report.results == alone
    passes, plain = [], networks[0].last_blocks
    monkeypatch.setattr(networks[0], "last_blocks", lambda *given: passes.append(1) or plain(*given))
    found = sweep([FEW, Knn(k=(1,))], networks, data, tmp_path)
    assert (found.num_known, len(passes)) == (2, 2)


def test_a_sweep_makes_room_for_the_looks(family, tmp_path, monkeypatch):  # noqa: F811
    networks = family_members(family)
    width = sum(network.num_features for network in networks)
    data = split(CountingSource("train"), CountingSource("test"), [FEW])
    needed = 4 * width * (60 + 30 * len(FEW.test_looks))
    for free, fits in ((1.05 * needed, False), (1.2 * needed, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: type("Usage", (), {"free": free})())
        if fits:
            sweep([FEW], networks, data, tmp_path / "fits")
        else:
            with pytest.raises(DataError, match="the vectors of 4 networks need up to"):
                sweep([FEW], networks, data, tmp_path)


@pytest.fixture
def masked(tmp_path):
    """Two classes of flat images of 8×8, each with an object in a corner, and their masks."""
    for label, (ground, thing) in {"a": (50, 200), "b": (100, 250)}.items():
        for number in range(3):
            pixels = np.full((8, 8), ground, np.uint8)
            mask = np.zeros((8, 8), np.uint8)
            pixels[number : number + 3, 1:4], mask[number : number + 3, 1:4] = thing, 7
            for folder, image, ending in (("images", pixels, "png"), ("masks", mask, "bmp")):
                file = tmp_path / folder / label / f"{number}.{ending}"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(file)
    return tmp_path


def source_of(folder):
    return open_source(str(folder), DataConfig(), 1)


def test_the_foreground_is_laid_over_the_background_of_another_class(masked):
    source, how = source_of(masked / "images"), Preprocessing(8, 1, (0.0,), (1.0,))
    look = BackgroundSwap(str(masked / "masks"))
    for index in range(6):
        before, found = PLAIN(shown(source, index), how)[0], look(shown(source, index), how)[0]
        own, other = ((50, 200), 100) if index < 3 else ((100, 250), 50)
        assert (found[before == own[1]] == own[1]).all()
        assert np.abs(found[before == own[0]].astype(int) - other).max() <= 2


def test_donors_are_drawn_among_the_images_of_the_extraction_that_can_be_read(masked):
    class Broken(type(source_of(masked / "images"))):
        def load(self, index):
            if index == 3:
                raise BadImage("is broken")
            return super().load(index)

    source = Broken(str(masked / "images"), DataConfig(), 1)
    look, seen = BackgroundSwap("unused"), shown(source, 0)
    seen.pool = np.array([0, 1, 3, 5])
    assert look._donor(seen)[0] == 5
    seen.pool = np.array([0, 3])
    with pytest.raises(BadImage, match="no image for its background"):
        look._donor(seen)


SPOILT = {
    "no mask": (lambda file: file.unlink(), "a/1.png: no mask"),
    "another size": (lambda file: Image.new("L", (9, 8), 1).save(file), "the mask is 9×8, the image 8×8"),
    "empty": (lambda file: Image.new("L", (8, 8), 0).save(file), "the mask is empty"),
    "no image": (lambda file: file.write_bytes(b"BM"), "the mask cannot be read"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_masks_that_do_not_fit_are_refused_before_work_starts(masked, how):
    spoil, words = SPOILT[how]
    spoil(masked / "masks" / "a" / "1.bmp")
    source = source_of(masked / "images")
    protocol = Robustness(masks=str(masked / "masks"), k=1)
    with pytest.raises(DataError, match=f"(?s)1 of the 6 test images.*{words}"):
        split(source, source, [protocol])


def test_images_that_cannot_be_read_are_counted_and_no_reason_to_refuse_the_masks(masked, family):  # noqa: F811
    (masked / "images" / "b" / "2.png").write_bytes(b"nothing")
    (masked / "masks" / "b" / "2.bmp").unlink()
    source = source_of(masked / "images")
    protocol = Robustness(corruptions=(), drops=(), shuffles=(), masks=str(masked / "masks"), k=1)
    report = robustness_of(family, protocol, source, source, loading=Loading(max_bad_share=0.2))
    assert {image.name for image in report.skipped} == {"b/2.png"}
    assert report.num_test == 5


def test_an_upright_mask_fits_an_image_that_lies_on_its_side(masked):
    image, exif = Image.new("L", (6, 8), 90), Image.Exif()
    exif[0x0112] = 6
    image.save(masked / "images" / "a" / "turned.jpg", exif=exif)
    Image.new("L", (8, 6), 1).save(masked / "masks" / "a" / "turned.png")
    check_masks(str(masked / "masks"), source_of(masked / "images"), np.array([3]))
    Image.new("L", (6, 8), 1).save(masked / "masks" / "a" / "turned.png")
    with pytest.raises(DataError, match=r"turned\.jpg: the mask is 6×8, the image 8×6"):
        check_masks(str(masked / "masks"), source_of(masked / "images"), np.array([3]))


def test_the_background_is_one_more_figure(masked, family):  # noqa: F811
    source = source_of(masked / "images")
    protocol = Robustness(corruptions=(), drops=(), shuffles=(), masks=str(masked / "masks"), k=1)
    report = robustness_of(family, protocol, source, source)
    assert list(report.results[0].figures)[3:] == ["accuracy_background", "background"]
    with pytest.raises(DataError, match="there is no folder"):
        split(source, source, [Robustness(masks=str(masked / "nothing"), k=1)])


MISTAKES = {
    "no such corruption": ({"corruptions": ("fogg",)}, "no corruption 'fogg'. Did you mean 'fog'"),
    "no such severity": ({"severities": (6,)}, "severities must be 1 to 5"),
    "share above one": ({"drops": (25.0,)}, "drops must be"),
    "one tile": ({"shuffles": (1,)}, "shuffles must be 2 or more"),
    "nothing to do": ({"corruptions": (), "drops": (), "shuffles": ()}, "nothing to do"),
    "no images": ({"max_images": 0}, "max_images must be 1 or more"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_numbers_that_make_no_sense_are_refused(mistake):
    options, words = MISTAKES[mistake]
    with pytest.raises(ConfigError, match=words):
        Robustness(**options)


@pytest.mark.parametrize("options", [{"grid": 9}, {"shuffles": (9,)}])
def test_more_patches_than_pixels_are_refused_before_images_are_read(family, options):  # noqa: F811
    train = CountingSource("train")
    with pytest.raises(ConfigError, match="must be at most the side of the images, 8; got 9"):
        robustness_of(family, Robustness(k=1, **options), train, CountingSource("test"))
    assert train.loads.sum() == 0


def test_the_same_look_at_other_images_by_two_protocols_is_refused(family):  # noqa: F811
    protocols = [Robustness(k=1, max_images=many) for many in (10, 20)]
    data = split(CountingSource("train"), CountingSource("test"), protocols)
    with pytest.raises(ConfigError, match="two protocols need corrupt_gaussian_noise_3 of other images"):
        evaluate(protocols, family_members(family), data)


class Lost(CountingSource):
    def load(self, index):
        del index
        raise DataError("the disk is gone.")


class Killed(CountingSource):
    def load(self, index):
        del index
        os.kill(os.getpid(), signal.SIGKILL)


def test_errors_in_processes_that_read_images_arrive_in_plain_words(family):  # noqa: F811
    networks, loading = family_members(family)[:1], Loading(batch_size=4, num_workers=1)
    with pytest.raises(DataError) as caught:
        vectors(networks, Lost("a"), loading=loading)
    assert str(caught.value) == "the disk is gone."
    with pytest.raises(DataError, match="ended from outside"):
        vectors(networks, Killed("a"), loading=loading)


def test_the_picture_has_a_row_for_each_network(tmp_path):
    figures = {"accuracy_damaged": 0.4, "accuracy_clean": 0.8, "retained": 0.5, "accuracy_corrupt": 0.4}
    results = [
        Result("robustness", name, "x", 10, 20, {**figures, "corrupt_fog_3": 0.4, "drop_random_50": value}, "retained")
        for name, value in (("w16-d1", 0.3), ("w32-d1", 0.6))
    ]
    assert Robustness.draw(tmp_path / "map.png", results)
    assert Image.open(tmp_path / "map.png").size[0] > 400
    assert not Knn.draw(Path("unused.png"), results)


def test_a_random_view_is_of_the_class_vector_only(family):  # noqa: F811
    networks, looks = family_members(family), [PLAIN, RandomView()]
    with extract_features(networks, CountingSource("a"), looks=looks, num_blocks=4) as found:
        deepest = networks[-1].name
        assert len(found.of(deepest).blocks) == 2
        view = found.of(deepest, RandomView().name)
        assert (len(view.blocks), view.pooled) == (1, None)
