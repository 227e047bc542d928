"""The one-layer head against scikit-learn's logistic regression."""

import pytest
import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from torch import nn

from fs_psm_hf.evaluation.heads import load_head, predict, save_head, train_head
from fs_psm_hf.inputs import load_classifier


def clusters(images=90, width=12, classes=3, spread=1.5, seed=0):
    """Features that overlap, far from the origin and of no common scale, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=generator)
    labels = torch.arange(images) % classes
    return 40 * (centres[labels] + spread * torch.randn(images, width, generator=generator)) + 300, labels


@pytest.mark.parametrize("penalty", [0.01, 1.0, 30.0])
def test_head_is_the_optimum_that_scikit_learn_finds(penalty):
    features, labels = clusters()
    head = train_head(features, labels, penalty=penalty)
    centred = features.double() - features.double().mean(0)
    scaled = (centred / centred.norm(dim=1).mean()).numpy()
    other = LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=20_000).fit(scaled, labels.numpy())
    wanted = torch.from_numpy(other.predict_proba(scaled))
    assert head.weight.dtype == torch.float32
    torch.testing.assert_close(head(features).double().softmax(1), wanted, rtol=0, atol=2e-4)
    assert predict(head, features) == other.predict(scaled).tolist()


def test_head_generalises_and_knows_classes_it_has_not_seen():
    features, labels = clusters(spread=0.2)
    other, its = clusters(images=30, spread=0.2)
    head = train_head(features.bfloat16(), labels, num_classes=5)
    assert predict(head, other) == its.tolist()
    assert head.weight.shape == (5, 12)
    assert not head.weight.requires_grad


def test_head_that_separates_the_classes_converges():
    features, labels = clusters(spread=0.01)
    assert predict(train_head(features, labels, penalty=1e-3), features) == labels.tolist()


def test_head_is_read_back_by_us_and_by_certify(tmp_path):
    features, labels = clusters()
    head = train_head(features, labels)
    path = tmp_path / "heads" / "head.safetensors"
    save_head(head, path, ["cat", "dog", "kite"])
    assert [file.name for file in path.parent.iterdir()] == ["head.safetensors"]
    loaded, names = load_head(path)
    assert names == ("cat", "dog", "kite")
    assert torch.equal(loaded(features), head(features))
    classifier = load_classifier(path)
    assert torch.equal(classifier.weight, head.weight.double())
    assert torch.equal(classifier.bias, head.bias.double())
    save_head(nn.Linear(4, 2, bias=False), path)
    loaded, names = load_head(path)
    assert loaded.bias is None
    assert names is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.zeros(90)}, TypeError, "`labels` must be whole numbers, got torch.float32"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, r"got \(90, 12\) and \(3,\)"),
        ({"labels": torch.zeros(90, dtype=torch.int64)}, ValueError, "with at least two classes, got 0 to 0"),
        ({"num_classes": 2}, ValueError, r"`labels` must be in \[0, 2\) with at least two classes, got 0 to 2"),
        ({"features": torch.full((90, 12), torch.nan)}, ValueError, "`features` must be finite, got NaN or Inf"),
        ({"features": torch.ones(90, 12)}, ValueError, "`features` must differ between images"),
        ({"penalty": 0}, ValueError, "`penalty` must be > 0, got 0"),
        ({"max_iterations": 2}, RuntimeError, "the head did not converge in 2 iterations: a gradient of .* is left"),
    ],
)
def test_what_no_head_can_be_fitted_to(change, error, message):
    features, labels = clusters()
    with pytest.raises(error, match=message):
        train_head(**({"features": features, "labels": labels} | change))


def test_files_that_hold_no_head(tmp_path):
    path = tmp_path / "head.safetensors"
    with pytest.raises(ValueError, match="`path` must be a safetensors file, got"):
        load_head(path)
    path.write_text("nothing")
    with pytest.raises(ValueError, match="`path` must be a safetensors file, got"):
        load_head(path)
    for tensors in (
        {"weight": torch.ones(3)},
        {"weight": torch.ones(2, 3), "bias": torch.ones(3)},
        {"w": torch.ones(1)},
    ):
        save_file(tensors, path)
        with pytest.raises(ValueError, match=r"must hold `weight` of \(classes, features\) and `bias`"):
            load_head(path)
    with pytest.raises(ValueError, match="`class_names` must be 2, one per class, got 1"):
        save_head(nn.Linear(4, 2), path, ["cat"])
