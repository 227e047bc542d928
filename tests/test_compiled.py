"""Passes under `torch.compile`: what is compiled once, and what happens where it cannot be."""

import logging

import pytest
import torch
from tiny_models import SIZE, images, psm_model, smoothed_tower

from fs_psm_hf import certify_features, certify_scores
from fs_psm_hf.certification.certify import draw_scores


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


@pytest.mark.parametrize("when", ["at once", "late"])
def test_what_does_not_compile_runs_eagerly_and_says_so(when, caplog):
    """To the bit: the noise that the failed program may have overwritten is not the one that is used."""

    def late(graph, inputs):
        def run(*arguments):
            for argument in arguments:
                if argument.shape == (4, 3, SIZE, SIZE):
                    argument.zero_()
            raise torch._dynamo.exc.BackendCompilerFailed(late, RuntimeError("no C++ compiler here"), None)

        return run

    torch._dynamo.reset()
    with caplog.at_level(logging.WARNING, logger="fs_psm_hf.compiled"):
        tower, expected, found = compiled_and_eager(10, backend=broken if when == "at once" else late)
    assert torch.equal(found, expected)
    assert "no C++ compiler here" in tower._compiled_pass.failure
    assert tower.compiled is None
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
    assert tower.compiled == "broken"
    certificate = certify_features(tower, images(1), num_samples=100, generator=1)[0]
    assert certificate == eager
    assert certificate.compiled is None


def test_draws_are_all_of_one_mode():
    """What fails to compile among the draws of an image makes all of them eager."""
    torch._dynamo.reset()
    programs = []

    def second_fails(graph, inputs):
        programs.append(1)
        if len(programs) == 2:
            raise RuntimeError("out of something")
        return graph.forward

    tower = smoothed_tower(sigma=0.2, max_batch_size=64)
    eager = certify_features(tower, images(1), num_samples=200, generator=1)[0]
    (draws,) = draw_scores(tower, images(1), generator=1)
    tower.compile(backend=second_fails)
    draws.take(40)
    assert draws.record["compiled"] == "second_fails"
    scores = draws.take(200)  # in passes of another size
    assert draws.record["compiled"] is None
    found = certify_scores(scores, sigma=0.2)
    assert found.inner_product_bounds == eager.inner_product_bounds
    assert len(programs) == 2


def test_a_pass_is_filled_up_to_what_its_own_stream_needs():
    rows = []
    tower = smoothed_tower(sigma=0.2, num_samples=4)
    tower.vision_tower.embeddings.register_forward_hook(lambda _, __, output: rows.append(len(output)))
    tower.compile(backend="eager")
    with torch.no_grad():
        list(tower.sample_features(images(1), 10, generator=3))
        assert rows == [10]
        list(tower.sample_features(images(1), 100, generator=3))
        assert rows == [10, 64, 64]
        tower(images(1))
        with tower.smoothing(num_samples=5, max_batch_size=2):
            tower(images(1))
    assert rows == [10, 64, 64, 4, 2, 2, 2]


def test_a_program_too_many_is_a_failure_and_not_silence(monkeypatch):
    """By default dynamo gives up after some programs, runs eagerly and says nothing that a caller sees."""
    torch._dynamo.reset()
    monkeypatch.setattr("fs_psm_hf.compiled._MOST_PROGRAMS", 3)
    tower = smoothed_tower(sigma=0.2)
    tower.compile(backend="eager", dynamic=False)
    with torch.no_grad():
        for level in range(1, 5):
            tower.sigma = level / 100
            list(tower.sample_features(images(1), 2, generator=3))
            if tower.compiled is None:
                break
    assert "FailOnRecompileLimitHit" in tower._compiled_pass.failure
    assert level == 4


def test_programs_of_other_towers_do_not_count(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr("fs_psm_hf.compiled._MOST_PROGRAMS", 3)
    for _ in range(5):
        tower = smoothed_tower(sigma=0.2)
        tower.compile(backend="eager")
        with torch.no_grad():
            list(tower.sample_features(images(1), 2, generator=3))
        assert tower.compiled == "eager"


def test_differentiated_passes_are_eager_and_their_gradients_right():
    """Inductor's layouts give wrong gradients of a U-Net on CPUs (torch 2.13)."""
    tower = smoothed_tower(psm=psm_model(), sigma=0.2)
    weights = [p for p in tower.psm.purifier.parameters() if p.ndim == 4]
    found = []
    for backend in (None, broken):
        if backend is not None:
            tower.compile(backend=backend)
        output = tower(images(1), generator=0).last_hidden_state
        found.append(torch.autograd.grad(output.square().sum(), weights))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert tower.compiled == "broken"  # never tried
