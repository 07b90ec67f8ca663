"""Acceptance: a draft tree and the target's own choices in, the accepted path out.

Why there is no acceptance test against draft probabilities. The method accepts child x of a node with
probability p(x), else zeroes p(x), renormalises and tries the next sibling, and samples the residual
if none is left. Drafts are a point mass (the same text always gets the same tree), and for these the
procedure is a sample from p in disguise: child x_1 is taken with p(x_1), child x_2 with
(1 - p(x_1)) * p(x_2) / (1 - p(x_1)) = p(x_2), and so on. So one token is drawn from p, exactly as plain
`generate` draws it, and the walk goes on if that token happens to be a child. The text is then not only
distributed as plain sampling's: with one random draw for each emitted token it is the same text for the
same seed. `sibling_rejection_ref` is the published procedure, kept to prove that.

This module never sees a model; how a token is chosen from the target's row is the caller's.
"""

from collections.abc import Callable
from dataclasses import dataclass

from .tree import DraftTree


@dataclass(frozen=True)
class Choice:
    """One emitted token. `stop`: generation ends with it (EOS, length, a stopping criterion)."""

    token: int
    stop: bool


@dataclass(frozen=True)
class Acceptance:
    """Of one round.

    path: accepted nodes from the root down, root included; their rows stay in the caches.
    tokens: the token emitted after each node of the path; the last one is the bonus token.
    stop: whether generation ended in this round.
    """

    path: list[int]
    tokens: list[int]
    stop: bool


def accept(tree: DraftTree, choose: Callable[[int], Choice]) -> Acceptance:
    """Walk down the tree as long as the target's own choice is among the children.

    Args:
        tree: on the CPU.
        choose: called with a node, once for every emitted token and in text order; chooses from the
            target's distribution after that node, with every logits processor applied.

    Returns:
        The path and its tokens, cut where generation stops.
    """
    children = {
        (parent, token): node
        for node, (parent, token) in enumerate(zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True))
    }
    node, path, tokens = 0, [0], []
    while True:
        choice = choose(node)
        tokens.append(choice.token)
        child = children.get((node, choice.token))
        if choice.stop or child is None:
            return Acceptance(path, tokens, choice.stop)
        node = child
        path.append(node)


def sibling_rejection_ref(probs: list[float], children: list[int]) -> dict[int, float]:
    """Distribution over the emitted token by the published sibling-rejection procedure, exactly.

    Args:
        probs: the target's distribution p over the vocabulary.
        children: distinct drafted tokens of one node, in the order they are tried.

    Returns:
        Probability of each token; equals p whatever the children are.
    """
    emitted = dict.fromkeys(range(len(probs)), 0.0)
    remaining, residual = 1.0, list(probs)
    for child in children:
        mass = sum(residual)
        if mass <= 0.0:
            break
        accept_probability = residual[child] / mass
        emitted[child] += remaining * accept_probability
        remaining *= 1.0 - accept_probability
        residual[child] = 0.0
    mass = sum(residual)
    if mass > 0.0:
        for token, weight in enumerate(residual):
            emitted[token] += remaining * weight / mass
    return emitted
