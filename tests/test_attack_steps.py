"""APGD on functions whose greatest value in a ball is known."""

import pytest
import torch

from fs_psm_hf.attacks.ball import project
from fs_psm_hf.attacks.steps import AutoSteps, FixedSteps, _checkpoints


CLEAN = torch.full((3, 3, 4, 4), 0.5)


def curved(x):
    """A narrow valley: `-Σ c (x - peak)²` with curvatures of 1 to 100, peaks partly outside the ball."""
    curvature = torch.logspace(0, 2, x[0].numel()).view(x[0].shape)
    peak = torch.linspace(0.35, 0.65, x[0].numel()).view(x[0].shape).flip(0)
    return -(curvature * (x - peak).square()).flatten(1).sum(1)


def best_in_ball(epsilon):
    peak = torch.linspace(0.35, 0.65, 48).view(3, 4, 4).flip(0)
    return curved(peak[None].clamp(0.5 - epsilon, 0.5 + epsilon))[0].item()


def climb(mover, function, steps, start=CLEAN):
    state = mover.state(start)
    seen = []
    for step in range(steps):
        x = state["adversarial"].clone().requires_grad_()
        values = function(x)
        (gradient,) = torch.autograd.grad(values.sum(), x)
        seen.append(x.detach())
        state = mover.move(state, step, values.detach(), gradient)
    return mover.result(state), state, seen


def test_apgd_finds_the_greatest_value_where_fixed_steps_oscillate():
    epsilon, steps = 0.1, 100
    found, state, seen = climb(AutoSteps(CLEAN, epsilon, "linf", 2 * epsilon, steps), curved, steps)
    exact = best_in_ball(epsilon)
    rough, _, _ = climb(FixedSteps(CLEAN, epsilon, "linf", 0.01, steps), curved, steps)
    assert exact >= curved(found)[0] > exact - 0.001
    assert curved(rough)[0] < exact - 0.02
    for x in seen:
        assert torch.equal(project(x, CLEAN, epsilon, "linf"), x)
    # What is returned is the best of all that was looked at, and the step was halved several times.
    assert curved(found)[0].item() == pytest.approx(max(curved(x)[0].item() for x in seen), abs=1e-6)
    assert 0 < state["length"][0] < 2 * epsilon / 8


def test_apgd_in_the_l2_ball():
    epsilon, steps = 0.2, 60
    found, _, seen = climb(AutoSteps(CLEAN, epsilon, "l2", 2 * epsilon, steps), lambda x: x.flatten(1)[:, 7], steps)
    assert (found - CLEAN).flatten(1)[:, 7].tolist() == pytest.approx([epsilon] * 3, abs=1e-4)
    assert max((x - CLEAN).flatten(1).norm(dim=1).max().item() for x in seen) <= epsilon


def test_each_image_has_a_schedule_of_its_own():
    def mixed(x):
        return torch.where(torch.arange(3) == 1, curved(x), x.flatten(1).sum(1))

    mover = AutoSteps(CLEAN, 0.1, "linf", 0.2, 60)
    _, state, _ = climb(mover, mixed, 60)
    _, alone, _ = climb(mover, curved, 60)
    assert state["length"][1] == alone["length"][1]
    assert state["best"][0].min() > 0.5999  # the top corner of the ball
    torch.testing.assert_close(state["best"][1], alone["best"][1], rtol=0, atol=0)


def test_checkpoints_are_those_of_croce_and_hein():
    # Their p: 0.22, then shorter by 0.03 each time, never below 0.06 of all steps.
    assert _checkpoints(100) == {22: 22, 41: 19, 57: 16, 70: 13, 80: 10, 87: 7, 93: 6, 99: 6}
    assert list(_checkpoints(3)) == [1, 2]
    assert _checkpoints(1) == {}


def test_one_step_returns_the_start():
    found, _, _ = climb(AutoSteps(CLEAN, 0.1, "linf", 0.2, 1), curved, 1)
    assert torch.equal(found, CLEAN)
