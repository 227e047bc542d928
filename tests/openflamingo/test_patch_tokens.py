"""The tower of an OpenFlamingo by itself, which needs no open_flamingo."""

import pytest
import torch
from tiny_models import MEAN, STD, WIDTH, images, psm_model, vision_model
from transformers import AutoModel

from fs_psm_hf import PSMConfig, PSMModel, SmoothedVisionTower, certify_features
from fs_psm_hf.openflamingo import (
    CLIPPatchTokensConfig,
    CLIPVisionModelWithPatchTokens,
    attach_flamingo,
    detach_flamingo,
    is_flamingo,
    prepare_open_flamingo,
    warn_of_plain_gelu,
)
from fs_psm_hf.training.tower import FrozenTower


PATCHES = 16


def patch_tokens(seed=0):
    """A tiny tower with a last LayerNorm that is not the identity, and the CLIP it shares every weight with."""
    clip = vision_model("clip", seed)
    with torch.no_grad():
        clip.post_layernorm.weight.copy_(torch.linspace(0.5, 2, WIDTH))
        clip.post_layernorm.bias.copy_(torch.linspace(-1, 1, WIDTH))
    fields = {name: value for name, value in clip.config.to_dict().items() if name != "model_type"}
    model = CLIPVisionModelWithPatchTokens(CLIPPatchTokensConfig(**fields)).eval()
    model.vision_model = clip
    return model, clip


def tower(psm=None, **options):
    settings = {"sigma": 0.1, "num_samples": 3, "image_mean": MEAN, "image_std": STD} | options
    return SmoothedVisionTower.from_components(patch_tokens()[0], psm, **settings)


def patch_psm(purifier="none"):
    """A PSM as `--post_layernorm true` makes them: its mapper has no leading token to leave out."""
    fields = psm_model(purifier).config.to_dict()
    fields["mapper_config"] = fields["mapper_config"] | {"num_prefix_tokens": 0}
    torch.manual_seed(2)
    psm = PSMModel(PSMConfig.from_dict(fields)).eval()
    with torch.no_grad():
        for name, parameter in psm.mapper.named_parameters():
            if name.endswith("scale"):
                parameter.fill_(0.2)
    return psm


def normed(clip, pixel_values):
    """Patch tokens after the last LayerNorm, by its formula."""
    states = clip(pixel_values).last_hidden_state[:, 1:]
    centred = states - states.mean(-1, keepdim=True)
    norm = clip.post_layernorm
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


@torch.no_grad()
def test_the_tokens_are_those_after_the_last_layernorm():
    model, clip = patch_tokens()
    output = model(images(2))
    assert set(output) == {"last_hidden_state"}
    torch.testing.assert_close(output.last_hidden_state, normed(clip, images(2)))
    (tokens,) = model(images(2), return_dict=False)
    assert torch.equal(tokens, output.last_hidden_state)


@torch.no_grad()
def test_smoothing_without_noise_is_the_tower():
    smoothed = tower(sigma=0, num_samples=1)
    assert torch.equal(smoothed(images(2)).last_hidden_state, patch_tokens()[0](images(2)).last_hidden_state)


@torch.no_grad()
def test_what_is_trained_is_what_is_served():
    """The feature of the losses of `--post_layernorm true`, the mapper's input too, is the one smoothed here."""
    plain = SmoothedVisionTower.from_components(patch_tokens()[1], image_mean=MEAN, image_std=STD)
    trained, psm, sigma = FrozenTower(plain, "tokens", post_layernorm=True), patch_psm(), 0.2
    smoothed, noisy = tower(psm, sigma=sigma, num_samples=1), []
    smoothed.vision_tower.vision_model.embeddings.register_forward_pre_hook(lambda _, given: noisy.append(given[0]))
    served = smoothed(images(2)).last_hidden_state
    raw = trained.raw(noisy[0] * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1))
    update = psm.mapper(raw, sigma)
    torch.testing.assert_close(served, raw + update, rtol=0, atol=1e-4)
    assert update.abs().max() > 0.01


@pytest.mark.parametrize("feature", ["pooled", "cls"])
def test_there_are_no_other_features(feature):
    with pytest.raises(ValueError, match="`feature` must not be"):
        certify_features(tower(), images(1), num_samples=200, feature=feature)


def test_the_certified_feature_is_all_patch_tokens():
    model, clip = patch_tokens()
    with torch.no_grad():
        expected = torch.nn.functional.normalize(normed(clip, images(2)).flatten(1), dim=-1)
    smoothed = tower(sigma=0.05)
    torch.testing.assert_close(smoothed.clean_features(images(2)), expected)
    assert smoothed.serves("tokens")
    (certificate,) = certify_features(smoothed, images(1), epsilons=[0.05], num_samples=400, generator=3)
    draws = next(iter(smoothed.sample_features(images(1), 400, generator=9)))[0]
    scores = (1 + (draws @ expected[0])) / 2
    # Two streams of noise: the means of 400 draws of a score within a few standard errors of each other.
    error = 5 * scores.std() / len(scores) ** 0.5
    assert abs(scores.mean() - certificate.robustness_score) < error
    assert certificate.deployed is not None


@torch.no_grad()
def test_a_saved_tower_reloads_exactly(tmp_path):
    smoothed = tower(patch_psm("unet"))
    expected = smoothed(images(2), generator=4).last_hidden_state
    assert expected.shape == (2, PATCHES, WIDTH)
    for name in ("first", "second"):
        smoothed.save_pretrained(tmp_path / name)
        smoothed = AutoModel.from_pretrained(tmp_path / name)
        assert type(smoothed.vision_tower) is CLIPVisionModelWithPatchTokens
        torch.testing.assert_close(smoothed(images(2), generator=4).last_hidden_state, expected, rtol=0, atol=1e-6)


def test_only_a_flamingo_is_one():
    class Flamingo(torch.nn.Module):
        """Not open_flamingo's."""

    for host in (Flamingo(), vision_model()):
        assert not is_flamingo(host)
        for call in (attach_flamingo, detach_flamingo, warn_of_plain_gelu):
            with pytest.raises(ValueError, match=r"`host` must be a Flamingo of open_flamingo, got (Flam|CLIP)"):
                call(host)


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "open_flamingo", None)
    with pytest.raises(ImportError, match=r"`open_flamingo` must be installed.*--no-deps open-flamingo==2\.0\.1"):
        prepare_open_flamingo()
