"""Which image is trained on when: order, weights, crops, what cannot be used, and data sets of `datasets`."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import command, log_of, losses_of, prepared, save_images, save_tower, train, weights_of, words

from fs_psm_hf.training.data import (
    ImageSource,
    Mixture,
    PositionBatches,
    TrainingImages,
    collate,
    fit_image,
    folder_source,
    hub_source,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    save_tower(root / "tower")
    save_images(root / "images", 12)
    save_images(root / "few", 4, seed=1)
    return root


@pytest.fixture
def sources(root):
    return [folder_source(root / "images"), folder_source(root / "few")]


def taken(mixture, first, last):
    return [mixture.at(position) for position in range(first, last)]


def test_every_image_once_per_epoch_in_a_new_order(sources):
    mixture = Mixture(sources, seed=3, held_out=frozenset({(0, 5), (1, 2)}))
    assert mixture.size == 14
    epochs = [taken(mixture, 14 * epoch, 14 * (epoch + 1)) for epoch in range(3)]
    everything = {(0, i) for i in range(12)} | {(1, i) for i in range(4)}
    for epoch in epochs:
        assert sorted(epoch) == sorted(everything - {(0, 5), (1, 2)})
    assert epochs[0] != epochs[1] != epochs[2]
    # Any position by itself, also backwards and after others.
    assert [mixture.at(position) for position in (20, 3)] == [epochs[1][6], epochs[0][3]]
    assert taken(Mixture(sources, seed=4), 0, 14) != taken(Mixture(sources, seed=5), 0, 14)


def test_weights_are_frequencies(sources):
    mixture = Mixture(sources, [3, 1], seed=0, held_out=frozenset({(1, 0)}))
    found = taken(mixture, 0, 4000)
    from_first = [index for source, index in found if source == 0]
    assert len(from_first) / 4000 == pytest.approx(0.75, abs=4 * np.sqrt(0.75 * 0.25 / 4000))
    counts = np.bincount(from_first, minlength=12)
    np.testing.assert_allclose(counts, 250, atol=4 * np.sqrt(250))
    assert {index for source, index in found if source == 1} == {1, 2, 3}
    for weights in ([1], [1, 0], [1, -1], [1, float("nan")]):
        with pytest.raises(ValueError, match="one number > 0 for each of 2 sets"):
            Mixture(sources, weights)


def test_a_set_must_not_be_held_out_as_a_whole(sources):
    with pytest.raises(ValueError, match="must leave images to train on in every set"):
        Mixture(sources, held_out=frozenset((1, i) for i in range(4)))


def test_positions_are_shared_out_among_processes_and_micro_batches():
    """A step has the same images whatever they are shared out to, and none is left out or seen twice."""

    def steps(batch_size, processes, accumulation, first=0, last=3):
        each = [
            list(PositionBatches(batch_size, rank, processes, accumulation, first, last)) for rank in range(processes)
        ]
        assert {len(batches) for batches in each} == {(last - first) * accumulation}
        together = [sum((batches[i] for batches in each), []) for i in range((last - first) * accumulation)]
        return [sum(together[i : i + accumulation], []) for i in range(0, len(together), accumulation)]

    expected = [list(range(8 * step, 8 * step + 8)) for step in range(3)]
    for sharing in ((8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2), (1, 4, 2)):
        assert steps(*sharing) == expected
    assert steps(2, 2, 2, first=2) == expected[2:]
    assert len(PositionBatches(2, 0, 2, 2, 2, 3)) == 2


def test_fitting_an_image():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
    exact = fit_image(Image.fromarray(pixels), 16)
    np.testing.assert_array_equal(exact.numpy(), pixels.transpose(2, 0, 1) / np.float32(255))
    wide = Image.fromarray(rng.integers(0, 255, (32, 50, 3), dtype=np.uint8))
    small = np.asarray(wide.resize((25, 16), Image.BICUBIC)).transpose(2, 0, 1) / np.float32(255)
    np.testing.assert_array_equal(fit_image(wide, 16).numpy(), small[:, :, 4:20])
    crops = [fit_image(wide, 16, np.random.default_rng(i)).numpy() for i in range(200)]
    lefts = [next(x for x in range(10) if np.array_equal(crop, small[:, :, x : x + 16])) for crop in crops]
    assert set(lefts) == set(range(10))
    # Of any size between both, and never cut from less.
    steps = Image.fromarray(np.kron(np.arange(0, 256, 4, dtype=np.uint8), np.ones((64, 1), np.uint8)))
    slopes = []
    for i in range(200):
        across = fit_image(steps.convert("RGB"), 16, np.random.default_rng(i), random_resize=True)[0, 0]
        slopes.append((255 * (across[12] - across[4]) / 8).item())  # grey levels per pixel: 4 at full size
    assert 3.9 < min(slopes) < 4.3
    assert 14 < max(slopes) < 17
    assert torch.equal(fit_image(wide, 16, None, random_resize=True), fit_image(wide, 16))
    # Enlarged where it is smaller; one row high and still a square.
    assert fit_image(Image.new("RGB", (3, 1)), 16).shape == (3, 16, 16)


def test_crops_and_flips_belong_to_the_position(sources):
    images = TrainingImages(Mixture(sources, seed=2), 16, random_flip=True)
    once = [images[position]["pixels"] for position in range(200)]
    assert torch.equal(images[17]["pixels"], once[17])
    plain = TrainingImages(Mixture(sources, seed=2), 16)
    flipped = 0
    for position, pixels in enumerate(once):
        other = plain[position]["pixels"]
        same, mirrored = torch.equal(pixels, other), torch.equal(pixels.flip(-1), other)
        assert same != mirrored
        flipped += mirrored
    assert 70 < flipped < 130
    # The same image is cropped anew in each epoch.
    by_image = {}
    for position in range(160):
        by_image.setdefault(images.mixture.at(position), []).append(plain[position]["pixels"])
    assert all(any(not torch.equal(crops[0], crop) for crop in crops) for crops in by_image.values())


@pytest.fixture
def spoilt(root, tmp_path):
    """Good images, a broken one, an empty one and one of less than a patch."""
    folder = save_images(tmp_path / "spoilt", 6)
    (folder / "broken.png").write_bytes((folder / "00.png").read_bytes()[:60])
    (folder / "empty.jpg").write_bytes(b"")
    Image.new("RGB", (40, 3)).save(folder / "thin.png")
    return folder


def test_an_unusable_image_gives_way_to_another_of_its_set(spoilt, root):
    mixture = Mixture([folder_source(spoilt), folder_source(root / "few")], seed=1)
    images = TrainingImages(mixture, 16, smallest=4)
    items = [images[position] for position in range(2 * mixture.size)]
    batch = collate(items)
    reasons = batch["skipped"]
    assert batch["pixels"].shape == (2 * mixture.size, 3, 16, 16)
    for name, words_of in (
        ("broken.png", "is not a readable image"),
        ("empty.jpg", "is not a readable image"),
        ("thin.png", "has 40x3 pixels, less than the 4 of a patch"),
    ):
        mine = [reason for reason in reasons if name in reason]
        # Twice in the order, and now and then as the stand-in of another.
        assert len(mine) >= 2
        assert all(words_of in reason for reason in mine)
    again = collate([images[position] for position in range(2 * mixture.size)])
    assert torch.equal(again["pixels"], batch["pixels"])
    assert again["skipped"] == reasons
    # What stands in for them is one of the six good ones of the same folder.
    usable = [fit_image(Image.open(spoilt / f"{i:02d}.png"), 16) for i in range(6)]
    centred = TrainingImages(mixture, 16, center_crop=True, smallest=4)
    for position in range(mixture.size):
        item = centred[position]
        if item["skipped"]:
            assert any(torch.equal(item["pixels"], pixels) for pixels in usable)


def test_unreadable_images_in_the_middle_of_a_run_are_skipped_and_counted(spoilt, root, tmp_path, caplog):
    """The run goes on, with the count in its log, and goes on to the bit after an interruption."""
    options = {
        "train_data_dir": spoilt,
        "max_train_steps": 6,
        "checkpointing_steps": 3,
        "validation_data_dir": root / "few",
    }
    whole = train(root, tmp_path / "whole", **options)
    counts = losses_of(tmp_path / "whole", "skipped_images")
    assert len(counts) == 6
    assert counts == sorted(counts)
    assert counts[2] > 0  # 12 of the 9 images have been seen
    assert counts[-1] > counts[2]
    assert sum("skipped: " in record.getMessage() for record in caplog.records) == counts[-1]
    (tmp_path / "part").mkdir()
    (tmp_path / "whole" / "checkpoint-3").rename(tmp_path / "part" / "checkpoint-3")
    lines = (tmp_path / "whole" / "log.jsonl").read_text()
    (tmp_path / "part" / "log.jsonl").write_text(lines)
    part = train(root, tmp_path / "part", resume_from_checkpoint="latest", **options)
    assert log_of(tmp_path / "part") == log_of(tmp_path / "whole")
    for name, tensor in weights_of(part.stage.trained).items():
        assert torch.equal(tensor, whole.stage.trained.state_dict()[name]), name


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_unusable_images_is_an_error(workers, root, tmp_path, capsys):
    folder = tmp_path / "broken"
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}.png").write_bytes(b"no image")
    bad = {"train_data_dir": folder, "dataloader_num_workers": workers}
    assert command(*words(root, tmp_path / "one", **bad)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "`--train_data_dir` has no readable image among the 1 held out" in error
    assert command(*words(root, tmp_path / "two", validation_data_dir=root / "few", **bad)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fs-psm train: `--train_data_dir` gave 100 unusable images in a row: ")
    assert "Traceback" not in error
    assert "is not a readable image: cannot identify image file" in error


def test_a_process_that_reads_images_changes_nothing(root, tmp_path):
    train(root, tmp_path / "none")
    train(root, tmp_path / "one", dataloader_num_workers=1)
    assert log_of(tmp_path / "none") == log_of(tmp_path / "one")


def picture_rows(root, count=5):
    return [{"bytes": (root / "images" / f"{i:02d}.png").read_bytes(), "path": None} for i in range(count)]


@pytest.mark.parametrize("layout", ["folder", "classes", "parquet"])
def test_a_local_data_set(layout, root, tmp_path):
    """`--dataset_name` with a folder of images, of folders of images or of parquet files."""
    place, column = tmp_path / layout, "picture" if layout == "parquet" else "image"
    if layout == "parquet":
        place.mkdir()
        features = datasets.Features({"picture": datasets.Image(), "number": datasets.Value("int64")})
        rows = {"picture": picture_rows(root), "number": list(range(5))}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(place / "train-00000.parquet")
    else:
        for i in range(5):
            folder = place / ("ab"[i % 2] if layout == "classes" else "")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i:02d}.png").write_bytes((root / "images" / f"{i:02d}.png").read_bytes())
    source = hub_source(str(place), None, "train", column, cache_dir=str(tmp_path / "cache"))
    found = sorted(np.asarray(source[i]).tobytes() for i in range(len(source)))
    files = [np.asarray(Image.open(root / "images" / f"{i:02d}.png")) for i in range(5)]
    assert found == sorted(pixels.tobytes() for pixels in files)
    trainer = train(
        root, tmp_path / "out", train_data_dir=None, dataset_name=place, image_column=column,
        cache_dir=tmp_path / "cache", max_train_samples=4, max_train_steps=1,
    )  # fmt: skip
    assert (len(trainer.images), len(trainer.held_out)) == (3, 1)


def test_broken_and_missing_rows_of_a_data_set_are_skipped(root):
    features = datasets.Features({"image": datasets.Image(decode=False)})
    rows = [*picture_rows(root, 3), {"bytes": b"no image", "path": None}, None]
    data = datasets.Dataset.from_dict({"image": rows}, features=features)
    images = TrainingImages(Mixture([ImageSource(data, "image")]), 16)
    reasons = {reason for position in range(5) for reason in images[position]["skipped"]}
    assert {reason.partition(":")[0] for reason in reasons} == {
        "image 3 is not a readable image",
        "image 4 is not a readable image",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset_name": "FOLDER/nowhere"}, "`--dataset_name` .*nowhere cannot be loaded"),
        ({"dataset_split": "test"}, "`--dataset_name` .* cannot be loaded: .*test"),
        ({"image_column": "picture"}, "`--image_column` must be one of image, label, got picture"),
        ({"image_column": "label"}, "`--image_column` label must hold images, got ClassLabel"),
    ],
)
def test_a_data_set_that_does_not_fit(change, message, root, tmp_path):
    for label in "ab":
        save_images(tmp_path / "set" / label, 2)
    options = {"dataset_name": str(tmp_path / "set"), "dataset_split": "train", "image_column": "image"} | change
    options = {name: value.replace("FOLDER", str(tmp_path)) for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        prepared(root, tmp_path / "out", train_data_dir=None, cache_dir=tmp_path / "cache", **options)


def test_fewer_images_and_images_held_out(root, tmp_path):
    """`--max_train_samples` is of each set; a folder to validate on leaves all images to train on."""
    both = [root / "images", root / "few"]
    trainer = prepared(root, tmp_path / "one", train_data_dir=both, max_train_samples=3)
    assert (len(trainer.images), len(trainer.held_out)) == (5, 1)
    trainer = prepared(root, tmp_path / "two", train_data_dir=both, validation_data_dir=root / "few")
    assert (len(trainer.images), len(trainer.held_out)) == (16, 2)
    few = [fit_image(Image.open(path).convert("RGB"), 16) for path in sorted((root / "few").glob("*.png"))]
    assert all(any(torch.equal(held, image) for image in few) for held in trainer.held_out)
    # Held out images come from all sets and are never trained on.
    trainer = prepared(root, tmp_path / "three", train_data_dir=both, center_crop=True, seed=3)
    trained = [trainer.images[position]["pixels"] for position in range(2 * len(trainer.images))]
    assert not any(torch.equal(held, pixels) for held in trainer.held_out for pixels in trained)
