"""Smoothed classifiers: what `CLIPModel`, `SiglipModel` and their image classification models answer is what is certified."""

import copy
import math

import pytest
import torch
from clip_hosts import STATISTICS, TEXT, answer, each_kind, host_model, read_by
from tiny_models import SHAPE, SIZE, STD, images, llava, psm_model, vision_model
from torch import nn
from transformers import (
    CLIPVisionModelWithProjection,
    Siglip2Config,
    Siglip2Model,
)

from fs_psm_hf import SmoothedVisionTower, attach, certify_features, certify_labels
from fs_psm_hf.certification.identity import model_hash
from fs_psm_hf.noise import gaussian_noise
from fs_psm_hf.zero_shot import attach_clip, detach_clip, is_clip_host


@each_kind
@torch.no_grad()
def test_without_noise_the_host_answers_as_before_and_detach_gives_it_back(kind, tmp_path):
    host, pixels = host_model(kind), images(3)
    assert is_clip_host(host)
    before, keys = answer(host, pixels), dict(host.state_dict())
    vision, projection = host.vision_model, getattr(host, "visual_projection", None)
    vision.train()
    tower = attach_clip(host, sigma=0.0, num_samples=1, **STATISTICS)
    assert torch.equal(answer(host, pixels), before)
    assert isinstance(tower, SmoothedVisionTower)
    assert tower is host.vision_model.tower
    rest = {name for name in keys if not name.startswith(("vision_model.", "visual_projection."))}
    assert {name for name in host.state_dict() if not name.startswith("vision_model.")} == rest
    # Nothing was copied.
    pointers = {parameter.data_ptr() for parameter in host.parameters()}
    assert {tensor.data_ptr() for name, tensor in keys.items() if not name.endswith("position_ids")} == pointers
    assert detach_clip(host) is vision
    assert host.vision_model is vision
    assert vision.training
    assert getattr(host, "visual_projection", None) is projection
    after = host.state_dict()
    assert list(after) == list(keys)
    assert all(torch.equal(after[name], tensor) for name, tensor in keys.items())
    host.eval().save_pretrained(tmp_path)
    assert torch.equal(answer(type(host).from_pretrained(tmp_path), pixels), before)


@each_kind
@torch.no_grad()
def test_each_draw_is_what_the_host_classifies(kind):
    """By hand on a plain copy: the noise of each draw, what the host reads of it, unit vectors, their mean."""
    sigma, draws, pixels = 1.0, 5, images(2)
    plain, host = host_model(kind), host_model(kind)
    tower = attach_clip(host, sigma=sigma, num_samples=draws, **STATISTICS)
    std = torch.tensor(STD).view(3, 1, 1)
    for i in range(2):
        noise = gaussian_noise((3, SIZE, SIZE), 11, [i], 0, draws, "cpu")
        read = read_by(plain, pixels[[i]] + noise * sigma / std)  # (n, D)
        if kind.endswith("images"):
            # The mean of the tokens m, in the place where the weights 1/‖[m, 1]‖ pull it.
            weights = 1 / (read.square().sum(-1, keepdim=True) + 1).sqrt()
            expected = (weights * read).sum(0) / weights.sum()
            found = tower(pixels, generator=11).pooler_output[i]
            assert torch.allclose(found[:-1] / found[-1], expected, rtol=0, atol=1e-5)
            logits = host(pixels, generator=11).logits[i]
            assert torch.allclose(logits, plain.classifier(expected), atol=1e-5)
        else:
            expected = nn.functional.normalize(nn.functional.normalize(read, dim=-1).mean(0), dim=-1)
            found = host.get_image_features(pixels, generator=11).pooler_output[i]
            assert torch.allclose(nn.functional.normalize(found, dim=-1), expected, rtol=0, atol=1e-6)
            assert torch.allclose(found.norm(), read.norm(dim=-1).mean(), rtol=1e-5)
    if kind == "clip":
        # Smoothing before the projection would be another classifier.
        pooled = plain.vision_model(pixel_values=pixels[[1]] + noise * sigma / std).pooler_output
        other = plain.visual_projection(nn.functional.normalize(pooled, dim=-1).mean(0))
        assert (nn.functional.normalize(other, dim=-1) - expected).abs().max() > 2e-4


@torch.no_grad()
def test_the_tower_of_a_clip_is_that_of_its_vision_model_with_projection(tmp_path):
    host = host_model("clip")
    psm = psm_model(mapper=False)
    tower = attach_clip(host, psm, sigma=0.1, **STATISTICS)
    separate = CLIPVisionModelWithProjection._from_config(tower.config.vision_config)
    assert separate.config.projection_dim == 24
    plain = host_model("clip")
    separate.vision_model, separate.visual_projection = plain.vision_model, plain.visual_projection
    other = SmoothedVisionTower.from_components(separate, psm, sigma=0.1, **STATISTICS)
    assert model_hash(other) == model_hash(tower)
    pixels = images(2)
    embeds = other(pixels, generator=4).image_embeds
    assert torch.equal(host.get_image_features(pixels, generator=4).pooler_output, embeds)
    outputs = host(input_ids=torch.tensor([[1, 5, 3]]), pixel_values=pixels, generator=4)
    assert torch.allclose(outputs.image_embeds, nn.functional.normalize(embeds, dim=-1))
    host.set_attn_implementation("eager")
    assert tower.config.vision_config._attn_implementation == "eager"


@each_kind
@torch.no_grad()
def test_the_tower_is_saved_and_the_host_is_not(kind, tmp_path):
    host, pixels = host_model(kind), images(2)
    tower = attach_clip(host, psm_model(mapper=False), sigma=0.1, num_samples=3, **STATISTICS)
    for one in (host, copy.deepcopy(host)):
        with pytest.raises(ValueError, match=r"cannot be saved, .* save the tower that `attach` returned") as error:
            one.save_pretrained(tmp_path / "host")
        assert "\n" not in str(error.value)
        assert type(host).__name__ in str(error.value)
    with pytest.raises(ValueError, match="cannot be saved"):
        host.push_to_hub("nobody/nothing")
    assert not (tmp_path / "host").exists()
    for saver, name in ((tower, "tower"), (host.vision_model, "vision")):
        saver.save_pretrained(tmp_path / name)
        reloaded = SmoothedVisionTower.from_pretrained(tmp_path / name)
        assert torch.equal(reloaded(pixels, generator=5)["pooler_output" if kind != "clip" else "image_embeds"],
                           tower(pixels, generator=5)["pooler_output" if kind != "clip" else "image_embeds"])  # fmt: skip
        assert model_hash(reloaded) == model_hash(tower)


def test_a_deep_copy_is_smoothed_and_detached_by_itself():
    host = host_model("clip")
    attach_clip(host, sigma=0.1, **STATISTICS)
    other = copy.deepcopy(host)
    plain = detach_clip(other)
    assert plain is other.vision_model
    assert isinstance(other.visual_projection, nn.Linear)
    assert list(other.state_dict()) == list(host_model("clip").state_dict())
    with pytest.raises(ValueError, match="smoothed already"):
        attach_clip(host, **STATISTICS)


# Mappers and refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "width"), [("clip", 24), ("siglip", 32)])
@torch.no_grad()
def test_a_mapper_of_the_embedding_is_taken(kind, width):
    host, pixels = host_model(kind), images(2)
    plain = read_by(host, pixels)
    psm = psm_model("none", feature="pooled", width=width)
    tower = attach_clip(host, psm, sigma=0.0, num_samples=1, **STATISTICS)
    expected = plain + psm.mapper(plain, 0.0)
    found = host.get_image_features(pixels).pooler_output
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)
    # The draws that are certified are those of the mapped embedding.
    with tower.smoothing(sigma=0.1):
        (certificate,) = certify_features(host, pixels[:1], num_samples=200, generator=1)
        served = host.get_image_features(pixels[:1], generator=1, image_ids=[0]).pooler_output
        (draw,) = tower.sample_features(pixels[:1], 1, "pooled", 1, [0])
    assert certificate.feature == "pooled"
    assert torch.allclose(nn.functional.normalize(served, dim=-1), draw[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("clip", {"psm": psm_model("none", feature="pooled", width=32)}, r"must be 24, the width of the tower's pooled"),
        ("siglip", {"psm": psm_model("none", feature="pooled", width=24)}, r"must be 32, the width of the tower's pooled"),
        ("clip", {"psm": psm_model("none")}, "`psm` must have a mapper of 'pooled' for a CLIPModel"),
        ("clip_images", {"psm": psm_model("none", feature="pooled")}, "`psm` must have no mapper for a CLIPForImageClass"),
        ("siglip_images", {"psm": psm_model("none")}, "got a mapper of 'tokens'"),
        ("clip", {"feature_layer": -2}, "`feature_layer` must be None for a CLIPModel, .* got -2"),
        ("siglip", {"sigma": -1.0}, "`sigma` must be a finite number >= 0"),
        ("clip_images", {"image_mean": None, "image_std": None}, "`image_mean`"),
    ],
)  # fmt: skip
def test_a_refused_attach_changes_nothing(kind, options, message):
    host, pixels = host_model(kind), images(2)
    before, modules = answer(host, pixels), list(host.modules())
    with pytest.raises(ValueError, match=message) as error:
        attach_clip(host, **STATISTICS | options)
    assert "\n" not in str(error.value)
    assert list(host.modules()) == modules
    assert "save_pretrained" not in host.__dict__
    assert torch.equal(answer(host, pixels), before)


def test_hosts_that_are_none():
    config = Siglip2Config(
        text_config=TEXT | {"hidden_size": 32, "projection_size": 32},
        vision_config={name: value for name, value in SHAPE.items() if name != "image_size"} | {"num_patches": 16},
    )
    patches = Siglip2Model(config)
    assert is_clip_host(patches)
    with pytest.raises(ValueError, match="`host` must take images, got a Siglip2Model, whose processor cuts them"):
        attach_clip(patches, **STATISTICS)
    plain = vision_model("clip")
    assert not is_clip_host(plain)
    for act in (attach_clip, detach_clip):
        with pytest.raises(ValueError, match="`host` must be one of CLIPModel, SiglipModel, .* got CLIPVisionModel"):
            act(plain)
    with pytest.raises(ValueError, match="must have a smoothed vision model, got a CLIPModel with a CLIPVisionModel"):
        detach_clip(host_model("clip"))


def test_a_new_head_survives_detach_and_a_new_projection_is_not_lost():
    host = host_model("clip_images")
    attach_clip(host, sigma=0.1, **STATISTICS)
    head = host.classifier = nn.Linear(32, 9)
    detach_clip(host)
    assert host.classifier is head
    host = host_model("clip")
    tower = attach_clip(host, sigma=0.1, **STATISTICS)
    other = host.visual_projection = nn.Linear(24, 24)
    with pytest.raises(ValueError, match="`host.visual_projection` must be as `attach` left it, .* got a Linear"):
        detach_clip(host)
    assert host.visual_projection is other
    assert host.vision_model.tower is tower


# Certificates ---------------------------------------------------------------------------------------------------------


def test_certificates_of_a_host_are_those_of_its_tower():
    host, pixels = host_model("clip"), images(2)
    tower = attach_clip(host, sigma=0.05, **STATISTICS)
    texts = nn.functional.normalize(torch.randn(3, 24), dim=-1)
    options = {"num_samples": 200, "generator": 3}
    assert certify_labels(host, pixels, texts, **options) == certify_labels(tower, pixels, texts, **options)
    found = certify_features(host, pixels, **options)
    assert found == certify_features(tower, pixels, feature="pooled", **options)
    assert found != certify_features(tower, pixels, **options)
    assert found[0].deployed is not None
    # What a LLaVA reads are tokens.
    model = llava()
    smoothed = attach(model, sigma=0.05, **STATISTICS)
    assert certify_features(model, pixels, **options) == certify_features(smoothed, pixels, **options)


@pytest.mark.parametrize("kind", ["clip_images", "siglip_images"])
def test_the_label_of_a_head_with_a_bias_is_that_of_the_host(kind):
    host, pixels = host_model(kind), images(2)
    tower = attach_clip(host, sigma=0.05, num_samples=4, **STATISTICS)
    with torch.no_grad():
        # Two classes with the boundary half-way between the two images, tilted towards what both have in common: the two
        # logits differ by a large product less a large bias.
        lifted = torch.stack([tower(pixels, generator=seed).pooler_output for seed in range(8)]).mean(0)
        mean = lifted[:, :-1] / lifted[:, -1:]  # (2, 32)
        middle, apart = mean.mean(0), mean[0] - mean[1]
        common = middle - (middle @ apart) / (apart @ apart) * apart
        normal = apart + 6 * common
        host.classifier.weight[:2] = torch.stack([normal, -normal])
        host.classifier.bias[:2] = torch.stack([-(normal @ middle), normal @ middle])
        host.classifier.weight[2:] = 0.01 * torch.randn(2, 32)
        host.classifier.bias[2:] = -50.0
    certificates = certify_labels(host, pixels, head=host.classifier, num_samples=1500, generator=3, beta=0.3)
    assert certificates == certify_labels(tower, pixels, head=host.classifier, num_samples=1500, generator=3, beta=0.3)
    served = torch.stack([host(pixels, generator=seed).logits for seed in range(60)]).argmax(-1)
    for i, certificate in enumerate(certificates):
        assert certificate.label == i
        assert not certificate.abstained
        assert 0.0 < certificate.deployed.radius < certificate.radius < math.inf
        assert (served[:, i] != i).float().mean() <= 0.3
    # On the unit mean itself the same head has another label: the bias would weigh as many times more as the mean is long.
    with torch.no_grad():
        assert len(set(host.classifier(nn.functional.normalize(mean, dim=-1)).argmax(-1).tolist())) == 1
    # Nothing in the ball changes it: the steepest descent of the margin is the worst that a step can do.
    moving = pixels.clone().requires_grad_()
    logits = host(moving, generator=1).logits
    (logits[0, 0] - logits[0, 1] + logits[1, 1] - logits[1, 0]).backward()
    std = torch.tensor(STD).view(3, 1, 1)
    step = moving.grad / std
    step = -step / step.flatten(1).norm(dim=1)[:, None, None, None]
    radii = torch.tensor([c.radius for c in certificates]).view(2, 1, 1, 1)
    with torch.no_grad(), tower.smoothing(num_samples=400):
        assert host(pixels + 0.99 * radii * step / std, generator=2).logits.argmax(-1).tolist() == [0, 1]


def test_a_head_without_a_bias_and_heads_that_do_not_fit():
    host, pixels = host_model("clip_images"), images(1)
    tower = attach_clip(host, sigma=0.05, **STATISTICS)
    head = nn.Linear(32, 3, bias=False)
    (certificate,) = certify_labels(tower, pixels, head=head, num_samples=300, generator=3)
    draws = torch.cat(list(tower.sample_features(pixels, 300, "pooled", 3, [0])), 1)[0]
    with torch.no_grad():
        assert certificate.label == head(draws[:, :-1]).mean(0).argmax()
    with pytest.raises(
        ValueError, match="`head` must have 32 values per class, the width of `feature` 'pooled', got 33"
    ):
        certify_labels(tower, pixels, head=nn.Linear(33, 3), num_samples=300)
    with pytest.raises(ValueError, match="`text_embeds` must have 33 values per class"):
        certify_labels(host, pixels, nn.functional.normalize(torch.randn(3, 32), dim=-1), num_samples=300)


def test_a_half_precision_host_is_certified_as_it_is_served():
    host = host_model("clip", dtype=torch.bfloat16)
    tower = attach_clip(host, psm_model(mapper=False), sigma=0.05, **STATISTICS)
    assert host.get_image_features(images(1)).pooler_output.dtype == torch.bfloat16
    embed = nn.functional.normalize(tower(images(1), generator=1).image_embeds.float(), dim=-1)
    texts = nn.functional.normalize(torch.cat([embed, torch.randn(2, 24)]), dim=-1)
    (certificate,) = certify_labels(host, images(1), texts, num_samples=300, generator=1)
    assert (certificate.label, certificate.dtype) == (0, "bfloat16")


# The trained model ----------------------------------------------------------------------------------------------------
