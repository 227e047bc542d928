"""The prompts of the paper's section S.9.1, word for word where it prints one, and how answers to them are read."""

import re
import string


CAPTION_PROMPT = "Describe this image in one concise sentence, no longer than 20 words."
# OpenFlamingo is no chat model: it goes on with what follows "Output:", as in its authors' captioning examples. The
# paper does not say which prompt it used there.
OPEN_FLAMINGO_PROMPT = "<image>Output:"

PAPER_CLASSES = (
    "rooster",
    "gibbon",
    "golden retriever",
    "goldfish",
    "hen",
    "hognose snake",
    "ice bear",
    "killer whale",
    "king crab",
    "kite",
    "shark",
)
PAPER_TARGET_CLASS = 10

NONE_OF_THE_ABOVE = "None of the above"


def classification_prompt(class_names=PAPER_CLASSES):
    """The request for the number of the class that an image shows.

    Args:
        class_names (`Sequence[str]`): at least two, in the order of their numbers, the target class among them.

    Raises:
        ValueError: fewer than two, or one twice.
    """
    names = list(class_names)
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"`class_names` must be at least two different names, got {names}")
    listed = ", ".join(f"{number}. {name}" for number, name in enumerate(names))
    return (
        f"You are a precise visual classifier. What are the main objects in this image?: {listed}. Output only a single "
        f"integer between 0 and {len(names) - 1} with no explanation, no text, no punctuation."
    )


def vqa_prompt(question, options):
    """The multiple-choice request; "None of the above", the attack's target, is added as the last option.

    Args:
        question (`str`): as the data set has it.
        options (`Sequence[str]`): 2 to 25, without "None of the above".

    Raises:
        ValueError: no question, too few or too many options, or "None of the above" among them.
    """
    letters = option_letters(options)
    if not question.strip():
        raise ValueError("`question` must not be empty, got ''")
    listed = " ".join(
        f"{letter}. {option}" for letter, option in zip(letters, [*options, NONE_OF_THE_ABOVE], strict=True)
    )
    return (
        "You are a knowledgeable multimodal assistant. Please answer the multiple-choice question ONLY by outputting the "
        f"single letter of the correct option. Do not include explanations or extra text. Question: {question} Options: "
        f"{listed}. If the visual information is not clear or uncorrelated with the questions, you should select the "
        "choice: None of the above. Answer with exactly one letter from the options above (e.g., A)."
    )


def option_letters(options):
    """The letters of the options and, last, of "None of the above".

    Raises:
        ValueError: not 2 to 25 options, or "None of the above" among them.
    """
    if not 2 <= len(options) < len(string.ascii_uppercase):
        raise ValueError(f"`options` must be 2 to 25, got {len(options)}")
    if any(option.strip().strip(".").casefold() == NONE_OF_THE_ABOVE.casefold() for option in options):
        raise ValueError(f"`options` must not hold {NONE_OF_THE_ABOVE!r}, which is added, got {list(options)}")
    return string.ascii_uppercase[: len(options) + 1]


def find_names(text, names):
    """The indices of the names that a text mentions as whole words, longer names first ("killer whale" is no "whale")."""
    found, rest = set(), " ".join(text.casefold().split())
    for index in sorted(range(len(names)), key=lambda i: -len(names[i])):
        # Plurals in s and es only: what else a class may be called, its synonyms have to say.
        pattern = rf"(?<!\w){re.escape(' '.join(names[index].casefold().split()))}(?:e?s)?(?!\w)"
        rest, count = re.subn(pattern, " | ", rest)
        if count:
            found.add(index)
    return found


def parse_class(answer, class_names=PAPER_CLASSES):
    """The number that an answer to [`classification_prompt`] gives.

    That is the only whole number from 0 to the last class in it ("3", "3.", "3. goldfish"), or, where it holds no number
    at all, the only class that it names.

    Returns:
        `int` or `None`: `None` where the answer says nothing or several things; it is then neither right nor the target.
    """
    numbers = {int(number) for number in re.findall(r"(?<![\w.])\d+(?![\w]|\.\d)", answer)}
    if not numbers:
        numbers = find_names(answer, class_names)
    number = numbers.pop() if len(numbers) == 1 else None
    return number if number is not None and number < len(class_names) else None


def parse_letter(answer, options):
    """The index of the option that an answer to [`vqa_prompt`] gives; `len(options)` is "None of the above".

    Read are a letter alone ("B", "b", "(B)"), a letter before its option ("B. the Atlantic Ocean"), "the answer is B", and
    the words of exactly one option. A sentence that begins with "A" names no option.

    Returns:
        `int` or `None`: `None` where the answer says nothing or several things.
    """
    letters = option_letters(options)
    allowed = f"[{letters}]"
    text = answer.strip()
    patterns = (
        rf"\W*({allowed}|{allowed.lower()})\W*",
        rf"\(?({allowed})\)?[.:)](?:\s.*)?",
        rf"(?:.*\W)?(?i:answer|option|choice)\W*(?i:is\b|of\b)?\W*({allowed})(?:\W.*)?",
    )
    for pattern in patterns:
        match = re.fullmatch(pattern, text, flags=re.DOTALL)
        if match:
            return letters.index(match.group(1).upper())
    named = find_names(text, [*options, NONE_OF_THE_ABOVE])
    return named.pop() if len(named) == 1 else None
