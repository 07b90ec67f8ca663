"""Draft trees: how big (`TreeBudget`), what is in one (`DraftTree`), how one grows (`expand`, `select`).

Enters: scores and logits of a frontier. Leaves: a `DraftTree` whose node 0 is the root (the last token of
the text) and whose parents come before their children. Pure tensor functions on one device; this module
runs no model and never sees the target's logits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TreeBudget:
    """How much to draft in a round: the N/D/K of the method.

    Args:
        nodes: rows the target verifies, the root included (N); 1 is plain decoding.
        depth: draft levels below the root (D).
        top_k: nodes of a level that are grown further, and children of each (K); 1 drafts a chain.

    Raises:
        ValueError: a number is below 1 or not whole.
    """

    nodes: int = 16
    depth: int = 6
    top_k: int = 8

    def __post_init__(self) -> None:
        for name in ("nodes", "depth", "top_k"):
            value = getattr(self, name)
            if not isinstance(value, int):
                raise ValueError(f"{name} must be a whole number, got {value!r}.")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")

    def __str__(self) -> str:
        return f"{self.nodes}/{self.depth}/{self.top_k}"

    @staticmethod
    def parse(text: str) -> "TreeBudget":
        """`N/D/K` as in the method, e.g. "16/6/8".

        Raises:
            ValueError: it is not three whole numbers above 0.
        """
        parts = text.split("/")
        if len(parts) != 3 or not all(part.strip().isdigit() for part in parts):
            raise ValueError(f"a budget is nodes/depth/top_k, e.g. 16/6/8, got {text!r}.")
        return TreeBudget(*(int(part) for part in parts))

    def clipped(self, new_tokens: int) -> "TreeBudget":
        """This budget with no level deeper than the `new_tokens` (1 or more) the text may still grow by."""
        depth = min(self.depth, new_tokens - 1)
        if depth < 1:
            return TreeBudget(nodes=1, depth=1, top_k=1)
        return TreeBudget(nodes=self.nodes, depth=depth, top_k=self.top_k)

    def as_chain(self) -> "TreeBudget":
        """The same depth without branches, as far as the nodes go."""
        return TreeBudget(nodes=min(self.nodes, self.depth + 1), depth=self.depth, top_k=1)


@dataclass(frozen=True)
class DraftTree:
    """N nodes in topological order; node 0 is the root.

    tokens: (N,) int64, the root's being the last token of the text.
    parents: (N,) int64, index of the parent; -1 for the root. A chain has parents i - 1.
    depths: (N,) int64, 0 for the root.
    scores: (N,) float32, cumulative draft log-probability, 0 for the root.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    scores: Tensor

    def __post_init__(self) -> None:
        assert self.tokens.ndim == 1 and self.tokens.shape == self.parents.shape == self.depths.shape

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def to(self, device: torch.device | str) -> "DraftTree":
        """The same tree on `device`."""
        return DraftTree(*(t.to(device) for t in (self.tokens, self.parents, self.depths, self.scores)))

    @staticmethod
    def root(token: int, device: torch.device | str = "cpu") -> "DraftTree":
        """The tree of plain decoding: only the last token."""
        return DraftTree.chain([token], device)

    @staticmethod
    def chain(tokens: list[int], device: torch.device | str = "cpu") -> "DraftTree":
        """Root and a single line of nodes below it, all scores 0."""
        steps = torch.arange(len(tokens), device=device)
        scores = torch.zeros(len(tokens), device=device)
        return DraftTree(torch.tensor(tokens, device=device), steps - 1, steps, scores)


def ancestor_mask(parents: Tensor, max_depth: int) -> Tensor:
    """Which nodes a node attends: itself and its ancestors.

    Args:
        parents: (N,) int64, -1 for the root.
        max_depth: at least the depth of the deepest node; the number of steps taken.

    Returns:
        (N, N) bool; row i is True at i and at every ancestor of i.
    """
    count = parents.shape[0]
    rows = torch.arange(count, device=parents.device)
    mask = torch.zeros(count, count, dtype=torch.bool, device=parents.device)
    current = rows
    for _ in range(max_depth + 1):
        mask[rows, current] = True
        current = parents[current].clamp(min=0)
    return mask


def ancestor_mask_ref(parents: list[int]) -> list[list[bool]]:
    """Slow reference of `ancestor_mask`: walk up from every node."""
    mask = [[False] * len(parents) for _ in parents]
    for node in range(len(parents)):
        at = node
        while at >= 0:
            mask[node][at] = True
            at = parents[at]
    return mask


@dataclass(frozen=True)
class Level:
    """The candidates of one depth, before selection; M of them.

    tokens: (M,) int64.
    scores: (M,) float32, cumulative log-probability.
    parent_rows: (M,) int64, row of the parent among the K frontier rows that were run.
    parent_ids: (M,) int64, the parent's place among all candidates of the tree, -1 for the root.
    """

    tokens: Tensor
    scores: Tensor
    parent_rows: Tensor
    parent_ids: Tensor


def expand(scores: Tensor, logits: Tensor, ids: Tensor, top_k: int, token_ids: Tensor | None = None) -> Level:
    """Children of a frontier: the `top_k` likeliest tokens of each of its K rows.

    Args:
        scores: (K,) float32 cumulative log-probabilities of the frontier.
        logits: (K, V) draft logits, any float type; probabilities are taken in fp32.
        ids: (K,) int64 places of the frontier among all candidates (-1 for the root).
        top_k: children of a row; fewer if the vocabulary is smaller.
        token_ids: (V,) int64 the target's id of each logit; None where they are in order.
    """
    top_k = min(top_k, logits.shape[-1])
    logprobs, tokens = logits.log_softmax(-1, dtype=torch.float32).topk(top_k, dim=-1)
    logprobs = logprobs.clamp(max=0)  # a child must not outrank its parent by rounding, see `select`
    rows = torch.arange(logits.shape[0], device=logits.device).repeat_interleave(top_k)
    tokens = tokens.flatten() if token_ids is None else token_ids[tokens.flatten()]
    return Level(tokens, (scores[:, None] + logprobs).flatten(), rows, ids[rows])


def select(levels: list[Level], root_token: Tensor, nodes: int) -> DraftTree:
    """The best `nodes` - 1 candidates of all levels below the root, every kept node's parent kept.

    A child's score is never above its parent's and parents come first in the list, so a stable sort
    by score can never take a child and leave its parent.

    Args:
        levels: candidates by depth, shallow first.
        root_token: () or (1,) int64.
        nodes: rows of the tree, the root included.
    """
    device = levels[0].tokens.device
    scores = torch.cat([level.scores for level in levels])
    tokens = torch.cat([level.tokens for level in levels])
    parent_ids = torch.cat([level.parent_ids for level in levels])
    sizes = [level.tokens.shape[0] for level in levels]
    depths = torch.cat([torch.full((n,), d + 1, device=device) for d, n in enumerate(sizes)])

    count = min(nodes - 1, scores.shape[0])
    chosen = scores.sort(descending=True, stable=True).indices[:count].sort().values
    # place[id + 1]: where candidate `id` stands in the tree; place[0] is the root's, for parent id -1.
    place = torch.zeros(scores.shape[0] + 1, dtype=torch.int64, device=device)
    place[chosen + 1] = torch.arange(1, count + 1, device=device)

    def with_root(first: Tensor, rest: Tensor) -> Tensor:
        return torch.cat([first.reshape(1).to(rest), rest])

    root = torch.zeros(1, device=device)
    return DraftTree(
        tokens=with_root(root_token, tokens[chosen]),
        parents=with_root(root - 1, place[parent_ids[chosen] + 1]),
        depths=with_root(root, depths[chosen]),
        scores=with_root(root, scores[chosen]),
    )


def select_ref(levels: list[Level], root_token: int, nodes: int) -> list[tuple[int, tuple[int, ...], float]]:
    """Slow reference of `select`: (token, path of tokens from the root, score), best first, greedily grown."""
    candidates: list[tuple[int, int, float]] = []
    for level in levels:
        columns = (level.tokens, level.parent_ids, level.scores)
        candidates += list(zip(*(c.tolist() for c in columns), strict=True))
    paths: dict[int, tuple[int, ...]] = {-1: (root_token,)}
    tree: list[tuple[int, tuple[int, ...], float]] = []
    while len(tree) < nodes - 1:
        open_ids = [i for i, (_, parent, _) in enumerate(candidates) if parent in paths and i not in paths]
        if not open_ids:
            break
        best = max(open_ids, key=lambda i: (candidates[i][2], -i))
        token, parent, score = candidates[best]
        paths[best] = (*paths[parent], token)
        tree.append((token, paths[best], score))
    return tree
