"""Ancestor masks, growth and selection of trees against slow references on random input, and budgets."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail_plugin import DraftTree, TreeBudget
from dovetail_plugin.tree import ancestor_mask, ancestor_mask_ref, expand, select, select_ref


@st.composite
def parent_lists(draw):
    """Parents of a random topologically ordered tree of up to 24 nodes."""
    count = draw(st.integers(1, 24))
    return [-1] + [draw(st.integers(0, i - 1)) for i in range(1, count)]


def depths_of(parents):
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    return depths


@given(parent_lists())
def test_ancestor_mask(parents):
    mask = ancestor_mask(torch.tensor(parents), max(depths_of(parents)))
    assert mask.tolist() == ancestor_mask_ref(parents)


def grow_randomly(seed, depth, top_k, vocab, ties):
    """Levels as a drafter makes them, from random logits. With `ties`, logits are rounded so that many are equal."""
    generator = torch.Generator().manual_seed(seed)

    def logits(rows):
        values = torch.randn(rows, vocab, generator=generator) * 3
        return values.round() if ties else values

    level = expand(torch.zeros(1), logits(1), torch.tensor([-1]), top_k)
    levels, seen = [level], 0
    for _ in range(1, depth):
        scores, frontier = level.scores.topk(min(top_k, level.scores.shape[0]))
        ids = frontier + seen
        seen += level.tokens.shape[0]
        level = expand(scores, logits(len(frontier)), ids, top_k)
        levels.append(level)
    return levels


def paths_of(tree: DraftTree) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return paths


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 6), st.integers(2, 40), st.booleans())
def test_select(seed, depth, top_k, nodes, ties):
    levels = grow_randomly(seed, depth, top_k, vocab=9, ties=ties)
    tree = select(levels, torch.tensor(4), nodes)
    reference = select_ref(levels, 4, nodes)
    assert tree.parents[0] == -1
    assert tree.tokens[0] == 4
    assert tree.scores[0] == 0
    assert bool((tree.parents[1:] < torch.arange(1, len(tree))).all())  # parents come before their children
    assert tree.depths.tolist() == depths_of(tree.parents.tolist())
    assert len(tree) == 1 + len(reference)
    # The scores are always the same; the nodes are the same too if no two scores are equal.
    assert sorted(tree.scores[1:].tolist()) == sorted(score for _, _, score in reference)
    if not ties:
        assert sorted(paths_of(tree)[1:]) == sorted(path for _, path, _ in reference)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 12))
def test_expand_takes_the_likeliest_children(seed, top_k):
    generator = torch.Generator().manual_seed(seed)
    logits, scores = torch.randn(3, 7, generator=generator), torch.randn(3, generator=generator)
    level = expand(scores, logits, torch.tensor([5, 6, 8]), top_k)
    children = min(top_k, 7)
    probabilities = logits.softmax(-1)
    for row in range(3):
        part = slice(row * children, (row + 1) * children)
        best = sorted(range(7), key=lambda t: -probabilities[row, t])[:children]
        assert level.tokens[part].tolist() == best
        torch.testing.assert_close(level.scores[part], scores[row] + probabilities[row, best].log())
        assert level.parent_rows[part].tolist() == [row] * children
        assert level.parent_ids[part].tolist() == [[5, 6, 8][row]] * children
    assert bool((level.scores <= scores[level.parent_rows]).all())


def test_certain_children_do_not_outrank_their_parents():
    """Probability 1 along a path gives equal scores; parents must still be kept before their children."""
    logits = torch.full((1, 5), -1e4)
    logits[0, 3] = 1e4
    level = expand(torch.zeros(1), logits, torch.tensor([-1]), 2)
    levels, seen = [level], 0
    for _ in range(4):
        scores, frontier = level.scores.topk(2)
        ids = frontier + seen
        seen += len(level.tokens)
        level = expand(scores, logits.repeat(2, 1), ids, 2)
        levels.append(level)
    tree = select(levels, torch.tensor(0), 4)
    assert tree.parents.tolist() == [-1, 0, 1, 2]
    assert tree.tokens.tolist() == [0, 3, 3, 3]


@pytest.mark.parametrize("name", ["nodes", "depth", "top_k"])
def test_budget_names_what_is_wrong(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        TreeBudget(**{name: 0})


@pytest.mark.parametrize(
    ("part", "wanted"),
    [
        ({}, (16, 6, 8)),
        ({"nodes": 1}, (1, 1, 1)),
        ({"nodes": 2}, (2, 1, 1)),
        ({"nodes": 4}, (4, 3, 2)),
        ({"nodes": 8}, (8, 5, 4)),
        ({"nodes": 64}, (64, 8, 8)),
        ({"depth": 1}, (9, 1, 8)),
        ({"depth": 3}, (16, 3, 8)),
        ({"depth": 20}, (21, 20, 8)),
        ({"top_k": 1}, (7, 6, 1)),
        ({"top_k": 1, "depth": 3}, (4, 3, 1)),
        ({"top_k": 1, "depth": 20}, (21, 20, 1)),
        ({"top_k": 1, "nodes": 12}, (12, 11, 1)),
        ({"top_k": 2, "nodes": 48}, (48, 13, 2)),
        ({"top_k": 8, "nodes": 2}, (2, 1, 8)),
        ({"depth": 1, "nodes": 16}, (16, 1, 15)),
        ({"depth": 6, "nodes": 3}, (3, 6, 1)),
        ({"depth": 6, "nodes": 4, "top_k": 8}, (4, 6, 8)),
    ],
)
def test_a_budget_in_part_gets_what_fits(part, wanted):
    assert TreeBudget(**part) == TreeBudget(*wanted)


@given(
    st.integers(1, 300), st.integers(1, 60), st.integers(1, 40), st.sets(st.sampled_from(["nodes", "depth", "top_k"]))
)
def test_a_budget_in_part_keeps_what_is_given_and_can_be_used(nodes, depth, top_k, names):
    """The tree can have all its nodes, and a path of its depth fits in them, but for what is given."""
    part = {n: v for n, v in {"nodes": nodes, "depth": depth, "top_k": top_k}.items() if n in names}
    budget = TreeBudget(**part)
    assert {name: getattr(budget, name) for name in part} == part
    if len(part) == 3:
        return
    assert 1 + budget.top_k + (budget.depth - 1) * budget.top_k**2 >= budget.nodes
    if not {"nodes", "depth"} <= part.keys():
        assert budget.depth < max(budget.nodes, 2)


def test_budget_clipping():
    budget = TreeBudget(16, 6, 8)
    assert budget.clipped(100) == budget
    assert budget.clipped(4) == TreeBudget(16, 3, 8)
    assert budget.clipped(1) == TreeBudget(1, 1, 1)
    assert budget.as_chain() == TreeBudget(7, 6, 1)
    assert TreeBudget(4, 6, 8).as_chain() == TreeBudget(4, 6, 1)


def test_chain():
    tree = DraftTree.chain([7, 8, 9])
    assert tree.parents.tolist() == [-1, 0, 1]
    assert tree.depths.tolist() == [0, 1, 2]
    assert len(DraftTree.root(5)) == 1
