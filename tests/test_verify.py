"""Acceptance against a brute-force search, and the published sampling procedure against its distribution."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.trees import random_tree

from dovetail_plugin import TreeBudget
from dovetail_plugin.verify import Choice, accept, sibling_rejection_ref


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(0, 8))
def test_accept_finds_the_longest_matching_path(seed, nodes, stop_after):
    """Of all paths from the root, the accepted one is the longest that the target would have written itself."""
    rng = random.Random(seed)
    truth = [rng.randrange(6) for _ in range(9)]
    tree = random_tree(3, truth, TreeBudget(nodes, 5, 4), rng, vocab=12)
    written: list[int] = []

    def choose(_node: int) -> Choice:
        written.append(truth[len(written)])
        return Choice(written[-1], stop=len(written) == stop_after)

    acceptance = accept(tree, choose)
    paths = {(): 0}
    for node, (parent, token) in enumerate(zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True)):
        if node:
            above = next(path for path, index in paths.items() if index == parent)
            paths[(*above, token)] = node
    limit = stop_after - 1 if stop_after else len(truth)
    longest = max(k for k in range(len(truth) + 1) if tuple(truth[:k]) in paths and k <= limit)
    assert len(acceptance.path) == longest + 1
    assert acceptance.path == [paths[tuple(truth[:k])] for k in range(longest + 1)]
    assert acceptance.tokens == truth[: longest + 1]
    assert acceptance.stop == (len(acceptance.tokens) == stop_after)


@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=8).filter(lambda weights: sum(weights) > 0.01),
    st.data(),
)
def test_sibling_rejection_emits_the_targets_distribution(weights, data):
    """The published procedure, computed exactly, emits each token with probability p, for any order of children."""
    probs = [w / sum(weights) for w in weights]
    children = data.draw(st.permutations(range(len(probs))))[: data.draw(st.integers(0, len(probs)))]
    emitted = sibling_rejection_ref(probs, list(children))
    for token, probability in enumerate(probs):
        assert math.isclose(emitted[token], probability, abs_tol=1e-9)


def test_choose_is_called_once_for_each_emitted_token():
    tree = random_tree(0, [1, 2, 3], TreeBudget(10, 4, 4), random.Random(5), vocab=9)
    calls = []

    def choose(node: int) -> Choice:
        calls.append(node)
        return Choice([1, 2, 3, 4][len(calls) - 1], stop=False)

    acceptance = accept(tree, choose)
    assert calls == acceptance.path
    assert len(acceptance.tokens) == len(acceptance.path)


@pytest.mark.parametrize("token", [0, 8])
def test_root_alone_gives_the_bonus_token(token):
    from dovetail_plugin import DraftTree

    acceptance = accept(DraftTree.root(3), lambda _node: Choice(token, stop=False))
    assert (acceptance.path, acceptance.tokens) == ([0], [token])
