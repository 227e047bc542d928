"""A pass under `torch.compile`: at fixed shapes, and eagerly where it does not compile."""

import torch
from torch.nn import functional as F
from transformers.utils import logging


logger = logging.get_logger(__name__)


class CompiledPass:
    """`SmoothedVisionTower._network` under `torch.compile`.

    The last pass of a stream of draws is often shorter than those before it. Its noise is filled up with zeros to their
    number and the surplus dropped from the answer, so that no second program is compiled for it.

    Args:
        network (`Callable`): `SmoothedVisionTower._network`.
        options: of `torch.compile`.
    """

    def __init__(self, network, *args, **options):
        self.network = network
        self.compiled = torch.compile(network, *args, **options)
        # Their outputs lie in memory that the next pass writes to.
        graphs = (options.get("options") or {}).get("triton.cudagraphs", False)
        self.keep = torch.clone if graphs or options.get("mode") in ("reduce-overhead", "max-autotune") else None
        self.failure = None  # why the passes run eagerly, one sentence, where they do
        self._known = set()
        self._most_draws = {}

    def __call__(
        self, model, runs, noises, num_samples, sigma, statistics, selection, options, raw=False, canvas=None
    ):
        """Arguments and result as those of the network."""
        rest = (sigma, statistics, selection, options, raw, canvas)
        if self.failure is not None:
            return self.network(model, runs, noises, num_samples, *rest)
        shapes, draws = tuple(tuple(run.shape) for run in runs), num_samples
        # Arguments with a row per draw would have to be filled up too, and other images are not ours to make up.
        alone = canvas is None and len(runs[0]) == 1 and noises[0] is not None
        if alone and not any(torch.is_tensor(value) for value in options.values()):
            name = shapes, id(model), raw
            draws = self._most_draws[name] = max(num_samples, self._most_draws.get(name, 0))
            if draws > num_samples:
                noises = [F.pad(noises[0], (0, 0) * 3 + (0, draws - num_samples))]
        program = shapes, draws, sigma, raw, canvas, id(model), selection, torch.is_grad_enabled()
        if self.keep is not None:
            torch.compiler.cudagraph_mark_step_begin()
        if program in self._known:
            outputs = self.compiled(model, runs, noises, draws, *rest)
        else:
            outputs = self._first(model, runs, noises, draws, rest)
            self._known.add(program)
        if draws > num_samples:
            outputs = [_with_every_tensor(output, lambda tensor: tensor[:num_samples]) for output in outputs]
        if self.keep is not None:
            outputs = [_with_every_tensor(output, self.keep) for output in outputs]
        return outputs

    def _first(self, model, runs, noises, num_samples, rest):
        """A pass that may have to be compiled, on a copy of the noise: a program that fails may have overwritten it."""
        kept = [None if noise is None else noise.clone() for noise in noises]
        try:
            return self.compiled(model, runs, noises, num_samples, *rest)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(str(error).strip().split("\n\n")[0].split())  # without the advice to compiler engineers
            self.failure = f"`torch.compile` failed with {type(error).__name__}: {reason}"
            logger.warning(f"{self.failure}; the passes run without it")
            return self.network(model, runs, kept, num_samples, *rest)


def _with_every_tensor(output, change):
    """A model's output with every tensor in it changed."""
    for name, value in output.items():
        if isinstance(value, torch.Tensor):
            output[name] = change(value)
        elif isinstance(value, (tuple, list)):
            output[name] = tuple(None if tensor is None else change(tensor) for tensor in value)
    return output
