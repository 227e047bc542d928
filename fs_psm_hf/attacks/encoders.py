"""What an attacker sees of a vision tower: its features of [0, 1] images, and the gradient of a function of them."""

import copy
import dataclasses

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..certification.identity import model_name
from ..configuration_fs_psm import check_smoothing
from ..features import FEATURES, pooled_name, unit_vector
from ..modeling_fs_psm import SmoothedVisionTower
from ..pixels import channel_tensor, from_unit
from ..smoothing import default_batch_size, plan_passes, vector_norm


MODES = ("transfer", "adaptive")


class Encoder:
    """A vision tower as an attack sees it.

    `"transfer"` differentiates the plain tower, of a smoothed tower the one that it wraps: what the paper's tables do, and
    what says nothing about an attacker who knows the defence. `"adaptive"` differentiates the smoothed feature itself:
    the mean over noise draws (EOT) through purifier, tower and mapper, averaged as the tower does (unit features of
    the draws, or raw ones where its `aggregation` is `"mean"`), so that the gradient is that of the smoothed objective
    (Salman et al. 2019, github.com/Hadisalman/smoothing-adversarial@cff781d, average before the loss in the same way).

    Args:
        model (`PreTrainedModel`): a vision tower of transformers or a [`SmoothedVisionTower`], in evaluation mode. bfloat16
            will do; images and perturbations stay float32.
        mode (`str`): `"transfer"` or `"adaptive"`; a plain tower has no noise and is `"transfer"` only.
        feature (`str`): what is compared, except by `"foa"`, which takes the class token and the patch tokens: `"pooled"`,
            the final embedding, after any projection; `"cls"`, the class token; `"tokens"`, the tokens that the host
            reads, as one vector (of a plain tower the patch tokens).
        layer (`int`, *optional*): hidden state that `"cls"`, `"tokens"` and `"foa"` take, as in `hidden_states[layer]`.
            Where not given, the smoothed tower's `feature_layer`, or `last_hidden_state` (of CLIP: before the last
            LayerNorm, as FOA-Attack does).
        draws (`int`): noise draws of each gradient, adaptive only.
        straight_through (`bool`): take the purifier's gradient to be the identity (BPDA), adaptive only.
        max_batch_size (`int`, *optional*): most noisy images in one pass, those of the tower where not given. Gradients
            take several times the memory of features. With at most `draws` of them a pass holds one image, and then
            an image's result is the same to the bit in whatever batch it comes; otherwise up to the rounding of
            batched products, which many sign steps can amplify.
        size (`tuple[int, int]`, *optional*): height and width that the tower wants, where the attacked images have others:
            they are resized for it, bicubic with antialias, and the ball stays in the images' own pixels.
        processor, image_mean, image_std: normalisation of a plain tower, as `SmoothedVisionTower.from_components` takes it.

    Raises:
        TypeError: `model` is of another kind.
        ValueError: a setting out of range, or one that this model does not have.
    """

    def __init__(
        self, model, *, mode, feature="pooled", layer=None, draws=8, straight_through=False, max_batch_size=None,
        size=None, processor=None, image_mean=None, image_std=None,
    ):  # fmt: skip
        if not isinstance(model, PreTrainedModel):
            raise TypeError(
                f"`model` must be a vision tower of transformers or a SmoothedVisionTower, got {type(model).__name__}"
            )
        smoothed = isinstance(model, SmoothedVisionTower)
        if mode not in MODES:
            raise ValueError(f"`mode` must be 'transfer' or 'adaptive', got {mode!r}")
        if feature not in FEATURES:
            raise ValueError(f"`feature` must be one of {', '.join(FEATURES)}, got {feature!r}")
        if mode == "adaptive" and not smoothed:
            raise ValueError(
                f"`mode` must be 'transfer' for a plain tower, got 'adaptive' for a {type(model).__name__}: only a "
                "SmoothedVisionTower has a defence to adapt to"
            )
        if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
            raise ValueError(f"`draws` must be an integer >= 1, got {draws!r}")
        if size is not None and not (
            isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)
        ):
            raise ValueError(f"`size` must be (height, width), two integers > 0, got {size!r}")
        if smoothed and not (processor is None and image_mean is None and image_std is None):
            raise ValueError("`processor`, `image_mean` and `image_std` must not be given for a SmoothedVisionTower")
        if any(module.training for module in model.modules()):
            raise ValueError("`model` must be in evaluation mode, got training mode: call `model.eval()`")
        if straight_through and (mode == "transfer" or model.psm.purifier is None):
            raise ValueError("`straight_through` must be False where the attack passes no purifier, got True")
        self.mode, self.feature, self.straight_through = mode, feature, bool(straight_through)
        self.size = None if size is None else tuple(size)
        self.max_batch_size = max_batch_size
        if mode == "adaptive":
            self.tower, self._selection = _adaptive(model, layer)
            if straight_through:
                self.tower = _with_straight_purifier(model)
        else:
            self.tower = _plain(model, smoothed, layer, processor, image_mean, image_std)
            self._selection = self.tower._selection
        check_smoothing(self.tower.config.sigma, draws, max_batch_size)
        self._draws = draws
        config = self.tower.config.vision_config
        # What stands before the patch tokens; register tokens are no patches.
        self._first_patch = int(self._selection.has_class_token) + getattr(config, "num_register_tokens", 0)
        if mode == "transfer" and not smoothed:
            self._selection = dataclasses.replace(self._selection, first_token=self._first_patch)
        if feature != "pooled":
            self._selection.check(feature)

    @property
    def sigma(self):
        """Standard deviation of the noise in [0, 1]-pixel units; 0 in transfer mode."""
        return self.tower.config.sigma

    @property
    def draws(self):
        """Noise draws of each gradient; 1 where there is no noise, since all would be the same."""
        return self._draws if self.sigma > 0 else 1

    @property
    def has_local(self):
        """Whether the tower has patch tokens to show: not where its mapper refines the pooled embedding."""
        return self._selection.mapped != "pooled"

    @property
    def device(self):
        """Where the tower is."""
        return self.tower.device

    def check(self, local):
        """Raise `ValueError` where the tower does not serve the feature that is to be attacked.

        Args:
            local (`bool`): class token and patch tokens (FOA-Attack), and not `feature`.
        """
        if local:
            return
        self._selection.check(self.feature)
        if self.mode == "adaptive" and self.feature == "pooled" and not self._selection.serves("pooled"):
            raise ValueError("`feature` must be 'tokens' or 'cls' for a tower that serves hidden states, got 'pooled'")

    def facts(self, local):
        """JSON-safe settings: what was differentiated and how."""
        layers = list(self._selection.layers)
        taken = {"feature": self.feature}
        if local:
            head = "cls" if self._selection.has_class_token and self.has_local else "pooled"
            taken = {"feature": f"{head}+tokens" if self.has_local else head}
        return {
            "mode": self.mode,
            "model": model_name(self.tower),
            "architecture": type(self.tower.vision_tower).__name__,
            "dtype": str(self.tower.dtype).removeprefix("torch."),
            **taken,
            "layers": layers or None,
            "sigma": self.sigma,
            "draws": self.draws,
            "straight_through": self.straight_through,
            "purifier": self.tower.config.psm_config.purifier,
            "mapper": self.tower.psm.mapper is not None,
            "size": None if self.size is None else list(self.size),
        }

    # Features ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def features(self, images, *, seed, image_ids, draws=None, local=False):
        """The mean feature over noise draws, without a gradient.

        Args:
            images (`torch.Tensor` of shape `(batch_size, 3, height, width)`): float32 in [0, 1].
            seed (`int`), image_ids (`list[int]`): name the noise.
            draws (`range`, *optional*): numbers of the draws; the first `self.draws` where not given.
            local (`bool`): class token and patch tokens, and not `feature`.

        Returns:
            `dict[str, torch.Tensor]`, float32: `"vector"` `(batch_size, F)`; with `local` `"global"` `(batch_size, F)` and,
            where the tower has them, `"tokens"` `(batch_size, num_patches, width)`. Mean unit features are not of length 1.
        """
        numbers = range(self.draws) if draws is None else draws
        totals = None
        for chosen, part in plan_passes(len(images), len(numbers), self._limit(images), numbers.start):
            sums = self._sums(images[chosen], part, seed, image_ids[chosen], local)
            if totals is None:
                totals = {name: value.new_zeros((len(images), *value.shape[1:])) for name, value in sums.items()}
            for name, value in sums.items():
                totals[name][chosen] += value
        return {name: total / len(numbers) for name, total in totals.items()}

    def gradient(self, images, score, *, seed, image_ids, draws, local=False):
        """A function of each image's mean feature, and its gradient at the images.

        One forward and one backward pass for as many images as fit with all their draws. Where the draws of one image
        do not fit, the features are taken first without a gradient, and each pass is run again to carry its share back.

        Args:
            images (`torch.Tensor` of shape `(batch_size, 3, height, width)`): float32 in [0, 1].
            score (callable): `(features, slice) -> (b,)`, of what [`features`] returns for the images of the slice; each
                value may depend on its own image only.
            draws (`range`): numbers of the draws.

        Returns:
            pair of `torch.Tensor`: values `(batch_size,)` and gradients in the shape of `images`, float32.

        Raises:
            ValueError: no gradient reaches the images.
        """
        limit, count = self._limit(images), len(draws)
        per_pass = max(1, limit // count)
        values, gradients = [], []
        for first in range(0, len(images), per_pass):
            chosen = slice(first, min(first + per_pass, len(images)))
            view, ids = images[chosen].detach().requires_grad_(), image_ids[chosen]
            if count <= limit:
                sums = self._sums(view, draws, seed, ids, local)
                value = score({name: total / count for name, total in sums.items()}, chosen)
                gradient = _differentiate([value.sum()], view, None)
            else:
                means = self.features(view, seed=seed, image_ids=ids, draws=draws, local=local)
                leaves = {name: mean.requires_grad_() for name, mean in means.items()}
                value = score(leaves, chosen)
                outer = torch.autograd.grad(value.sum(), list(leaves.values()))
                gradient = torch.zeros_like(view)
                for start in draws[::limit]:
                    part = range(start, min(start + limit, draws.stop))
                    sums = self._sums(view, part, seed, ids, local)
                    gradient += _differentiate(list(sums.values()), view, [g / count for g in outer])
            values.append(value.detach())
            gradients.append(gradient)
        return torch.cat(values), torch.cat(gradients)

    def _sums(self, images, draws, seed, image_ids, local):
        """Features of all `draws` in one pass, added up for each image."""
        tower, selection = self.tower, self._selection
        tokens = self.has_local if local else self.feature != "pooled"
        pooled = not (selection.has_class_token and self.has_local) if local else self.feature == "pooled"
        if self.size is not None and self.size != tuple(images.shape[2:]):
            images = F.interpolate(images, self.size, mode="bicubic", align_corners=False, antialias=True)
        config = tower.config
        mean, std = (channel_tensor(values, images) for values in (config.image_mean, config.image_std))
        # A tower cut after its own feature layer, or the whole where another layer or what follows is read.
        own = selection.layers == tower._selection.layers
        options = {"output_hidden_states": list(selection.layers)} if selection.layers and tokens else {}
        ((_, output),) = tower._passes(
            model=tower._model(whole=pooled or not own), selection=selection, pixel_values=from_unit(images, mean, std),
            options=options, seed=seed, image_ids=image_ids, sigma=self.sigma, samples=draws,
            limit=len(images) * len(draws),
        )  # fmt: skip
        unit = unit_vector if config.aggregation == "unit" else lambda vector: vector.flatten(1)
        if not local:
            found = {"vector": unit(selection.vector(output, self.feature))}
        else:
            found = {}
            if tokens:
                states = selection.tokens(output).float()
                if config.aggregation == "unit" and self.sigma > 0:
                    # One length for the whole hidden state, over the tokens that the host reads: as the tower has it.
                    # One draw is its own mean.
                    states = states / vector_norm([states], selection.first_token)[:, None, None]
                found["tokens"] = states[:, self._first_patch :]
            found["global"] = unit(output[pooled_name(output)].float()) if pooled else states[:, 0]
        return {name: rows.view(len(images), len(draws), *rows.shape[1:]).sum(1) for name, rows in found.items()}

    def _limit(self, images):
        """Most noisy images in one pass."""
        height, width = self.size or images.shape[2:]
        given = self.max_batch_size or self.tower.config.max_batch_size
        return given or default_batch_size(height, width, images.device, self.tower.psm.purifier)


def _differentiate(outputs, view, weights):
    differentiable = all(output.requires_grad for output in outputs)
    gradient = torch.autograd.grad(outputs, view, weights, allow_unused=True)[0] if differentiable else None
    if gradient is None:
        raise ValueError(
            "`model` gives no gradient from its feature to the pixels: a part of it runs under no_grad or detaches"
        )
    return gradient


def _plain(model, smoothed, layer, processor, image_mean, image_std):
    """The plain tower in the form of a smoothed one that neither adds noise nor refines; no weight is copied."""
    first_token = 0
    layers = getattr(model.config, "num_hidden_layers", None)
    if layer is not None and isinstance(layers, int):
        _check_layer(layer, layers)
    if smoothed:
        config = model.config
        image_mean, image_std = config.image_mean, config.image_std
        layer = config.feature_layer if layer is None else layer
        first_token, model = config.first_token, model.vision_tower
    return SmoothedVisionTower.from_components(
        model, None, sigma=0.0, num_samples=1, feature_layer=layer, first_token=first_token, processor=processor,
        image_mean=image_mean, image_std=image_std,
    )  # fmt: skip


def _adaptive(tower, layer):
    """The smoothed tower and the selection of `layer`, which must be one that it serves."""
    selection = tower._selection
    if layer is None:
        return tower, selection
    _check_layer(layer, selection.num_layers)
    wanted = (layer % (selection.num_layers + 1),)
    if selection.restricted and wanted != selection.layers:
        raise ValueError(
            f"`layer` must be the one this tower serves (`feature_layer={tower.config.feature_layer}`), got {layer}"
        )
    return tower, dataclasses.replace(selection, layers=wanted)


def _check_layer(layer, num_layers):
    if isinstance(layer, bool) or not isinstance(layer, int) or not -num_layers - 1 <= layer <= num_layers:
        raise ValueError(f"`layer` must be an integer in [{-num_layers - 1}, {num_layers}], got {layer!r}")


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(context, images, purified):
        return purified.view_as(purified)

    @staticmethod
    def backward(context, gradient):
        return gradient, None


class _StraightPurifier(nn.Module):
    """A purifier whose gradient is taken to be the identity (Athalye, Carlini & Wagner 2018, BPDA)."""

    def __init__(self, purifier):
        super().__init__()
        self.purifier = purifier

    def denoise(self, images, sigma):
        with torch.no_grad():
            purified = self.purifier.denoise(images, sigma)
        return _Identity.apply(images, purified)


def _with_straight_purifier(tower):
    """A second tower that shares every weight, with a straight-through purifier."""
    twin, psm = copy.copy(tower), copy.copy(tower.psm)
    twin._modules, psm._modules = dict(tower._modules), dict(tower.psm._modules)
    psm._modules["purifier"] = _StraightPurifier(tower.psm.purifier).eval()
    twin._modules["psm"] = psm
    return twin
