"""Two real processes, and accumulated micro-batches, do what one process does."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from training_runs import command, log_of, losses_of, save_images, save_tower, start, train, words

from fs_psm_hf import PSMModel


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("distributed")
    save_tower(root / "tower")
    images = save_images(root / "images", 10)
    (images / "broken.png").write_bytes(b"no image")
    return root


def assert_near(found, expected, tolerance):
    """Logs of two runs agree in every number, to a relative tolerance."""
    assert len(found) == len(expected)
    for line, other in zip(found, expected, strict=True):
        assert line.keys() == other.keys()
        for name, value in line.items():
            assert value == pytest.approx(other[name], rel=tolerance, abs=tolerance), (line["step"], name)


def test_two_processes_train_both_stages_as_one(root, tmp_path):
    """Losses to 1e-4, weights nearly; the statistics of the mapper's loss are over the images of both processes."""
    options = {"max_train_steps": 5, "checkpointing_steps": 1, "validation_data_dir": root / "images"}
    options |= {"sigma": None, "sigma_min": 0.1, "sigma_max": 0.4}
    assert command(*words(root, tmp_path / "one", "both", train_batch_size=4, **options)) == 0
    # They go on where one process stopped.
    one, two = tmp_path / "one" / "purifier", tmp_path / "two" / "purifier"
    shutil.copytree(one / "checkpoint-1", two / "checkpoint-1")
    shutil.copy(one / "log.jsonl", two)
    options |= {"resume_from_checkpoint": "latest"}
    process = start(words(root, tmp_path / "two", "both", train_batch_size=2, **options), processes=2)
    printed = process.communicate(timeout=600)[0]
    assert process.returncode == 0, printed
    for stage in ("purifier", "mapper"):
        one, two = tmp_path / "one" / stage, tmp_path / "two" / stage
        # There were two: each keeps its own random state.
        assert (two / "checkpoint-5" / "random_states_1.pkl").exists()
        assert not (one / "checkpoint-5" / "random_states_1.pkl").exists()
        assert_near(log_of(two), log_of(one), 1e-4)
        assert losses_of(one, "skipped_images")[-1] > 0
        found, expected = (load_file(folder / "model.safetensors") for folder in (two, one))
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-2, atol=2e-3)
    assert PSMModel.from_pretrained(tmp_path / "two").mapper is not None
    assert not list((tmp_path / "two").rglob(".unfinished*"))
    # One process goes on where two stopped.
    for name in ("one", "two"):
        train(root, tmp_path / name / "purifier", train_batch_size=4, **options | {"max_train_steps": 6})
    assert_near(log_of(tmp_path / "two" / "purifier")[-2:], log_of(tmp_path / "one" / "purifier")[-2:], 1e-3)


def test_accumulated_micro_batches_are_one_batch(root, tmp_path):
    """Of the purifier, whose losses are means over images: 2 × 2 images and 1 × 4, also where one goes on from the other."""
    options = {"max_train_steps": 4, "sigma": None, "sigma_min": 0.1, "sigma_max": 0.4, "checkpointing_steps": 3}
    halves = options | {"train_batch_size": 2, "gradient_accumulation_steps": 2}
    train(root, tmp_path / "one", train_batch_size=4, **options)
    train(root, tmp_path / "two", **halves)
    assert_near(log_of(tmp_path / "two"), log_of(tmp_path / "one"), 1e-4)
    (tmp_path / "three").mkdir()
    (tmp_path / "one" / "checkpoint-3").rename(tmp_path / "three" / "checkpoint-3")
    shutil.copy(tmp_path / "one" / "log.jsonl", tmp_path / "three")
    train(root, tmp_path / "three", resume_from_checkpoint="latest", **halves)
    assert_near(log_of(tmp_path / "three"), log_of(tmp_path / "one"), 1e-4)
