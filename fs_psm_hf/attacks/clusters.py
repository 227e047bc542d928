"""k-means of each image's tokens, batched and without waiting for the device; centres are differentiable.

FOA-Attack (github.com/jiaxiaojunQAQ/FOA-Attack@fbf4239) clusters one image at a time with kmeans_pytorch: Euclidean,
random first centres, tolerance 1e-4. The assignment is made without a gradient; a centre is the mean of its tokens, and
the gradient flows through that mean.
"""

import torch

from .streams import uniform_numbers


NUM_CLUSTERS = 10
_TOLERANCE = 1e-4
_ITERATIONS = 100


def first_centres(num_tokens, seed, image_ids, step, num_clusters=NUM_CLUSTERS):
    """Different random tokens as first centres of each image: `(num_images, min(num_clusters, num_tokens))`, on the CPU."""
    draws = uniform_numbers((num_tokens,), seed, image_ids, step)
    return draws.topk(min(num_clusters, num_tokens), dim=1).indices


def assign(tokens, centres, iterations=_ITERATIONS, tolerance=_TOLERANCE):
    """Lloyd's iterations, each image until its centres have moved by less than `sqrt(tolerance)` in all.

    Args:
        tokens (`torch.Tensor` of shape `(batch_size, num_tokens, width)`): what is clustered; no gradient is recorded.
        centres (`torch.Tensor` of shape `(batch_size, k, width)`): where to start.

    Returns:
        pair of `torch.Tensor`: the cluster of each token, `(batch_size, num_tokens)`, and the last centres. A centre
        that lost its tokens stays where it was.
    """
    with torch.no_grad():
        running = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
        clusters = _nearest(tokens, centres)
        for _ in range(iterations):
            moved = _means(tokens, clusters, centres)
            shift = (moved - centres).norm(dim=-1).sum(-1).square()  # (B,)
            centres = torch.where(running[:, None, None], moved, centres)
            clusters = torch.where(running[:, None], _nearest(tokens, centres), clusters)
            running = running & (shift >= tolerance)
            # Reading the mask would make the host wait for an accelerator, where going on costs little.
            if running.device.type == "cpu" and not running.any():
                break
        return clusters, centres


def cluster_centres(tokens, starts, iterations=_ITERATIONS, tolerance=_TOLERANCE):
    """Centres of the clusters of each image's tokens, with the gradient of the means.

    Args:
        tokens (`torch.Tensor` of shape `(batch_size, num_tokens, width)`): float32.
        starts (`torch.Tensor` of shape `(batch_size, k)`): tokens that are the first centres, from [`first_centres`].

    Returns:
        `torch.Tensor` of shape `(batch_size, k, width)`.
    """
    detached = tokens.detach()
    indices = starts.to(tokens.device)[:, :, None].expand(-1, -1, tokens.shape[-1])
    clusters, centres = assign(detached, detached.gather(1, indices), iterations, tolerance)
    return _means(tokens, clusters, centres)


def _nearest(tokens, centres):
    # |t|² is the same for every centre.
    return (centres.square().sum(-1)[:, None] - 2 * tokens @ centres.mT).argmin(-1)  # (B, N)


def _means(tokens, clusters, centres):
    """Means of the clusters, `centres` where there are no tokens."""
    members = torch.nn.functional.one_hot(clusters, centres.shape[1]).to(tokens.dtype).mT  # (B, k, N)
    counts = members.sum(-1, keepdim=True)
    return torch.where(counts > 0, members @ tokens / counts.clamp_min(1), centres)
