"""A pass under `torch.compile`: at fixed shapes, and eagerly where it does not compile."""

import inspect

import torch
from torch.nn import functional as F
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Sizes of passes and settings; with more of them than this the passes run eagerly.
_MOST_PROGRAMS = 64


class CompiledPass:
    """`SmoothedVisionTower._network` under `torch.compile`, for passes without gradients.

    A pass that is differentiated runs eagerly: on CPUs the layouts that torch 2.13 chooses give wrong gradients of a U-Net,
    and CUDA graphs would write over what a backward pass still needs.

    Args:
        network (`Callable`): `SmoothedVisionTower._network`.
        options: of `torch.compile`.
    """

    def __init__(self, network, *args, **options):
        self.network = network
        # The programs of other towers in the process are not counted against this one, where torch can tell them apart.
        apart = "isolate_recompiles" in inspect.signature(torch.compile).parameters
        self.compiled = torch.compile(network, *args, **{"isolate_recompiles": True} | options if apart else options)
        self.mode = _words(options)
        # The outputs of CUDA graphs lie in memory that the next pass writes to.
        graphs = (options.get("options") or {}).get("triton.cudagraphs") or options.get("backend") == "cudagraphs"
        self.keep = torch.clone if graphs or options.get("mode") in ("reduce-overhead", "max-autotune") else None
        self.failure = None  # why the passes run eagerly, one sentence, where they do

    def __call__(
        self, model, runs, noises, num_samples, sigma, statistics, selection, options, raw=False, canvas=None, fill=0
    ):
        """Arguments and result as those of the network.

        Args:
            fill (`int`): draws in a full pass of this call. The last pass of a stream is often shorter: its noise is filled
                up with zeros and the surplus dropped from the answer, so that no second program is compiled for it.
        """
        rest = (sigma, statistics, selection, options, raw, canvas)
        if self.failure is not None or torch.is_grad_enabled():
            return self.network(model, runs, noises, num_samples, *rest)
        # Arguments with a row per draw would have to be filled up too, and other images are not ours to make up.
        alone = canvas is None and len(runs[0]) == 1 and noises[0] is not None
        alone = alone and not any(torch.is_tensor(value) for value in options.values())
        draws = max(num_samples, fill) if alone else num_samples
        # Copies: a program that fails half-way may have scaled the noise.
        surplus = draws - num_samples
        copies = [None if noise is None else _filled(noise, surplus) for noise in noises]
        if self.keep is not None:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            # Without the first, what was compiled too often would run eagerly and nobody would know.
            with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=_MOST_PROGRAMS):
                outputs = self.compiled(model, runs, copies, draws, *rest)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            reason = " ".join(str(error).strip().split("\n\n")[0].split())  # without the advice to compiler engineers
            self.failure = f"`torch.compile` failed with {type(error).__name__}: {reason}"
            logger.warning(f"{self.failure}; the passes run without it")
            return self.network(model, runs, noises, num_samples, *rest)
        if draws > num_samples:
            outputs = [_with_every_tensor(output, lambda tensor: tensor[:num_samples]) for output in outputs]
        if self.keep is not None:
            outputs = [_with_every_tensor(output, self.keep) for output in outputs]
        return outputs


def _filled(noise, surplus):
    return F.pad(noise, (0, 0) * 3 + (0, surplus)) if surplus else noise.clone()


def _words(options):
    """Backend and options in words: `"inductor, mode=reduce-overhead"`."""
    backend = options.get("backend", "inductor")
    if not isinstance(backend, str):
        backend = getattr(backend, "__name__", type(backend).__name__)
    return ", ".join([backend, *(f"{name}={options[name]}" for name in sorted(options) if name != "backend")])


def _with_every_tensor(output, change):
    """A model's output with every tensor in it changed."""
    for name, value in output.items():
        if isinstance(value, torch.Tensor):
            output[name] = change(value)
        elif isinstance(value, (tuple, list)):
            output[name] = tuple(None if tensor is None else change(tensor) for tensor in value)
    return output
