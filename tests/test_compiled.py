"""Passes under `torch.compile`: what is compiled once, and what happens where it cannot be."""

import logging

import pytest
import torch
from tiny_models import images, smoothed_tower


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
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler here")

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
