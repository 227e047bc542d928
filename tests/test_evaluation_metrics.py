"""FCS, PSNR and rates against numpy and scikit-image; prompts against the paper's words; answers as models give them."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio
from tiny_models import images, smoothed_tower

from fs_psm_hf.evaluation.metrics import fcs, mean_score, psnr, rate
from fs_psm_hf.evaluation.prompts import (
    CAPTION_PROMPT,
    classification_prompt,
    find_names,
    parse_class,
    parse_letter,
    vqa_prompt,
)


OCEANS = ["the Arctic Ocean", "the Atlantic Ocean", "the Pacific Ocean", "the Southern Ocean"]


def test_fcs_is_the_cosine_of_flattened_features():
    first, second = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)).double()
    wanted = [
        np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
        for a, b in zip(first.numpy().reshape(3, -1), second.numpy().reshape(3, -1), strict=True)
    ]
    values = fcs(first, second)
    assert values.dtype == torch.float32
    assert values.tolist() == pytest.approx(wanted, abs=1e-6)
    # Its scale does not matter, and bfloat16 features are not averaged in bfloat16.
    assert fcs(first.bfloat16(), (100 * first).bfloat16()).tolist() == pytest.approx([1] * 3, abs=1e-4)


def test_fcs_of_a_smoothed_encoder_is_one_only_under_the_same_noise():
    tower, pixels = smoothed_tower(), images(2)
    same = [tower(pixels, generator=5).last_hidden_state for _ in range(2)]
    other = tower(pixels, generator=6).last_hidden_state
    assert fcs(*same).tolist() == pytest.approx([1, 1], abs=1e-6)
    assert fcs(same[0], other).max() < 1 - 1e-4


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), r"`clean_features` and `adversarial_features` must have the same shape"),
        (torch.ones(3), torch.ones(3), r"must have the same shape \(batch_size, ...\)"),
        (torch.ones(1, 3), torch.full((1, 3), math.nan), r"`adversarial_features` must be finite and not all zero"),
        (torch.zeros(1, 3), torch.ones(1, 3), r"`clean_features` must be finite and not all zero"),
    ],
)
def test_features_that_have_no_cosine(first, second, message):
    with pytest.raises(ValueError, match=message):
        fcs(first, second)


def test_features_must_be_tensors():
    with pytest.raises(TypeError, match="`clean_features` must be a torch.Tensor, got list"):
        fcs([1.0], torch.ones(1, 1))


def test_psnr_against_scikit_image():
    clean = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    changed = (clean + 16 / 255 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1)).sign()).clamp(
        0, 1
    )
    wanted = [
        peak_signal_noise_ratio(a.double().numpy(), b.double().numpy(), data_range=1)
        for a, b in zip(clean, changed, strict=True)
    ]
    assert psnr(clean, changed).tolist() == pytest.approx(wanted, abs=1e-9)
    assert psnr(torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.1)).item() == pytest.approx(20, abs=1e-5)
    assert psnr(clean, clean).tolist() == [math.inf] * 3
    with pytest.raises(ValueError, match=r"`adversarial` must be in \[0, 1\], got values in \[1.5, 1.5\]"):
        psnr(clean[:1, :, :1, :1], torch.full((1, 3, 1, 1), 1.5))
    with pytest.raises(ValueError, match=r"`clean` must be in \[0, 1\], got values in \[nan, nan\]"):
        psnr(torch.full((1, 3, 1, 1), math.nan), clean[:1, :, :1, :1])


def test_rates_count_the_threshold_and_leave_out_what_is_unjudged():
    assert rate([0.5, 0.49, None, 1.0], 0.5) == pytest.approx(2 / 3)
    assert mean_score([0.5, 0.4, None, 0.9]) == pytest.approx(0.6)
    assert rate([None], 0.5) is None
    assert mean_score([]) is None


def test_the_prompts_are_the_papers():
    assert CAPTION_PROMPT == "Describe this image in one concise sentence, no longer than 20 words."
    assert classification_prompt() == (
        "You are a precise visual classifier. What are the main objects in this image?: 0. rooster, 1. gibbon, 2. golden "
        "retriever, 3. goldfish, 4. hen, 5. hognose snake, 6. ice bear, 7. killer whale, 8. king crab, 9. kite, 10. shark. "
        "Output only a single integer between 0 and 10 with no explanation, no text, no punctuation."
    )
    assert vqa_prompt("Which ocean is highlighted?", OCEANS) == (
        "You are a knowledgeable multimodal assistant. Please answer the multiple-choice question ONLY by outputting the "
        "single letter of the correct option. Do not include explanations or extra text. Question: Which ocean is "
        "highlighted? Options: A. the Arctic Ocean B. the Atlantic Ocean C. the Pacific Ocean D. the Southern Ocean E. None "
        "of the above. If the visual information is not clear or uncorrelated with the questions, you should select the "
        "choice: None of the above. Answer with exactly one letter from the options above (e.g., A)."
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: classification_prompt(["a"]), r"`class_names` must be at least two different names, got \['a'\]"),
        (lambda: classification_prompt(["a", "a"]), "`class_names` must be at least two different names"),
        (lambda: vqa_prompt(" ", OCEANS), "`question` must not be empty"),
        (lambda: vqa_prompt("Why?", ["a"]), "`options` must be 2 to 25, got 1"),
        (lambda: vqa_prompt("Why?", ["a"] * 26), "`options` must be 2 to 25, got 26"),
        (lambda: vqa_prompt("Why?", ["a", "none of the above."]), "`options` must not hold 'None of the above'"),
    ],
)
def test_prompts_that_cannot_be_asked(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("3", 3),
        (" 10. ", 10),
        ("10", 10),
        ("3. goldfish", 3),
        ("The answer is 7", 7),
        ("killer whale", 7),
        ("It shows two Golden  Retrievers.", 2),
        ("3 or 4", None),  # says two things
        ("11", None),  # no such class
        ("3.5", None),
        ("rooster and hen", None),
        ("a whale", None),  # of no class by that name
        ("sharkskin", None),
        ("", None),
        ("no idea", None),
    ],
)
def test_answers_to_the_classification_prompt(answer, number):
    assert parse_class(answer) == number


@pytest.mark.parametrize(
    ("answer", "index"),
    [
        ("B", 1),
        ("b", 1),
        ("(B)", 1),
        ("B.", 1),
        ("B. the Atlantic Ocean", 1),
        ("B(the Atlantic Ocean)", 1),
        ("E", 4),
        ("E. None of the above", 4),
        ("None of the above.", 4),
        ("The answer is C.", 2),
        ("Answer: D", 3),
        ("The correct option is (A)", 0),
        ("It is the Pacific Ocean.", 2),
        ("A dog in the snow", None),  # an article is no letter
        ("a dog", None),
        ("F", None),  # no such option
        ("The Arctic Ocean or the Atlantic Ocean", None),
        ("", None),
    ],
)
def test_answers_to_the_multiple_choice_prompt(answer, index):
    assert parse_letter(answer, OCEANS) == index


def test_longer_names_are_found_first():
    assert find_names("a killer whale", ["whale", "killer whale"]) == {1}
    assert find_names("killer whales and a whale", ["whale", "killer whale"]) == {0, 1}
    assert find_names("a catfish", ["cat", "fish"]) == set()
    assert find_names("two buses, a C++ book", ["bus", "c++"]) == {0, 1}
