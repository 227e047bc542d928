"""Certificates of small encoders whose smoothed feature is known: by a closed form, or by quadrature in 2 or 3 pixels."""

import dataclasses
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import ndtr, ndtri

from fs_psm_hf.certification import METHODS, Classifier, bounds, certify_logits, certify_scores


CERTIFYING = [method for method in METHODS if method != "plugin"]
SIGMAS = (0.25, 0.5, 1.0)
QUADRATURE_ERROR = 1e-3  # of all quantities below; checked against a finer rule


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Encoder:
    """`g` maps images `(..., d)` to unit features; `x` is the image that is certified."""

    g: Callable
    x: np.ndarray
    sigma: float

    @property
    def clean(self):
        return self.g(self.x)

    def draw(self, n, at=None, seed=0):
        """Features of n noisy images."""
        noise = np.random.default_rng(seed).standard_normal((n, len(self.x)))
        return self.g((self.x if at is None else at) + self.sigma * noise)

    def smoothed(self, points, finer=False):
        """ĝ at each of the points, by Gauss-Hermite quadrature."""
        nodes, weights = gauss_hermite(len(self.x), finer)
        return np.array([weights @ self.g(point + self.sigma * nodes) for point in points])

    def gradient(self, points, u):
        """Of `<ĝ, u>`: `E[<g(x + n), u> n] / sigma²`."""
        nodes, weights = gauss_hermite(len(self.x), False)
        return np.array([(weights * (self.g(p + self.sigma * nodes) @ u)) @ nodes / self.sigma for p in points])


@lru_cache
def gauss_hermite(dimension, finer):
    """Nodes `(m, d)` in units of sigma and weights `(m,)`, without the negligible ones."""
    order = {2: (48, 80), 3: (20, 30)}[dimension][finer]
    nodes, weights = np.polynomial.hermite_e.hermegauss(order)
    nodes = np.stack(np.meshgrid(*[nodes] * dimension, indexing="ij"), -1).reshape(-1, dimension)
    weights = np.prod(np.meshgrid(*[weights / weights.sum()] * dimension, indexing="ij"), 0).ravel()
    kept = weights > 1e-11
    return nodes[kept], weights[kept] / weights[kept].sum()


def linear(weight, direction, sigma):
    """g(y) = Wy/|Wy|, at least six sigmas from its singular point 0."""
    weight = np.array(weight)
    return Encoder(lambda y: unit(y @ weight.T), 6 * unit(np.array(direction)), sigma)


def tanh(dimension, features, sigma, seed, hidden=6):
    """One hidden layer that bends over a length of about 0.5."""
    rng = np.random.default_rng(seed)
    first, shift = 2 * rng.standard_normal((hidden, dimension)), rng.standard_normal(hidden)
    second, offset = rng.standard_normal((features, hidden)), 2 * rng.standard_normal(features)
    x = rng.random(dimension)
    return Encoder(lambda y: unit(np.tanh((y - x) @ first.T + shift) @ second.T + offset), x, sigma)


ENCODERS = {
    "linear, 2 pixels": lambda sigma: linear([[1.0, 0.3], [-0.4, 1.2], [0.8, 0.1]], [0.6, 0.8], sigma),
    "linear, 2 pixels, stretched": lambda sigma: linear([[1.0, 0.5], [0.0, 0.4]], [0.9, 0.4], sigma),
    "linear, 3 pixels": lambda sigma: linear([[1.0, 0.5, 0.0], [0.2, 1.1, -0.4], [0.0, 0.3, 0.7]], [1, 1, 2], sigma),
    "tanh, 2 pixels": lambda sigma: tanh(2, 3, sigma, 0),
    "tanh, 2 pixels, other": lambda sigma: tanh(2, 5, sigma, 4),
    "tanh, 3 pixels": lambda sigma: tanh(3, 4, sigma, 2),
}


def directions(dimension, m=120):
    if dimension == 2:
        angles = np.linspace(0, 2 * np.pi, m, endpoint=False)
        return np.stack([np.cos(angles), np.sin(angles)], -1)
    height = 1 - 2 * (np.arange(m) + 0.5) / m  # the Fibonacci sphere
    angles = np.pi * (1 + 5**0.5) * np.arange(m)
    wide = np.sqrt(1 - height**2)
    return np.stack([wide * np.cos(angles), wide * np.sin(angles), height], -1)


def ball(x, epsilon, shares):
    """The centre and `shares` of the radius in all directions."""
    return np.concatenate([x[None], *[x + share * epsilon * directions(len(x)) for share in shares]])


def find_worst(encoder, u, epsilon):
    """The x' in the ball with the smallest `<ĝ(x'), u>`: a dense search, then projected descent from the best five."""
    points = ball(encoder.x, epsilon, (0.5, 1.0))
    values = encoder.smoothed(points) @ u
    best = values.argsort()[:5]
    points, values = points[best], values[best]
    step = np.full(len(best), epsilon / 4)
    for _ in range(25):
        moved = points - step[:, None] * unit(encoder.gradient(points, u)) - encoder.x
        far = np.linalg.norm(moved, axis=-1, keepdims=True)
        moved = encoder.x + moved * np.minimum(1.0, epsilon / far)
        new = encoder.smoothed(moved) @ u
        better = new < values
        points, values = np.where(better[:, None], moved, points), np.where(better, new, values)
        step = np.where(better, step, step / 2)
    return points[values.argmin()], values.min()


@lru_cache
def fine_grid(dimension, per_axis):
    """A trapezoidal rule for the Gaussian, in units of sigma: for distributions, which quadrature of high order blurs."""
    axis = np.linspace(-6, 6, per_axis)
    points = np.stack(np.meshgrid(*[axis] * dimension, indexing="ij"), -1).reshape(-1, dimension)
    weights = np.exp(-0.5 * np.square(points).sum(-1))
    kept = weights > 1e-9
    return points[kept], weights[kept] / weights[kept].sum()


def population_layer_cake(encoder, u, epsilon, per_axis):
    points, weights = fine_grid(len(encoder.x), per_axis)
    scores = 0.5 * (1 + encoder.g(encoder.x + encoder.sigma * points) @ u)
    order = scores.argsort()
    survival = np.clip(1 - np.concatenate([[0.0], weights[order].cumsum()[:-1]]), 0, 1)
    return float((np.diff(scores[order], prepend=0.0) * ndtr(ndtri(survival) - epsilon / encoder.sigma)).sum())


@pytest.mark.parametrize("dimension", [2, 3, 7])
@pytest.mark.parametrize("sigma", SIGMAS)
def test_theorem_1_is_attained_by_half_spaces(dimension, sigma):
    """g is e on one side of a plane and -e on the other; x' goes straight through it."""
    rng = np.random.default_rng(dimension)
    w, x = unit(rng.standard_normal(dimension)), rng.random(dimension)
    plane = w @ x - 0.9 * sigma  # x lies 0.9 sigma inside
    e = unit(rng.standard_normal(4))

    epsilons = sigma * np.array([0.0, 0.2, 0.5, 1.0, 2.0])
    truth = 2 * ndtr((w @ x - epsilons - plane) / sigma) - 1  # <ĝ(x - epsilon w), e>
    bound = bounds.fcsb(ndtr((w @ x - plane) / sigma), epsilons, sigma)
    assert np.all(bound <= truth + 1e-12)
    assert np.all(bound > truth - 1e-3)

    noisy = x + sigma * rng.standard_normal((20_000, dimension))
    features = np.where((noisy @ w > plane)[:, None], e, -e)
    scores = np.clip(0.5 * (1 + features @ e), 0, 1)
    radius = (w @ x - plane) + sigma * ndtri(0.25)  # where <ĝ, e> falls to 0.5
    for method in CERTIFYING:
        certificate = certify_scores(scores, sigma=sigma, epsilons=epsilons, method=method, level=0.5)
        assert np.all(np.array(certificate.inner_product_bounds) <= truth)
        assert certificate.radius <= max(radius, 0.0)
        if method in ("cdf", "cdf_pilot", "betting", "best"):  # and by little: twice that of a Clopper-Pearson bound
            assert np.all(np.array(certificate.inner_product_bounds) > truth - 0.08)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_layer_cake_is_attained_by_a_feature_that_turns_along_one_direction(sigma):
    """Every level set of the score is a half-space with the same normal, so all of them are lost together."""
    w, x = unit(np.array([1.0, 2.0])), np.array([0.3, 0.8])
    u = np.array([1.0, 0.0])

    def g(y):
        angle = 2.0 * ndtr(-(y - x) @ w / 0.3) + 0.6 * ((y - x) @ w < -0.2)
        return np.stack([np.cos(angle), np.sin(angle)], -1)

    encoder, fine = Encoder(g, x, sigma), np.linspace(-9, 9, 40_001)
    weights = stats.norm.pdf(fine) * (fine[1] - fine[0])
    scores = 0.5 * (1 + encoder.draw(20_000) @ u)
    for epsilon in sigma * np.array([0.25, 1.0]):
        truth = weights @ (g(x + (sigma * fine - epsilon)[:, None] * w) @ u)
        bound = 2 * population_layer_cake(encoder, u, epsilon, 800) - 1
        assert bound == pytest.approx(truth, abs=1e-3)
        theorem_1 = bounds.fcsb(0.5 * (1 + weights @ (g(x + sigma * fine[:, None] * w) @ u)), epsilon, sigma)
        assert theorem_1 < truth - 0.01
        for method in CERTIFYING:
            found = certify_scores(scores, sigma=sigma, epsilons=[epsilon], method=method).inner_product_bounds[0]
            assert found <= truth
            if method in ("cdf", "cdf_pilot", "best"):
                assert found > truth - 0.12


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("sigma", SIGMAS)
def test_no_certificate_exceeds_the_worst_case(name, sigma):
    encoder = ENCODERS[name](sigma)
    u = encoder.clean
    scores = np.clip(0.5 * (1 + encoder.draw(4000) @ u), 0, 1)
    epsilons = sigma * np.array([0.25, 0.5, 1.0])
    certificates = [
        certify_scores(
            scores,
            sigma=sigma,
            epsilons=epsilons,
            method=method,
        )
        for method in CERTIFYING
    ]
    mean = 0.5 * (1 + encoder.smoothed(encoder.x[None])[0] @ u)
    per_axis = {2: 500, 3: 80}[len(encoder.x)]
    for i, epsilon in enumerate(epsilons):
        point, worst = find_worst(encoder, u, epsilon)
        assert np.linalg.norm(point - encoder.x) <= epsilon * (1 + 1e-9)
        assert encoder.smoothed(point[None], finer=True)[0] @ u == pytest.approx(worst, abs=QUADRATURE_ERROR)
        length = np.linalg.norm(encoder.smoothed(point[None])[0])
        for certificate in certificates:
            assert certificate.inner_product_bounds[i] <= worst + QUADRATURE_ERROR, certificate.method
            assert certificate.cosine_bounds[i] <= worst / length + QUADRATURE_ERROR, certificate.method

        theorem_1 = bounds.fcsb(mean, epsilon, sigma)
        layer_cake = 2 * population_layer_cake(encoder, u, epsilon, per_axis) - 1
        coarser = 2 * population_layer_cake(encoder, u, epsilon, per_axis // 2) - 1
        assert layer_cake == pytest.approx(coarser, abs=2e-3)
        assert theorem_1 < layer_cake <= worst + QUADRATURE_ERROR
        if name.startswith("tanh"):
            assert theorem_1 < layer_cake - 0.01
            assert layer_cake > worst - 0.06  # these scores fall nearly along one direction


@pytest.mark.parametrize("name", ["linear, 2 pixels, stretched", "tanh, 2 pixels", "tanh, 3 pixels"])
def test_a_certified_radius_keeps_the_cosine(name):
    encoder = ENCODERS[name](0.5)
    u = encoder.clean
    scores = np.clip(0.5 * (1 + encoder.draw(20_000) @ u), 0, 1)
    for method in CERTIFYING:
        certificate = certify_scores(scores, sigma=0.5, method=method, level=0.6)
        assert not certificate.abstained or method == "hoeffding"
        if certificate.radius > 0:
            worst = find_worst(encoder, u, certificate.radius)[1]
            assert worst >= 0.6 - QUADRATURE_ERROR


@pytest.mark.parametrize("name", ["linear, 2 pixels, stretched", "tanh, 2 pixels", "tanh, 3 pixels"])
@pytest.mark.parametrize("method", ["cdf", "best"])
def test_the_mean_of_few_served_draws_fails_at_most_as_often_as_beta(name, method):
    encoder, beta = ENCODERS[name](0.5), 0.05
    u, epsilon = encoder.clean, 0.25
    scores = np.clip(0.5 * (1 + encoder.draw(20_000) @ u), 0, 1)
    worst, _ = find_worst(encoder, u, epsilon)
    others = ball(encoder.x, epsilon, (1.0,))[[0, 1, 40, 80]]
    for num_draws, queries in ((1, 20_000), (4, 20_000), (16, 8000), (64, 2000)):
        certificate = certify_scores(
            scores, sigma=0.5, epsilons=[epsilon], method=method, deployed_samples=num_draws, beta=beta
        )
        (bound,) = certificate.deployed.inner_product_bounds
        assert bound > -1
        for at in (worst, *others):
            products = encoder.draw(queries * num_draws, at, seed=num_draws) @ u
            failures = int((products.reshape(queries, num_draws).mean(1) < bound).sum())
            assert stats.binomtest(failures, queries, beta, alternative="greater").pvalue > 1e-6


def test_the_deployed_bound_fails_nearly_as_often_as_beta_where_it_is_tight():
    """Scores of half-spaces with one normal: at x - epsilon w the served scores have exactly the dominated law."""
    sigma, epsilon, beta, queries = 0.5, 0.2, 0.05, 40_000
    places, values = np.array([-0.9, -0.3, 0.4]), np.array([0.1, 0.62, 0.81, 0.97])
    survival = ndtr(-places / sigma)  # P(noise along w > place)
    for num_draws in (1, 4, 16):
        bound = bounds.deployed_score(np.array([1.0, *survival]), values, epsilon, sigma, num_draws, beta)
        noise = sigma * np.random.default_rng(num_draws).standard_normal((queries, num_draws)) - epsilon
        served = values[np.searchsorted(places, noise)].mean(1)
        assert stats.binomtest(int((served < bound).sum()), queries, beta, alternative="greater").pvalue > 1e-6
        assert (served <= bound + 2e-4).mean() > beta  # no larger value would do


def classes(name):
    """Four classes for the three features of the encoder, and the head that makes their logits."""
    generator = torch.Generator().manual_seed(5)
    if name == "text":
        embeds = torch.nn.functional.normalize(torch.randn(4, 3, generator=generator, dtype=torch.float64), dim=1)
        return Classifier.of(text_embeds=embeds)
    head = torch.nn.Linear(3, 4, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(2 * torch.randn(4, 3, generator=generator, dtype=torch.float64))
        head.bias.copy_(torch.tensor([0.3, -0.2, 0.1, 0.4]))
    return Classifier.of(head=head)


def logits_of(classifier, features):
    return classifier.logits(torch.from_numpy(features)).numpy()


@pytest.mark.parametrize("kind", ["text", "head with bias"])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize("sigma", [0.25, 1.0])
def test_no_label_changes_inside_its_radius(kind, seed, sigma):
    encoder, classifier = tanh(2, 3, sigma, seed), classes(kind)
    logits = logits_of(classifier, encoder.draw(20_000))
    true_label = logits_of(classifier, encoder.smoothed(encoder.x[None])).argmax()
    for method in ("cdf", "betting", "best", "hoeffding", "bernstein"):
        certificate = certify_logits(logits, classifier, sigma=sigma, method=method)
        if certificate.abstained:
            continue
        assert certificate.label == true_label
        points = ball(encoder.x, min(certificate.radius, 20 * sigma) * (1 - 1e-9), (0.25, 0.5, 0.75, 0.9, 1.0))
        truth = logits_of(classifier, encoder.smoothed(points))
        assert np.all(truth.argmax(1) == certificate.label)


@pytest.mark.parametrize("kind", ["text", "head with bias"])
def test_labels_are_certified_at_all_and_change_further_out(kind):
    certified, flips = [], []
    for seed in range(4):
        encoder, classifier = tanh(2, 3, 0.5, seed), classes(kind)
        certificate = certify_logits(logits_of(classifier, encoder.draw(20_000)), classifier, sigma=0.5)
        further = ball(encoder.x, 1.0, np.linspace(0.04, 1, 25))
        changed = logits_of(classifier, encoder.smoothed(further)).argmax(1) != certificate.label
        certified.append(certificate.radius)
        flips.append(np.linalg.norm(further[changed] - encoder.x, axis=1).min() if changed.any() else np.inf)
    assert np.all(np.array(certified) <= flips)
    assert np.sum(np.array(certified) > 0.3 * np.array(flips)) >= 2  # not far from the truth either
    assert np.sum(np.array(certified) > 0.1) >= 3


@pytest.mark.parametrize("kind", ["text", "head with bias"])
def test_the_hard_vote_is_cohen_et_al(kind):
    encoder, classifier = tanh(2, 3, 0.5, 2), classes(kind)
    logits = logits_of(classifier, encoder.draw(5000))
    certificate = certify_logits(logits, classifier, sigma=0.5, alpha=0.01, pilot=1000)
    votes = logits.argmax(1)
    label = np.bincount(votes[:1000]).argmax()
    hits = (votes[1000:] == label).sum()
    p_lower = stats.beta.ppf(0.01, hits, 4000 - hits + 1)
    assert certificate.hard_vote_label == label
    assert certificate.hard_vote_radius == pytest.approx(0.5 * stats.norm.ppf(p_lower), rel=1e-9)

    points, weights = fine_grid(2, 300)
    for at in ball(encoder.x, certificate.hard_vote_radius, (0.5, 1.0))[::5]:
        votes = logits_of(classifier, encoder.g(at + 0.5 * points)).argmax(1)
        shares = np.bincount(votes, weights, minlength=4)
        assert shares.argmax() == label
        assert shares[label] >= 0.5 - 1e-3


def test_a_served_label_fails_at_most_as_often_as_beta():
    classifier, sigma, beta, queries, radii = classes("text"), 0.5, 0.05, 4000, []
    for seed in (0, 2):
        encoder = tanh(2, 3, sigma, seed)
        logits = logits_of(classifier, encoder.draw(20_000))
        for num_draws in (4, 16):
            certificate = certify_logits(logits, classifier, sigma=sigma, deployed_samples=num_draws, beta=beta)
            radius = certificate.deployed.radius
            assert radius < certificate.radius
            radii.append(radius)
            if radius == 0:  # says nothing, not even about x itself
                continue
            for at in ball(encoder.x, radius, (1.0,))[::20]:
                served = encoder.draw(queries * num_draws, at, seed=num_draws).reshape(queries, num_draws, 3).mean(1)
                failures = int((logits_of(classifier, served).argmax(1) != certificate.label).sum())
                assert stats.binomtest(failures, queries, beta, alternative="greater").pvalue > 1e-6
    assert np.sum(np.array(radii) > 0.02) >= 2
