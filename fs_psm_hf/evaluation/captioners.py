"""Answers of a host model to images in [0, 1]: LLaVA and its relatives in transformers, and OpenFlamingo."""

import contextlib
import inspect
from collections.abc import Sequence

import torch
from PIL import Image

from ..modeling_fs_psm import SmoothedVisionTower
from ..noise import MAX_ID, resolve_image_ids
from .prompts import CAPTION_PROMPT, OPEN_FLAMINGO_PROMPT


# For a processor without a chat template: what LLaVA-1.5 was trained on.
LLAVA_PROMPT = "USER: {image}\n{prompt} ASSISTANT:"
_VIEWS = 2**16


def is_open_flamingo(host):
    """Whether a model is OpenFlamingo's, told by its parts so that the package need not be there."""
    parts = all(hasattr(host, name) for name in ("vision_encoder", "perceiver", "lang_encoder"))
    return parts and "vision_x" in inspect.signature(host.generate).parameters


def to_pictures(images):
    """[0, 1] images as 8-bit pictures, without loss.

    A picture that a user sends has 8 bits, and image processors resize such pictures. What is not a multiple of 1/255 would
    be another image after rounding than the one that was attacked, so it is refused.

    Args:
        images (`torch.Tensor` of shape `(batch_size, 3, height, width)`): [0, 1] pixels.

    Returns:
        `list[PIL.Image.Image]`

    Raises:
        TypeError: no floating point tensor.
        ValueError: another shape, pixels outside [0, 1], or more than 8 bits.
    """
    if not isinstance(images, torch.Tensor) or not images.is_floating_point():
        given = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
        raise TypeError(f"`images` must be a floating point tensor, got {given}")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"`images` must have shape (batch_size, 3, height, width), got {tuple(images.shape)}")
    levels = images.detach().double().cpu() * 255
    rounded = levels.round()
    if images.numel() and not (rounded.min() >= 0 and rounded.max() <= 255 and (levels - rounded).abs().max() < 0.01):
        raise ValueError(
            "`images` must be multiples of 1/255 in [0, 1], as an image file holds them: round them first, as "
            "`(images * 255).round() / 255`"
        )
    return [Image.fromarray(picture.numpy()) for picture in rounded.to(torch.uint8).permute(0, 2, 3, 1)]


class Captioner:
    """Asks a host about images and returns its greedy answers.

    Args:
        host: a model of transformers with `generate` and images in its prompt, plain or with a smoothed tower; or an
            OpenFlamingo.
        processor: its processor; for OpenFlamingo the pair `(image_processor, tokenizer)` that its
            `create_model_and_transforms` gives.
        prompt (`str`): asked of every image for which no other is given. For OpenFlamingo it is the whole text, with
            `<image>` in it; [`OPEN_FLAMINGO_PROMPT`] stands for the default.
        max_new_tokens (`int`): per answer.
        batch_size (`int`): images per pass.
        seed (`int`, *optional*): of the noise of a smoothed tower, for answers that can be made again; an image's noise is
            then a function of the seed and its id. `None` draws it anew each time, as when the model is served.
        generate_options (`dict`, *optional*): further arguments of `generate`, such as `num_beams`.

    Raises:
        ValueError: a prompt that OpenFlamingo cannot take, or a batch of no image.
    """

    def __init__(
        self,
        host,
        processor,
        prompt=CAPTION_PROMPT,
        *,
        max_new_tokens=64,
        batch_size=8,
        seed=None,
        generate_options=None,
    ):
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}")
        self.host, self.processor, self.batch_size, self.seed = host, processor, batch_size, seed
        self.options = {"max_new_tokens": max_new_tokens, "do_sample": False} | (generate_options or {})
        self.open_flamingo = is_open_flamingo(host)
        if self.open_flamingo and not (isinstance(processor, Sequence) and len(processor) == 2):
            raise ValueError("`processor` must be the pair (image_processor, tokenizer) for an OpenFlamingo")
        self.prompt = OPEN_FLAMINGO_PROMPT if self.open_flamingo and prompt == CAPTION_PROMPT else prompt

    def __call__(self, images, prompts=None, image_ids=None):
        """The answers to images.

        Args:
            images (`torch.Tensor` of shape `(batch_size, 3, height, width)`): multiples of 1/255 in [0, 1], in the attack's
                frame; the host's own image processor brings them to its size.
            prompts (`str` or `list[str]`, *optional*): one for all, or one per image.
            image_ids (`list[int]`, *optional*): names of the images for the noise; positions where not given.

        Returns:
            `list[str]`: without the prompt, blanks around them removed.

        Raises:
            TypeError, ValueError: as [`to_pictures`], or not one prompt and one id per image.
        """
        pictures = to_pictures(images)
        prompts = self.prompt if prompts is None else prompts
        prompts = [prompts] * len(pictures) if isinstance(prompts, str) else list(prompts)
        if len(prompts) != len(pictures):
            raise ValueError(f"`prompts` must be one or one per image, got {len(prompts)} for {len(pictures)} images")
        ids = resolve_image_ids(image_ids, len(pictures))
        answer = self._ask_open_flamingo if self.open_flamingo else self._ask
        answers, training = [], self.host.training
        self.host.eval()
        try:
            with torch.inference_mode():
                for chunk in self._chunks(pictures):
                    with self._noise(ids[chunk]):
                        answers += answer(pictures[chunk], prompts[chunk])
        finally:
            self.host.train(training)
        return [text.strip() for text in answers]

    def _chunks(self, pictures):
        """Slices of at most `batch_size` images."""
        start = 0
        while start < len(pictures):
            end = min(start + self.batch_size, len(pictures))
            if self.open_flamingo and self.seed is not None:
                # Its tower smooths equal images once, so only different ones can have noise of their own.
                seen = set()
                while start + len(seen) < end and (pixels := pictures[start + len(seen)].tobytes()) not in seen:
                    seen.add(pixels)
                end = start + len(seen)
            yield slice(start, end)
            start = end

    def _ask(self, pictures, prompts):
        texts = [self._text(prompt) for prompt in prompts]
        inputs = self.processor(images=pictures, text=texts, padding=True, padding_side="left", return_tensors="pt")
        inputs = inputs.to(self.host.device, dtype=self.host.dtype)  # the dtype is for pixels only
        length = inputs["input_ids"].shape[1]
        tokens = self.host.generate(**inputs, **self.options)[:, length:]
        return self.processor.batch_decode(tokens, skip_special_tokens=True)

    def _text(self, prompt):
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": prompt}]
            conversation = [{"role": "user", "content": content}]
            return self.processor.apply_chat_template(conversation, add_generation_prompt=True)
        return LLAVA_PROMPT.format(image=getattr(self.processor, "image_token", "<image>"), prompt=prompt)

    def _ask_open_flamingo(self, pictures, prompts):
        transform, tokenizer = self.processor
        wrong = [prompt for prompt in prompts if prompt.count("<image>") != 1]
        if wrong:
            raise ValueError(f"`prompts` of an OpenFlamingo must hold `<image>` once, got {wrong[0]!r}")
        parameter = next(self.host.lang_encoder.parameters())
        pixels = torch.stack([transform(picture) for picture in pictures])  # (B, 3, H, W)
        pixels = pixels[:, None, None].to(
            parameter.device, parameter.dtype
        )  # one image, one frame: (B, 1, 1, 3, H, W)
        # Answers go on where the tokens end, so what is filled in stands before them.
        text = tokenizer(list(prompts), padding=True, padding_side="left", return_tensors="pt").to(parameter.device)
        tokens = self.host.generate(
            vision_x=pixels,
            lang_x=text["input_ids"],
            attention_mask=text["attention_mask"],
            pad_token_id=tokenizer.pad_token_id,
            **self.options,
        )
        texts = tokenizer.batch_decode(tokens[:, text["input_ids"].shape[1] :], skip_special_tokens=False)
        # A chunk of interleaved text ends there; what a model says afterwards is about a next image.
        answers = [text.partition("<|endofchunk|>")[0] for text in texts]
        for token in tokenizer.all_special_tokens:
            answers = [text.replace(token, "") for text in answers]
        return answers

    @contextlib.contextmanager
    def _noise(self, ids):
        """Gives every smoothed tower of the host the seed and the images' ids; `generate` has no argument for them."""
        if self.seed is None:
            yield
            return

        def add(tower, args, options):
            images = args[0] if args else options["pixel_values"]
            views, left = divmod(len(images), len(ids))
            # A host that looks at several crops of an image has them one after another.
            if left or (views != 1 and len(ids) != 1):
                raise ValueError(
                    f"`batch_size` must be 1 with a `seed` where a host makes {len(images)} views of {len(ids)} images"
                )
            named = ids if views == 1 else [(ids[0] * _VIEWS + view) % MAX_ID for view in range(views)]
            return args, options | {"generator": self.seed, "image_ids": named}

        with contextlib.ExitStack() as stack:
            for module in self.host.modules():
                if isinstance(module, SmoothedVisionTower):
                    stack.callback(module.register_forward_pre_hook(add, with_kwargs=True).remove)
            yield
