"""Answers of the embedded LLaVA, against its own processor and `generate`, plain and smoothed."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from fs_psm_hf import PSMModel, attach, detach
from fs_psm_hf.demo import demo_images
from fs_psm_hf.evaluation.captioners import Captioner, is_open_flamingo, to_pictures
from fs_psm_hf.evaluation.data import load_image


CARDS = Path(__file__).parents[1] / "model_cards"
QUESTION = "describe this image in one sentence."


@pytest.fixture(scope="module")
def llava():
    return LlavaForConditionalGeneration.from_pretrained(CARDS / "tiny-llava-cifar10", dtype=torch.float32).eval()


@pytest.fixture
def processor():
    return AutoProcessor.from_pretrained(CARDS / "tiny-llava-cifar10")


@pytest.fixture(scope="module")
def images():
    """What the demo shows, in a frame twice as large as the host's."""
    return torch.stack([load_image(shown.image, 64) for shown in demo_images()])


@pytest.fixture
def smoothed(llava, processor):
    psm = PSMModel.from_pretrained(CARDS / "fs-psm-tiny-clip-cifar10", dtype=torch.float32)
    attach(llava, psm, sigma=0.5, num_samples=1, processor=processor)
    yield llava
    detach(llava)


def by_hand(llava, processor, image, question):
    """One image at a time, with the text that its template makes."""
    text = f"USER: <image>\n{question} ASSISTANT:"
    inputs = processor(text=text, images=image, return_tensors="pt")
    with torch.inference_mode():
        tokens = llava.generate(**inputs, do_sample=False, max_new_tokens=64)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_captions_are_what_the_host_says_of_the_file(llava, processor, images, tmp_path):
    wanted = []
    for number, shown in enumerate(demo_images()):
        path = tmp_path / f"{number}.png"
        to_pictures(load_image(shown.image, 64)[None])[0].save(path)
        wanted.append(by_hand(llava, processor, Image.open(path), QUESTION))
    captions = Captioner(llava, processor, QUESTION, batch_size=4)(images)
    assert captions == wanted
    assert captions[0] == "a photo of a cat."
    assert len(set(captions)) > 3
    # Without a chat template LLaVA-1.5's prompt is used, which is this model's own.
    processor.chat_template = None
    assert Captioner(llava, processor, QUESTION)(images) == wanted
    assert Captioner(llava, processor, QUESTION)(images[:0]) == []


def test_prompts_of_different_lengths_share_a_batch(llava, processor, images):
    questions = [QUESTION, "what is this?"]
    answers = Captioner(llava, processor, max_new_tokens=64)(images[:2], questions)
    pictures = to_pictures(images[:2])
    assert answers == [by_hand(llava, processor, *pair) for pair in zip(pictures, questions, strict=True)]


def test_a_seed_makes_the_captions_a_function_of_the_image(smoothed, processor, images):
    ids = [30, 10, 20, 40]
    captioner = Captioner(smoothed, processor, QUESTION, seed=7, max_new_tokens=12)
    together = captioner(images[:4], image_ids=ids)
    alone = [captioner(images[i : i + 1], image_ids=ids[i : i + 1])[0] for i in (3, 2, 1, 0)]
    assert together == alone[::-1]


def test_the_seeded_noise_is_the_towers_own(smoothed, processor, images):
    """What the host reads under the captioner is what the tower gives for that seed and id; without a seed nobody knows."""
    seen = []
    tower = smoothed.model.vision_tower
    handle = tower.register_forward_hook(lambda module, args, output: seen.append(output.hidden_states[-2].clone()))
    try:
        for seed in (7, 7, 8, None, None):
            Captioner(smoothed, processor, QUESTION, seed=seed, max_new_tokens=1)(images[:2], image_ids=[5, 9])
    finally:
        handle.remove()
    pixels = processor.image_processor(to_pictures(images[:2]), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        wanted = tower(pixels, output_hidden_states=-2, generator=7, image_ids=[5, 9]).hidden_states[-2]
    first, again, *others = seen
    torch.testing.assert_close(first, wanted, rtol=0, atol=1e-5)
    assert torch.equal(first, again)
    for other in others:
        assert (other - first).abs().max() > 1e-3
    assert (others[1] - others[2]).abs().max() > 1e-3
    assert not tower._forward_pre_hooks  # none is left behind


def test_several_views_of_an_image_get_noise_of_their_own(smoothed, processor, images):
    captioner = Captioner(smoothed, processor, QUESTION, seed=7)
    pixels = processor.image_processor(to_pictures(images[:1]), return_tensors="pt")["pixel_values"].repeat(2, 1, 1, 1)
    tower = smoothed.model.vision_tower
    with torch.inference_mode():
        with captioner._noise([3]):
            first, second = tower(pixels, output_hidden_states=-2).hidden_states[-2]
            again = tower(pixels, output_hidden_states=-2).hidden_states[-2]
        with pytest.raises(
            ValueError, match="`batch_size` must be 1 with a `seed` where a host makes 4 views of 2 images"
        ):
            with captioner._noise([3, 4]):
                tower(pixels.repeat(2, 1, 1, 1), output_hidden_states=-2)
    assert (first - second).abs().max() > 1e-3
    assert torch.equal(first, again[0])


def test_no_gradient_and_the_mode_is_put_back(llava, processor, images):
    leaf = images[:1].clone().requires_grad_()
    llava.train()
    try:
        assert Captioner(llava, processor, QUESTION)(leaf) == Captioner(llava, processor, QUESTION)(images[:1])
        assert llava.training
    finally:
        llava.eval()
    assert leaf.grad is None


def test_all_8_bit_levels_survive():
    levels = torch.arange(256.0).view(1, 1, 16, 16).repeat(1, 3, 1, 1) / 255
    for images in (levels, levels.double(), levels.cpu() + 1e-7 * (levels < 1)):
        picture = to_pictures(images)[0]
        assert list(picture.get_flattened_data(0)) == list(range(256))


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.full((1, 3, 2, 2), 0.5), ValueError, "`images` must be multiples of 1/255 in .* round them first"),
        (torch.full((1, 3, 2, 2), 256 / 255), ValueError, "`images` must be multiples of 1/255"),
        (torch.full((1, 3, 2, 2), -1 / 255), ValueError, "`images` must be multiples of 1/255"),
        (torch.full((1, 3, 2, 2), torch.nan), ValueError, "`images` must be multiples of 1/255"),
        (
            torch.zeros(3, 2, 2),
            ValueError,
            r"`images` must have shape \(batch_size, 3, height, width\), got \(3, 2, 2\)",
        ),
        (torch.zeros(1, 3, 2, 2, dtype=torch.uint8), TypeError, "must be a floating point tensor, got torch.uint8"),
        ([], TypeError, "`images` must be a floating point tensor, got list"),
    ],
)
def test_images_that_no_file_could_hold(images, error, message):
    with pytest.raises(error, match=message):
        to_pictures(images)


def test_questions_and_ids_must_fit(llava, processor, images):
    captioner = Captioner(llava, processor)
    with pytest.raises(ValueError, match="`prompts` must be one or one per image, got 1 for 2 images"):
        captioner(images[:2], [QUESTION])
    with pytest.raises(ValueError, match="`image_ids` must"):
        captioner(images[:2], image_ids=[1])
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        Captioner(llava, processor, batch_size=0)
    assert not is_open_flamingo(llava)
