"""Zero-shot labels of the embedded, trained CLIP, and classifiers from texts."""

import copy

import pytest
import torch
from clip_hosts import CARDS, host_model
from tiny_models import images, psm_model
from torch import nn
from transformers import AutoProcessor, CLIPModel, pipeline

from fs_psm_hf import PSMModel, attach, certify_labels, detach
from fs_psm_hf.demo import demo_images
from fs_psm_hf.zero_shot import attach_clip, detach_clip, text_classifier


NAMES = ["airplane", "cat", "ship", "truck"]


@pytest.fixture(scope="module")
def trained():
    """The embedded CLIP, its processor, and four images of its classes in the order of `NAMES`."""
    folder = CARDS / "tiny-clip-cifar10"
    host = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    pictures = {one.name: one.image for one in demo_images()}
    pixels = processor(images=[pictures[name] for name in NAMES], return_tensors="pt")["pixel_values"]
    return host, processor, pixels


@torch.no_grad()
def test_zero_shot_labels_of_the_trained_clip(trained):
    plain, processor, pixels = trained
    host = copy.deepcopy(plain)
    texts = processor(text=[f"a photo of a {name}." for name in NAMES], padding=True, return_tensors="pt")
    before = plain(pixel_values=pixels, **texts)
    embeds = text_classifier(host, processor, NAMES)
    assert torch.allclose(embeds, before.text_embeds, atol=1e-6)
    tower = attach_clip(host, sigma=0.0, num_samples=1, processor=processor)
    assert torch.equal(host(pixel_values=pixels, **texts).logits_per_image, before.logits_per_image)
    assert torch.equal(text_classifier(host, processor, NAMES), embeds)
    detach_clip(host)

    psm, sigma = PSMModel.from_pretrained(CARDS / "tiny-denoiser-cifar10", dtype=torch.float32), 0.12
    tower = attach_clip(host, psm, sigma=sigma, num_samples=16, processor=processor)
    certificates = certify_labels(host, pixels, embeds, num_samples=200, generator=3)
    assert [c.label for c in certificates] == [0, 1, 2, 3]
    assert all(c.radius > sigma / 2 and c.deployed.radius > 0 for c in certificates)
    assert certificates[0].model.endswith("tiny-clip-cifar10")
    assert host(pixel_values=pixels, **texts).logits_per_image.argmax(-1).tolist() == [0, 1, 2, 3]
    # By hand, with noise of the global generator: the plain model on purified noisy images in [0, 1].
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (tower.config.image_mean, tower.config.image_std))
    served = host.get_image_features(pixels).pooler_output
    for i in range(4):
        noisy = (pixels[[i]] * std + mean) + sigma * torch.randn(32, *pixels.shape[1:])
        found = plain.get_image_features((psm(noisy, sigma) - mean) / std).pooler_output
        average = nn.functional.normalize(found, dim=-1).mean(0)
        assert (average @ embeds.T).argmax() == i
        assert nn.functional.cosine_similarity(served[i], average, dim=0) > 0.97
        assert torch.allclose(served[i].norm(), found.norm(dim=-1).mean(), rtol=0.1)


@torch.no_grad()
def test_pipelines_and_other_sizes(trained):
    """Through `attach` and `detach`, the way in for every host."""
    plain, processor, pixels = trained
    host, picture = copy.deepcopy(plain), demo_images()[0].image
    parts = {"tokenizer": processor.tokenizer, "image_processor": processor.image_processor}
    larger = torch.randn(2, 3, 48, 48)

    def answers():
        labels = pipeline("zero-shot-image-classification", model=host, **parts)(picture, candidate_labels=NAMES)
        return labels, host.get_image_features(larger, interpolate_pos_encoding=True).pooler_output

    (labels, embeds), tower = answers(), attach(host, sigma=0.0, num_samples=1, processor=processor)
    again, same = answers()
    assert labels[0]["label"] == "cat"
    assert again == labels
    assert torch.equal(same, embeds)
    tower.config.sigma = 0.05
    assert len(host.get_image_features(pixels, output_hidden_states=True).hidden_states) == 7
    assert isinstance(host.get_image_features(pixels, return_dict=False), tuple)
    with pytest.raises(ValueError, match="attention maps are not smoothed"):
        host.get_image_features(pixels, output_attentions=True)
    detach(host)
    assert answers()[0] == labels


def test_a_psm_of_another_base_is_taken_with_a_warning(trained, caplog):
    plain, processor, _ = trained
    for base, warnings in (("somebody/tiny-clip-cifar10", 0), ("openai/clip-vit-base-patch32", 1)):
        psm, host = psm_model(mapper=False), copy.deepcopy(plain)
        psm.config.base_model_name_or_path = base
        caplog.clear()
        attach_clip(host, psm, processor=processor)
        assert sum("was trained for" in record.getMessage() for record in caplog.records) == warnings
        assert not any(parameter.requires_grad for parameter in psm.parameters())


@torch.no_grad()
def test_texts_to_classes(trained):
    plain, processor, _ = trained
    templates = ["a photo of a {}.", "a picture of one {}."]
    single = [text_classifier(plain, processor, NAMES, one) for one in templates]
    both = text_classifier(plain, processor, NAMES, templates)
    assert torch.allclose(both, nn.functional.normalize(single[0] + single[1], dim=-1), atol=1e-6)
    assert torch.equal(text_classifier(plain, processor.tokenizer, NAMES), single[0])
    # SigLIP reads the last token, padding or not, so its texts are padded to the length it was trained with.
    host, pixels = host_model("siglip"), images(2)
    embeds = text_classifier(host, processor.tokenizer, ["cat", "ship"], "{}")
    texts = processor.tokenizer(["cat", "ship"], padding="max_length", max_length=12, return_tensors="pt")
    outputs = host(pixel_values=pixels, **texts)
    assert torch.allclose(embeds, outputs.text_embeds, atol=1e-6)
    # Its scale and bias are the same for all classes.
    logits = nn.functional.normalize(host.get_image_features(pixels).pooler_output, dim=-1) @ embeds.T
    assert torch.allclose(outputs.logits_per_image, logits * host.logit_scale.exp() + host.logit_bias, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_names": "cat"}, "`class_names` must be a list of at least 2 different names, got 'cat'"),
        ({"class_names": ["cat", "cat"]}, "`class_names` must be a list of at least 2 different names"),
        ({"template": "a photo"}, "`template` must be one or more sentences with {} for the name, got 'a photo'"),
        ({"template": []}, "`template` must be one or more sentences"),
        ({"template": "a " * 40 + "{}"}, "`template` and names must fit in 32 tokens, got"),
    ],
)
def test_bad_texts_are_refused(trained, options, message):
    host, processor, _ = trained
    with pytest.raises(ValueError, match=message) as error:
        text_classifier(host, processor, **{"class_names": NAMES} | options)
    assert "\n" not in str(error.value)


def test_hosts_without_texts_or_in_training(trained):
    _, processor, _ = trained
    with pytest.raises(TypeError, match="`host` must be a CLIPModel or SiglipModel, got CLIPForImageClassification"):
        text_classifier(host_model("clip_images"), processor, NAMES)
    with pytest.raises(ValueError, match="`host` must be in evaluation mode"):
        text_classifier(host_model("clip").train(), processor, NAMES)
