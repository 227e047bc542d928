"""Every speed benchmark runs at tiny shapes and writes the keys that its page documents."""

import argparse
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import MEAN, SIZE, STD, psm_model, smoothed_tower
from training_runs import forget_accelerate
from transformers import CLIPImageProcessorPil


ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "benchmarks"
# What every file says of the machine and of the run.
COMMON = {
    "tower", "psm", "random_weights", "image_size", "dtype", "device", "threads", "clock", "repeats", "true_shapes",
    "malloc", "versions", "command",
}  # fmt: skip
TINY = ["--tower", "tiny", "--psm", "tiny", "--image-size", 16, "--dtype", "float32", "--repeats", 2]


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    """Runs a script in this process and gives its JSON."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    threads = torch.get_num_threads()

    def run(script, *arguments):
        path = tmp_path / "result.json"
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments), "--json", str(path)])
        runpy.run_path(str(FOLDER / script), run_name="__main__")
        return json.loads(path.read_text())

    yield run
    torch.set_num_threads(threads)
    forget_accelerate()
    # The helpers of the benchmarks are a module of their folder, not of the tests.
    sys.modules.pop("measuring", None)


def test_overhead(benchmark):
    found = benchmark("overhead.py", *TINY, "--at-least", 0, "--batch-sizes", 1, 2, "--num-samples", 1, 3)
    assert set(found) == COMMON | {"rows", "worst_ratio"}
    assert [(row["batch_size"], row["num_samples"]) for row in found["rows"]] == [(1, 1), (1, 3), (2, 1), (2, 3)]
    assert found["worst_ratio"] == max(row["ratio"] for row in found["rows"])
    assert all(row["seconds_bare"] > 0 for row in found["rows"])


def test_the_bare_networks_see_the_very_images_that_are_smoothed(monkeypatch):
    """With one draw the smoothed output is what the bare networks make of the prepared image."""
    monkeypatch.syspath_prepend(str(FOLDER))
    overhead = runpy.run_path(str(FOLDER / "overhead.py"))
    measuring = sys.modules.pop("measuring")
    tower = smoothed_tower(psm=psm_model(), num_samples=1)
    tower.config.image_mean, tower.config.image_std = measuring.MEAN, measuring.STD
    pixels = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    seen = []
    handle = tower.vision_tower.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs), with_kwargs=True)
    with torch.inference_mode():
        tower(pixels, generator=0)
        overhead["bare"](tower, overhead["noisy_passes"](tower, pixels, 1))
    handle.remove()
    smoothed, bare = (kwargs["pixel_values"] for kwargs in seen)
    torch.testing.assert_close(bare, smoothed, rtol=1e-5, atol=1e-5)


def test_certify_throughput(benchmark):
    found = benchmark(
        "certify_throughput.py", *TINY, "--num-samples", 60, "--max-draws", 1000, "--loop-batch-size", 20
    )
    assert set(found) == COMMON | {"sigma", "throughput", "draws_to_radius", "median_ratio_of_draws"}
    speed = found["throughput"]
    assert speed["ratio"] > 0
    # The restated loop scores the same function: the two means are of the same distribution.
    assert speed["difference_in_standard_errors"] < 5
    (row,) = found["draws_to_radius"]
    assert row["draws_hoeffding"] == 1000
    assert row["radius_adaptive"] >= row["radius"] > 0
    assert found["median_ratio_of_draws"] == 1000 / row["draws_adaptive"] > 1


def test_draws_to_a_radius_of_a_trained_tower(benchmark):
    cards = ROOT / "model_cards"
    options = [
        "--tower",
        cards / "tiny-llava-cifar10",
        "--psm",
        cards / "fs-psm-tiny-clip-cifar10",
        "--image-size",
        32,
    ]
    options += ["--dtype", "float32", "--sigma", 0.12, "--max-draws", 200, "--radius-only", "--repeats", 1]
    found = benchmark("certify_throughput.py", *options)
    assert set(found) == COMMON | {"sigma", "draws_to_radius", "median_ratio_of_draws"}
    assert len(found["draws_to_radius"]) == 3
    assert found["random_weights"] == {"tower": False, "psm": False}
    assert str(ROOT) not in json.dumps(found)


def test_tradeoff(benchmark):
    options = ["--image-size", 16, "--repeats", 2, "--num-samples", 1, 2, "--new-tokens", 2]
    found = benchmark("tradeoff.py", *options)
    assert set(found) == COMMON | {"rows", "purifier_parameters", "new_tokens"}
    assert [(row["purifier"], row["num_samples"]) for row in found["rows"]] == [
        ("diffusion", 1), ("diffusion", 2), ("light", 1), ("light", 2),
    ]  # fmt: skip
    for row in found["rows"]:
        assert row["seconds_end_to_end"] > row["seconds_tower"] > 0
        assert row["paper_ratio"] == pytest.approx(
            {("diffusion", 2): 0.41 / 0.28, ("light", 2): 0.24 / 0.20}.get((row["purifier"], row["num_samples"]), 1)
        )


def test_attack_throughput(benchmark):
    found = benchmark("attack_throughput.py", *TINY, "--steps", 2, "--num-draws", 4, "--epsilon", 0.5)
    assert set(found) == COMMON | {
        "steps", "num_draws", "epsilon", "steps_per_second_ours", "steps_per_second_usual", "ratio", "l2_norms",
        "peak_bytes_ours", "peak_bytes_usual", "passes_of",
    }  # fmt: skip
    # Both are attacks: they end on the sphere, or near it after two steps of half the radius each.
    assert all(0.3 < length <= 0.5 + 1e-5 for length in found["l2_norms"].values())


def test_train_throughput(benchmark):
    found = benchmark("train_throughput.py", *TINY, "--batch-size", 2, "--num-samples", 2)
    assert set(found) == COMMON | {"rows"}
    assert [row["stage"] for row in found["rows"]] == ["purifier", "mapper"]
    assert all(row["steps_per_second_ours"] > 0 and row["ratio"] > 0 for row in found["rows"])
    # One draw at a time holds less than a graph over all of them.
    assert all(row["peak_bytes_ours"] < row["peak_bytes_usual"] for row in found["rows"])


def test_the_peak_is_of_what_is_held_at_once(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    measuring = runpy.run_path(str(FOLDER / "measuring.py"))
    args = argparse.Namespace(device="cpu")

    def one_after_another():
        for _ in range(3):
            torch.zeros(1_000_000)

    def at_once():
        return [torch.zeros(1_000_000) for _ in range(3)]

    for _ in range(2):  # and what came before changes nothing
        assert measuring["peak_memory"](args, one_after_another) == pytest.approx(4e6, rel=0.01)
        assert measuring["peak_memory"](args, at_once) == pytest.approx(12e6, rel=0.01)


def test_memory(benchmark):
    options = [*TINY[:-1], 1, "--num-samples", 1, 2, "--batch-sizes", 1, 2, "--most", 4, "--max-batch-size", 2]
    found = benchmark("memory.py", *options)
    assert set(found) == COMMON | {
        "max_batch_size", "by_samples", "by_batch", "growth_over_samples", "largest_pass", "largest_product_that_fits",
        "budget_gib",
    }  # fmt: skip
    assert [row["num_samples"] for row in found["by_samples"]] == [2, 4]
    assert found["largest_product_that_fits"] == 4
    # A pass is all that is held, whatever the number of draws; a larger pass holds more.
    assert found["growth_over_samples"] < 1.1
    assert found["largest_pass"][-1]["peak_bytes"] > 1.2 * found["largest_pass"][0]["peak_bytes"]


def test_engine(benchmark):
    options = [*TINY, "--pass-size", 2, "--wide-pass", 4]
    options[options.index("float32")] = "bfloat16"
    found = benchmark("engine.py", *options)
    assert set(found) == COMMON | {"matmul_rate", "matmul_rates", "networks", "changes", "pass_size"}
    assert [row["network"] for row in found["networks"]] == ["purifier", "tower"]
    for row in found["networks"]:
        assert row["share_of_matmul_rate"] == pytest.approx(row["floor_seconds"] / row["seconds"])
    assert len(found["changes"]) == 5


def test_kept_memory(benchmark):
    found = benchmark("kept_memory.py", *TINY, "--calls", 2)
    assert set(found) == COMMON | {"pass_size", "seconds_default", "seconds_kept", "ratio"}
    assert found["ratio"] > 0


@pytest.mark.slow
def test_two_processes(tmp_path):
    smoothed_tower(sigma=0.25, num_samples=2).save_pretrained(tmp_path / "tower")
    CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, image_mean=MEAN, image_std=STD
    ).save_pretrained(tmp_path / "tower")
    (tmp_path / "images").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    command = [
        sys.executable, "examples/benchmarks/two_processes.py", "--repeats", 1, "--json", tmp_path / "r.json", "--",
        "certify", "--tower", tmp_path / "tower", "--images", tmp_path / "images", "--num-samples", 200, "--seed", 0,
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["same_file"]
    assert found["ratio"] == found["seconds_one_process"] / found["seconds_two_processes"] > 0
    assert str(tmp_path) not in json.dumps(found)
