"""Draft trees: their size (`TreeBudget`), their nodes (`DraftTree`), and how they grow (`expand`, `select`).

`expand` turns the draft's logits for one level into candidates for the next level. `select` keeps the best candidates
of all levels and returns them as a `DraftTree`. All functions are pure tensor functions on one device. This module runs
no model and never sees the target's logits.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, init=False)
class TreeBudget:
    """The largest tree that a round may use: N/D/K in the paper. `TreeBudget()` is 16/6/8.

    What is not given is chosen so that it fits what is given, and given values are never changed:

    - nodes: 16, or fewer if a tree of this depth and width cannot have as many, or more if a path of this depth needs
      them. A chain (`top_k=1`) gets the nodes of its depth.
    - depth: 3 for 4 nodes, 5 for 8, 6 for 16, and one more each time that the nodes double; less than the nodes.
    - top_k: half of the nodes, from 1 to 8.

    A depth or width chosen in this way is raised if the tree could not have the given nodes otherwise.

    Args:
        nodes: nodes that the target verifies, including the root (N). 1 means plain decoding.
        depth: levels below the root (D).
        top_k: nodes of a level that get children, and number of children of each (K). 1 drafts a chain.

    Raises:
        ValueError: a value is not an integer or is below 1.
    """

    nodes: int
    depth: int
    top_k: int

    def __init__(self, nodes: int | None = None, depth: int | None = None, top_k: int | None = None) -> None:
        for name, value in (("nodes", nodes), ("depth", depth), ("top_k", top_k)):
            if value is not None and not isinstance(value, int):
                raise ValueError(f"{name} must be an integer, got {value!r}.")
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        for name, value in zip(("nodes", "depth", "top_k"), _fitting(nodes, depth, top_k), strict=True):
            object.__setattr__(self, name, value)

    def __str__(self) -> str:
        return f"{self.nodes}/{self.depth}/{self.top_k}"

    @staticmethod
    def parse(text: str) -> "TreeBudget":
        """Parse a budget that is written as "nodes/depth/top_k".

        Args:
            text: for example "16/6/8".

        Raises:
            ValueError: the text does not consist of three integers of at least 1.
        """
        parts = text.split("/")
        if len(parts) != 3 or not all(part.strip().isdigit() for part in parts):
            raise ValueError(f"{text!r} is not a valid budget. Use nodes/depth/top_k, for example 16/6/8.")
        return TreeBudget(*(int(part) for part in parts))

    def clipped(self, new_tokens: int) -> "TreeBudget":
        """Return this budget without levels that a text cannot use if it may grow by `new_tokens` (1 or more)."""
        depth = min(self.depth, new_tokens - 1)
        if depth < 1:
            return TreeBudget(nodes=1, depth=1, top_k=1)
        return TreeBudget(nodes=self.nodes, depth=depth, top_k=self.top_k)

    def within(self, other: "TreeBudget") -> "TreeBudget":
        """Return the largest budget that exceeds neither this nor the other one."""
        return TreeBudget(min(self.nodes, other.nodes), min(self.depth, other.depth), min(self.top_k, other.top_k))

    def as_chain(self) -> "TreeBudget":
        """Return a budget for chains of the same depth, or of fewer levels if there are not enough nodes."""
        return TreeBudget(nodes=min(self.nodes, self.depth + 1), depth=self.depth, top_k=1)


USUAL_NODES, USUAL_DEPTH, USUAL_TOP_K = 16, 6, 8


def _fitting(nodes: int | None, depth: int | None, top_k: int | None) -> tuple[int, int, int]:
    """Return nodes, depth and top_k, with those that are None as `TreeBudget` says."""
    if nodes is None:
        depth, top_k = depth or USUAL_DEPTH, top_k or USUAL_TOP_K
        usual = depth + 1 if top_k == 1 else max(USUAL_NODES, depth + 1)
        return min(usual, _largest_tree(depth, top_k)), depth, top_k
    below = nodes - 1
    chosen_k = top_k or max(min(nodes // 2, USUAL_TOP_K), 1)
    chosen_depth = depth or max(min(nodes.bit_length() + 1, below), 1)
    if depth is None:
        chosen_depth = max(chosen_depth, 1 - (chosen_k - below) // chosen_k**2)
    elif top_k is None:
        chosen_k = max(chosen_k, below if depth == 1 else math.isqrt(below // depth))
        while _largest_tree(depth, chosen_k) < nodes:
            chosen_k += 1
    return nodes, chosen_depth, chosen_k


def _largest_tree(depth: int, top_k: int) -> int:
    """Return the nodes of a tree all of whose candidates are kept."""
    return 1 + top_k + (depth - 1) * top_k * top_k


@dataclass(frozen=True)
class DraftTree:
    """A tree of N nodes in topological order. Node 0 is the root, which stands for the last token of the text.

    Attributes:
        tokens: (N,) int64 token ids.
        parents: (N,) int64 index of each node's parent; -1 for the root. In a chain, the parent of node i is i - 1.
        depths: (N,) int64, 0 for the root.
        scores: (N,) float32 cumulative log-probabilities of the draft, 0 for the root.
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
        """Return the tree on `device`."""
        return DraftTree(*(t.to(device) for t in (self.tokens, self.parents, self.depths, self.scores)))

    def check(self, root: int, budget: TreeBudget, vocab_size: int) -> None:
        """Refuse a tree that the target cannot verify: it would give wrong text, or an error in the middle of a pass.

        Args:
            root: the last token of the text.
            budget: the largest tree allowed.
            vocab_size: tokens of the target (V).

        Raises:
            ValueError: names what is wrong.
        """
        columns = (self.tokens, self.parents, self.depths)
        if any(column.device.type != "cpu" or column.dtype != torch.int64 for column in columns):
            raise ValueError("a draft tree must hold int64 tensors on the CPU")
        tokens, parents, depths = (column.numpy() for column in columns)
        if not 1 <= len(tokens) <= budget.nodes:
            raise ValueError(f"a draft tree has {len(tokens)} nodes, and the budget allows 1 to {budget.nodes}")
        if tokens[0] != root or parents[0] != -1 or depths[0] != 0:
            raise ValueError(f"a draft tree must start at the text's last token {root}, with parent -1 and depth 0")
        above = parents[1:]
        if (above < 0).any() or (above >= np.arange(1, len(tokens))).any() or (depths[1:] != depths[above] + 1).any():
            raise ValueError("each node of a draft tree must come after its parent, one level below it")
        if depths.max() > budget.depth or tokens.min() < 0 or tokens.max() >= vocab_size:
            raise ValueError(f"a draft tree has tokens outside of the {vocab_size} known ones, or too many levels")

    @staticmethod
    def root(token: int, device: torch.device | str = "cpu") -> "DraftTree":
        """Return a tree that has only a root, as in plain decoding."""
        return DraftTree.chain([token], device)

    @staticmethod
    def chain(tokens: list[int], device: torch.device | str = "cpu") -> "DraftTree":
        """Return a chain. The first token is the root, and all scores are 0."""
        steps = torch.arange(len(tokens), device=device)
        scores = torch.zeros(len(tokens), device=device)
        return DraftTree(torch.tensor(tokens, device=device), steps - 1, steps, scores)


def ancestor_mask(parents: Tensor, max_depth: int) -> Tensor:
    """Return which nodes each node attends to: itself and its ancestors.

    Args:
        parents: (N,) int64, -1 for the root.
        max_depth: depth of the deepest node, or more. The function takes one step per level.

    Returns:
        (N, N) bool. Row i is True at i and at every ancestor of i.
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
    """Compute the same as `ancestor_mask` by walking up from every node. Slow; for tests."""
    mask = [[False] * len(parents) for _ in parents]
    for node in range(len(parents)):
        at = node
        while at >= 0:
            mask[node][at] = True
            at = parents[at]
    return mask


@dataclass(frozen=True)
class Level:
    """The M candidates of one level, before selection.

    Attributes:
        tokens: (M,) int64 token ids.
        scores: (M,) float32 cumulative log-probabilities.
        parent_rows: (M,) int64 row of each parent in the draft's pass over the level above.
        parent_ids: (M,) int64 index of each parent among all candidates of the tree, -1 for the root.
    """

    tokens: Tensor
    scores: Tensor
    parent_rows: Tensor
    parent_ids: Tensor


def expand(scores: Tensor, logits: Tensor, ids: Tensor, top_k: int, token_ids: Tensor | None = None) -> Level:
    """Return the candidates below K nodes: the `top_k` most likely tokens of each.

    Args:
        scores: (K,) float32 cumulative log-probabilities of the nodes.
        logits: (K, V) draft logits in any float dtype. Probabilities are computed in float32.
        ids: (K,) int64 index of each node among all candidates, -1 for the root.
        top_k: children of each node; fewer if the vocabulary is smaller.
        token_ids: (V,) int64 token of the target for each logit; None if logit i belongs to token i.
    """
    top_k = min(top_k, logits.shape[-1])
    logprobs, tokens = logits.log_softmax(-1, dtype=torch.float32).topk(top_k, dim=-1)
    logprobs = logprobs.clamp(max=0)  # rounding must not put a child above its parent, see `select`
    rows = torch.arange(logits.shape[0], device=logits.device).repeat_interleave(top_k)
    tokens = tokens.flatten() if token_ids is None else token_ids[tokens.flatten()]
    return Level(tokens, (scores[:, None] + logprobs).flatten(), rows, ids[rows])


def select(levels: list[Level], root_token: Tensor, nodes: int) -> DraftTree:
    """Return the tree of the root and the `nodes` - 1 candidates with the best scores.

    A child's score is never above its parent's, and parents come first in the list. A stable sort by score therefore
    never selects a child without its parent.

    Args:
        levels: candidates of each level, from the top down.
        root_token: () or (1,) int64.
        nodes: nodes of the tree, including the root.
    """
    device = levels[0].tokens.device
    scores = torch.cat([level.scores for level in levels])
    tokens = torch.cat([level.tokens for level in levels])
    parent_ids = torch.cat([level.parent_ids for level in levels])
    sizes = [level.tokens.shape[0] for level in levels]
    depths = torch.cat([torch.full((n,), d + 1, device=device) for d, n in enumerate(sizes)])

    count = min(nodes - 1, scores.shape[0])
    chosen = scores.sort(descending=True, stable=True).indices[:count].sort().values
    # place[id + 1] is the node of candidate `id`. place[0] is the root, whose id is -1.
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
    """Select the same nodes as `select`, one at a time. Slow; for tests.

    Returns:
        (token, tokens on the path from the root, score) of each node, best first.
    """
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
