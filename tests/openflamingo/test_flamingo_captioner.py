"""Answers of the real OpenFlamingo classes, against its own processor and `generate`, plain and smoothed."""

import pytest
import torch
from flamingo_models import flamingo

from fs_psm_hf.evaluation.captioners import Captioner, is_open_flamingo, to_pictures
from fs_psm_hf.openflamingo import attach_flamingo


MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


@pytest.fixture(params=["opt", "mpt"])
def host(request, language_models):
    return flamingo(language_models / request.param)


@pytest.fixture
def images():
    """Smooth pictures with 8 bits per channel."""
    small = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return (torch.nn.functional.interpolate(small, 40, mode="bilinear") * 255).round() / 255


def by_hand(host, image, prompt, **options):
    model, transform, tokenizer = host
    text = tokenizer(prompt, return_tensors="pt")
    pixels = transform(to_pictures(image[None])[0])[None, None, None]
    with torch.inference_mode():
        tokens = model.generate(pixels, text["input_ids"], text["attention_mask"], max_new_tokens=8, **options)
    answer = tokenizer.decode(tokens[0, text["input_ids"].shape[1] :], skip_special_tokens=False)
    answer = answer.partition("<|endofchunk|>")[0]
    for token in tokenizer.all_special_tokens:
        answer = answer.replace(token, "")
    return answer.strip()


def test_answers_are_what_the_host_says(host, images):
    model, transform, tokenizer = host
    assert is_open_flamingo(model)
    captioner = Captioner(model, (transform, tokenizer), max_new_tokens=8, batch_size=3)
    assert captioner.prompt == "<image>Output:"
    answers = captioner(images)
    assert answers == [by_hand(host, image, "<image>Output:") for image in images]
    assert any(answers)
    beams = Captioner(model, (transform, tokenizer), max_new_tokens=8, generate_options={"num_beams": 2})
    assert beams(images[:2]) == [by_hand(host, image, "<image>Output:", num_beams=2) for image in images[:2]]
    prompt = "<image>An image of a cat."
    assert captioner(images[:1], prompt) == [by_hand(host, images[0], prompt)]


def test_a_seed_makes_the_noise_a_function_of_the_image(host, images):
    model, transform, tokenizer = host
    tower = attach_flamingo(model, sigma=0.5, num_samples=2, image_mean=MEAN, image_std=STD)
    images = torch.cat([images, images[:1]])  # one comes twice, with another name
    seen = []
    tower.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state.clone()))

    def features(batch_size, chosen):
        seen.clear()
        captioner = Captioner(model, (transform, tokenizer), max_new_tokens=2, batch_size=batch_size, seed=3)
        captioner(images[chosen], image_ids=[10 + i for i in chosen])
        return torch.cat(seen)

    together = features(5, range(5))
    alone = torch.cat([features(1, [i]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert (together[0] - together[4]).abs().max() > 1e-3


def test_refusals(host, images):
    model, transform, tokenizer = host
    with pytest.raises(ValueError, match=r"`processor` must be the pair \(image_processor, tokenizer\)"):
        Captioner(model, tokenizer)
    with pytest.raises(ValueError, match="`prompts` of an OpenFlamingo must hold `<image>` once, got 'Output:'"):
        Captioner(model, (transform, tokenizer))(images, "Output:")
