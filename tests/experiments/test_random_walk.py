"""The random-walk task: its optima against brute force, its score by hand, and what PPO achieves."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from experiments import random_walk
from experiments.random_walk import distances, path_score, random_graph, random_walks, soft_optimum
from jaxgpt.errors import UserError
from jaxgpt.structs import Batch

# 0 -> 1 -> 2 -> 3, the goal; 0 -> 2 is a short cut, 1 -> 0 leads back.
EDGES = np.zeros((4, 4), bool)
EDGES[[0, 0, 1, 1, 2], [1, 2, 2, 0, 3]] = True
score_of = jax.jit(path_score)


def some_graph(seed, nodes=5, probability=0.4):
    rng = np.random.default_rng(seed)
    edges = (rng.random((nodes, nodes)) < probability) & ~np.eye(nodes, dtype=bool)
    edges[-1] = False
    return edges


def uniform(edges):
    return edges / np.maximum(edges.sum(axis=1, keepdims=True), 1)


def scores(paths, limit=10, width=8, edges=EDGES, pad=0, rows=11):
    """path_score of lists of nodes, the first of each being the prompt; the batch has spare rows."""
    tokens, mask = np.full((rows, width), pad, np.int32), np.zeros((rows, width), bool)
    for i, path in enumerate(paths):
        tokens[i, : len(path)], mask[i, 1 : len(path)] = path, True
    return np.asarray(score_of(edges, limit, Batch(tokens, mask)))[: len(paths)]


@pytest.mark.parametrize("seed", range(20))
def test_shortest_paths_are_those_of_brute_force(seed):
    """Every sequence of different nodes is tried, on graphs of up to six nodes, some of them unreachable."""
    nodes = 3 + seed % 4
    edges = some_graph(seed, nodes, 0.15 + 0.02 * seed)
    expected = np.full(nodes, np.inf)
    expected[-1] = 0
    for start in range(nodes - 1):
        others = [node for node in range(nodes - 1) if node != start]
        for length in range(len(others) + 1):
            for between in itertools.permutations(others, length):
                path = (start, *between, nodes - 1)
                if all(edges[a, b] for a, b in itertools.pairwise(path)):
                    expected[start] = min(expected[start], len(path) - 1)
    np.testing.assert_array_equal(distances(edges), expected)


def test_the_graph_has_a_way_from_everywhere():
    for seed in range(5):
        edges = random_graph(12, 0.2, 8, np.random.default_rng(seed))
        assert distances(edges).max() <= 4 and not edges[-1].any() and not edges.diagonal().any()
        np.testing.assert_array_equal(edges, random_graph(12, 0.2, 8, np.random.default_rng(seed)))
    with pytest.raises(UserError, match="edge_probability"):
        random_graph(12, 0.0, 8, np.random.default_rng(0))


def test_walks_follow_edges_alike_until_the_goal():
    """Each step is an edge, a node's edges are equally frequent, and a walk stops at the goal or at the limit."""
    walks = random_walks(uniform(EDGES), 4000, 6, np.random.default_rng(0))
    assert walks.tokens_BT.shape == (4000, 7) and not walks.mask_BT[:, 0].any()
    taken = np.zeros((4, 4))
    for tokens, mask in zip(walks.tokens_BT, walks.mask_BT, strict=True):
        path = tokens[: 1 + mask.sum()]
        assert mask[1 : len(path)].all() and 3 not in path[:-1]
        assert path[-1] == 3 or len(path) == 7
        np.add.at(taken, (path[:-1], path[1:]), 1)
    assert set(walks.tokens_BT[:, 0]) == {0, 1, 2}
    np.testing.assert_allclose(taken[:3] / taken[:3].sum(axis=1, keepdims=True), uniform(EDGES)[:3], atol=0.03)


LEGAL = [[2, 3], [0, 2, 3], [0, 1, 2, 3], [0, 1, 0, 2, 3]]
ILLEGAL, NOWHERE = [[0, 3], [0, 2, 1, 2, 3], [1, 3], [0, 0, 2, 3]], [[0, 1, 0, 1, 0], [0, 2], [1, 0, 1, 2]]


def test_scores_of_paths_by_hand():
    """1 - (t - 1) / 10 on reaching the goal at step t."""
    found = scores(LEGAL + ILLEGAL + NOWHERE)
    np.testing.assert_allclose(found[:4], [1.0, 0.9, 0.8, 0.7], rtol=1e-6)
    np.testing.assert_array_equal(found[4:], 0.0)


@pytest.mark.parametrize(("width", "pad"), [(5, 0), (8, 1), (8, 3)])
def test_padding_does_not_count(width, pad):
    """Neither the amount of padding nor the node whose id it has matters."""
    paths = LEGAL + ILLEGAL + NOWHERE
    np.testing.assert_array_equal(scores(paths, width=width, pad=pad), scores(paths))


@pytest.mark.parametrize("seed", range(6))
def test_the_soft_optimum_is_that_of_enumerated_walks(seed):
    """All walks of up to five steps: pi* = rho exp(r / beta) / Z, its score, its KL, and beta log Z as their sum."""
    edges, limit, beta = some_graph(seed), 5, (0.05, 0.2, 1.0)[seed % 3]
    edges[:-1, -1] |= ~edges[:-1].any(axis=1)  # no dead ends
    rho = uniform(edges)
    score, kl = soft_optimum(rho, beta, limit)
    chances, walks = [{} for _ in range(4)], [([start], 1.0) for start in range(4)]
    for step in range(limit):
        walks = [([*path, j], p * rho[path[-1], j]) for path, p in walks for j in np.flatnonzero(edges[path[-1]])]
        for path, p in walks:
            if path[-1] == 4 or step == limit - 1:
                chances[path[0]][tuple(path)] = p
        walks = [walk for walk in walks if walk[0][-1] != 4]
    every = [path for of_start in chances for path in of_start]
    worth_of = dict(zip(every, scores(every, limit, limit + 1, edges, rows=400).astype(float), strict=True))
    for start in range(4):
        worth = np.array([worth_of[path] for path in chances[start]])
        chance = np.array(list(chances[start].values()))
        assert chance.sum() == pytest.approx(1.0)
        best = chance * np.exp(worth / beta)
        best /= best.sum()
        assert score[start] == pytest.approx(best @ worth, rel=1e-5)
        assert kl[start] == pytest.approx(best @ np.log(best / chance), rel=1e-4, abs=1e-6)
        value = beta * np.log(chance @ np.exp(worth / beta))
        assert score[start] - beta * kl[start] == pytest.approx(value, rel=1e-5)


def test_the_soft_optimum_lies_between_walks_and_shortest_paths():
    """beta -> 0: the score of breadth-first search. beta -> infinity: the walks' own, at no KL."""
    edges = random_graph(12, 0.2, 8, np.random.default_rng(1))
    rho, best = uniform(edges), 1 - (distances(edges)[:-1] - 1) / 8
    np.testing.assert_allclose(soft_optimum(rho, 1e-4, 8)[0], best, rtol=1e-6)
    score, kl = soft_optimum(rho, 1e4, 8)
    walks = random_walks(rho, 40_000, 8, np.random.default_rng(2))
    own = np.asarray(score_of(edges, 8, walks))
    mean = [own[walks.tokens_BT[:, 0] == start].mean() for start in range(11)]
    np.testing.assert_allclose(score, mean, atol=0.03)
    np.testing.assert_allclose(kl, 0.0, atol=1e-6)
    by_beta = np.array([soft_optimum(rho, beta, 8)[0].mean() for beta in (0.01, 0.1, 0.3, 1.0)])
    assert (np.diff(by_beta) < 0).all()


def test_prompts_repeat_every_start_equally():
    prompts = jax.jit(lambda: random_walk.prompts_from_every_start(random_walk.Settings(nodes=4), 3))()
    assert prompts.tokens_BP.tolist() == [[node] for node in (0, 0, 0, 1, 1, 1, 2, 2, 2)]
    assert prompts.length_B.tolist() == [1] * 9


@pytest.mark.slow
def test_the_experiment_runs_at_toy_size(tmp_path):
    """A figure, curves and results for each start; a second call only reads them."""
    settings = dataclasses.replace(random_walk.PRESETS["toy"], run=tmp_path / "run")
    found = random_walk.main(settings)
    assert (tmp_path / "run/random_walk.png").stat().st_size > 10_000
    assert len(found["starts"]["after"]) == settings.nodes - 1
    assert 0 <= found["optimality"] <= 1 and found["optimality_for_beta"] <= 1
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 * settings.iterations + 1 and not any("nonfinite" in line for line in lines)
    assert random_walk.main(settings) == found


def test_invalid_settings_are_refused():
    with pytest.raises(UserError, match="beta is 0.0; it must be above 0"):
        random_walk.Settings(beta=0.0)
    with pytest.raises(UserError, match="nodes"):
        random_walk.Settings(nodes=2)


def run_small(tmp_path, beta):
    """Results of the task on a smaller graph with a smaller model, in a fifth of the time."""
    return random_walk.main(
        random_walk.Settings(
            run=tmp_path / "run",
            nodes=13,
            edge_probability=0.15,
            max_steps=8,
            layers=1,
            width=32,
            pretrain_steps=150,
            pretrain_learning_rate=6e-3,
            iterations=25,
            learning_rate=1e-3,
            eval_every=25,
            beta=beta,
        )
    )


@pytest.mark.slow
def test_ppo_takes_the_shortest_paths(tmp_path):
    """The walks score less than half of the best. After PPO each start scores at least four fifths, and the mean
    is that of the KL-regularised optimum, at about its KL."""
    found = run_small(tmp_path, beta=0.05)
    assert found["optimality_before"] < 0.5
    assert found["optimality"] > 0.95
    after, best = np.array(found["starts"]["after"]), np.array(found["starts"]["best"])
    assert (after / best).min() > 0.8
    assert found["optimality"] == pytest.approx(found["optimality_for_beta"], abs=0.04)
    assert found["kl"] == pytest.approx(found["kl_for_beta"], rel=0.2)


@pytest.mark.slow
def test_a_larger_beta_buys_less_kl(tmp_path):
    """At beta 0.35 the optimum gives up a fifth of the score for two thirds of the KL, and so does PPO."""
    found = run_small(tmp_path, beta=0.35)
    assert found["kl_for_beta"] < 0.5 and found["optimality_for_beta"] < 0.85
    assert found["kl"] == pytest.approx(found["kl_for_beta"], rel=0.25)
    assert found["optimality"] == pytest.approx(found["optimality_for_beta"], abs=0.1)
