"""Passes under `torch.compile`: what is compiled once, and what happens where it cannot be."""

import logging

import pytest
import torch
from tiny_models import images, psm_model, smoothed_tower

from fs_psm_hf import certify_features


def broken(graph, inputs):
    raise RuntimeError("no C++ compiler here")


def compiled_and_eager(draws, **options):
    """The same draws of one image with and without `compile`, in passes of four."""
    tower = smoothed_tower(max_batch_size=4)
    found = []
    for compile in (False, True):
        if compile:
            tower.compile(**options)
        found.append(torch.cat(list(tower.sample_features(images(1), draws, generator=3)), 1))
    return tower, *found


def test_a_short_last_pass_compiles_nothing_anew():
    programs = []

    def count(graph, inputs):
        programs.append([tuple(i.shape) for i in inputs if isinstance(i, torch.Tensor)])
        return graph.forward

    torch._dynamo.reset()
    _, expected, found = compiled_and_eager(8, backend=count)
    full = len(programs)
    assert full >= 1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    programs.clear()
    torch._dynamo.reset()
    _, expected, found = compiled_and_eager(10, backend=count)
    assert found.shape == expected.shape == (1, 10, expected.shape[-1])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(programs) == full


def test_what_does_not_compile_runs_eagerly_and_says_so(caplog):
    with caplog.at_level(logging.WARNING, logger="fs_psm_hf.compiled"):
        tower, expected, found = compiled_and_eager(10, backend=broken)
    # To the bit: the noise that the failed program may have scaled is not the one that is used.
    assert torch.equal(found, expected)
    assert "no C++ compiler here" in tower._compiled_pass.failure
    assert caplog.text.count("run without it") == 1


def test_a_mistake_of_the_caller_is_not_taken_for_one_of_the_compiler():
    tower = smoothed_tower()
    tower.compile(backend="eager")
    with pytest.raises(ValueError, match="Input image size"):
        tower(images(size=20), generator=0)
    assert tower._compiled_pass.failure is None


def test_features_outlive_the_next_pass_where_outputs_lie_in_memory_that_is_written_again():
    """As CUDA graphs do it: every replay writes its outputs to the same memory."""

    def replay(graph, inputs, mode=None):
        memory = []

        def run(*arguments):
            outputs = graph.forward(*arguments)
            if not memory:
                memory.extend(output.clone() for output in outputs)
            for place, output in zip(memory, outputs, strict=True):
                place.copy_(output)
            return memory

        return run

    def passes(tower):
        setting = {"limit": 2, "statistics": (tower.config.image_mean, tower.config.image_std), "sigma": 0.2}
        setting |= {"model": tower._model(True), "selection": tower._selection, "options": {}, "seed": 3}
        with torch.no_grad():
            found = list(tower._passes(pixel_values=images(1), image_ids=[0], samples=range(6), **setting))
        return [output.last_hidden_state for _, output in found]

    torch._dynamo.reset()
    tower = smoothed_tower(psm=psm_model(mapper=False), sigma=0.2)
    expected = passes(tower)
    tower.compile(backend=replay, mode="reduce-overhead")
    found = passes(tower)
    assert tower.compiled
    assert len(found) == len(expected) == 3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_cuda_graphs_give_the_draws_of_the_eager_tower():
    tower = smoothed_tower(psm=psm_model(), sigma=0.2, max_batch_size=4).cuda()
    expected = torch.cat(list(tower.sample_features(images(1).cuda(), 10, generator=3)), 1)
    tower.compile(mode="reduce-overhead")
    for _ in range(3):  # the third call is the first replay
        found = torch.cat(list(tower.sample_features(images(1).cuda(), 10, generator=3)), 1)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert tower.compiled


def test_a_certificate_of_a_tower_that_does_not_compile_says_that_it_was_eager():
    tower = smoothed_tower(sigma=0.2)
    eager = certify_features(tower, images(1), num_samples=100, generator=1)[0]
    tower.compile(backend=broken)
    assert tower.compiled
    certificate = certify_features(tower, images(1), num_samples=100, generator=1)[0]
    assert certificate == eager
    assert not certificate.compiled


def test_draws_of_two_modes_are_no_certificate(monkeypatch):
    tower = smoothed_tower(sigma=0.2, max_batch_size=4)
    tower.compile(backend="eager")
    network, calls = tower._compiled_pass.compiled, []

    def fails_late(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            tower._compiled_pass.failure = "out of something"
        return network(*arguments, **options)

    monkeypatch.setattr(tower._compiled_pass, "compiled", fails_late)
    with pytest.raises(RuntimeError, match="`torch.compile` failed among the draws of image 0"):
        certify_features(tower, images(1), num_samples=100, generator=1)
    assert not certify_features(tower, images(1), num_samples=100, generator=1)[0].compiled
