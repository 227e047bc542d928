"""Images, their targets and what is known of them, from folders with a `metadata.csv` or from `datasets`.

A folder is laid out as `datasets` reads an imagefolder: images at any depth, and a `metadata.csv` whose column `file_name`
names them. Which further columns must be there, the task says. `target_file`, where there is such a column, names the image
that an attack aims at.
"""

import csv
import dataclasses
import hashlib
import io
import os
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image

from ..inputs import list_images


SCIENCE_QA = "derek-thomas/ScienceQA"
# What an attack's frame is in the three papers: short side to 224 pixels, centre cropped.
IMAGE_SIZE = 224


@dataclasses.dataclass(frozen=True)
class Example:
    """One image to attack.

    Args:
        id (`str`): what results call it: its file name below the folder, or its number in the data set.
        image (`Path`, `bytes` or `PIL.Image.Image`): where its pixels are; [`load_image`] reads it.
        row (`dict`): what is known of it: its line of metadata.csv.
        target (`Path`, `bytes` or `PIL.Image.Image`, *optional*): the image that the attack aims at.
        target_row (`dict`): what is known of that one.
    """

    id: str
    image: object
    row: dict = dataclasses.field(default_factory=dict)
    target: object = None
    target_row: dict = dataclasses.field(default_factory=dict)


def read_folder(folder, columns=(), limit=None):
    """The images of a folder, in the order of its metadata.csv, or of their names where it has none.

    Without a metadata.csv the columns `label_name` and `label` are the sub-folder and its number in the alphabet.

    Args:
        folder (`str` or `os.PathLike`): with images.
        columns (`Sequence[str]`): that each line must have, filled in.
        limit (`int`, *optional*): take the first ones only.

    Returns:
        `list[Example]`

    Raises:
        ValueError: no folder, no image, a column, a value or an image that is missing, or a file named twice.
    """
    folder = Path(folder)
    table = folder / "metadata.csv"
    if not table.is_file():
        return _read_bare_folder(folder, columns)[:limit]
    try:
        with open(table, newline="", encoding="utf-8-sig") as stream:  # spreadsheets put a mark at the beginning
            reader = csv.DictReader(stream)
            rows = list(reader)
            header = reader.fieldnames or []
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"`{table}` must be comma-separated values in UTF-8, got a file that is not: {error}"
        ) from error
    for column in ("file_name", *columns):
        if column not in header:
            raise ValueError(f"`{table}` lacks the column `{column}`: it has {', '.join(header) or 'none'}")
    examples, seen = [], set()
    for number, row in enumerate(rows, start=1):
        short = [name for name, value in row.items() if value is None or name is None]
        if short:
            raise ValueError(f"`{table}` row {number} must have {len(header)} values, as its header has")
        empty = [column for column in ("file_name", *columns) if not row[column].strip()]
        if empty:
            raise ValueError(f"`{table}` row {number} must have a value for `{empty[0]}`, got none")
        name = PurePosixPath(row["file_name"])
        if name in seen:
            raise ValueError(f"`{table}` must name each file once, got {name} again in row {number}")
        seen.add(name)
        target = folder / row["target_file"] if row.get("target_file", "").strip() else None
        for path in (folder / name, target):
            if path is not None and not path.is_file():
                raise ValueError(f"`{table}` row {number} names {path}, which is not there")
        examples.append(Example(str(name), folder / name, dict(row), target))
    if not examples:
        raise ValueError(f"`{table}` must have at least one row, got none")
    return examples[:limit]


def _read_bare_folder(folder, columns):
    names = list_images(folder, None, None, option="folder")
    examples = [Example(name, folder / name) for name in names]
    if not columns:
        return examples
    classes = sorted({PurePosixPath(name).parts[0] for name in names if len(PurePosixPath(name).parts) > 1})
    unknown = [column for column in columns if column not in ("label", "label_name")]
    if unknown or not all(len(PurePosixPath(name).parts) > 1 for name in names):
        wanted = ", ".join(f"`{column}`" for column in unknown or columns)
        raise ValueError(f"`{folder}` lacks a metadata.csv with the column {wanted} beside `file_name`")
    for position, example in enumerate(examples):
        name = PurePosixPath(example.id).parts[0]
        row = {"file_name": example.id, "label": str(classes.index(name)), "label_name": name}
        examples[position] = dataclasses.replace(example, row=row)
    return examples


def label_of(example, row=None):
    """The class number of an example, or of its target with `row=example.target_row`.

    Raises:
        ValueError: there is no `label`, or it is not a whole number from 0 on.
    """
    value = str((example.row if row is None else row).get("label", "")).strip()
    if not (value.isascii() and value.isdigit()):
        raise ValueError(f"`label` of {example.id} must be a whole number from 0 on, got {value!r}")
    return int(value)


def pair_by_stem(clean, targets):
    """Clean image i with target i: the one whose name, without its suffix, is the same (`12.png`, `12.jpg`).

    As M-Attack and FOA pair them. Targets that no clean image asks for are left out.

    Args:
        clean, targets (`list[Example]`): of two folders.

    Returns:
        `list[Example]`: the clean ones, each with its target.

    Raises:
        ValueError: a clean image has no target, or two images of one folder have the same stem.
    """
    found = {}
    for name, examples in (("clean", clean), ("targets", targets)):
        stems = {}
        for example in examples:
            stem = str(PurePosixPath(example.id).with_suffix(""))
            if stem in stems:
                raise ValueError(f"`{name}` must have one image per stem, got {stems[stem].id} and {example.id}")
            stems[stem] = example
        found[name] = stems
    missing = [stem for stem in found["clean"] if stem not in found["targets"]]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"`targets` must hold an image for every clean image, by file stem, got none for {', '.join(missing[:3])}{more}"
        )
    pairs = ((example, found["targets"][stem]) for stem, example in found["clean"].items())
    return [dataclasses.replace(one, target=other.image, target_row=other.row) for one, other in pairs]


def pair_with_class(examples, label):
    """Every image of another class, each with an image of class `label` as its target, these in turn.

    The paper's classification aims at its eleventh class, shark, which no clean image belongs to.

    Raises:
        ValueError: there is no image of that class, or none of another.
    """
    targets = [example for example in examples if label_of(example) == label]
    clean = [example for example in examples if label_of(example) != label]
    if not targets or not clean:
        raise ValueError(
            f"`label` must leave images on both sides, got {len(targets)} images of class {label} and {len(clean)} others"
        )
    return [
        dataclasses.replace(example, target=target.image, target_row=target.row)
        for position, example in enumerate(clean)
        for target in [targets[position % len(targets)]]
    ]


def pair_with_another_class(examples, seed=0):
    """Each image with one of another class as its target, a function of the seed and the image's name.

    Raises:
        ValueError: all images are of one class.
    """
    labels = [label_of(example) for example in examples]
    if len(set(labels)) < 2:
        raise ValueError(f"`examples` must be of at least two classes, got {sorted(set(labels))}")
    paired = []
    for example, label in zip(examples, labels, strict=True):
        others = [other for other, its in zip(examples, labels, strict=True) if its != label]
        digest = hashlib.blake2b(f"{seed}/{example.id}".encode(), digest_size=8).digest()
        other = others[int.from_bytes(digest, "little") % len(others)]
        paired.append(dataclasses.replace(example, target=other.image, target_row=other.row))
    return paired


def read_scienceqa(name=SCIENCE_QA, split="test", limit=None, cache_dir=None):
    """Questions with an image from ScienceQA, or from a data set with its columns.

    The paper uses 100 pairs and does not say which; here they are the first with an image.

    Args:
        name (`str`): a Hub id, or a folder that `datasets` has saved.
        split (`str`): of it.
        limit (`int`, *optional*): take the first ones only.
        cache_dir (`str`, *optional*): where `datasets` keeps downloads.

    Returns:
        `list[Example]`: whose rows have `question`, `options` (`list[str]`) and `answer` (`int`).

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: the set, the split or a column is not there, or no row has an image.
    """
    try:
        from datasets import DatasetDict, load_dataset, load_from_disk
        from datasets import Image as ImageFeature
    except ImportError as error:
        raise ImportError("ScienceQA needs datasets: pip install 'fs-psm-hf[train]'") from error
    saved = any(os.path.isfile(os.path.join(name, file)) for file in ("dataset_dict.json", "state.json"))
    try:
        data = load_from_disk(name) if saved else load_dataset(name, split=split, cache_dir=cache_dir)
    except Exception as error:  # its own classes, urllib's, pyarrow's
        raise ValueError(f"`name` {name} cannot be loaded: {error}") from error
    if isinstance(data, DatasetDict):
        if split not in data:
            raise ValueError(f"`split` must be one of {', '.join(data)}, got {split}")
        data = data[split]
    for column in ("image", "question", "choices", "answer"):
        if column not in data.column_names:
            raise ValueError(f"`{name}` lacks the column `{column}`: it has {', '.join(data.column_names)}")
    data = data.cast_column("image", ImageFeature(decode=False))
    examples = []
    for number, line in enumerate(data):
        entry = line["image"]
        if entry is None:
            continue
        image = entry["bytes"] if entry["bytes"] is not None else Path(entry["path"])
        row = {"question": line["question"], "options": list(line["choices"]), "answer": line["answer"]}
        examples.append(Example(f"{split}/{number}", image, row))
        if len(examples) == limit:
            break
    if not examples:
        raise ValueError(f"`{name}` must have rows with an image, got none in {split}")
    return examples


def load_image(source, size=IMAGE_SIZE, name=None):
    """An image in the frame of the attacks: short side to `size` (bicubic), centre crop, RGB.

    An image that is `size` x `size` already is not touched.

    Args:
        source (`Path`, `str`, `bytes` or `PIL.Image.Image`): of any size.
        size (`int`): pixels.
        name (`str`, *optional*): what to call it in a message.

    Returns:
        `torch.Tensor` of shape `(3, size, size)`: multiples of 1/255 in [0, 1], float32.

    Raises:
        OSError: it cannot be read.
        ValueError: it has more than 8 bits per channel.
    """
    name = name or (str(source) if isinstance(source, (str, Path)) else "the image")
    try:
        if isinstance(source, Image.Image):
            mode, image = source.mode, source.convert("RGB")
        else:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
                mode, image = opened.mode, opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise OSError(f"{name} is not a readable image: {error}") from error
    if mode.startswith("I") or mode == "F":  # convert clips those to white
        raise ValueError(f"{name} must have 8 bits per channel, got an image of mode {mode}")
    width, height = image.size
    if min(width, height) != size:
        # Rounded down, and the crop's corner rounded, as torchvision and the attacks' code do.
        wide, high = (size, size * height // width) if width <= height else (size * width // height, size)
        image = image.resize((wide, high), Image.Resampling.BICUBIC)
        width, height = image.size
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).float() / 255


def load_images(examples, size=IMAGE_SIZE, target=False):
    """The images of some examples, or with `target` those that the attack aims at.

    Returns:
        `torch.Tensor` of shape `(len(examples), 3, size, size)`: [0, 1] pixels, float32.

    Raises:
        OSError, ValueError: as [`load_image`].
        ValueError: an example has no target.
    """
    images = []
    for example in examples:
        source = example.target if target else example.image
        if source is None:
            raise ValueError(f"`examples` must each have a target image, got none for {example.id}")
        named = source if isinstance(source, (str, Path)) else f"{'target of ' if target else ''}{example.id}"
        images.append(load_image(source, size, str(named)))
    return torch.stack(images)
