"""Acceptance: takes a draft tree and the target's choices, and returns the accepted path.

Draft probabilities play no part in acceptance. The published procedure accepts child x of a node with probability p(x),
where p is the target's distribution. On rejection it sets p(x) to zero, renormalizes p and tries the next sibling; if
none is left, it samples from the rest. The tree is a function of the text, so this procedure is the same as one sample
from p: it accepts child x_1 with p(x_1), child x_2 with (1 - p(x_1)) * p(x_2) / (1 - p(x_1)) = p(x_2), and so on.

`accept` therefore draws one token from p, as plain `generate` does, and continues if that token is a child. With one
random draw per emitted token, sampling gives the same text as plain `generate` for the same seed, not only the same
distribution. `sibling_rejection_ref` implements the published procedure, for the test of this equality.

This module never sees a model. The caller chooses the tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

from .tree import DraftTree


@dataclass(frozen=True)
class Choice:
    """One emitted token.

    Attributes:
        token: its id.
        stop: whether generation ends with it (EOS, maximum length, a stopping criterion).
    """

    token: int
    stop: bool


@dataclass(frozen=True)
class Acceptance:
    """Result of one round.

    Attributes:
        path: accepted nodes from the root down, including the root. Their rows stay in the caches.
        tokens: the token emitted after each node of the path. The last one is the target's own token.
        stop: whether generation ended in this round.
    """

    path: list[int]
    tokens: list[int]
    stop: bool


def accept(tree: DraftTree, choose: Callable[[int], Choice]) -> Acceptance:
    """Walk down the tree for as long as the token that the target chooses is a child of the current node.

    Args:
        tree: on the CPU.
        choose: takes a node and returns the token that the target chooses after it, with all logits processors applied.
            It is called once per emitted token, in text order.

    Returns:
        The path and its tokens, up to the token at which generation stops.
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
    """Compute the exact distribution of the token that the published sibling-rejection procedure emits. For tests.

    Args:
        probs: the target's distribution p over the vocabulary.
        children: distinct drafted tokens below one node, in the order in which they are tried.

    Returns:
        Probability of each token. It equals p for any children.
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
