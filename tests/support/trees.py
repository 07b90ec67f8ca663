"""Draft trees for tests of verification and of drafts."""

import random

import pytest
import torch

from dovetail_plugin import DraftTree, TreeBudget


def random_tree(root: int, truth: list[int], budget: TreeBudget, rng: random.Random, vocab: int) -> DraftTree:
    """A random tree below `root` that contains a random prefix of the true continuation among wrong tokens.

    Args:
        root: token of the root.
        truth: tokens that follow the root in the target's text; may be empty.
        budget: largest tree; a `top_k` of 1 gives a chain.
        rng: source of randomness.
        vocab: wrong tokens are drawn from 0 to vocab - 1.
    """
    on_path, right = 0, rng.randint(0, min(len(truth), budget.depth))
    if budget.top_k == 1:
        return random_chain([root, *truth[:right]], budget, rng, vocab)
    tokens, parents, depths = [root], [-1], [0]
    while len(tokens) < budget.nodes:
        grow_right = depths[on_path] < right and rng.random() < 0.5
        shallow = [i for i, d in enumerate(depths) if d < budget.depth]
        parent = on_path if grow_right else rng.choice(shallow)
        token = truth[depths[on_path]] if grow_right else rng.randrange(vocab)
        siblings = {tokens[i] for i, p in enumerate(parents) if p == parent}
        if token in siblings:
            if len(siblings) >= vocab // 2:
                break
            continue
        tokens.append(token)
        parents.append(parent)
        depths.append(depths[parent] + 1)
        if grow_right:
            on_path = len(tokens) - 1
    return DraftTree(torch.tensor(tokens), torch.tensor(parents), torch.tensor(depths), torch.zeros(len(tokens)))


def random_chain(start: list[int], budget: TreeBudget, rng: random.Random, vocab: int) -> DraftTree:
    """A chain of the tokens in `start`, as far as the budget allows, followed by random tokens."""
    nodes = min(budget.nodes, budget.depth + 1)
    tokens = [*start, *(rng.randrange(vocab) for _ in range(nodes))][:nodes]
    count = torch.arange(nodes)
    return DraftTree(torch.tensor(tokens), count - 1, count, torch.zeros(nodes))


def assert_scores_are_a_models(model, text: list[int], tree: DraftTree, tolerance: float) -> None:
    """Each node's score is the log-probability of its path behind the text, by a pass of the model without a cache.

    Args:
        model: transformers model.
        text: tokens, the root included.
        tree: with scores.
        tolerance: largest difference.
    """
    paths = []
    for token, parent, score in zip(*(t.tolist() for t in (tree.tokens, tree.parents, tree.scores)), strict=True):
        paths.append([*paths[parent], token] if parent >= 0 else [])
        if paths[-1]:
            logprobs = model(torch.tensor([text + paths[-1]])).logits[0].log_softmax(-1)
            path = sum(float(logprobs[len(text) - 1 + i][t]) for i, t in enumerate(paths[-1]))
            assert score == pytest.approx(path, abs=tolerance)
