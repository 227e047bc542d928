"""Untargeted l2-PGD on the smoothed feature itself, the strongest thing a certificate has to withstand.

A certificate speaks of `<ĝ(x'), u>`, ĝ the mean of unit features over the noise. This attack descends on that very
function: the gradient of a mean over fresh draws (EOT), through noise, purifier, tower and mapper.
"""

import dataclasses
import math

import torch
from tqdm.auto import tqdm

from ..certification.certify import check_unit
from ..features import unit_vector
from ..noise import gaussian_noise, resolve_image_ids, resolve_seed
from ..pixels import channel_tensor, check_pixel_values


# Numbers of the draws: the steps count from 0, and what judges the attack lies where no step has drawn. Restarts are
# compared on draws that the final figures do not use, or the best of several would look better than it is.
_COMPARE = 2**41
_REPORT = 2**42
_START = 2**43
# The ball in floating point is a hair smaller, so that a step's rounding stays inside the ball.
_INSIDE = 1.0 - 1e-6
# Pixels may lie this much outside [0, 1] by the rounding of the image processor.
_PIXEL_ROUNDING = 1e-5


@dataclasses.dataclass(frozen=True)
class AttackResult:
    """Adversarial images and what they do to the smoothed feature; one entry per image.

    Args:
        pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): adversarial images, normalised and in the
            dtype of the input.
        objective_before (`tuple[float, ...]`): estimate of `<ĝ(x), u>`, without a confidence, from draws that neither
            the steps nor the choice between restarts used.
        objective_after (`tuple[float, ...]`): the same of `<ĝ(x'), u>`, from the same noise.
        l2_norms (`tuple[float, ...]`): `‖x' - x‖₂` of the returned images in [0, 1]-pixel units.
        zero_gradients (`tuple[int, ...]`): steps, of all restarts, in which the gradient was exactly zero and nothing
            moved. Many of them mean an attack that is weaker than it looks.
        epsilon (`float`): radius of the ball in [0, 1]-pixel units.
        seed (`int`): names the noise of the call.
    """

    pixel_values: torch.Tensor
    objective_before: tuple[float, ...]
    objective_after: tuple[float, ...]
    l2_norms: tuple[float, ...]
    zero_gradients: tuple[int, ...]
    epsilon: float
    seed: int


def unit_features(tower, image, samples, *, feature="tokens", seed, image_id):
    """The unit features that are certified, with gradients: the differentiable twin of `tower.sample_features`.

    Draw for draw the same values to the bit. A graph is recorded where gradients are enabled, one for each pass, so that
    a sum over passes can be differentiated pass by pass and no two are ever held.

    Args:
        tower ([`SmoothedVisionTower`]): the function.
        image (`torch.Tensor` of shape `(1, 3, height, width)`): one normalised image.
        samples (`range`): numbers of the draws.
        feature (`str`): `"tokens"`, `"cls"` or `"pooled"`.
        seed (`int`), image_id (`int`): name the noise.

    Yields:
        `torch.Tensor` of shape `(m, F)`, float32: the next m draws.
    """
    selection = tower._selection
    options, whole = selection.options(feature)
    model, limit = tower._model(whole), tower._limit(image)
    for first in samples[::limit]:
        numbers = range(first, min(first + limit, samples.stop))
        ((_, output),) = tower._passes(
            model=model, selection=selection, pixel_values=image, options=options, seed=seed, image_ids=[image_id],
            sigma=tower.config.sigma, samples=numbers, limit=limit,
        )  # fmt: skip
        yield unit_vector(selection.vector(output, feature))


def l2_pgd(
    tower,
    pixel_values,
    *,
    epsilon: float,
    steps: int = 20,
    step_size: float | None = None,
    num_draws: int = 8,
    restarts: int = 1,
    evaluation_draws: int = 64,
    anchor="clean",
    feature: str = "tokens",
    clip: bool = True,
    generator=None,
    image_ids=None,
    progress: bool = False,
) -> AttackResult:
    """Search the l2 ball around each image for the point where the smoothed feature points least along the anchor.

    Minimises `mean_k <g(x + d + n_k), u>` over `‖d‖₂ <= epsilon` with fresh noise in each step, normalised gradients and
    a projection after each: SmoothAdv-PGD (Salman et al. 2019; github.com/Hadisalman/smoothing-adversarial) with the
    inner product of theory.md in place of the loss of a classifier. That inner product is linear in the features, so
    the gradient of the mean is the mean of the gradients. They keep one noise for all steps; fresh noise cannot be
    overfitted and costs the same. The first start is the image itself, further ones are random points of the sphere.

    What it finds is an upper bound on the worst case, up to sampling; it proves nothing about images it did not find.

    Args:
        tower ([`SmoothedVisionTower`]): in evaluation mode; its `sigma` is used, 0 for an undefended tower.
        pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): normalised images, float32 or float64.
        epsilon (`float`): radius of the ball, an l2 length in [0, 1]-pixel units, >= 0.
        steps (`int`): gradient steps of each restart.
        step_size (`float`, *optional*): length of a step in [0, 1]-pixel units; `2 * epsilon / steps` where not given.
        num_draws (`int`): noisy copies in each step.
        restarts (`int`): independent searches, of which each image keeps the best.
        evaluation_draws (`int`): draws to compare restarts, and as many others for `objective_before` and `_after`.
        anchor (`str` or `torch.Tensor` of shape `(batch_size, num_features)`): `"clean"`, the feature of the unwrapped
            tower on the image, or unit vectors.
        feature (`str`): `"tokens"`, `"cls"` or `"pooled"`, as certified.
        clip (`bool`): also keep the pixels in [0, 1]. A certificate allows any x', so a test of one does not clip.
        generator (`torch.Generator`, `int` or `None`): source of the noise; `None` is the operating system.
        image_ids (`list[int]`, *optional*): names of the images in the noise, default their positions. An image's result
            depends on its name and the seed, not on its neighbours.
        progress (`bool`): show a bar over the steps.

    Raises:
        TypeError: `pixel_values` is no floating point tensor.
        ValueError: an argument out of its range, a tower in training mode, pixels outside [0, 1] with `clip`, a feature
            or gradient that is NaN or infinite, or a gradient that does not exist or is zero in every step: such an
            attack would say nothing about robustness.
    """
    _check(tower, pixel_values, epsilon, step_size, clip)
    for name, value in (
        ("steps", steps), ("num_draws", num_draws), ("restarts", restarts), ("evaluation_draws", evaluation_draws)
    ):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be an integer >= 1, got {value!r}")
    tower._selection.check(feature)
    ids, seed = resolve_image_ids(image_ids, len(pixel_values)), resolve_seed(generator)
    # The caller may be in inference mode, where nothing can be differentiated.
    with torch.inference_mode(False), torch.enable_grad():
        images = pixel_values.detach().clone()
        anchors = _anchors(tower, images, anchor, feature)
        found = []
        with tqdm(total=len(images) * restarts * steps * (epsilon > 0), unit="step", disable=not progress) as bar:
            for image, image_id, vector in zip(images.split(1), ids, anchors, strict=True):
                search = _Search(tower, image, vector, epsilon, clip, feature, seed, image_id)
                size = 2.0 * epsilon / steps if step_size is None else step_size
                found.append(search.run(steps, size, num_draws, restarts, evaluation_draws, bar))
    adversarial, before, after, norms, zeros = zip(*found, strict=True)
    return AttackResult(torch.cat(adversarial), before, after, norms, zeros, float(epsilon), seed)


class _Search:
    """The attack on one image. Perturbations are float32 and in [0, 1]-pixel units."""

    def __init__(self, tower, image, anchor, epsilon, clip, feature, seed, image_id):
        self.tower, self.image, self.anchor, self.epsilon = tower, image, anchor, float(epsilon)
        self.stream = {"feature": feature, "seed": seed, "image_id": image_id}
        self.std = channel_tensor(tower.config.image_std, image)
        self.low = self.high = None
        if clip:
            pixels = image * self.std + channel_tensor(tower.config.image_mean, image)
            # Bounds on the perturbation that contain 0 whatever the rounding, so that clipping only shortens it.
            self.low, self.high = (-pixels).clamp_max(0.0).float(), (1.0 - pixels).clamp_min(0.0).float()

    def run(self, steps, step_size, num_draws, restarts, evaluation_draws, bar):
        """The adversarial image, the objective before and after, the length and the number of zero gradients."""
        compare = range(_COMPARE, _COMPARE + evaluation_draws)
        report = range(_REPORT, _REPORT + evaluation_draws)
        zeros, candidates = 0, []
        for restart in range(restarts if self.epsilon > 0 else 0):
            perturbation = self.start(restart)
            for step in range(steps):
                first = (restart * steps + step) * num_draws
                gradient = self.gradient(perturbation, range(first, first + num_draws))
                largest = gradient.abs().max()
                if largest > 0:
                    # Scaled first: the squares of a very small gradient underflow, and its direction must not be lost.
                    direction = gradient / largest
                    perturbation = self.project(perturbation - step_size * (direction / direction.norm()))
                else:
                    zeros += 1
                bar.update()
            candidates.append(self.adversarial(perturbation))
        if candidates and zeros == restarts * steps:
            raise ValueError(
                f"`tower` gives a gradient that is zero in each of {zeros} steps on image {self.stream['image_id']}: "
                "this attack would say nothing about it (a function of steps, or more `num_draws` needed?)"
            )
        best = candidates[0] if candidates else self.image
        if len(candidates) > 1:
            best = min(candidates, key=lambda candidate: self.objective(candidate, compare))
        before = self.objective(self.image, report)
        after = self.objective(best, report) if candidates else before
        return best, before, after, self.length(best), zeros

    def start(self, restart):
        """The image itself, or a random point of the sphere."""
        # A clean feature without noise is a maximum, where the gradient is zero.
        if restart == 0 and self.tower.config.sigma > 0:
            return torch.zeros_like(self.image, dtype=torch.float32)
        seed, image_id = self.stream["seed"], self.stream["image_id"]
        shape = tuple(self.image.shape[1:])
        direction = gaussian_noise(shape, seed, [image_id], _START + restart, 1, self.image.device)
        return self.project(direction * (self.epsilon / direction.norm()))

    def gradient(self, perturbation, samples):
        """Gradient of the sum over `samples` of `<g(x + perturbation + n), u>`, in [0, 1]-pixel units."""
        image = (self.image + (perturbation / self.std).to(self.image.dtype)).requires_grad_()
        total = torch.zeros_like(perturbation)
        for features in self.features(image, samples):
            objective = (features * self.anchor).sum()
            # Pass by pass, so that one graph is held at a time. Weights get no gradient.
            part = torch.autograd.grad(objective, image, allow_unused=True)[0] if objective.requires_grad else None
            if part is None:
                raise ValueError(
                    "`tower` gives no gradient from its feature to the pixels: a part of it runs under no_grad or detaches"
                )
            total += part / self.std
        if not torch.isfinite(total).all():
            raise ValueError(
                f"`tower` gave a NaN or infinite feature or gradient on image {self.stream['image_id']}, all must be "
                "finite (a half-precision overflow?)"
            )
        return total

    def features(self, image, samples):
        return unit_features(self.tower, image, samples, **self.stream)

    @torch.no_grad()
    def objective(self, image, samples):
        """Estimate of `<ĝ(image), u>`."""
        total = sum((features * self.anchor).sum().double().item() for features in self.features(image, samples))
        if not math.isfinite(total):
            raise ValueError(f"`tower` gave a NaN or infinite feature on image {self.stream['image_id']}")
        return total / len(samples)

    def project(self, perturbation):
        """The nearest point of the ball, then of the box: clipping towards 0 in each pixel keeps it in the ball."""
        length = perturbation.norm()
        limit = self.epsilon * _INSIDE
        if length > limit:
            perturbation = perturbation * (limit / length)
        return perturbation if self.low is None else perturbation.clamp(self.low, self.high)

    def adversarial(self, perturbation):
        """The normalised image; where the rounding of its dtype has led out of the ball, a shorter perturbation."""
        image = self.image + (perturbation / self.std).to(self.image.dtype)
        for _ in range(8):
            length = self.length(image)
            if length <= self.epsilon:
                return image
            perturbation = perturbation * (self.epsilon * _INSIDE / length)
            image = self.image + (perturbation / self.std).to(self.image.dtype)
        # A ball so small that the spacing of the pixels' dtype is all there is.
        return self.image

    def length(self, image):
        """`‖image - x‖₂` in [0, 1]-pixel units, float64."""
        return ((image.double() - self.image.double()) * self.std.double()).norm().item()


def _anchors(tower, images, anchor, feature):
    """Unit vectors `(batch_size, F)`, float32, on the images' device."""
    if isinstance(anchor, torch.Tensor):
        width = tower.clean_features(images[:1], feature).shape[-1]
        if tuple(anchor.shape) != (len(images), width):
            raise ValueError(
                f"`anchor` must have shape ({len(images)}, {width}), a unit vector for each image, "
                f"got {tuple(anchor.shape)}"
            )
        vectors = anchor.detach().clone().to(images.device, torch.float32)
    elif anchor == "clean":
        # One image at a time, so that the batch does not change it, not even by rounding.
        vectors = torch.cat([tower.clean_features(image, feature) for image in images.split(1)])
    else:
        raise ValueError(f"`anchor` must be 'clean' or a tensor of unit vectors, got {anchor!r}")
    check_unit(vectors, "anchor")
    return vectors


def _check(tower, pixel_values, epsilon, step_size, clip):
    check_pixel_values(pixel_values)
    if pixel_values.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"`pixel_values` must be float32 or float64, also for a tower in {tower.dtype}, got {pixel_values.dtype}: half "
            "precision rounds a perturbation away"
        )
    if not (isinstance(epsilon, (int, float)) and math.isfinite(epsilon) and epsilon >= 0):
        raise ValueError(f"`epsilon` must be a finite number >= 0 in [0, 1] pixel units, got {epsilon!r}")
    if step_size is not None and not (math.isfinite(step_size) and step_size > 0):
        raise ValueError(f"`step_size` must be a finite number > 0 in [0, 1] pixel units, got {step_size!r}")
    if any(module.training for module in tower.modules()):
        raise ValueError("`tower` must be in evaluation mode, got training mode: call `tower.eval()`")
    if clip:
        pixels = pixel_values * channel_tensor(tower.config.image_std, pixel_values)
        pixels = pixels + channel_tensor(tower.config.image_mean, pixel_values)
        low, high = pixels.min().item(), pixels.max().item()
        if low < -_PIXEL_ROUNDING or high > 1.0 + _PIXEL_ROUNDING:
            raise ValueError(
                f"`pixel_values` must be pixels in [0, 1] once the normalisation is undone, got {low:.4g} to {high:.4g}: "
                "give `clip=False` for others"
            )
