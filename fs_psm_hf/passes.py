"""One pass: noisy copies of some images go through purifier, wrapped tower and mapper."""

import functools

import torch

from .compiled import CompiledPass
from .features import FeatureSelection
from .noise import gaussian_noise
from .packed import equal_runs, is_packed, pack, read_sizes, unpack
from .pixels import channel_tensor, from_unit, to_unit
from .smoothing import default_batch_size, plan_passes
from .truncation import truncated


class Passes:
    """The part of a [`SmoothedVisionTower`] that runs its networks, on as many noisy images at a time as fit."""

    def compile(self, *args, **kwargs):
        """`torch.compile` of one pass (noise to features); the loop around it stays Python and its shapes stay fixed.

        Passes that are differentiated run eagerly, and where a pass does not compile, the log says so once and all do. `mode="reduce-overhead"` replays CUDA
        graphs; features are copied out of them, so that those of one pass outlive the next.
        """
        self._compiled_pass = CompiledPass(self._network, *args, **kwargs)
        return self

    @property
    def compiled(self):
        """How passes without gradients are compiled, `"inductor"` for example; `None` where they are not, or not any more."""
        return None if self._compiled_pass is None or self._compiled_pass.failure else self._compiled_pass.mode

    @property
    def _selection(self):
        # Follows the configuration, and is one object while that stays, which torch.compile needs.
        selection = FeatureSelection.of(self.config)
        if selection != self._last_selection:
            self._last_selection = selection
        return self._last_selection

    @property
    def _is_packed(self):
        return is_packed(self.config.vision_config)

    def _model(self, whole):
        """The wrapped tower: the `whole` of it, or cut after the last feature layer where nothing behind it is needed."""
        depth = self._selection.depth
        if whole or depth is None:
            return self.vision_tower
        # Kept, so that torch.compile sees one object; made again for another layer, or where a block was exchanged
        # (adapters, for one).
        parts = depth, *(id(module) for module in self.vision_tower.modules())
        if self._short is None or self._short[0] != parts:
            self._short = parts, truncated(self.vision_tower, depth)
        return self._short[1]

    def _noisy(self, images, noise, num_samples, sigma, statistics, raw):
        """What the wrapped tower is given: the noisy copies of images of one size, purified and normalised.

        Returns:
            `torch.Tensor` of shape `(b * num_samples, 3, height, width)`, in the tower's dtype.
        """
        mean, std = statistics
        purified = self.psm.purifier is not None and not raw
        copies = images[:, None].expand(-1, num_samples, -1, -1, -1)  # (b, n, 3, H, W)
        if noise is None:
            pixels = copies.flatten(0, 1)  # (b*n, 3, H, W)
        else:
            # Noise of σ in [0, 1] pixels is σ / std in normalised ones, where the tower without a purifier lives.
            scale = sigma if purified else sigma / std
            if torch.compiler.is_compiling():  # fused, and CUDA graphs do not take arguments that are overwritten
                pixels = (noise * scale).view(copies.shape).add(copies).flatten(0, 1)
            else:
                pixels = noise.mul_(scale).view(copies.shape).add_(copies).flatten(0, 1)
        if purified:
            purified_pixels = self.psm(pixels, sigma)
            pixels = from_unit(purified_pixels, mean.to(purified_pixels), std.to(purified_pixels))
        return pixels.to(self.vision_tower.dtype)

    def _network(
        self, model, runs, noises, num_samples, sigma, statistics, selection, options, raw=False, canvas=None
    ):
        """Purifier, wrapped tower and mapper on the noisy copies of some images.

        Args:
            model (`PreTrainedModel`): from `_model`.
            runs (`list[torch.Tensor]`): images of shape `(b, 3, height, width)`, those of one size together: one run, but for
                a packed tower. In [0, 1] with a purifier, normalised without.
            noises (`list[torch.Tensor or None]`): unit noise of shape `(b * num_samples, 3, height, width)`, overwritten
                by an eager pass.
            statistics (pair of `torch.Tensor` of shape `(3, 1, 1)`): mean and standard deviation of the normalisation.
            selection ([`FeatureSelection`]): what the mapper refines.
            options (`dict`): further arguments of the wrapped tower.
            raw (`bool`): the wrapped tower alone, neither purifier nor mapper, on normalised images.
            canvas (`tuple[int, int]`, *optional*): height and width of the padded batch of a packed tower.

        Returns:
            `list[ModelOutput]`: the wrapped tower's output class, for `b * num_samples` images of each run.
        """
        pixels = [
            self._noisy(images, noise, num_samples, sigma, statistics, raw)
            for images, noise in zip(runs, noises, strict=True)
        ]
        if canvas is None:
            outputs = [model(pixel_values=pixels[0], return_dict=True, **options)]
        else:
            packed, sizes = pack(pixels, canvas)
            output = model(pixel_values=packed, image_sizes=sizes, return_dict=True, **options)
            outputs = unpack(output, pixels, self.config.vision_config.patch_size)
        if self.psm.mapper is not None and not raw:
            for output in outputs:
                selection.refine(output, self.psm.mapper, sigma)
        return outputs

    def _limit(self, pixel_values):
        """Most noisy images in one pass."""
        height, width = pixel_values.shape[2:]
        return self.config.max_batch_size or default_batch_size(height, width, pixel_values.device, self.psm.purifier)

    def _statistics(self, images, values=None):
        mean, std = values or (self.config.image_mean, self.config.image_std)
        return channel_tensor(mean, images), channel_tensor(std, images)

    def _passes(
        self,
        model,
        selection,
        pixel_values,
        options,
        seed,
        image_ids,
        sigma,
        samples,
        limit,
        statistics=None,
        fill=None,
    ):
        """Run every pass of a call.

        Args:
            samples (`range`): numbers of the draws of each image.
            limit (`int`): most noisy images in one pass.
            statistics (pair of `tuple`, *optional*): mean and standard deviation of the normalisation; those of the
                configuration where not given.
            fill (`int`, *optional*): draws in a full pass, where these `samples` are a part of more.

        Yields:
            `tuple[slice, ModelOutput]`: some images, of one size, and the wrapped tower's answer for their draws.
        """
        batch_size, canvas, sizes = len(pixel_values), None, None
        if self._is_packed:
            canvas, patch_size = tuple(pixel_values.shape[2:]), self.config.vision_config.patch_size
            sizes = read_sizes(options.get("image_sizes"), pixel_values, patch_size)
            options = {name: value for name, value in options.items() if name != "image_sizes"}
        images = pixel_values.float()
        statistics = self._statistics(images, statistics)
        if self.psm.purifier is not None:
            images = to_unit(images, *statistics)
        network = self._network
        if self._compiled_pass is not None:
            network = functools.partial(self._compiled_pass, fill=fill or min(len(samples), limit))
        for chosen, numbers in plan_passes(batch_size, len(samples), limit, samples.start):
            count, parts, runs = len(numbers), [chosen], [images[chosen]]
            if sizes is not None:
                parts = list(equal_runs(sizes, chosen))
                runs = [images[part, :, : sizes[part.start][0], : sizes[part.start][1]] for part in parts]
            noises = [None] * len(parts)
            if sigma > 0:
                noises = [
                    gaussian_noise(tuple(run.shape[1:]), seed, image_ids[part], numbers.start, count, images.device)
                    for part, run in zip(parts, runs, strict=True)
                ]
            repeated = {
                name: value[chosen].repeat_interleave(count, 0)
                if isinstance(value, torch.Tensor) and value.ndim and len(value) == batch_size
                else value
                for name, value in options.items()
            }
            outputs = network(model, runs, noises, count, sigma, statistics, selection, repeated, canvas=canvas)
            yield from zip(parts, outputs, strict=True)
