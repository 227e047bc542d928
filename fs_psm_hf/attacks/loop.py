"""`attack`: the loop of all attacks on features, batched over images, resumable to the bit."""

import contextlib
import math
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..certification.identity import model_hash, vector_hash
from ..noise import resolve_image_ids, resolve_seed
from .ball import project, random_start, round_eight_bit
from .checks import (
    check_adversarial,
    check_ball,
    check_deterministic,
    check_encoders,
    check_finite,
    check_first_gradient,
    check_images,
    check_targets,
)
from .encoders import Encoder
from .objectives import Objective, ensemble_weights, method_named
from .result import FeatureAttackResult
from .state import check_identity, load_state, save_state
from .steps import AutoSteps, FixedSteps


_LEVEL = 1 / 255
_FORMAT = 1


def attack(
    encoders, images, targets=None, *, method="foa", epsilon=16 / 255, norm="linf", steps=300, step_size=None,
    generator=None, image_ids=None, eight_bit=True, checkpoint=None, save_every=50, progress=False,
) -> FeatureAttackResult:  # fmt: skip
    """Search the ball around each image for what the encoders take for the target, or no longer for the image.

    The defaults are those of M-Attack and FOA-Attack: I-FGSM, 300 steps of 1/255, ε = 16/255, no random start. Two things
    are done otherwise than in their code. Each step is projected to [0, 1], where theirs clips the image on its way into
    the encoder, which kills the gradient of clipped pixels for good. And the image is not encoded a second time for a log.

    `"pgd"` and `"apgd"` begin at a random point, since the clean image is a stationary point of a cosine to itself.

    Args:
        encoders ([`Encoder`] or list of them): what is attacked. Several are an ensemble: their objectives are averaged,
            for `"foa"` with its dynamic weights.
        images, targets (`torch.Tensor` of shape `(batch_size, 3, height, width)`): float32 in [0, 1], on the encoders'
            device or moved there; `targets` for targeted methods only.
        method (`str`): one of [`METHODS`].
        epsilon (`float`): radius in [0, 1]-pixel units, in the norm.
        norm (`str`): `"linf"` or `"l2"`.
        steps (`int`): gradient steps.
        step_size (`float`, *optional*): length of a step in [0, 1]-pixel units. Where not given: 1/255 in l∞ and ε/16 in l2
            for targeted methods (the same share of the usual ball), 2.5 ε/steps for `"pgd"`, 2 ε at first for `"apgd"`.
        generator (`torch.Generator`, `int` or `None`): source of crops, noise and starts; `None` is the operating system, or
            the seed of the `checkpoint` that is continued.
        image_ids (`list[int]`, *optional*): names of the images in crops and noise, default their positions. An image's
            result depends on its name and the seed, not on its neighbours (see [`Encoder`] on rounding).
        eight_bit (`bool`): round the result to whole grey levels inside the ball, as an image file holds it.
        checkpoint (`str` or `Path`, *optional*): safetensors file that the state is written to, aside and renamed. Called
            again with the same arguments, a run goes on from there, to the bit.
        save_every (`int`): steps between two writings.
        progress (`bool`): show a bar over the steps.

    Returns:
        [`FeatureAttackResult`], on the encoders' device.

    Raises:
        TypeError: `images`, `targets` or `encoders` of another kind.
        ValueError: an argument out of its range, images outside [0, 1], targets that do not fit, a checkpoint of another run,
            a gradient that does not exist, is exactly zero at first, or is not finite.

    Warns:
        AttackWarning: a tower that draws noise is attacked with fewer than 8 draws, or a model draws by itself.
    """
    plan = method_named(method)
    encoders = _encoder_list(encoders)
    device = encoders[0].device
    check_images(images, "images")
    check_targets(images, targets, plan)
    check_ball(images, epsilon, norm, eight_bit)
    for name, value in (("steps", steps), ("save_every", save_every)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be an integer >= 1, got {value!r}")
    check_step_size(step_size)
    check_encoders(encoders, plan.local)
    ids = resolve_image_ids(image_ids, len(images))
    length = _default_step(plan, epsilon, norm, steps) if step_size is None else float(step_size)
    saved = None if checkpoint is None else load_state(checkpoint, device)
    seed = saved[2].get("seed") if saved is not None and generator is None else resolve_seed(generator)
    mode = encoders[0].mode
    settings = {
        "method": plan.name, "mode": mode, "epsilon": float(epsilon), "norm": norm, "steps": steps, "step_size": length,
        "eight_bit": bool(eight_bit), "seed": seed, "image_ids": ids, "recipe": plan.facts(),
        "draws": [encoder.draws for encoder in encoders],
        "straight_through": [encoder.straight_through for encoder in encoders],
        "encoders": [encoder.facts(plan.local) for encoder in encoders],
    }  # fmt: skip
    identity = {}
    if checkpoint is not None:
        identity = settings | {
            "format": _FORMAT,
            "images": vector_hash(images),
            "targets": None if targets is None else vector_hash(targets),
            "weights": [model_hash(encoder.tower) for encoder in encoders],
        }
        if saved is not None:
            check_identity(checkpoint, saved[2], identity)
    # The caller may be in inference mode, where nothing can be differentiated.
    with torch.inference_mode(False), torch.enable_grad(), _frozen(encoders):
        clean = images.detach().clone().to(device)
        references = clean if targets is None else targets.detach().clone().to(device)
        search = _Search(plan, encoders, clean, references, seed, ids, float(epsilon), norm, length, steps)
        if saved is None:
            check_deterministic(encoders, clean, ids, seed, plan.local)
        search.run(saved, checkpoint, save_every, identity, progress)
        adversarial = project(search.mover.result(search.state), clean, float(epsilon), norm)
        if eight_bit:
            adversarial = round_eight_bit(adversarial, clean, float(epsilon), norm)
    check_adversarial(clean, adversarial, epsilon, norm)
    zeros, history = search.state["zeros"], search.state["history"]
    return FeatureAttackResult.of(clean, adversarial, history, zeros, mode, settings)


@torch.no_grad()
def expected_objective(encoders, images, targets=None, *, method="foa", samples=16, generator=0, image_ids=None):
    """An attack's own objective, averaged over crops and noise that no step of an attack has used.

    Args:
        encoders, images, targets, method, image_ids: as in [`attack`]. For an untargeted method `targets` are the clean
            images that `images` were made from.
        samples (`int`): crops (and as many sets of draws) to average over.
        generator (`torch.Generator`, `int` or `None`): source of crops and noise; the same seed compares images on the same.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`: the mean over samples, and over encoders with equal weights.

    Raises:
        TypeError, ValueError: as [`attack`] for the same arguments.
    """
    plan, encoders = method_named(method), _encoder_list(encoders)
    check_images(images, "images")
    if targets is None:
        raise ValueError("`targets` must be given: the target images, or the clean ones of an untargeted method")
    check_images(targets, "targets")
    if targets.shape != images.shape:
        raise ValueError(
            f"`targets` must have the shape of the images, {tuple(images.shape)}, got {tuple(targets.shape)}"
        )
    for encoder in encoders:
        encoder.check(plan.local)
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"`samples` must be an integer >= 1, got {samples!r}")
    ids, seed = resolve_image_ids(image_ids, len(images)), resolve_seed(generator)
    images, targets = images.to(encoders[0].device), targets.to(encoders[0].device)
    objectives = [Objective(plan, encoder, seed, number, ids) for number, encoder in enumerate(encoders)]
    total = torch.zeros(len(images), device=images.device)
    for sample in range(samples):
        step = _UNUSED + sample
        view, target = (
            plan.crop(pixels, which, seed, ids, step) for pixels, which in ((images, "source"), (targets, "target"))
        )
        total += torch.stack([objective.values(view, step, target) for objective in objectives]).mean(0)
    return total / samples


# Steps count from 0; beyond this are crops and draws that no attack has used.
_UNUSED = 2**32


class _Search:
    """The state of a run and one step of it."""

    def __init__(self, plan, encoders, clean, references, seed, ids, epsilon, norm, length, steps):
        self.plan, self.clean, self.references, self.seed, self.ids = plan, clean, references, seed, ids
        self.epsilon, self.norm, self.steps = epsilon, norm, steps
        self.mover = (AutoSteps if plan.adaptive_steps else FixedSteps)(clean, epsilon, norm, length, steps)
        self.objectives = [Objective(plan, encoder, seed, number, ids) for number, encoder in enumerate(encoders)]
        self.state = None

    def first_state(self):
        clean, count = self.clean, len(self.clean)
        start = clean.clone()
        if not self.plan.targeted:
            start = random_start(clean, self.epsilon, self.norm, self.seed, self.ids)
        return self.mover.state(start) | {
            "history": torch.full((count, self.steps), torch.nan, device=clean.device),
            "values": torch.full((len(self.objectives), count), torch.nan, device=clean.device),
            "zeros": torch.zeros(count, device=clean.device),
            "finite": torch.ones(count, dtype=torch.bool, device=clean.device),
        }

    def run(self, saved, checkpoint, save_every, identity, progress):
        first = 0
        if saved is None:
            self.state = self.first_state()
        else:
            self.state, first, _ = saved
        with tqdm(total=self.steps, initial=first, unit="step", disable=not progress) as bar:
            for step in range(first, self.steps):
                self.step(step)
                done = step + 1
                if done % save_every == 0 or done == self.steps:
                    # Before anything is kept: a NaN must not be continued from.
                    check_finite(self.state["finite"], self.ids)
                    if checkpoint is not None:
                        save_state(Path(checkpoint), self.state, done, identity)
                bar.update()

    def step(self, step):
        """Objective and gradient at the present images, weights of the encoders, and the move."""
        state = self.state
        leaf = state["adversarial"].detach().requires_grad_()
        view = self.plan.crop(leaf, "source", self.seed, self.ids, step)
        target = self.plan.crop(self.references, "target", self.seed, self.ids, step)
        values, gradients = zip(
            *(objective.evaluate(view.detach(), step, target) for objective in self.objectives), strict=True
        )
        values = torch.stack(values)  # (K, B)
        previous = state["values"] if self.plan.dynamic_weights and step > 0 else None
        weights = ensemble_weights(values, previous)
        total = sum(w[:, None, None, None] * g for w, g in zip(weights, gradients, strict=True)) / len(gradients)
        gradient = total if view is leaf else torch.autograd.grad(view, leaf, total)[0]
        objective = values.mean(0)
        if step == 0:
            check_first_gradient(gradient, objective, self.ids)
        history, flat = state["history"], gradient.flatten(1)
        history[:, step] = objective
        kept = {
            "history": history,
            "values": values,
            "zeros": state["zeros"] + (flat == 0).all(1),
            "finite": state["finite"] & torch.isfinite(flat).all(1) & torch.isfinite(objective),
        }
        self.state = self.mover.move(state, step, objective, gradient) | kept


def check_step_size(step_size):
    """Raise `ValueError` unless `step_size` is `None` or a finite number > 0."""
    if step_size is None:
        return
    if isinstance(step_size, bool) or not isinstance(step_size, (int, float)) or not 0 < step_size < math.inf:
        raise ValueError(f"`step_size` must be a finite number > 0 in [0, 1]-pixel units, got {step_size!r}")


def _encoder_list(encoders):
    found = (
        [encoders] if isinstance(encoders, Encoder) else list(encoders) if isinstance(encoders, (list, tuple)) else []
    )
    if not found or not all(isinstance(encoder, Encoder) for encoder in found):
        raise TypeError(f"`encoders` must be an Encoder or a list of them, got {type(encoders).__name__}")
    return found


def _default_step(plan, epsilon, norm, steps):
    if plan.adaptive_steps:
        return 2.0 * epsilon
    if not plan.targeted:
        return 2.5 * epsilon / steps
    return _LEVEL if norm == "linf" else epsilon / 16


@contextlib.contextmanager
def _frozen(encoders):
    """No weight asks for a gradient meanwhile, so that nothing is kept for one."""
    weights = [w for encoder in encoders for w in encoder.tower.parameters() if w.requires_grad]
    try:
        for weight in weights:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)
