"""Folders, pairs and images: against transformers' own image processor, and every mistake a user can make."""

import json
import re

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from fs_psm_hf.evaluation.data import (
    Example,
    label_of,
    load_image,
    load_images,
    pair_by_stem,
    pair_with_another_class,
    pair_with_class,
    read_folder,
    read_scienceqa,
)


def picture(width=40, height=30, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 5, width // 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def write(folder, names, table=None, header=None):
    """A folder of pictures with a metadata.csv of the given lines."""
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed=seed).save(path)
    if table is not None:
        (folder / "metadata.csv").write_text("\n".join([header, *table]) + "\n", encoding="utf-8")
    return folder


# Reading --------------------------------------------------------------------------------------------------------------


def test_a_folder_with_its_table(tmp_path):
    folder = write(
        tmp_path,
        ["b.png", "sub/a.jpg", "t.png"],
        ['sub/a.jpg,"a dog, é",1,t.png', "b.png,a cat,0,"],
        "file_name,caption,label,target_file",
    )
    first, second = read_folder(folder, ["caption", "label"])
    assert [first.id, second.id] == ["sub/a.jpg", "b.png"]  # the table's order
    assert first.row["caption"] == "a dog, é"
    assert (first.image, first.target) == (folder / "sub/a.jpg", folder / "t.png")
    assert second.target is None
    assert label_of(first) == 1
    assert [example.id for example in read_folder(folder, limit=1)] == ["sub/a.jpg"]


def test_a_folder_without_a_table(tmp_path):
    folder = write(tmp_path, ["10.png", "9.png"])
    assert [example.id for example in read_folder(folder)] == ["10.png", "9.png"]
    with pytest.raises(ValueError, match="lacks a metadata.csv with the column `label` beside `file_name`"):
        read_folder(folder, ["label"])


def test_sub_folders_are_classes(tmp_path):
    folder = write(tmp_path, ["dog/1.png", "cat/1.png", "cat/2.png"])
    examples = read_folder(folder, ["label", "label_name"])
    assert [(e.id, label_of(e), e.row["label_name"]) for e in examples] == [
        ("cat/1.png", 0, "cat"),
        ("cat/2.png", 0, "cat"),
        ("dog/1.png", 1, "dog"),
    ]
    with pytest.raises(ValueError, match="lacks a metadata.csv with the column `caption`"):
        read_folder(folder, ["caption", "label"])


@pytest.mark.parametrize(
    ("header", "table", "message"),
    [
        ("file_name,label", ["a.png,1"], r"metadata.csv` lacks the column `caption`: it has file_name, label$"),
        ("name,caption", ["a.png,x"], "lacks the column `file_name`: it has name, caption"),
        ("file_name,caption", ["a.png,x", "a.png,y"], "must name each file once, got a.png again in row 2"),
        ("file_name,caption", ["a.png,x", "b.png,y"], "row 2 names .*b.png, which is not there"),
        ("file_name,caption", ["a.png"], "row 1 must have 2 values, as its header has"),
        ("file_name,caption", ["a.png,x,y"], "row 1 must have 2 values, as its header has"),
        ("file_name,caption", ["a.png, "], "row 1 must have a value for `caption`, got none"),
        ("file_name,caption,target_file", ["a.png,x,t.png"], "row 1 names .*t.png, which is not there"),
        ("file_name,caption", [], "must have at least one row, got none"),
    ],
)
def test_tables_with_a_mistake(tmp_path, header, table, message):
    with pytest.raises(ValueError, match=message):
        read_folder(write(tmp_path, ["a.png"], table, header), ["caption"])


def test_tables_of_spreadsheets(tmp_path):
    folder = write(tmp_path, ["a.png"])
    (folder / "metadata.csv").write_bytes("file_name,caption\r\na.png,é\r\n".encode("utf-8-sig"))
    assert read_folder(folder, ["caption"])[0].row == {"file_name": "a.png", "caption": "é"}
    (folder / "metadata.csv").write_bytes("file_name,caption\na.png,é\n".encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"metadata.csv` must be comma-separated values in UTF-8, got a file that is not"
    ):
        read_folder(folder, ["caption"])


def test_no_folder(tmp_path):
    with pytest.raises(ValueError, match="`folder` must be a folder, got"):
        read_folder(tmp_path / "nothing")


@pytest.mark.parametrize("label", ["x", "-1", "1.0", "", "²"])
def test_labels_are_whole_numbers(label):
    with pytest.raises(ValueError, match=r"`label` of a.png must be a whole number from 0 on, got"):
        label_of(Example("a.png", None, {"label": label}))


# Pairs ----------------------------------------------------------------------------------------------------------------


def examples(*names, label=None):
    rows = [{} if label is None else {"label": str(label)} for _ in names]
    return [Example(name, f"image of {name}", row) for name, row in zip(names, rows, strict=True)]


def test_pairs_by_stem():
    clean, targets = examples("10.png", "9.png", "x/1.png"), examples("9.jpg", "x/1.jpg", "10.jpg", "extra.jpg")
    paired = pair_by_stem(clean, targets)
    assert [(pair.id, pair.target) for pair in paired] == [
        ("10.png", "image of 10.jpg"),
        ("9.png", "image of 9.jpg"),
        ("x/1.png", "image of x/1.jpg"),
    ]


def test_pairs_that_do_not_match():
    clean = examples(*(f"{number}.png" for number in range(6)))
    message = "`targets` must hold an image for every clean image, by file stem, got none for 1, 2, 3 and 2 more"
    with pytest.raises(ValueError, match=message):
        pair_by_stem(clean, examples("0.jpg"))
    with pytest.raises(ValueError, match="got none for 5$"):
        pair_by_stem(clean, examples(*(f"{number}.jpg" for number in range(5))))
    with pytest.raises(ValueError, match="`clean` must have one image per stem, got 0.png and 0.jpg"):
        pair_by_stem(examples("0.png", "0.jpg"), examples("0.jpg"))


def test_targets_of_one_class_in_turn():
    sharks, others = examples("s1", "s2", label=10), examples("a", "b", "c", label=0)
    paired = pair_with_class([*sharks, *others], 10)
    assert [(p.id, p.target) for p in paired] == [("a", "image of s1"), ("b", "image of s2"), ("c", "image of s1")]
    assert all(label_of(p, p.target_row) == 10 for p in paired)
    with pytest.raises(
        ValueError, match="`label` must leave images on both sides, got 0 images of class 3 and 5 others"
    ):
        pair_with_class([*sharks, *others], 3)


def test_targets_of_another_class_depend_on_seed_and_name_only():
    pool = [*examples(*"abcd", label=0), *examples(*"efgh", label=1), *examples(*"ijkl", label=2)]
    paired = pair_with_another_class(pool, seed=4)
    assert all(label_of(p) != label_of(p, p.target_row) for p in paired)
    assert len({p.target for p in paired}) > 4
    assert paired == pair_with_another_class(pool, seed=4)
    assert paired != pair_with_another_class(pool, seed=5)
    with pytest.raises(ValueError, match=r"`examples` must be of at least two classes, got \[0\]"):
        pair_with_another_class(pool[:4])


# Images ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(500, 333), (333, 500), (224, 224), (100, 71), (225, 224), (224, 300)])
def test_the_frame_is_that_of_clip(shape):
    image = picture(*shape)
    processor = CLIPImageProcessor(size={"shortest_edge": 224}, crop_size=224, do_normalize=False)
    wanted = processor(image, return_tensors="pt")["pixel_values"][0]
    loaded = load_image(image)
    assert loaded.shape == (3, 224, 224)
    assert loaded.dtype == torch.float32
    # Where an odd border is cut, its middle pixel may go on either side: here as torchvision has it.
    if shape == (100, 71):
        loaded, wanted = loaded[:, :, :-1], wanted[:, :, 1:]
    assert torch.equal(loaded, wanted)


def test_an_image_of_the_right_size_is_not_touched(tmp_path):
    image = picture(32, 32)
    image.save(tmp_path / "a.png")
    wanted = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    assert torch.equal(load_image(tmp_path / "a.png", 32), wanted)
    assert torch.equal(load_image((tmp_path / "a.png").read_bytes(), 32), wanted)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_other_kinds_of_pictures_become_rgb(mode):
    assert load_image(picture().convert(mode), 16).shape == (3, 16, 16)


def test_images_and_targets_of_other_sizes_share_the_frame(tmp_path):
    picture(50, 20).save(tmp_path / "a.png")
    picture(13, 90).save(tmp_path / "b.jpg")
    pair = [Example("a", tmp_path / "a.png", target=tmp_path / "b.jpg")]
    assert load_images(pair, 16).shape == load_images(pair, 16, target=True).shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match="`examples` must each have a target image, got none for a"):
        load_images([Example("a", tmp_path / "a.png")], 16, target=True)


def test_images_that_cannot_be_read(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    picture(300, 300).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:400])
    for name in ("text.png", "half.png", "missing.png"):
        with pytest.raises(OSError, match=f"{re.escape(str(tmp_path / name))} is not a readable image: "):
            load_image(tmp_path / name)
    with pytest.raises(OSError, match="target of 7 is not a readable image: "):
        load_images([Example("7", b"", target=b"no image")], target=True)
    with pytest.raises(ValueError, match="the image must have 8 bits per channel, got an image of mode I;16"):
        load_image(Image.fromarray(np.full((30, 30), 40_000, dtype=np.uint16)))


# ScienceQA ------------------------------------------------------------------------------------------------------------


def science_qa():
    """Rows in the columns of derek-thomas/ScienceQA."""
    rows = {
        "image": [picture(seed=1), None, picture(seed=2)],
        "question": ["Which ocean is highlighted?", "What is text?", "Which is a mammal?"],
        "choices": [["the Arctic Ocean", "the Atlantic Ocean"], ["a", "b"], ["a gibbon", "a kite", "a hen"]],
        "answer": [1, 0, 0],
        "hint": ["", "", "Look."],
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "choices": datasets.Sequence(datasets.Value("string")),
            "answer": datasets.Value("int8"),
            "hint": datasets.Value("string"),
        }
    )
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.mark.parametrize("layout", ["split", "splits", "parquet"])
def test_science_qa(tmp_path, layout):
    if layout == "parquet":  # as the Hub has it
        science_qa().to_parquet(tmp_path / "test-00000-of-00001.parquet")
    else:
        data = science_qa()
        (data if layout == "split" else datasets.DatasetDict(test=data)).save_to_disk(tmp_path)
    first, second = read_scienceqa(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert (first.id, second.id) == ("test/0", "test/2")  # the row without an image is left out
    assert second.row == {
        "question": "Which is a mammal?",
        "options": ["a gibbon", "a kite", "a hen"],
        "answer": 0,
    }
    assert json.dumps(second.row)
    assert torch.equal(load_images([second], 30), load_image(picture(seed=2), 30)[None])
    assert len(read_scienceqa(str(tmp_path), limit=1, cache_dir=str(tmp_path / "cache"))) == 1


def test_science_qa_that_is_not_there(tmp_path):
    data = science_qa()
    datasets.DatasetDict(test=data).save_to_disk(tmp_path / "whole")
    data.remove_columns("choices").save_to_disk(tmp_path / "without")
    data.select([1]).save_to_disk(tmp_path / "no_image")
    cases = [
        ("whole", "train", "`split` must be one of test, got train"),
        ("without", "test", "lacks the column `choices`: it has image, question, answer, hint"),
        ("no_image", "test", "must have rows with an image, got none in test"),
        ("nothing", "test", "cannot be loaded: "),
    ]
    for folder, split, message in cases:
        with pytest.raises(ValueError, match=message):
            read_scienceqa(str(tmp_path / folder), split)
