"""How an attack moves: fixed sign steps (I-FGSM, PGD), or those of APGD.

APGD is the schedule of Croce & Hein 2020 (github.com/fra31/auto-attack@a392200) for any objective, each image with a
schedule of its own and no wait for the device. Their package is on no index, and torchattacks 3.5.1, which installs,
needs torchvision and maximises the cross-entropy or the logit margin of a classifier only: neither takes an objective on
features.
"""

import torch

from .ball import project, steepest


class FixedSteps:
    """Projected steps of one length along the steepest direction: I-FGSM in l∞."""

    def __init__(self, images, epsilon, norm, step_size, steps):
        self.images, self.epsilon, self.norm, self.step_size = images, epsilon, norm, step_size

    def state(self, start):
        """The tensors and numbers to go on from, for a search that begins at `start`."""
        return {"adversarial": start}

    def move(self, state, step, values, gradient):
        """The next state, from the objective and its gradient at `state["adversarial"]`."""
        moved = state["adversarial"] + self.step_size * steepest(gradient, self.norm)
        return {"adversarial": project(moved, self.images, self.epsilon, self.norm)}

    def result(self, state):
        """The adversarial images of a finished search: the last ones."""
        return state["adversarial"]


class AutoSteps:
    """APGD: momentum 0.75, a first step of twice the radius, halved where an image's objective does not rise enough.

    With fresh noise in each step the values that the schedule compares are estimates, as in their version "rand".
    """

    def __init__(self, images, epsilon, norm, step_size, steps):
        self.images, self.epsilon, self.norm, self.step_size = images, epsilon, norm, step_size
        self.checkpoints, self.last = _checkpoints(steps), steps - 1

    def state(self, start):
        """As in [`FixedSteps`]; all of it tensors with one entry for each image."""
        per_image = torch.zeros(len(start), dtype=torch.float32, device=start.device)
        return {
            "adversarial": start,
            "before": start.clone(),
            "best": start.clone(),
            "best_gradient": torch.zeros_like(start),
            "best_value": per_image - torch.inf,
            "best_at_check": per_image - torch.inf,
            "halved_at_check": per_image + 1,
            "value_before": per_image - torch.inf,
            "rises": per_image.clone(),
            "length": per_image + self.step_size,
        }

    def move(self, state, step, values, gradient):
        """As in [`FixedSteps`]. The last step only looks at where the one before has led."""
        state = dict(state)
        better = values > state["best_value"]
        state["best_value"] = torch.where(better, values, state["best_value"])
        state["best"] = torch.where(_wide(better), state["adversarial"], state["best"])
        state["best_gradient"] = torch.where(_wide(better), gradient, state["best_gradient"])
        state["rises"] = state["rises"] + (values > state["value_before"])
        state["value_before"] = values
        current, before = state["adversarial"], state["before"]
        if step == 0:
            # There is no value before the first one, so it is no rise.
            state["rises"] = torch.zeros_like(state["rises"])
            state["best_at_check"] = values
        elif step in self.checkpoints:
            few = state["rises"] <= 0.75 * self.checkpoints[step]
            stuck = (state["halved_at_check"] == 0) & (state["best_at_check"] >= state["best_value"])
            halve = few | stuck
            state["length"] = torch.where(halve, state["length"] / 2, state["length"])
            state["halved_at_check"] = halve.float()
            state["best_at_check"] = state["best_value"]
            state["rises"] = torch.zeros_like(state["rises"])
            current = torch.where(_wide(halve), state["best"], current)
            gradient = torch.where(_wide(halve), state["best_gradient"], gradient)
        if step == self.last:
            return state
        momentum = 0.75 if step else 1.0
        moved = self._project(current + _wide(state["length"]) * steepest(gradient, self.norm))
        moved = self._project(current + momentum * (moved - current) + (1 - momentum) * (current - before))
        return state | {"adversarial": moved, "before": current}

    def result(self, state):
        """The images of the greatest value that was seen."""
        return state["best"]

    def _project(self, moved):
        return project(moved, self.images, self.epsilon, self.norm)


def _wide(per_image):
    return per_image[:, None, None, None]


def _checkpoints(steps):
    """Steps at which the schedule looks back, and over how many values: 22 % of all, then ever fewer, at least 6 %."""
    period, least, decrease = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    found, at = {}, period
    while at < steps:
        found[at] = period
        period = max(period - decrease, least)
        at += period
    return found
