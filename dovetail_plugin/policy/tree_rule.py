"""The rule that grows a tree as long as this pays off.

`TreeJudge` takes the draft's scores level by level, with tables of seconds and a price, and returns how many rows the
next level has and how many nodes are verified. `Lookahead` learns how likely the children of nodes are accepted. The
module runs no model.
"""

import numpy as np

from ..tree import TreeBudget
from .acceptance import AcceptanceCurve
from .settings import PolicySettings

CHILDREN = 2
"""Number of children of a node that the lookahead considers; these are the most likely ones."""


class Lookahead:
    """Predicts the gain of drafting the children of nodes from the children of the latest nodes.

    It remembers, for the latest nodes, the acceptance of their two best children given that the node is accepted. The
    gain of a child is a convex function of its probability, because children that do not pay off are not verified.
    Therefore the expected gain is a mean over the remembered children, not the gain of a mean child.

    Trees of several threads may use `observe` and `gains` at any time; `refresh` is for one thread at a time.

    Args:
        settings: how many nodes are remembered, and which.
    """

    def __init__(self, settings: PolicySettings) -> None:
        self._least_parent, self._most = settings.least_parent, settings.children
        first = np.linspace(0.3, 0.95, 16)  # evenly spread until nodes are seen, and soon outnumbered by them
        self._children = np.stack([first, 0.4 * (1.0 - first)], axis=1)
        self._seen: list[tuple[np.ndarray, np.ndarray]] = []

    def observe(self, parents: np.ndarray, children: np.ndarray) -> None:
        """Keep parents and children for the next `refresh`.

        Args:
            parents: (R,) acceptance of nodes.
            children: (R, C) cumulative log-probabilities of their children, best first.
        """
        if children.shape[1] < CHILDREN:  # chains
            children = np.pad(children, ((0, 0), (0, CHILDREN - children.shape[1])), constant_values=-np.inf)
        self._seen.append((parents, children[:, :CHILDREN]))

    def refresh(self, curve: AcceptanceCurve) -> None:
        """Remember the nodes observed since the last call; `curve` turns scores into acceptance."""
        seen = self._seen[:]
        if not seen:
            return
        del self._seen[: len(seen)]  # other threads may have appended more
        parents = np.concatenate([parents for parents, _ in seen])
        scores = np.concatenate([children for _, children in seen])
        likely = parents > self._least_parent
        shares = curve(scores[likely]) / parents[likely, None]
        # A new array: other threads may be reading the old one.
        self._children = np.concatenate([self._children, np.minimum(shares, 1.0)])[-self._most :]

    def path(self, levels: int) -> np.ndarray:
        """Return the expected acceptance of a node's best child, its best child, and so on, (levels,).

        It is that of a node that is accepted for certain.
        """
        return self._children[:, 0].mean() ** np.arange(1, levels + 1)

    def gains(self, likely: np.ndarray, prices: np.ndarray) -> np.ndarray:
        """Return the expected gain, in tokens, of drafting the children of each node, (K,).

        Args:
            likely: (K,) acceptance of the nodes.
            prices: (2 K,) costs of verifying one child, in tokens, ascending. The most likely child takes the first.
        """
        children = self._children
        expected = likely[:, None] * children.mean(axis=0)
        paid = np.empty(expected.size)
        paid[np.argsort(-expected, axis=None, kind="stable")] = prices
        brought = likely[:, None, None] * children.T - paid.reshape(*expected.shape, 1)
        return np.maximum(brought, 0.0).mean(axis=2).sum(axis=1)


class TreeJudge:
    """Decides, while one tree grows, how wide the next level is and how many nodes are verified.

    Args:
        budget: the largest tree allowed.
        price: number of tokens that a second is worth.
        verify_s: (budget.nodes,) seconds of passes over 1, 2, ... rows.
        level_s: (budget.top_k + 1,) seconds of a further draft level over 0, 1, ... rows.
        curve: maps scores to acceptance; not updated here.
        lookahead: children of the latest nodes; updated here.

    Attributes:
        widths: rows of each level drafted after the first.
        expected: number of tokens that the round is expected to emit.
    """

    def __init__(
        self,
        budget: TreeBudget,
        price: float,
        verify_s: np.ndarray,
        level_s: np.ndarray,
        curve: AcceptanceCurve,
        lookahead: Lookahead,
    ) -> None:
        self._budget, self._curve, self._lookahead = budget, curve, lookahead
        self._node_costs = price * verify_s  # in tokens, of 0, 1, ... drafted nodes
        self._level_costs = price * level_s
        self._frontier = np.ones(1)  # acceptance of the nodes whose children come next, in order of their rows
        self._candidates = np.zeros(0)  # acceptance of all nodes so far, best first, as many as may be verified
        self.widths: list[int] = []
        self.expected = 1.0

    def width(self, scores: np.ndarray) -> int:
        """Return how many of the last level's candidates to extend, the most likely ones; 0 ends the tree.

        Args:
            scores: (M,) cumulative log-probabilities of the last level's candidates: the children of each row, best
                first.
        """
        lookahead = self._lookahead
        lookahead.observe(self._frontier, scores.reshape(len(self._frontier), -1))
        level = self._likeliest(scores, len(scores))
        self._candidates = -np.sort(-np.concatenate([self._candidates, level]))[: self._budget.nodes - 1]
        likely = level[: self._budget.top_k]
        prices = self._prices(CHILDREN * len(likely))
        gains = lookahead.gains(likely, prices).cumsum() - self._level_costs[1 : len(likely) + 1]
        width = int(gains.argmax()) + 1
        if gains[width - 1] <= 0.0:
            if not self._path_pays(float(likely[0])):
                return 0
            width = 1
        self.widths.append(width)
        self._frontier = likely[:width]
        return width

    def _path_pays(self, likely: float) -> bool:
        """Return whether a path of some levels below a node of this acceptance is worth more than it costs.

        It can be although its first level is not, where a pass over one or two more rows is much longer, and one over
        some more rows hardly so: where kernels are made for several rows, or where rows share a mixture's experts.
        """
        levels = min(self._budget.depth - 1 - len(self.widths), self._budget.nodes - 1)
        if levels < 1:
            return False
        below = likely * self._lookahead.path(levels)
        parts = np.tril(np.broadcast_to(below, (levels, levels)))  # the paths of 1, 2, ... levels
        parts = np.concatenate([np.broadcast_to(self._candidates, (levels, len(self._candidates))), parts], axis=1)
        brought = -np.sort(-parts, axis=1)[:, : self._budget.nodes - 1].cumsum(axis=1)
        worth = (brought - self._node_costs[1 : brought.shape[1] + 1]).max(axis=1)
        taken = self._worth(self._candidates)
        before = self._candidates[:taken].sum() - self._node_costs[taken]
        gains = np.maximum(worth, -self._node_costs[0]) - before - self._level_costs[1] * np.arange(1, levels + 1)
        return bool(gains.max() > 0.0)

    def _prices(self, count: int) -> np.ndarray:
        """Return the costs of `count` further nodes, in tokens, ascending; inf beyond the budget.

        A better node either replaces the weakest node that would be verified, or adds a row to the pass.
        """
        taken = self._worth(self._candidates)
        replaced = self._candidates[:taken][::-1][:count]
        longer = np.maximum.accumulate(np.diff(self._node_costs[taken : taken + count + 1]))
        prices = np.sort(np.concatenate([replaced, longer, np.full(count, np.inf)]))
        return prices[:count]

    def rows(self, scores: np.ndarray) -> int:
        """Return how many nodes to verify, the root included.

        Args:
            scores: (M,) cumulative log-probabilities of all candidates of the tree.
        """
        likely = self._likeliest(scores, self._budget.nodes - 1)
        nodes = self._worth(likely)
        self.expected = 1.0 + float(likely[:nodes].sum())
        return nodes + 1

    def _worth(self, likely: np.ndarray) -> int:
        """Return how many of these candidates, best first, are worth their rows."""
        brought = np.concatenate([[0.0], likely.cumsum()])
        return int((brought - self._node_costs[: len(brought)]).argmax())

    def _likeliest(self, scores: np.ndarray, count: int) -> np.ndarray:
        """Return the acceptance of the `count` best candidates, best first."""
        return self._curve(np.sort(scores)[::-1][:count])
