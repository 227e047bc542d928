"""What a tower refuses, in one sentence that names the value and what is allowed."""

import pytest
import torch
from tiny_models import MEAN, STD, images, psm_model, smoothed_tower
from torch import nn

from fs_psm_hf import PSMConfig, SmoothedVisionTower


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sigma": -0.1}, "`sigma` must be a finite number >= 0 in .* got -0.1"),
        ({"sigma": float("inf")}, "`sigma`"),
        ({"num_samples": 0}, "`num_samples` must be an integer >= 1, got 0"),
        ({"num_samples": 2.0}, "`num_samples`"),
        ({"max_batch_size": 0}, "`max_batch_size`"),
        ({"image_mean": None, "image_std": None}, "`image_mean` is missing"),
        ({"image_std": [1, 1]}, "`image_std` must be three finite numbers"),
        ({"feature_layer": 9}, r"`feature_layer` must be in \[-5, 4\].*got 9"),
        ({"feature_layer": [-2, -6]}, r"`feature_layer`.*got \[-2, -6\]"),
        ({"feature_layer": 1.5}, "`feature_layer` must be an integer, a list of integers or None, got 1.5"),
        ({"first_token": -1}, "`first_token` must be an integer >= 0, got -1"),
        ({"image_mean": 0.5}, "`image_mean` must be three finite numbers, got 0.5"),
        ({"aggregation": "median"}, "`aggregation` must be one of unit, mean, got 'median'"),
    ],
)
def test_bad_settings_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        smoothed_tower(**options)


def test_a_mapper_of_another_width_is_named():
    with pytest.raises(ValueError, match=r"must be 32, the width of the tower's feature, got 64"):
        smoothed_tower(psm=psm_model(width=64))


def test_wrong_kinds_are_named():
    with pytest.raises(TypeError, match="`vision_tower` must be a transformers PreTrainedModel, got Linear"):
        SmoothedVisionTower.from_components(nn.Linear(2, 2), None, image_mean=MEAN, image_std=STD)
    with pytest.raises(TypeError, match="`psm` must be a PSMModel, None or .* got Linear"):
        smoothed_tower(psm=nn.Linear(2, 2))


def test_unknown_parts_are_named():
    with pytest.raises(Exception, match="`purifier` must be one of none, diffusion, unet, got 'gan'"):
        PSMConfig(purifier="gan")
    with pytest.raises(Exception, match="`mapper_feature` must be one of tokens, pooled, got 'x'"):
        PSMConfig(mapper_feature="x")


def test_no_class_token_is_named():
    with pytest.raises(ValueError, match="no class token"):
        next(smoothed_tower("siglip").sample_features(images(), 2, feature="cls"))
    with pytest.raises(ValueError, match="`feature` must be one of tokens, pooled, cls, got 'x'"):
        next(smoothed_tower().sample_features(images(), 2, feature="x"))


@pytest.mark.parametrize("call", ["forward", "sample_features", "clean_features"])
@pytest.mark.parametrize(
    ("pixels", "error"),
    [
        (torch.full((1, 3, 16, 16), float("nan")), ValueError),
        (torch.zeros(1, 1, 16, 16), ValueError),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), TypeError),
    ],
)
def test_bad_pixels_are_refused_at_every_door(call, pixels, error):
    options = {"num_samples": 2} if call == "sample_features" else {}
    with pytest.raises(error, match="`pixel_values` must"):
        getattr(smoothed_tower(), call)(pixels, **options)


@pytest.mark.parametrize(("name", "value"), [("sigma", -0.5), ("sigma", float("nan")), ("num_samples", 0)])
def test_a_setting_spoilt_later_never_serves_the_raw_tower(name, value):
    tower = smoothed_tower()
    tower.config.__dict__[name] = value
    for call in (lambda: tower(images()), lambda: tower.sample_features(images(), tower.config.num_samples)):
        with pytest.raises(ValueError, match=f"`{name}`"):
            call()


def test_layers_out_of_range_and_missing_tokens_are_named():
    with pytest.raises(ValueError, match="asks for layer 8"):
        smoothed_tower(feature_layer=3)(images(), output_hidden_states=8)
    for count in (1, 3):
        with pytest.raises(ValueError, match="`first_token` must be below the number of tokens, 17, got 99"):
            smoothed_tower(feature_layer=3, first_token=99, num_samples=count)(images())


def test_a_size_the_wrapped_tower_refuses_is_refused():
    with pytest.raises(ValueError, match=r"20\*20.*16\*16|\(20.*16"):
        smoothed_tower(psm=psm_model())(images(size=20))
