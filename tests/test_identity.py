"""A certificate says what it is about, and refuses another tower."""

import dataclasses

import pytest
import torch
from tiny_models import images, psm_model, smoothed_tower, vision_model
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from fs_psm_hf import SmoothedVisionTower, certify_features, certify_labels, certify_scores
from fs_psm_hf.certification.identity import model_hash, quantization


SETTINGS = {"psm": psm_model(), "sigma": 0.2, "num_samples": 2, "feature_layer": -2, "first_token": 1}


def certificate_of(tower, **options):
    (certificate,) = certify_features(tower, images(1), num_samples=100, epsilons=[0.01], **options)
    return certificate


@pytest.mark.parametrize("kind", ["clip", "projection", "siglip", "dinov2"])
def test_the_same_tower_is_accepted_also_after_a_reload(kind, tmp_path):
    tower = smoothed_tower(kind, psm_model())
    certificate = certificate_of(tower)
    certificate.verify(tower)
    certificate.verify(tower, images(3))
    tower.save_pretrained(tmp_path)
    again = SmoothedVisionTower.from_pretrained(tmp_path)
    certificate.verify(again)
    again.save_pretrained(tmp_path / "again")
    certificate.verify(SmoothedVisionTower.from_pretrained(tmp_path / "again"))


def change(tower, name):
    with torch.no_grad():
        for parameter in tower.get_submodule(name).parameters():
            parameter.view(-1)[0] += 1e-6
            return


def in_another_class(module, difference=0.0):
    """One weight as a tensor of a class, which is how torchao quantises; this one holds two tensors."""
    layer = next(child for child in module.modules() if isinstance(child, nn.Linear))
    weight = layer.weight.detach()
    layer.weight = nn.Parameter(TwoTensor(weight.clone(), weight + difference))


@pytest.mark.parametrize(
    ("alter", "named"),
    [
        (lambda t: change(t, "vision_tower"), "model_hash"),
        (lambda t: change(t, "psm.purifier"), "model_hash"),
        (lambda t: change(t, "psm.mapper"), "model_hash"),
        (lambda t: setattr(t.config.vision_config, "layer_norm_eps", 1e-3), "model_hash"),
        (lambda t: setattr(t.config.vision_config, "hidden_act", "relu"), "model_hash"),
        (lambda t: t.to(torch.bfloat16), "dtype"),
        (lambda t: t.vision_tower.set_attn_implementation("eager"), "attention"),
        (lambda t: t.compile(backend="eager"), "compiled"),
        (lambda t: in_another_class(t.psm.purifier), "quantization"),
        (lambda t: setattr(t.config, "sigma", 0.3), "sigma"),
        (lambda t: setattr(t.config, "num_samples", 8), "num_samples"),
        (lambda t: setattr(t.config, "feature_layer", -1), "feature_layer"),
        (lambda t: setattr(t.config, "first_token", 0), "first_token"),
        (lambda t: setattr(t.config, "aggregation", "mean"), "aggregation"),
        (lambda t: setattr(t.config, "image_std", [0.5, 0.5, 0.5]), "image_std"),
    ],
)
def test_a_tower_that_differs_is_refused_by_name(alter, named):
    tower = smoothed_tower(**SETTINGS)
    certificate = certificate_of(tower)
    alter(tower)
    with pytest.raises(ValueError, match=f"`tower` is not the certified one: `{named}` was"):
        certificate.verify(tower)


def test_another_size_of_image_is_refused():
    tower = smoothed_tower(**SETTINGS)
    with pytest.raises(ValueError, match=r"`image_size` was \(16, 16\), this tower has \(32, 32\)"):
        certificate_of(tower).verify(tower, images(1, size=32))


def test_a_tower_in_training_mode_and_half_precision_pixels_are_refused():
    tower = smoothed_tower(**SETTINGS)
    certificate = certificate_of(tower)
    with pytest.raises(ValueError, match="`pixel_values` must be float32, as they were certified, got torch.bfloat16"):
        certificate.verify(tower, images(1).bfloat16())
    tower.psm.train()
    with pytest.raises(ValueError, match="`tower` must be in evaluation mode"):
        certificate.verify(tower)


def test_a_certificate_of_scores_alone_is_about_no_tower():
    with pytest.raises(ValueError, match="does not record the model"):
        certify_scores([0.9] * 200, sigma=0.2).verify(smoothed_tower(**SETTINGS))


def test_a_purifier_of_yours_enters_by_class_and_weights():
    class Blur(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(weight))

        def denoise(self, images, sigma):
            return images * self.weight

    class Other(Blur):
        """Other code under another name."""

    def build(purifier):
        return SmoothedVisionTower.from_components(
            vision_model(), purifier, sigma=0.2, image_mean=[0.5] * 3, image_std=[0.5] * 3
        )

    hashes = [model_hash(build(purifier)) for purifier in (Blur(0.9), Blur(0.9), Blur(0.8), Other(0.9))]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_where_the_seed_came_from_is_recorded():
    tower = smoothed_tower(**SETTINGS)
    drawn, given = certificate_of(tower), certificate_of(tower, generator=7)
    assert (drawn.seed_source, given.seed_source, given.seed) == ("os", "given", 7)
    assert dataclasses.replace(certificate_of(tower, generator=drawn.seed), seed_source="os") == drawn


def test_a_label_certificate_is_held_against_a_tower_too():
    tower = smoothed_tower("projection")
    texts = nn.functional.normalize(torch.randn(3, 24), dim=-1)
    (certificate,) = certify_labels(tower, images(1), texts, num_samples=200)
    certificate.verify(tower)
    tower.config.sigma = 0.4
    with pytest.raises(ValueError, match="`sigma` was 0.1, this tower has 0.4"):
        certificate.verify(tower)


def test_the_mode_is_recorded_and_an_older_certificate_was_not_compiled():
    tower = smoothed_tower(sigma=0.2)
    tower.compile(backend="eager")
    certificate = certificate_of(tower)
    assert certificate.compiled == "eager"
    assert certificate.quantization is None
    certificate.verify(tower)
    with pytest.raises(ValueError, match="`compiled` was 'eager', this tower has None"):
        certificate.verify(smoothed_tower(sigma=0.2))
    values = certificate_of(smoothed_tower(sigma=0.2)).to_dict()
    del values["compiled"], values["quantization"]
    type(certificate).from_dict(values).verify(smoothed_tower(sigma=0.2))


def test_weights_of_another_class_are_named_and_hashed_by_what_they_hold():
    def build(difference=0.0):
        tower = smoothed_tower(psm=psm_model())
        in_another_class(tower.psm.purifier, difference)
        return tower

    assert quantization(build()) == "TwoTensor in psm.purifier"
    assert model_hash(build()) == model_hash(build())
    assert len({model_hash(t) for t in (build(), build(1.0), smoothed_tower(psm=psm_model()))}) == 3
