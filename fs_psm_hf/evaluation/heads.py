"""A classifier of one layer on frozen features, as the paper puts on CLIP-L/14: multinomial logistic regression."""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy


def train_head(features, labels, num_classes=None, *, penalty=1.0, max_iterations=500):
    """Fit a linear layer to features by L-BFGS; the loss is convex, so the result does not depend on a start.

    Minimised is the sum over the images of the cross entropy, plus `penalty` / 2 times the squared norm of the weight (not
    of the bias): scikit-learn's `LogisticRegression(C=1 / penalty)`. It is solved on features that are centred and
    divided by their mean length, which the returned layer undoes; `penalty` counts in that scale.

    Args:
        features (`torch.Tensor` of shape `(images, width)`): of the encoder that is attacked, plain or smoothed.
        labels (`torch.Tensor` of shape `(images,)`): class numbers.
        num_classes (`int`, *optional*): the highest label plus one where not given.
        penalty (`float`): > 0.
        max_iterations (`int`): of L-BFGS.

    Returns:
        `torch.nn.Linear`: from `width` to `num_classes`, float32, on the CPU, without gradients.

    Raises:
        TypeError: labels that are not whole numbers.
        ValueError: shapes that do not fit, values that are not finite, or labels outside the classes.
        RuntimeError: it did not converge.
    """
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"`labels` must be whole numbers, got {labels.dtype}")
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(features):
        raise ValueError(
            "`features` and `labels` must have shapes (images, width) and (images,), got "
            f"{tuple(features.shape)} and {tuple(labels.shape)}"
        )
    classes = int(labels.max()) + 1 if num_classes is None else num_classes
    if labels.min() < 0 or labels.max() >= classes or classes < 2:
        raise ValueError(
            f"`labels` must be in [0, {classes}) with at least two classes, got {labels.min()} to {labels.max()}"
        )
    if not penalty > 0:
        raise ValueError(f"`penalty` must be > 0, got {penalty}")
    x, y = features.detach().double().cpu(), labels.cpu().long()
    if not torch.isfinite(x).all():
        raise ValueError("`features` must be finite, got NaN or Inf")
    centre = x.mean(0)
    scale = (x - centre).norm(dim=1).mean()
    if not scale > 0:
        raise ValueError("`features` must differ between images, got the same for all")
    x = (x - centre) / scale
    weight = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        tolerance_grad=1e-7,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def loss():
        solver.zero_grad()
        value = cross_entropy(x @ weight.T + bias, y, reduction="sum") + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
        loss()
    # The bias has no penalty, so at the optimum the gradient vanishes against the number of images.
    left = max(weight.grad.abs().max().item(), bias.grad.abs().max().item()) / len(x)
    if not left < 1e-5:
        raise RuntimeError(
            f"the head did not converge in {max_iterations} iterations: a gradient of {left:.1e} per image is left"
        )
    head = nn.Linear(x.shape[1], classes).requires_grad_(False)
    head.weight.copy_(weight.detach() / scale)
    head.bias.copy_(bias.detach() - (weight.detach() / scale) @ centre)
    return head


@torch.no_grad()
def predict(head, features):
    """The class numbers of features of shape `(images, width)`, a list of `int`."""
    return head(features.detach().to(head.weight)).argmax(dim=1).tolist()


def save_head(head, path, class_names=None):
    """Write a head where `fs-psm certify --labels` and [`load_head`] read it.

    Args:
        head (`torch.nn.Linear`): with or without a bias.
        path (`str` or `os.PathLike`): safetensors file; its folder is made. Written aside, then renamed.
        class_names (`Sequence[str]`, *optional*): one per class, kept in the file's metadata.

    Raises:
        ValueError: another number of names than classes.
    """
    if class_names is not None and len(class_names) != head.out_features:
        raise ValueError(f"`class_names` must be {head.out_features}, one per class, got {len(class_names)}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    tensors = {name: value.detach().contiguous().cpu() for name, value in head.state_dict().items()}
    names = {} if class_names is None else {"class_names": json.dumps(list(class_names))}
    save_file(tensors, temporary, metadata={"format": "pt"} | names)
    os.replace(temporary, path)


def load_head(path):
    """Read a head back.

    Returns:
        `tuple[torch.nn.Linear, tuple[str, ...] | None]`: the layer, without gradients, and the names of its classes.

    Raises:
        ValueError: the file is not there or holds no head.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            names = (file.metadata() or {}).get("class_names")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"`path` must be a safetensors file, got {path}: {error}") from error
    weight, bias = tensors.get("weight"), tensors.get("bias")
    fits = set(tensors) in ({"weight"}, {"weight", "bias"}) and weight.ndim == 2
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(
            f"`path` {path} must hold `weight` of (classes, features) and `bias` of (classes,) or no bias"
        )
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    head.load_state_dict(tensors)
    return head.requires_grad_(False), None if names is None else tuple(json.loads(names))
