"""What does not fit an OpenFlamingo is refused in a sentence, and the host is as before."""

import logging

import open_clip
import pytest
import torch
from flamingo_models import SIZE, WIDTH, flamingo, flamingo_inputs
from open_clip.transformer import LayerNorm, VisionTransformer
from test_flamingo import patch_psm
from tiny_models import psm_model
from torch import nn

from fs_psm_hf import PSMConfig, PSMModel
from fs_psm_hf.openflamingo import (
    attach_flamingo,
    detach_flamingo,
    is_flamingo,
    prepare_open_flamingo,
    warn_of_plain_gelu,
)


@pytest.fixture
def host(language_models):
    return flamingo(language_models / "opt")[0]


def refused(host, words, **options):
    """`attach_flamingo` raises one sentence and leaves every object and number of the host."""
    visual, before = host.vision_encoder, {name: value.clone() for name, value in host.state_dict().items()}
    modules = [id(module) for module in host.modules()]
    with pytest.raises(ValueError, match=words) as caught:
        attach_flamingo(host, **options)
    assert "\n" not in str(caught.value)
    assert host.vision_encoder is visual
    assert [id(module) for module in host.modules()] == modules
    after = host.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def mapper_psm(**fields):
    """A PSM with another mapper than the one that fits."""
    config = patch_psm().config.to_dict()
    config["mapper_config"] = config["mapper_config"] | fields.pop("mapper_config", {})
    return PSMModel(PSMConfig.from_dict(config | fields)).eval()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sigma": -1.0}, "`sigma` must be a finite number >= 0"),
        ({"num_samples": 0}, "`num_samples` must be an integer >= 1, got 0"),
        ({"max_batch_size": 0}, "`max_batch_size` must be an integer >= 1"),
        ({"aggregation": "median"}, "`aggregation` must be one of unit, mean"),
        ({"feature_layer": -2}, "`feature_layer` must be None for a Flamingo.*got -2"),
        ({"image_mean": [0.5, 0.5]}, "`image_mean` must be three finite numbers"),
        ({"image_mean": [0.5] * 3}, "`image_std` is missing"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_out_of_range(host, options, words):
    refused(host, words, **options)


def test_a_psm_that_was_not_trained_for_it(host):
    refused(
        host,
        rf"must be {WIDTH}, the width of the tower's feature, got 32",
        psm=mapper_psm(mapper_config={"hidden_size": 32}),
    )
    of_clip = psm_model("none", width=WIDTH)
    refused(host, r"`psm` must have a mapper of patch tokens alone.*'tokens' with `num_prefix_tokens=1`", psm=of_clip)
    refused(host, r"patch tokens alone.*got one of 'pooled'", psm=mapper_psm(mapper_feature="pooled"))


def test_attached_twice_and_detached_twice(host):
    with pytest.raises(
        ValueError, match="must have a smoothed vision encoder, got a Flamingo with a VisionTransformer"
    ):
        detach_flamingo(host)
    attach_flamingo(host)
    refused(host, r"smoothed already: `detach\(host\)` first")
    detach_flamingo(host)
    with pytest.raises(ValueError, match="must have a smoothed vision encoder"):
        detach_flamingo(host)


def visual(**options):
    settings = {"image_size": SIZE, "patch_size": 7, "width": WIDTH, "layers": 2, "heads": 2, "mlp_ratio": 2.0}
    net = VisionTransformer(**settings | {"output_dim": 32, "output_tokens": True, "norm_layer": LayerNorm} | options)
    net.image_mean, net.image_std = [0.5] * 3, [0.25] * 3
    return net.eval()


VISUALS = {
    "attentional pooling": ({"attentional_pool": True, "attn_pooler_heads": 2}, "no conversion"),
    "layer scale": ({"ls_init_value": 0.1}, "no conversion"),
    "no first LayerNorm": ({"no_ln_pre": True}, "no conversion"),
    "no output of tokens": (
        {"output_tokens": False},
        "with `output_tokens=True`, got a VisionTransformer of open_clip",
    ),
    "another activation": ({"act_layer": nn.ReLU}, "activations .*, got ReLU\\(\\)"),
    "all tokens": ({"pool_type": "none"}, "differ by a share of inf"),
    "tokens before the LayerNorm": ({"final_ln_after_pool": True}, r"differ by a share of \d"),
    "another epsilon": ({"norm_layer": lambda width: LayerNorm(width, eps=0.1)}, r"differ by a share of 0\.\d"),
    "another GELU": ({"act_layer": lambda: nn.GELU("tanh")}, "activations .*, got GELU\\(approximate='tanh'\\)"),
}


@pytest.mark.parametrize(("options", "words"), VISUALS.values(), ids=VISUALS)
def test_another_visual_of_open_clip(host, options, words):
    host.vision_encoder = visual(**options)
    # So that LayerNorm is not the identity, as in a trained one.
    nn.init.normal_(host.vision_encoder.ln_post.weight)
    refused(host, f"`host.vision_encoder` must (be|have).*{words}")


def test_a_visual_that_averages_its_patches_is_fine(host):
    """Its second output is the same."""
    host.vision_encoder, images = visual(pool_type="avg"), torch.randn(2, 3, SIZE, SIZE)
    expected = host.vision_encoder(images)[1]
    tower = attach_flamingo(host, sigma=0, num_samples=1)
    torch.testing.assert_close(tower(images).last_hidden_state, expected, rtol=0, atol=5e-6)


def test_a_network_of_another_library(host):
    host.vision_encoder = open_clip.model._build_vision_tower(
        32, {"timm_model_name": "resnet10t", "image_size": 32, "timm_model_pretrained": False}
    )
    refused(host, "must be a VisionTransformer of open_clip.*got a TimmModel of open_clip")


def test_a_processor_that_does_not_normalise(language_models):
    host, processor, _ = flamingo(language_models / "opt")
    *others, normalise = processor.transforms
    for steps in (others, [*others, normalise, normalise], [normalise], [normalise, *others]):
        processor.transforms = steps
        refused(host, "`processor` must make .*ToTensor.* then normalise them once", processor=processor)
    del host.vision_encoder.image_mean
    refused(host, "`image_mean` is missing")


@pytest.mark.parametrize(
    ("vision", "names", "warns"),
    [
        ("tiny", ["openai"], True),
        ("tiny", ["fare_eps_4.pt"], True),
        ("tiny", [None, "chs20/TeCoA4-clip"], True),
        ("tiny", ["laion2b_s32b_b82k"], False),
        ("tiny", ["chs20/FARE4-ViT-B-32-laion2B-s34B-b79K"], False),
        ("tiny", [None], False),
        ("tiny-quickgelu", ["openai"], False),
    ],
)
def test_openai_weights_with_plain_gelu_are_told(language_models, caplog, vision, names, warns):
    host = flamingo(language_models / "opt", vision)[0]
    for _ in range(2):
        with caplog.at_level(logging.WARNING, "fs_psm_hf"):
            caplog.clear()
            assert warn_of_plain_gelu(host, *names) is warns
        said = [record.getMessage() for record in caplog.records if record.name.startswith("fs_psm_hf")]
        assert len(said) == warns
        assert not warns or ("has GELU" in said[0] and "'ViT-L-14-quickgelu'" in said[0])
        if host.vision_encoder.__class__.__name__ == "VisionTransformer":
            attach_flamingo(host)  # and once more of a smoothed one


@pytest.mark.parametrize("vision", ["tiny", "tiny-quickgelu"])
def test_attach_tells_from_what_the_psm_remembers(language_models, caplog, vision):
    host = flamingo(language_models / "opt", vision)[0]
    psm = patch_psm()
    psm.config.base_model_name_or_path = "openai/clip-vit-large-patch14"
    with caplog.at_level(logging.WARNING, "fs_psm_hf"):
        attach_flamingo(host, psm)
    assert ("`host.vision_encoder` has GELU" in caplog.text) is (vision == "tiny")


def test_generate_needs_the_preparation(language_models, monkeypatch):
    """What fails without `prepare_open_flamingo`, and that it may be called again; it leaves everything else."""
    from open_flamingo.src.flamingo_lm import FlamingoLMMixin

    host, _, tokenizer = flamingo(language_models / "opt")
    assert is_flamingo(host)
    inputs, prepared = flamingo_inputs(tokenizer), FlamingoLMMixin.forward
    expected = host.generate(**inputs, max_new_tokens=2)
    original = prepared.__closure__[0].cell_contents
    monkeypatch.setattr(FlamingoLMMixin, "forward", original)
    with pytest.raises(TypeError, match="attention_mask"):
        host.generate(**inputs, max_new_tokens=2)
    assert prepare_open_flamingo().create_model_and_transforms
    again = FlamingoLMMixin.forward
    prepare_open_flamingo()
    assert FlamingoLMMixin.forward is again
    assert torch.equal(host.generate(**inputs, max_new_tokens=2), expected)
