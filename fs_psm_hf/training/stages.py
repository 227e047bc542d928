"""What each stage trains, and its losses pass by pass (paper Algorithm 1)."""

import numpy as np
import torch

from . import losses


# Draws of l_diff are numbered from here, apart from the n₀ draws of the other losses.
_DIFFUSION_DRAW = 2**32


class Stage:
    """A stage: which part of the PSM is trained, and by what.

    Args:
        args ([`PSMTrainingArguments`]): of this stage.
        psm ([`PSMModel`]): from `build_psm`.
        tower ([`FrozenTower`]): frozen.
    """

    needs_features = True

    def __init__(self, args, psm, tower):
        self.args, self.psm, self.tower = args, psm, tower

    def train(self):
        """Train the part, leave all else in evaluation mode."""
        self.psm.eval()
        self.trained.train()

    def eval(self):
        """Everything in evaluation mode."""
        self.psm.eval()

    def sigmas(self, positions, like):
        """The noise level of each image, `(batch_size,)`: one for all, or uniform in the range; a function of the position."""
        low, high = self.args.sigma_range
        levels = [low + (high - low) * self._uniform(position, 4) for position in positions]
        return torch.tensor(levels, dtype=torch.float32, device=like.device)

    def _uniform(self, position, purpose):
        return np.random.default_rng([self.args.seed, purpose, position]).random()

    def _noisy(self, images, positions, sigma, draw):
        noise = losses.draw_noise(images, self.args.seed, positions, draw)
        return images + sigma[:, None, None, None] * noise, noise


class PurifierStage(Stage):
    """L_P = λ·l_diff + λ₁·l_rb + λ₂·l_mse; gradients flow through the frozen tower into the purifier."""

    @property
    def trained(self):
        """The purifier."""
        return self.psm.purifier

    @property
    def needs_features(self):
        """Whether the loss asks for clean features."""
        return self.args.lambda_rb > 0

    @classmethod
    def passes(cls, args):
        """Backward passes of one micro-batch."""
        return (args.lambda_diff > 0) + args.num_samples * (args.lambda_rb > 0 or args.lambda_mse > 0)

    def networks(self, model):
        """Purifier and mapper for a validation."""
        return model, None

    def losses(self, model, images, positions, clean):
        """The passes of one micro-batch.

        Yields:
            `Callable`: gives a loss to differentiate, which counts as one of `passes` equal parts, and what to log of it.
        """
        args, count = self.args, self.passes(self.args)
        sigma = self.sigmas(positions, images)

        def diffusion():
            uniform = torch.tensor([self._uniform(p, 6) for p in positions], device=images.device)
            levels = losses.diffusion_levels(self.trained, uniform, args.sigma_range)
            noisy, noise = self._noisy(images, positions, levels, _DIFFUSION_DRAW)
            loss = losses.diffusion_loss(model(noisy, levels), images, noise, levels, self.trained)
            return count * args.lambda_diff * loss, {"loss": args.lambda_diff * loss, "loss_diff": loss}

        def draw(number):
            noisy, _ = self._noisy(images, positions, sigma, number)
            purified = model(noisy, sigma)
            loss_mse = losses.reconstruction_loss(purified, images)
            parts, loss = {"loss_mse": loss_mse}, args.lambda_mse * loss_mse
            if self.needs_features:
                features = self.tower.vector(self.tower.raw(purified))
                parts["loss_rb"] = losses.cosine_loss(features, self.tower.vector(clean))
                loss = loss + args.lambda_rb * parts["loss_rb"]
            share = 1 / args.num_samples
            return count * share * loss, {name: share * part for name, part in ({"loss": loss} | parts).items()}

        if args.lambda_diff > 0:
            yield diffusion
        if args.lambda_rb > 0 or args.lambda_mse > 0:
            for number in range(args.num_samples):
                yield lambda number=number: draw(number)


class MapperStage(Stage):
    """L_M = λ·l_rb + λ₃·l_stats + λ₄·l_id; purifier and tower run without gradients."""

    @property
    def trained(self):
        """The mapper."""
        return self.psm.mapper

    @classmethod
    def passes(cls, args):
        """Backward passes of one micro-batch."""
        return args.num_samples

    def networks(self, model):
        """Purifier and mapper for a validation."""
        return (self.psm if self.psm.purifier is not None else None), model

    def losses(self, model, images, positions, clean):
        """As [`PurifierStage.losses`]."""
        args, sigma = self.args, self.sigmas(positions, images)
        norm = self.trained.token_norm

        def draw(number):
            with torch.no_grad():
                noisy, _ = self._noisy(images, positions, sigma, number)
                features = self.tower.raw(self.psm(noisy, sigma).float())
            mapped = features + model(features, sigma)
            parts = {
                "loss_rb": losses.cosine_loss(self.tower.vector(mapped), self.tower.vector(clean)),
                "loss_stats": losses.statistics_loss(mapped, clean, norm),
            }
            loss = args.lambda_rb * parts["loss_rb"] + args.lambda_stats * parts["loss_stats"]
            # Of the first draw only: it costs a pass, and is zero by construction.
            if args.lambda_id > 0 and number == 0:
                parts["loss_id"] = args.num_samples * losses.identity_loss(model, features, norm)
                loss = loss + args.lambda_id * parts["loss_id"]
            share = 1 / args.num_samples
            return loss, {name: share * part for name, part in ({"loss": loss} | parts).items()}

        for number in range(args.num_samples):
            yield lambda number=number: draw(number)
