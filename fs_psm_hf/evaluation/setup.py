"""What a run works with: its task, its judge, its images."""

import dataclasses
from pathlib import Path

from .data import read_folder, read_scienceqa
from .retrieval import Retrieval
from .tasks import make_task


def build_task(config):
    """The task of a [`TaskConfig`]."""
    if config.kind == Retrieval.name:
        return Retrieval()
    return make_task(config.kind, **config.options)


def build_judge(values, output):
    """The judge of a configuration; the answers of a language model are kept beside `output`.

    Raises:
        ValueError: an argument that this judge does not take, or a value it refuses.
        ImportError: its package is not installed.
    """
    if values is None:
        return None
    options = dict(values)
    kind = options.pop("kind")
    try:
        if kind == "keyword":
            from .judges import KeywordJudge

            return KeywordJudge(**options)
        if kind == "embedding":
            from .judges import EmbeddingJudge

            return EmbeddingJudge(**options)
        from .llm_judge import LLMJudge

        return LLMJudge(**{"cache": Path(output).with_name(Path(output).name + ".judge.sqlite")} | options)
    except TypeError as error:
        raise ValueError(f"`judge` of kind {kind} got an argument that it does not take: {error}") from error


def read_examples(config, task):
    """The images of a run with their targets, in the order that results keep.

    Raises:
        ValueError: images and targets that do not match, a column that is missing, or two images of one name.
    """
    asked = config.task
    if asked.kind == "vqa" and not Path(asked.images).joinpath("metadata.csv").is_file():
        if asked.targets is None:
            raise ValueError("`task.targets` must be a folder of target images for a data set of questions, got none")
        examples = read_scienceqa(asked.images, asked.split, asked.limit)
        targets = read_folder(asked.targets)
        paired = ((example, targets[i % len(targets)]) for i, example in enumerate(examples))
        examples = [dataclasses.replace(one, target=other.image, target_row=other.row) for one, other in paired]
    else:
        examples = task.read(asked.images, asked.targets, asked.limit)
    ids = [example.id for example in examples]
    if len(set(ids)) < len(ids):
        raise ValueError("`task.images` must name each image once, got one name twice")
    return examples


def read_labelled(folder, class_names):
    """Images of a folder with the class numbers of a head, by the column `label_name`, or by `label` where it is a number."""
    wanted = {name: number for number, name in enumerate(class_names)}
    found = []
    # Other images may lie in the folder too, so not each line of a metadata.csv needs a label.
    columns = () if Path(folder).joinpath("metadata.csv").is_file() else ("label",)
    for example in read_folder(folder, columns):
        name = example.row.get("label_name") or example.row.get("label")
        if name in wanted:
            found.append((example, wanted[name]))
    if len({label for _, label in found}) < 2:
        raise ValueError(
            f"`task.head_images` {folder} must hold images of at least two of the classes {', '.join(class_names)}"
        )
    return [example for example, _ in found], [label for _, label in found]
