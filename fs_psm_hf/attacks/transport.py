"""How well two sets of vectors match: entropic optimal transport, batched and without waiting for the device.

The local part of FOA-Attack (github.com/jiaxiaojunQAQ/FOA-Attack@fbf4239): cost one minus cosine, uniform weights,
regularisation 0.1, at most 100 scalings until the row factors change by less than 0.01. The plan is a constant for the
gradient. POT's solver was not taken: it works on one pair of sets, and its stopping rule is another one.
"""

import math

import torch
from torch.nn import functional as F


REGULARISATION = 0.1
_ITERATIONS = 100
_TOLERANCE = 1e-2


def transport_plan(similarity, regularisation=REGULARISATION, iterations=_ITERATIONS, tolerance=_TOLERANCE):
    """The Sinkhorn plan between uniform weights for the cost `1 - similarity`; no gradient.

    Args:
        similarity (`torch.Tensor` of shape `(batch_size, m, n)`): cosines.
        regularisation (`float`): weight of the entropy, > 0.
        iterations (`int`), tolerance (`float`): each image stops by itself where the mean change of its row factors is
            below the tolerance.

    Returns:
        `torch.Tensor` of shape `(batch_size, m, n)`: its columns sum to 1/n exactly, its rows to 1/m once converged.
    """
    with torch.no_grad():
        kernel = (similarity.detach() - 1) / regularisation  # logarithms: a small regularisation would underflow
        _, m, n = kernel.shape
        rows, columns = kernel.new_zeros(len(kernel), m), kernel.new_zeros(len(kernel), n)
        running = torch.ones(len(kernel), 1, dtype=torch.bool, device=kernel.device)
        for _ in range(iterations):
            new_rows = -math.log(m) - (kernel + columns[:, None, :]).logsumexp(2)
            new_columns = -math.log(n) - (kernel + new_rows[:, :, None]).logsumexp(1)
            change = (new_rows.exp() - rows.exp()).abs().mean(1, keepdim=True)
            rows, columns = torch.where(running, new_rows, rows), torch.where(running, new_columns, columns)
            running = running & ~(change < tolerance)
            if running.device.type == "cpu" and not running.any():
                break
        return (kernel + rows[:, :, None] + columns[:, None, :]).exp()


def transport_similarity(first, second, **options):
    """`Σ plan · cosine` between the rows of two sets, for each image; 1 where the sets have the same directions.

    Args:
        first (`torch.Tensor` of shape `(batch_size, m, width)`), second (of shape `(batch_size, n, width)`).
        options: of [`transport_plan`].

    Returns:
        `torch.Tensor` of shape `(batch_size,)`, in [-1, 1]; its gradient takes the plan as constant.
    """
    similarity = F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).mT
    return (transport_plan(similarity, **options) * similarity).sum((1, 2))
