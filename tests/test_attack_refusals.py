import warnings

import pytest
import torch
from attack_runs import adaptive_encoder, defended_tower, pictures, plain_encoder, run
from tiny_models import smoothed_tower, vision_model
from torch import nn

from fs_psm_hf.attacks import AttackWarning, Encoder, attack, expected_objective


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "fgsm"},
            "`method` must be one of attackvlm, m_attack, m_attack_global, foa, pgd, apgd, got 'fgsm'",
        ),
        ({"norm": "l1"}, "`norm` must be 'linf' or 'l2', got 'l1'"),
        ({"epsilon": 0}, r"`epsilon` must be in \(0, 1\], in \[0, 1\]-pixel units of linf, .* got 0"),
        ({"epsilon": 16}, r"`epsilon` must be in \(0, 1\].* got 16"),
        ({"epsilon": float("nan")}, r"`epsilon` must be in \(0, 1\].* got nan"),
        ({"epsilon": 30, "norm": "l2"}, r"`epsilon` must be in \(0, 27.71\], in \[0, 1\]-pixel units of l2"),
        (
            {"epsilon": 0.001},
            "`epsilon` must be at least 1/255 with `eight_bit=True`, or nothing can change, got 0.001",
        ),
        ({"steps": 0}, "`steps` must be an integer >= 1, got 0"),
        ({"save_every": 2.5}, "`save_every` must be an integer >= 1, got 2.5"),
        ({"step_size": 0.0}, "`step_size` must be a finite number > 0"),
        ({"step_size": True}, "`step_size` must be a finite number > 0"),
        ({"generator": -1}, "`generator` as a seed must be in"),
        ({"image_ids": [1]}, "`image_ids` must name each of the 2 images, got 1 ids"),
        ({"targets": None}, "`targets` must be given for the targeted method 'foa'"),
        ({"method": "apgd"}, "`targets` must be None for the untargeted method 'apgd'"),
        ({"targets": pictures(1)}, "`targets` must hold one image for each of the 2 images, got 1"),
        ({"targets": pictures(2, size=20)}, r"`targets` must have the size of the images, \(16, 16\), got \(20, 20\)"),
        ({"targets": pictures(2) + 0.5}, r"`targets` must be pixels in \[0, 1\], got 0.5 to 1.5"),
        ({"images": pictures(2) - 0.5}, r"`images` must be pixels in \[0, 1\], got -0.5 to 0.5"),
        ({"images": pictures(2)[0]}, "`images` must have shape .batch_size, 3, height, width., got .3, 16, 16."),
        ({"images": pictures(2) * float("nan")}, "`images` must be finite, got NaN or Inf"),
        (
            {"images": pictures(2) * 0.9 + 0.01, "norm": "l2"},
            "`images` must be multiples of 1/255 for `eight_bit=True` in",
        ),
        (
            {"encoders": [plain_encoder(), adaptive_encoder()]},
            "`encoders` must have one mode, got 'transfer' and 'adapt",
        ),
        (
            {"encoders": adaptive_encoder(feature="pooled"), "method": "m_attack"},
            "`feature` must be the one the mapper",
        ),
    ],
)
def test_bad_arguments_are_refused(options, message):
    arguments = {
        "encoders": plain_encoder(),
        "images": pictures(2),
        "targets": pictures(2, seed=9),
        "steps": 2,
    } | options
    with pytest.raises(ValueError, match=message):
        attack(**arguments)


def test_other_kinds_of_arguments_are_refused():
    images, targets = pictures(2), pictures(2, seed=9)
    with pytest.raises(TypeError, match="`encoders` must be an Encoder or a list of them, got CLIPVisionModel"):
        attack(vision_model(), images, targets)
    with pytest.raises(TypeError, match="`encoders` must be an Encoder or a list of them, got list"):
        attack([], images, targets)
    with pytest.raises(TypeError, match="`images` must be a float32 tensor of pixels in .0, 1., got torch.uint8"):
        attack(plain_encoder(), (images * 255).to(torch.uint8), targets)
    with pytest.raises(TypeError, match="`targets` must be a float32 tensor of pixels in .0, 1., got list"):
        attack(plain_encoder(), images, targets.tolist())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": None}, "`targets` must be given: the target images, or the clean ones of an untargeted method"),
        (
            {"targets": pictures(1)},
            r"`targets` must have the shape of the images, \(2, 3, 16, 16\), got \(1, 3, 16, 16\)",
        ),
        ({"samples": 0}, "`samples` must be an integer >= 1, got 0"),
    ],
)
def test_bad_arguments_of_the_expectation_are_refused(options, message):
    arguments = {"encoders": plain_encoder(), "images": pictures(2), "targets": pictures(2, seed=9)} | options
    with pytest.raises(ValueError, match=message):
        expected_objective(**arguments)


def test_a_model_in_training_mode_is_refused_also_later():
    model = vision_model()
    encoder = Encoder(model, mode="transfer", image_mean=[0.5] * 3, image_std=[0.5] * 3)
    model.train()
    with pytest.raises(ValueError, match="`encoders` must hold models in evaluation mode, got training mode"):
        attack(encoder, pictures(1), pictures(1, seed=9), steps=1)


class Faulty(nn.Module):
    """Purifiers that an attack must not take for robust."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.generator = kind, torch.Generator().manual_seed(1)

    def denoise(self, images, sigma):
        if self.kind == "steps":
            return images.round()
        if self.kind == "detached":
            return images.detach()
        if self.kind == "infinite":
            return images * 1e38 * 1e38
        return images + 0.3 * torch.randn(images.shape, generator=self.generator)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("steps", "`encoders` give a gradient that is exactly zero on image 0"),
        ("detached", "`model` gives no gradient from its feature to the pixels"),
        ("infinite", "`encoders` gave a NaN or infinite feature or gradient on image 0"),
    ],
)
@pytest.mark.parametrize("method", ["attackvlm", "apgd"])
def test_a_gradient_that_says_nothing_is_refused(kind, message, method):
    encoder = Encoder(smoothed_tower(psm=Faulty(kind), sigma=0.1), mode="adaptive")
    with pytest.raises(ValueError, match=message):
        run(encoder, pictures(2), pictures(2, seed=9), method)


def test_a_model_that_draws_by_itself_is_reported():
    encoder = Encoder(smoothed_tower(psm=Faulty("random"), sigma=0.1), mode="adaptive", feature="tokens")
    with pytest.warns(AttackWarning, match="or its purifier answers the same image differently each time") as caught:
        run(encoder, pictures(1), pictures(1, seed=9), "attackvlm", steps=1)
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("draws", "message"), [(1, "`draws=1` on a tower that draws noise"), (7, "at least 8 .* got 7")]
)
def test_few_draws_are_reported_at_the_callers_line(draws, message):
    encoder = adaptive_encoder(draws=draws)
    with pytest.warns(AttackWarning, match=message) as caught:
        attack(encoder, pictures(1), pictures(1, seed=9), method="attackvlm", steps=1)
    assert [warning.filename for warning in caught] == [__file__]


def test_enough_draws_or_none_needed_are_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for encoder in (
            adaptive_encoder(),
            plain_encoder(draws=1),
            Encoder(defended_tower(), mode="transfer", draws=1),
        ):
            encoder.feature = "tokens"
            run(encoder, pictures(1), pictures(1, seed=9), "attackvlm", steps=1)
