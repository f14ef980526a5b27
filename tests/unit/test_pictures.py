import sys
import types

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import poa.evaluate.pictures.embedding as embedding_module
from poa.backbones import ARCHITECTURES
from poa.config import HeadsConfig, ViTConfig
from poa.data import normalize
from poa.errors import ConfigError, DataError, PoaWarning
from poa.evaluate.pictures import (
    EmbeddingConfig,
    Maps,
    Reading,
    agreement,
    are_shared,
    cluster_scores,
    colours,
    compute_maps,
    draw_matches,
    embed,
    head_scores,
    most_used,
    mutual_matches,
    read,
    top_images,
)
from poa.evaluate.pictures.pca import foreground
from poa.evaluate.pictures.sheet import colour_image, overlay, scaled
from poa.family import Family, FamilyCard, Preprocessing
from poa.models import TimmCandidate, family_members
from poa.objective.heads import ProjectionHeads
from tests.contract.configs import SMALLEST

TINY = {"widths": (16, 32), "depths": (1, 2), "head_dim": 16, "patch_size": 4, "image_size": 16, "num_channels": 3}
VITS = {
    "learned": ViTConfig(**TINY, mlp="gelu", position="learned", num_reg_tokens=0),
    "registers": ViTConfig(**TINY, mlp="gelu", position="learned", num_reg_tokens=3, no_embed_class=True),
    "rope": ViTConfig(**TINY, mlp="swiglu", position="rope", num_reg_tokens=2),
}


def family_of(config, seed=0):
    kind = ARCHITECTURES[config.architecture]
    backbone = kind.build(config)
    rng = torch.Generator().manual_seed(seed)
    backbone.init_weights_(rng)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng), alpha=0.1)
    how = Preprocessing(config.image_size, config.num_channels, (0.5,), (0.25,))
    return Family(FamilyCard(kind, config, how), backbone)


def pixels_of(family, num_images=2, image_size=None):
    how = family.card.preprocessing
    side = image_size or how.image_size
    shape = (num_images, how.num_channels, side, side)
    return list(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def normalised(family, pixels):
    how = family.card.preprocessing
    return normalize(torch.from_numpy(np.stack(pixels)), how.mean, how.std)


def attention_by_hand(model, images):
    """softmax(q·kᵀ / √d) of the last block, from its input and its weights alone."""
    attn = model.blocks[-1].attn
    seen = []
    handle = attn.register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    with torch.no_grad():
        model(images)
    handle.remove()
    (x,) = seen
    weight, bias = attn.qkv.weight, attn.qkv.bias
    if bias is None and getattr(attn, "q_bias", None) is not None:
        bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    q, k, _ = F.linear(x, weight, bias).chunk(3, dim=-1)
    q, k = (part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in (q, k))
    if getattr(model, "rope", None) is not None:
        grid = images.shape[-1] // model.patch_embed.patch_size[0]
        sin, cos = model.rope.get_embed((grid, grid)).chunk(2, dim=-1)
        prefix = model.num_prefix_tokens
        q, k = (torch.cat([part[:, :, :prefix], turned(part[:, :, prefix:], sin, cos)], dim=2) for part in (q, k))
    return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1)


def turned(x, sin, cos):
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


@pytest.mark.parametrize("name", sorted(VITS))
def test_attention_is_the_softmax_that_every_sub_network_computes(name):
    family = family_of(VITS[name])
    images = normalised(family, pixels_of(family))
    for subnet in family.subnets:
        model = family.extract(subnet)
        maps = compute_maps(model, images)
        expected = attention_by_hand(model, images)
        torch.testing.assert_close(maps.attention, expected[:, :, 0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(maps.attention.sum(dim=-1), torch.ones(maps.attention.shape[:2]))
        assert maps.attention.shape == (2, subnet.width // 16, 17 + VITS[name].num_reg_tokens)
        torch.testing.assert_close(maps.heads.flatten(2), expected[:, :, 0, -16:], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(maps.saliency, maps.heads.mean(dim=1))
        assert expected[:, :, 0].std() > 1e-3


def test_attention_of_a_timm_model_is_its_softmax_and_the_fused_kernel_is_back_afterwards():
    model = timm.create_model("test_vit", num_classes=0).eval()
    images = torch.randn(1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    fused = model.blocks[-1].attn.fused_attn
    maps = compute_maps(model, images)
    torch.testing.assert_close(maps.attention, attention_by_hand(model, images)[:, :, 0], rtol=1e-4, atol=1e-6)
    assert model.blocks[-1].attn.fused_attn is fused
    assert not model.blocks[-1].attn.attn_drop._forward_hooks


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_a_reading_has_the_features_of_the_sub_network(architecture):
    family = family_of(SMALLEST[architecture])
    pixels = pixels_of(family)
    members = family_members(family)[:: max(1, len(family.subnets) - 1)]
    for member, reading in zip(members, read(members, pixels), strict=True):
        expected = member.features(normalised(family, pixels))
        torch.testing.assert_close(reading.maps.cls, expected.cls, rtol=1e-4, atol=1e-4)
        scale = getattr(family.card.config, "patch_scale", 1)
        patches = F.interpolate(reading.maps.patches, scale_factor=scale).flatten(2).transpose(1, 2)
        torch.testing.assert_close(patches, expected.patches, rtol=1e-4, atol=1e-4)
        if architecture == "vit":
            assert reading.maps.saliency_name == "attention"
        else:
            cosine = F.cosine_similarity(expected.patches, expected.cls.unsqueeze(1), dim=2)
            found = F.interpolate(reading.maps.saliency.unsqueeze(1), scale_factor=scale).flatten(1)
            torch.testing.assert_close(found, cosine, rtol=1e-4, atol=1e-4)
            assert reading.maps.saliency_name == "cosine with class vector"


@pytest.mark.parametrize("name", ["learned", "rope"])
def test_at_another_size_a_reading_has_the_features_of_the_super_network_at_that_size(name):
    family = family_of(VITS[name])
    pixels = pixels_of(family, image_size=24)
    member = family_members(family)[-1]
    (reading,) = read([member], pixels, image_size=24)
    expected = member.features(normalised(family, pixels))
    assert reading.maps.patches.shape[2:] == (6, 6)
    torch.testing.assert_close(reading.maps.cls, expected.cls, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="multiple of the patch size 4"):
        read([member], pixels, image_size=23)


def test_networks_without_maps_or_in_training_mode_are_refused():
    model = timm.create_model("test_vit", num_classes=0)
    images = torch.zeros(1, 3, 160, 160)
    with pytest.raises(ConfigError, match="training mode"):
        compute_maps(model.train(), images)
    with pytest.raises(ConfigError, match="Flatten gives no maps"):
        compute_maps(nn.Flatten().eval(), images)


def test_class_vectors_of_other_channels_give_the_cosine_with_the_mean_patch():
    maps = Maps(torch.ones(1, 5), torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0)), None)
    assert maps.saliency_name == "cosine with mean patch"
    mean = maps.patches.mean(dim=(2, 3))
    torch.testing.assert_close(maps.saliency[0, 0, 1], F.cosine_similarity(maps.patches[0, :, 0, 1], mean[0], dim=0))


def test_wrong_images_and_too_many_networks_are_refused():
    family = family_of(VITS["learned"])
    members = family_members(family)
    with pytest.raises(DataError, match="got none"):
        read(members, [])
    with pytest.raises(DataError, match=r"must be uint8 of shape \(3, 16, 16\)"):
        read(members, [np.zeros((3, 8, 8), np.uint8)])
    with pytest.raises(ConfigError, match="1 to 8 networks side by side; got 12"):
        read(members * 3, pixels_of(family))


def maps_of(seed, num_channels=8, side=4, num_images=3):
    return np.random.default_rng(seed).normal(size=(num_images, num_channels, side, side)).astype(np.float32)


def rotation(size, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0].astype(np.float32)


@pytest.mark.parametrize("only_foreground", [False, True])
def test_networks_that_differ_by_a_rotation_have_the_same_colours(only_foreground):
    first = maps_of(0)
    second = np.einsum("nchw,cd->ndhw", first, rotation(8))
    found = colours([first, second, maps_of(1)], 0, only_foreground=only_foreground)
    np.testing.assert_allclose(found[0], found[1], atol=1e-3)
    assert np.abs(found[0] - found[2]).mean() > 0.05
    assert all(part.min() == 0 and part.max() == 1 for part in found)
    again = colours([first, second, maps_of(1)], 0, only_foreground=only_foreground)
    assert all(np.array_equal(one, other) for one, other in zip(found, again, strict=True))


def test_colours_are_the_principal_components_of_all_images_together():
    maps = maps_of(0)
    (found,) = colours([maps], 0)
    rows = maps.transpose(0, 2, 3, 1).reshape(-1, 8)
    scores = (rows - rows.mean(0)) @ np.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:3].T
    for channel in range(3):
        expected = scaled(scores[:, channel])
        ours = found[..., channel].reshape(-1)
        assert min(np.abs(ours - expected).max(), np.abs(ours - scaled(-scores[:, channel])).max()) < 1e-3


def test_colours_follow_the_reference_on_other_grids_and_with_few_components():
    coarse = maps_of(0, side=2)
    fine = np.repeat(np.repeat(coarse, 2, axis=2), 2, axis=3)
    found = colours([fine, coarse, maps_of(2, num_channels=1)], 0)
    np.testing.assert_allclose(found[0][:, ::2, ::2], found[1], atol=0.05)
    assert found[2].shape == (3, 4, 4, 3)


def test_the_foreground_is_the_side_of_the_first_component_with_fewer_borders():
    scores = np.full((1, 5, 5, 3), 1.0)
    scores[:, 1:4, 1:4] = -1.0
    assert foreground(scores).sum() == 9
    assert np.array_equal(foreground(scores), foreground(-scores))


def test_mutual_matches_are_all_pairs_that_are_each_others_nearest():
    rng = torch.Generator().manual_seed(0)
    first, second = torch.randn(20, 6, generator=rng), torch.randn(15, 6, generator=rng)
    similarity = F.cosine_similarity(first[:, None], second[None], dim=2)
    expected = {
        (i, j) for i in range(20) for j in range(15) if similarity[i].argmax() == j and similarity[:, j].argmax() == i
    }
    found = mutual_matches(first, second)
    assert set(zip(found.first.tolist(), found.second.tolist(), strict=True)) == expected
    torch.testing.assert_close(found.similarity, similarity[found.first, found.second])
    assert found.similarity.tolist() == sorted(found.similarity.tolist(), reverse=True)


def reading_of(name, num_params, patches, size=16):
    pixels = np.zeros((len(patches), 1, size, size), np.uint8)
    return Reading(name, num_params, pixels, Maps(torch.zeros(len(patches), 2), patches, None))


def test_agreement_counts_the_matches_that_are_the_largest_networks_too():
    rng = torch.Generator().manual_seed(0)
    first = torch.randn(1, 64, 4, 4, generator=rng)
    order = torch.randperm(16, generator=rng)
    second = first.flatten(2)[:, :, order].reshape(first.shape)
    swapped = second.flatten(2)[:, :, [1, 0, *range(2, 16)]].reshape(first.shape)
    networks = [("small", 10), ("intact", 20), ("other grid", 5)]
    coarse = first[:, :, ::2, ::2]
    ours = [reading_of(*each, part) for each, part in zip(networks, (first, first, coarse), strict=True)]
    theirs = [reading_of(*each, part) for each, part in zip(networks, (swapped, second, coarse), strict=True)]
    small, intact, other = agreement(ours, theirs)
    assert (intact.num_matches, intact.num_shared, intact.share) == (16, 16, 1.0)
    assert (small.num_matches, small.num_shared, small.share) == (16, 14, 14 / 16)
    assert (other.num_shared, other.share) == (None, None)
    matches = [mutual_matches(part[0].flatten(1).T, first[0].flatten(1).T) for part in (first, second)]
    assert are_shared(*matches).tolist() == [bool(order[i] == i) for i in matches[0].first.tolist()]
    with pytest.raises(DataError, match="as many first as second"):
        draw_matches(ours, theirs[:2])


def test_a_heads_scores_are_the_logits_of_training_at_every_width():
    family = family_of(VITS["learned"])
    heads = ProjectionHeads(
        family.supernet.layout.features, HeadsConfig(hidden_dim=8, bottleneck_dim=4, num_prototypes=(5, 7))
    )
    heads.init_weights_(torch.Generator().manual_seed(0))
    for width in (16, 32):
        vectors = torch.randn(300, width, generator=torch.Generator().manual_seed(1))
        for number, expected in enumerate(heads(vectors, width)):
            found = head_scores(heads.heads[number], vectors, width)
            torch.testing.assert_close(found, expected.detach())


def test_clusters_stand_in_with_the_mean_direction_of_their_images():
    vectors = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    assigned = torch.tensor([0, 1, 2] * 3)
    found = cluster_scores(vectors, assigned)
    mean = F.normalize(vectors, dim=1)[assigned == 1].mean(dim=0)
    torch.testing.assert_close(found[:, 1], F.cosine_similarity(vectors, mean[None], dim=1))
    assert found.shape == (9, 3)


def test_the_most_used_prototypes_and_their_top_images_come_in_order():
    scores = torch.tensor([[0.1, 0.9, 0.2], [0.3, 0.8, 0.1], [0.2, 0.1, 0.7]])
    assert most_used(scores, 2).tolist() == [1, 2]
    assert most_used(scores, 5).tolist() == [1, 2, 0]
    assert top_images(scores, 2).tolist() == [[1, 2], [0, 1], [2, 0]]
    with pytest.raises(ConfigError, match="1 to the 3"):
        top_images(scores, 4)


def vectors_of(seed, num_images=24, num_channels=6):
    return torch.randn(num_images, num_channels, generator=torch.Generator().manual_seed(seed))


def test_maps_are_the_same_for_the_same_seed_and_keep_neighbours():
    centres = 8 * torch.eye(3, 6)
    vectors = vectors_of(0) * 0.1 + centres.repeat(8, 1)
    config = EmbeddingConfig(perplexity=5.0)
    found = [embed([vectors, vectors_of(1)], 0, config, seed=0) for _ in range(2)]
    assert np.array_equal(found[0][0], found[1][0])
    points = found[0][0]
    distance = np.linalg.norm(points[:, None] - points[None], axis=2) + 1e9 * np.eye(24)
    assert (distance.argmin(axis=1) % 3 == np.arange(24) % 3).all()
    np.testing.assert_allclose(points.mean(axis=0), 0, atol=1e-3)


def test_maps_start_alike_and_are_turned_to_fit_the_reference(monkeypatch):
    points = np.random.default_rng(0).normal(size=(24, 2)).astype(np.float32)
    starts = []

    def drawn(rows, start, perplexity, seed):
        starts.append(start)
        return [points, points @ rotation(2) * [1, -1] + 5]

    monkeypatch.setattr(embedding_module, "_tsne", drawn)
    one, other = embed([vectors_of(0), vectors_of(1)], 0, EmbeddingConfig(perplexity=5.0), seed=0)
    np.testing.assert_allclose(one, other, atol=1e-4)
    np.testing.assert_allclose(starts[0][:, 0].std(), 1e-4, rtol=1e-4)


def test_few_images_and_a_missing_umap_are_clear(monkeypatch):
    with pytest.raises(DataError, match="needs 5 images or more; got 3"):
        embed([vectors_of(0, num_images=3)], 0, EmbeddingConfig(), seed=0)
    with pytest.warns(PoaWarning, match="perplexity of 4 instead of 30"):
        embed([vectors_of(0, num_images=13)], 0, EmbeddingConfig(), seed=0)
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(DataError, match="pip install umap-learn"):
        EmbeddingConfig(map="umap").check()


def test_umap_is_given_the_start_the_seed_and_the_neighbours(monkeypatch):
    given = []

    class Fake:
        def __init__(self, **options):
            given.append(options)

        def fit_transform(self, rows):
            return rows[:, :2]

    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=Fake))
    config = EmbeddingConfig(map="umap", num_neighbors=4)
    one, other = embed([vectors_of(0), vectors_of(0)], 0, config, seed=3)
    assert np.array_equal(one, other)
    assert given[0]["n_neighbors"] == 4
    assert given[0]["random_state"] == given[1]["random_state"]
    np.testing.assert_allclose(given[0]["init"][:, 0].std(), 1, rtol=1e-4)


@pytest.mark.parametrize("num_channels", [1, 2, 3, 4])
def test_images_of_any_channels_are_shown_in_colour(num_channels):
    pixels = np.full((num_channels, 4, 4), 255, np.uint8)
    assert (colour_image(pixels) == 255).all()
    assert colour_image(pixels).shape == (4, 4, 3)
    shown = overlay(np.arange(4.0).reshape(2, 2), pixels)
    assert shown.shape == (96, 96, 3)
    assert 0 <= shown.min() < shown.max() <= 1


def test_timm_models_are_read_with_their_own_preprocessing():
    candidate = TimmCandidate(timm.create_model("test_vit", num_classes=0), "timm:test_vit", "x")
    (reading,) = read([candidate], [np.zeros((3, 160, 160), np.uint8)])
    expected = candidate.features(
        normalize(
            torch.zeros(1, 3, 160, 160, dtype=torch.uint8), candidate.preprocessing.mean, candidate.preprocessing.std
        )
    )
    torch.testing.assert_close(reading.maps.cls, expected.cls, rtol=1e-4, atol=1e-4)
