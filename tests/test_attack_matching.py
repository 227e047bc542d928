"""Clusters and their optimal transport: the local part of FOA-Attack."""

import numpy as np
import pytest
import torch
from scipy.cluster.vq import kmeans2
from scipy.optimize import linprog
from torch.nn import functional as F

from fs_psm_hf.attacks.clusters import cluster_centres, first_centres
from fs_psm_hf.attacks.transport import transport_plan, transport_similarity


def random(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# k-means ----------------------------------------------------------------------------------------------------------------


def test_centres_are_those_of_scipy_from_the_same_start():
    tokens = random(3, 60, 5, dtype=torch.float64) + 2 * random(3, 1, 5, seed=2, dtype=torch.float64)
    starts = first_centres(60, 1, [0, 1, 2], 0, num_clusters=6)
    found = cluster_centres(tokens, starts, tolerance=0)
    for i in range(3):
        start = tokens[i][starts[i]].numpy()
        expected, _ = kmeans2(tokens[i].numpy(), start, iter=100, minit="matrix", missing="raise")
        np.testing.assert_allclose(found[i].numpy(), expected, atol=1e-10)


def test_separate_groups_are_found_and_their_means_are_the_centres():
    groups = torch.tensor([[0.0, 0], [10, 0], [0, 10]])
    tokens = (groups[:, None] + 0.1 * random(3, 7, 2)).flatten(0, 1)[None]
    starts = torch.tensor([[0, 8, 15]])
    expected = tokens.view(3, 7, 2).mean(1)
    torch.testing.assert_close(cluster_centres(tokens, starts)[0], expected)


def test_gradient_agrees_with_finite_differences():
    tokens = random(2, 24, 3, dtype=torch.float64).requires_grad_()
    starts = first_centres(24, 2, [0, 1], 0, num_clusters=4)
    # Where no token changes its cluster, which is so for all but a set of measure zero.
    torch.autograd.gradcheck(lambda x: cluster_centres(x, starts), tokens, eps=1e-6, atol=1e-7)


def test_fewer_tokens_than_clusters_are_their_own_centres():
    tokens = random(2, 4, 3)
    starts = first_centres(4, 1, [0, 1], 0)
    assert starts.shape == (2, 4)
    found = cluster_centres(tokens, starts)
    assert torch.equal(found, tokens.gather(1, starts[:, :, None].expand(-1, -1, 3)))


def test_a_centre_without_tokens_stays_and_has_no_gradient():
    tokens = torch.tensor([[[0.0], [0.0], [0.0], [5.0]]], requires_grad=True)
    # Equal first centres: the second one never gets a token.
    found = cluster_centres(tokens, torch.tensor([[0, 1, 3]]))
    assert found[0, :, 0].tolist() == [0, 0, 5]
    (gradient,) = torch.autograd.grad(found.sum(), tokens)
    assert gradient[0, :, 0].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1])


def test_first_centres_differ_and_do_not_depend_on_the_batch():
    starts = first_centres(30, 4, [5, 6], 2)
    assert all(len(set(row)) == 10 for row in starts.tolist())
    assert torch.equal(first_centres(30, 4, [6], 2)[0], starts[1])
    assert not torch.equal(first_centres(30, 4, [6], 3)[0], starts[1])


def test_an_image_stops_by_itself():
    slow, quick = random(1, 80, 2, seed=3), torch.cat([torch.zeros(1, 40, 2), torch.ones(1, 40, 2)], 1)
    starts = torch.tensor([[0, 79]])
    both = cluster_centres(torch.cat([slow, quick]), starts.expand(2, -1))
    torch.testing.assert_close(both[:1], cluster_centres(slow, starts))
    torch.testing.assert_close(both[1:], cluster_centres(quick, starts))


# Optimal transport ------------------------------------------------------------------------------------------------------


def linear_programme(similarity):
    """The greatest `Σ plan · similarity` over plans with uniform margins."""
    m, n = similarity.shape
    rows, columns = np.kron(np.eye(m), np.ones(n)), np.kron(np.ones(m), np.eye(n))
    margins = np.concatenate([np.full(m, 1 / m), np.full(n, 1 / n)])
    solved = linprog(-similarity.ravel(), A_eq=np.vstack([rows, columns]), b_eq=margins, bounds=(0, None))
    assert solved.status == 0
    return -solved.fun


@pytest.mark.parametrize("sizes", [(10, 10), (4, 7)])
def test_value_is_that_of_the_linear_programme_as_the_regularisation_vanishes(sizes):
    first, second = random(3, sizes[0], 6, dtype=torch.float64), random(3, sizes[1], 6, seed=2, dtype=torch.float64)
    similarity = F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).mT
    exact = [linear_programme(pair.numpy()) for pair in similarity]
    gaps = []
    for regularisation in (0.1, 0.02, 0.004):
        options = {"regularisation": regularisation, "iterations": 5000, "tolerance": 1e-12}
        found = transport_similarity(first, second, **options).tolist()
        gaps.append([e - f for e, f in zip(exact, found, strict=True)])
        # Entropy costs at most the regularisation times that of the uniform plan.
        assert all(-1e-6 < gap < regularisation * np.log(sizes[0] * sizes[1]) for gap in gaps[-1])
    assert max(gaps[-1]) < 0.01 < min(gaps[0])


def test_plan_has_uniform_margins_and_solves_the_entropic_problem():
    similarity = random(2, 5, 8, dtype=torch.float64).tanh()
    plan = transport_plan(similarity, iterations=2000, tolerance=1e-14)
    torch.testing.assert_close(plan.sum(1), torch.full((2, 8), 1 / 8, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(2), torch.full((2, 5), 1 / 5, dtype=torch.float64))
    # Optimal: log(plan) - S / reg is a row term plus a column term.
    rest = plan.log() - similarity / 0.1
    rest = rest - rest.mean(1, keepdim=True) - rest.mean(2, keepdim=True) + rest.mean((1, 2), keepdim=True)
    assert rest.abs().max() < 1e-8


def test_single_vectors_match_with_their_cosine():
    first, second = random(4, 1, 6), random(4, 1, 6, seed=2)
    expected = F.cosine_similarity(first[:, 0], second[:, 0])
    torch.testing.assert_close(transport_similarity(first, second), expected)


def test_gradient_takes_the_plan_as_constant():
    first, second = random(2, 4, 5, dtype=torch.float64).requires_grad_(), random(2, 6, 5, seed=2, dtype=torch.float64)
    (ours,) = torch.autograd.grad(transport_similarity(first, second).sum(), first)
    plan = transport_plan(F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).mT)

    def fixed(x):
        return (plan * (F.normalize(x, dim=-1) @ F.normalize(second, dim=-1).mT)).sum()

    for place in [(0, 0, 0), (1, 3, 4), (0, 2, 1)]:
        nudge = torch.zeros_like(first)
        nudge[place] = 1e-6
        with torch.no_grad():
            difference = (fixed(first + nudge) - fixed(first - nudge)) / 2e-6
        assert ours[place].item() == pytest.approx(difference.item(), abs=1e-7)


def test_a_pair_of_sets_stops_by_itself():
    first, second = random(2, 10, 6), random(2, 10, 6, seed=2)
    second[1] = first[1]
    both = transport_similarity(first, second)
    alone = torch.cat([transport_similarity(first[[i]], second[[i]]) for i in range(2)])
    torch.testing.assert_close(both, alone)
