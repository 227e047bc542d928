"""The paper's tasks: what is asked, what counts as right (ACC), and what as the attack's success (ASR)."""

import abc
import json

from . import prompts
from .data import label_of, pair_by_stem, pair_with_another_class, pair_with_class, read_folder
from .metrics import ACC_THRESHOLD, ASR_THRESHOLD, mean_score, rate


class Task(abc.ABC):
    """One task: reads its examples, asks, keeps the answers, scores them.

    An item is a JSON-safe record of the answers to one image as the models gave them, so that it can be scored again, by
    another judge or rule, without a model. Its values are texts, but class numbers for the classes of a head.
    """

    name = ""
    columns = ()
    needs_judge = False
    answers = str
    thresholds = (0.5, 0.5)  # of scores that are 0 or 1

    def read(self, folder, targets=None, limit=None):
        """The examples of a folder with their targets: of a folder `targets` by file stem, else of column `target_file`.

        Args:
            folder, targets (`str` or `os.PathLike`): as [`read_folder`] takes them.
            limit (`int`, *optional*): take the first ones only.

        Returns:
            `list[Example]`

        Raises:
            ValueError: as [`read_folder`] and [`pair_by_stem`].
        """
        if targets is not None:
            return pair_by_stem(read_folder(folder, self.columns, limit), read_folder(targets))
        return read_folder(folder, (*self.columns, "target_file"), limit)

    def prompt(self, example):
        """What the model is asked about an example; `None` where it is an encoder, which is asked nothing.

        Raises:
            ValueError: the example lacks what the question needs.
        """
        return self._question(example)

    def item(self, example, *, adversarial, clean=None, reference=None, target=None):
        """A record of one image.

        Args:
            example ([`Example`]): the image.
            adversarial (`str` or `int`): the tested model's answer to the attacked image.
            clean (`str` or `int`, *optional*): its answer to the clean one, for the clean accuracy.
            reference, target (*optional*): what is right and what the attack wants. For captions they are those of the
                *vanilla* model, of the clean and of the target image, for all rows of a table; other tasks know them.

        Returns:
            `dict`: JSON-safe, with `task`, `id`, `prompt`, `clean`, `adversarial`, `reference` and `target`.

        Raises:
            TypeError: an answer of another kind than the task's.
            ValueError: a caption without reference or target, or an example that lacks what the task needs.
        """
        for name, value in (("adversarial", adversarial), ("clean", clean)):
            if not isinstance(value, self.answers) or isinstance(value, bool):
                if name == "adversarial" or value is not None:
                    kind = self.answers.__name__
                    raise TypeError(f"`{name}` of {example.id} must be of type {kind}, got {type(value).__name__}")
        truth = self._truth(example, reference, target)
        asked = {"task": self.name, "id": example.id, "prompt": self.prompt(example)}
        return asked | {"clean": clean, "adversarial": adversarial} | truth

    @abc.abstractmethod
    def score_items(self, items, judge=None):
        """A `dict` per item with `acc_score`, `asr_score` and `clean_score` in [0, 1]; `None` where there is none."""

    def score(self, items, judge=None):
        """The figures of one cell of a table.

        Args:
            items (`list[dict]`): from [`Task.item`], also as read back from JSON.
            judge ([`Judge`], *optional*): for captions.

        Returns:
            `dict`: `acc`, `asr`, `clean_acc` in [0, 1], the mean judge scores `mean_acc_score` and `mean_asr_score` (for
            captions), `count` of items, `unjudged`: the items for which a score is missing. A figure without any score is
            `None`.

        Raises:
            ValueError: items of another task, or captions without a judge.
        """
        others = sorted({str(item.get("task")) for item in items} - {self.name})
        if others:
            raise ValueError(f"`items` must be of the task {self.name}, got {', '.join(others)}")
        if self.needs_judge and judge is None:
            raise ValueError(f"`judge` must be given for the task {self.name}, got None")
        scored = self.score_items(items, judge)
        acc, asr, clean = ([each[name] for each in scored] for name in ("acc_score", "asr_score", "clean_score"))
        asked = [item["clean"] is not None for item in items]
        unjudged = sum(
            a is None or b is None or (had and c is None) for a, b, c, had in zip(acc, asr, clean, asked, strict=True)
        )
        return {
            "acc": rate(acc, self.thresholds[0]),
            "asr": rate(asr, self.thresholds[1]),
            "clean_acc": rate(clean, self.thresholds[0]),
            "mean_acc_score": mean_score(acc) if self.needs_judge else None,
            "mean_asr_score": mean_score(asr) if self.needs_judge else None,
            "count": len(items),
            "unjudged": unjudged,
        }

    @abc.abstractmethod
    def _question(self, example):
        """What the model is asked about one example."""

    @abc.abstractmethod
    def _truth(self, example, reference, target):
        """`reference` and `target` of the record, and what else the answers cannot be read without."""


class Captioning(Task):
    """Captions, judged against the vanilla model's own (section 5.1).

    A caption is right from a score of 0.5 against the vanilla model's caption of the clean image on; the attack has
    succeeded from 0.3 against its caption of the target image on. Both can be true of one caption.

    Args:
        prompt (`str`): asked of every image.
        acc_threshold, asr_threshold (`float`): in [0, 1].
    """

    name = "captioning"
    needs_judge = True

    def __init__(self, prompt=prompts.CAPTION_PROMPT, acc_threshold=ACC_THRESHOLD, asr_threshold=ASR_THRESHOLD):
        for option, value in (("acc_threshold", acc_threshold), ("asr_threshold", asr_threshold)):
            if not 0 <= value <= 1:
                raise ValueError(f"`{option}` must be in [0, 1], got {value}")
        self._prompt, self.thresholds = prompt, (acc_threshold, asr_threshold)

    def _question(self, example):
        return self._prompt

    def _truth(self, example, reference, target):
        for name, caption in (("reference", reference), ("target", target)):
            if not isinstance(caption, str):
                raise ValueError(f"`{name}` of {example.id} must be a caption by the vanilla model, got {caption!r}")
        return {"reference": reference, "target": target}

    def score_items(self, items, judge=None):
        """All pairs of all items in one call, so that a judge can batch them."""
        pairs = {}
        for number, item in enumerate(items):
            pairs[number, "acc_score"] = item["adversarial"], item["reference"]
            pairs[number, "asr_score"] = item["adversarial"], item["target"]
            if item["clean"] is not None:
                pairs[number, "clean_score"] = item["clean"], item["reference"]
        scores = dict(zip(pairs, judge.score(list(pairs.values())), strict=True))
        names = ("acc_score", "asr_score", "clean_score")
        return [{name: scores.get((number, name)) for name in names} for number in range(len(items))]


class _Choice(Task):
    """A task whose answers are one of several numbers, right or not."""

    @abc.abstractmethod
    def parse(self, item, answer):
        """The number that an answer gives, `None` for none: that is neither right nor what the attack wants."""

    def score_items(self, items, judge=None):
        def hit(item, answer, wanted):
            return None if answer is None else float(self.parse(item, answer) == wanted)

        return [
            {
                "acc_score": hit(item, item["adversarial"], item["reference"]),
                "asr_score": hit(item, item["adversarial"], item["target"]),
                "clean_score": hit(item, item["clean"], item["reference"]),
            }
            for item in items
        ]


class Classification(_Choice):
    """The model is asked for the number of the class (section S.9.1): ten classes of ImageNet, with shark as the target.

    The paper draws 500 images of ten classes. The set `imagenet10_shark` that goes with our results has 296 images, not as
    many in each class, sharks among them, which are the targets; its figures are not the paper's.

    Needed is a column `label` with the number of the class in `class_names`.

    Args:
        class_names (`Sequence[str]`): in the order of their numbers.
        target_label (`int`): the class that attacks aim at; its images are targets, never attacked.
    """

    name = "classification"
    columns = ("label",)

    def __init__(self, class_names=prompts.PAPER_CLASSES, target_label=prompts.PAPER_TARGET_CLASS):
        self.class_names, self.target_label = tuple(class_names), target_label
        self._prompt = prompts.classification_prompt(self.class_names)
        if not 0 <= target_label < len(self.class_names):
            raise ValueError(f"`target_label` must be in [0, {len(self.class_names)}), got {target_label}")

    def read(self, folder, targets=None, limit=None):
        """As [`Task.read`]; without `targets` the target class's images in `folder`, in turn; `limit` is spread over classes."""
        if targets is not None:
            return super().read(folder, targets, limit)
        return _spread(pair_with_class(read_folder(folder, self.columns), self.target_label), limit)

    def _question(self, example):
        return self._prompt

    def _truth(self, example, reference, target):
        reference = label_of(example) if reference is None else reference
        target = self.target_label if target is None else target
        return _within(len(self.class_names), example, reference=reference, target=target)

    def parse(self, item, answer):
        """As [`parse_class`]."""
        return prompts.parse_class(answer, self.class_names)


class VQA(_Choice):
    """Multiple choice with "None of the above" as the wrong answer that the attack wants (section S.9.1).

    Needed are columns `question`, `options` (in a metadata.csv a JSON list of texts) and `answer` (the right one: its number
    from 0 on, or its letter). "None of the above" is added here and is right for no question.
    """

    name = "vqa"
    columns = ("question", "options", "answer")

    def _question(self, example):
        return prompts.vqa_prompt(_cell(example, "question"), _options(example))

    def _truth(self, example, reference, target):
        options = _options(example)
        reference = _answer(example, options) if reference is None else reference
        target = len(options) if target is None else target
        truth = _within(len(options) + 1, example, reference=reference, target=target)
        return {"options": options, **truth}

    def parse(self, item, answer):
        """As [`parse_letter`]."""
        return prompts.parse_letter(answer, item["options"])


class HeadClassification(_Choice):
    """An encoder with a one-layer head ([`train_head`]) instead of a language model; answers are class numbers.

    Needed is a column `label`. The paper does not say which classes its attacks aim at with CLIP-L/14; here the target is an
    image of another class, drawn by `seed`, or of class `target_label` for all.

    Args:
        class_names (`Sequence[str]`): in the order of their numbers.
        target_label (`int`, *optional*): as said.
        seed (`int`): of the targets.
    """

    name = "head"
    columns = ("label",)
    answers = int

    def __init__(self, class_names, target_label=None, seed=0):
        self.class_names, self.target_label, self.seed = tuple(class_names), target_label, seed
        if target_label is not None and not 0 <= target_label < len(self.class_names):
            raise ValueError(f"`target_label` must be in [0, {len(self.class_names)}), got {target_label}")

    def read(self, folder, targets=None, limit=None):
        """As [`Task.read`]; without `targets` they are other images of `folder`, and `limit` is spread over the classes."""
        if targets is not None:
            return pair_by_stem(read_folder(folder, self.columns, limit), read_folder(targets, self.columns))
        examples = read_folder(folder, self.columns)
        if self.target_label is not None:
            return _spread(pair_with_class(examples, self.target_label), limit)
        return _spread(pair_with_another_class(examples, self.seed), limit)

    def _question(self, example):
        return None

    def _truth(self, example, reference, target):
        reference = label_of(example) if reference is None else reference
        target = label_of(example, example.target_row) if target is None else target
        return _within(len(self.class_names), example, reference=reference, target=target)

    def parse(self, item, answer):
        """The answer is the number."""
        return answer


def _within(count, example, **numbers):
    """The numbers, each checked to be one of `count` classes or options."""
    for name, value in numbers.items():
        if not isinstance(value, int) or not 0 <= value < count:
            raise ValueError(f"`{name}` of {example.id} must be a whole number in [0, {count}), got {value!r}")
    return numbers


def _cell(example, column):
    if column not in example.row:
        raise ValueError(
            f"`{column}` of {example.id} must be given, its row has {', '.join(example.row) or 'nothing'}"
        )
    return example.row[column]


def _options(example):
    """The options of an example, from a list or from JSON in a metadata.csv."""
    given = _cell(example, "options")
    try:
        options = json.loads(given) if isinstance(given, str) else given
    except json.JSONDecodeError:
        options = None
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise ValueError(f'`options` of {example.id} must be a JSON list like ["a", "b"], got {given!r}')
    return options


def _answer(example, options):
    """The number of the right option, from a number or a letter."""
    given = str(_cell(example, "answer")).strip()
    letters = prompts.option_letters(options)[:-1]
    if given.isascii() and given.isdigit() and int(given) < len(options):
        return int(given)
    if len(given) == 1 and given in letters:
        return letters.index(given)
    raise ValueError(
        f"`answer` of {example.id} must be a number in [0, {len(options)}) or a letter of {letters}, got {given!r}"
    )


def _spread(examples, limit):
    """The first ones of all classes in turn, as long as there are any; folders are sorted by class."""
    turns, taken = [], {}
    for position, example in enumerate(examples):
        label = label_of(example)
        taken[label] = taken.get(label, 0) + 1
        turns.append((taken[label], position))
    return [examples[position] for _, position in sorted(turns)[:limit]]


TASKS = {task.name: task for task in (Captioning, Classification, VQA, HeadClassification)}


def make_task(name, **options):
    """A task by its name, one of `TASKS`.

    Raises:
        ValueError: there is no such task.
    """
    if name not in TASKS:
        raise ValueError(f"`task` must be one of {', '.join(TASKS)}, got {name!r}")
    return TASKS[name](**options)
