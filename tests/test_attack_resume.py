import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from attack_runs import Interrupted, adaptive_encoder, interrupt_after, noisy_encoder, pictures, plain_encoder, run
from safetensors.torch import save_file

from fs_psm_hf.attacks import METHODS, attack
from fs_psm_hf.attacks.state import load_state


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_goes_on_to_the_bit(method, tmp_path):
    images, targets, path = pictures(2), pictures(2, seed=9), tmp_path / "deep" / "state.safetensors"
    encoders = [noisy_encoder(), noisy_encoder(draws=9)]
    whole = run(encoders, images, targets, method, steps=5)
    options = {"steps": 5, "checkpoint": path, "save_every": 2}
    # In the middle of a step, two or three steps in: after the first writing.
    handle = interrupt_after(encoders[0].tower.vision_tower.embeddings, 7)
    with pytest.raises(Interrupted):
        run(encoders, images, targets, method, **options)
    handle.remove()
    assert [file.name for file in path.parent.iterdir()] == ["state.safetensors"]
    assert load_state(path, "cpu")[1] == 2
    resumed = run(encoders, images, targets, method, **options)
    assert torch.equal(resumed.images, whole.images)
    assert torch.equal(resumed.objective, whole.objective)
    assert resumed.facts() == whole.facts()


def test_a_resumed_run_repeats_no_step_and_a_finished_one_runs_none(tmp_path):
    images, targets, path = pictures(1), pictures(1, seed=9), tmp_path / "state.safetensors"
    encoder, calls = plain_encoder(), []
    encoder.tower.vision_tower.embeddings.register_forward_pre_hook(lambda *_: calls.append(1))
    options = {"steps": 6, "checkpoint": path, "save_every": 3}
    handle = interrupt_after(encoder.tower.vision_tower.embeddings, 8)
    with pytest.raises(Interrupted):
        run(encoder, images, targets, "attackvlm", **options)
    handle.remove()
    # The check that the model does not draw by itself, the target, and one pass for each step: no pass is for a log.
    assert len(calls) == 2 + 1 + 5 + 1
    calls.clear()
    finished = run(encoder, images, targets, "attackvlm", **options)
    assert len(calls) == 1 + 3
    calls.clear()
    again = run(encoder, images, targets, "attackvlm", **options)
    assert calls == []
    assert torch.equal(again.images, finished.images)
    assert torch.equal(again.objective, finished.objective)


def test_without_a_seed_the_one_in_the_file_goes_on(tmp_path):
    images, targets, path = pictures(1), pictures(1, seed=9), tmp_path / "state.safetensors"
    encoder = plain_encoder()
    options = {"steps": 5, "checkpoint": path, "save_every": 1, "generator": None}
    handle = interrupt_after(encoder.tower.vision_tower.embeddings, 8)
    with pytest.raises(Interrupted):
        run(encoder, images, targets, "foa", **options)
    handle.remove()
    resumed = run(encoder, images, targets, "foa", **options)
    whole = run(encoder, images, targets, "foa", steps=5, generator=resumed.facts()["seed"])
    assert torch.equal(resumed.images, whole.images)
    # Unpredictable otherwise.
    assert run(encoder, images, targets, "foa", steps=1, generator=None).facts()["seed"] != resumed.facts()["seed"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epsilon": 0.1}, "its epsilon is 0.06274509803921569, this one's 0.1"),
        ({"generator": 4}, "its seed is 3, this one's 4"),
        ({"method": "m_attack"}, "its encoders is"),
        ({"steps": 5}, "its steps is 4, this one's 5"),
        ({"images": pictures(2, seed=11)}, "its images is"),
        ({"targets": pictures(2, seed=11)}, "its targets is"),
        ({"image_ids": [5, 6]}, r"its image_ids is \[0, 1\], this one's \[5, 6\]"),
        ({"encoders": plain_encoder(layer=-2)}, "its encoders is"),
    ],
)
def test_a_file_of_another_run_is_refused_and_left_alone(change, message, tmp_path):
    path = tmp_path / "state.safetensors"
    arguments = {"encoders": plain_encoder(), "images": pictures(2), "targets": pictures(2, seed=9), "method": "foa"}
    arguments |= {"steps": 4, "generator": 3, "checkpoint": path, "save_every": 1}
    attack(**arguments)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="`checkpoint` .*state.safetensors is of another run: " + message):
        attack(**arguments | change)
    assert path.read_bytes() == before


def test_other_weights_are_another_run(tmp_path):
    path, encoder = tmp_path / "state.safetensors", plain_encoder()
    options = {"steps": 2, "checkpoint": path}
    run(encoder, pictures(1), pictures(1, seed=9), "attackvlm", **options)
    with torch.no_grad():
        next(encoder.tower.vision_tower.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match="is of another run: its weights is"):
        run(encoder, pictures(1), pictures(1, seed=9), "attackvlm", **options)


@pytest.mark.parametrize("content", ["garbage", "other"])
def test_what_no_attack_wrote_is_refused(content, tmp_path):
    path = tmp_path / "state.safetensors"
    if content == "garbage":
        path.write_bytes(b"no tensors here")
    else:
        save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="`checkpoint` must be a file that an attack wrote, got .*state.safetensors"):
        run(plain_encoder(), pictures(1), pictures(1, seed=9), "attackvlm", checkpoint=path)


def test_a_bad_state_is_never_written(tmp_path):
    """The weights break down in the middle: what was saved before stays what there is."""
    path, encoder = tmp_path / "state.safetensors", plain_encoder()
    weight = encoder.tower.vision_tower.embeddings.patch_embedding.weight
    calls = []

    def spoil(*_):
        calls.append(1)
        if len(calls) == 9:
            weight.data.fill_(float("nan"))

    encoder.tower.vision_tower.embeddings.register_forward_pre_hook(spoil)
    before = weight.detach().clone()
    options = {"steps": 8, "checkpoint": path, "save_every": 2}
    with pytest.raises(ValueError, match="`encoders` gave a NaN or infinite feature or gradient on image 0"):
        run(encoder, pictures(1), pictures(1, seed=9), "attackvlm", **options)
    weight.data.copy_(before)
    resumed = run(encoder, pictures(1), pictures(1, seed=9), "attackvlm", **options)
    whole = run(plain_encoder(), pictures(1), pictures(1, seed=9), "attackvlm", steps=8)
    assert torch.equal(resumed.images, whole.images)


KILLED = """
import time
from attack_runs import adaptive_encoder, pictures, run
encoder = adaptive_encoder()
encoder.tower.vision_tower.embeddings.register_forward_pre_hook(lambda *_: time.sleep(0.1))
run(encoder, pictures(2), pictures(2, seed=9), "foa", steps=12, checkpoint={path!r}, save_every=1)
"""


@pytest.mark.slow
def test_a_killed_process_loses_nothing(tmp_path):
    path = tmp_path / "state.safetensors"
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    process = subprocess.Popen([sys.executable, "-c", KILLED.format(path=str(path))], env=environment)
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    shutil.copy(path, tmp_path / "kept")
    resumed = run(adaptive_encoder(), pictures(2), pictures(2, seed=9), "foa", steps=12, checkpoint=path, save_every=1)
    whole = run(adaptive_encoder(), pictures(2), pictures(2, seed=9), "foa", steps=12)
    assert torch.equal(resumed.images, whole.images)
    assert torch.equal(resumed.objective, whole.objective)
    assert (tmp_path / "kept").read_bytes() != path.read_bytes()  # it was in the middle
