"""A simulated world for the policy: numbers only, so that nothing depends on how fast this machine is.

A `Computer` says how long the phases of a round take. A `Pair` is a text with a draft that guesses it. `play` runs the
policy on both; `best_static_rate` is what the best fixed budget reaches on the same text.
"""

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from dovetail_plugin import DraftTree, TreeBudget
from dovetail_plugin.policy.device_split import LIMITS, AdaptivePlanner, DeviceSplitPolicy
from dovetail_plugin.policy.measurements import Measurements
from dovetail_plugin.policy.tree_rule import TreeJudge
from dovetail_plugin.report import Round

PROMPT = 10
"""Tokens of the prompt before position 0 of a text."""


@dataclass(frozen=True)
class Computer:
    """Seconds of passes and draft levels.

    Attributes:
        pass_s: a verification pass over one row.
        pass_row_s: each further row of a pass.
        tree_s: the draft's first level.
        level_s: a further level of one row.
        level_row_s: each further row of a level.
        token_s: accepting one token.
        switch: share by which a pass takes longer after a pass over another number of rows.
        steps: (rows, seconds) of passes, linear in between; replaces `pass_s` and `pass_row_s`.
        probed: rows of the passes that a probe measures.
    """

    pass_s: float
    pass_row_s: float
    tree_s: float
    level_s: float
    level_row_s: float = 0.0
    token_s: float = 0.0
    switch: float = 0.0
    steps: tuple[tuple[int, float], ...] = ()
    probed: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 48)

    def verify_s(self, nodes: int) -> float:
        """Seconds of a pass after one over as many rows."""
        if self.steps:
            return float(np.interp(nodes, *zip(*self.steps, strict=True)))
        return self.pass_s + (nodes - 1) * self.pass_row_s

    def further_level_s(self, rows: int) -> float:
        """Seconds of one more draft level."""
        return self.level_s + (rows - 1) * self.level_row_s

    def seconds(self, nodes: int, widths: "list[int] | None", tokens: int, last: int | None = None) -> dict[str, float]:
        """Seconds of a round by phase.

        Args:
            nodes: rows verified.
            widths: rows of the draft levels after the first; None where nothing was drafted.
            tokens: tokens emitted.
            last: rows of the pass before; None counts as another number.
        """
        draft_s = 0.0 if widths is None else self.tree_s + sum(self.further_level_s(rows) for rows in widths)
        verify_s = self.verify_s(nodes) * (1.0 if nodes == last else 1.0 + self.switch)
        return {"draft": draft_s, "transfer": 0.0, "verify": verify_s, "accept": self.token_s * tokens}

    def measurements(self) -> Measurements:
        """The result of a probe of this computer."""
        return Measurements(
            {nodes: self.verify_s(nodes) for nodes in self.probed},
            {rows: self.further_level_s(rows) for rows in (1, 2, 4, 8)},
            draft_s=self.tree_s,
            transfer_s=0.0,
            context=PROMPT,
        )

    def plain_rate(self) -> float:
        """Tokens per second without a draft."""
        return 1.0 / sum(self.seconds(1, None, 1, last=1).values())

    def slower(self, factor: float) -> "Computer":
        """The same computer with passes that take `factor` times as long."""
        steps = tuple((rows, factor * seconds) for rows, seconds in self.steps)
        return replace(self, pass_s=factor * self.pass_s, pass_row_s=factor * self.pass_row_s, steps=steps)


COMPUTERS = {
    "passes cost, rows hardly do": Computer(0.1, 0.001, 0.004, 0.003),
    "rows cost a little": Computer(0.01, 0.0008, 0.002, 0.0015, 0.0001, 0.0003),
    "rows cost a lot": Computer(0.02, 0.004, 0.003, 0.002),
    "the draft is slow": Computer(0.03, 0.001, 0.012, 0.010, 0.001),
}

SWITCHING = replace(COMPUTERS["rows cost a little"], switch=0.1)
"""An engine that prepares its graph again for another number of rows."""

STEPS = ((1, 0.18), (2, 0.38), (3, 0.55), (8, 0.60), (16, 0.80), (48, 2.0))
"""Seconds of passes of a float32 target on an old CPU, whose kernel for one row differs from that for three."""

AVX2 = ((1, 0.197), (2, 0.281), (4, 0.461), (6, 0.672), (8, 0.897), (16, 1.809), (48, 5.43))
"""Seconds of passes of a bf16 target of 1.05B weights on two cores without bf16 units: 8 rows take 4.6 times a row."""

MIXTURE = ((1, 0.100), (2, 0.170), (4, 0.280), (8, 0.450), (16, 0.700), (48, 1.400))
"""Seconds of passes of a mixture of experts: each row brings its own experts, and later rows share them."""

STEPPED = Computer(0.0, 0.0, 0.01, 0.008, steps=STEPS, probed=(1, 8))
"""That CPU. The target is slow, so the probe has time for two row counts only."""


WITHOUT_BF16_UNITS = Computer(0.0, 0.0, 0.012, 0.010, 0.005, 0.004, steps=AVX2)
"""The draft runs on the same cores, where a level of 8 rows takes 4.5 times as long as one of one row."""

EXPERTS = Computer(0.0, 0.0, 0.012, 0.010, 0.002, 0.002, steps=MIXTURE)


@dataclass(frozen=True)
class Candidates:
    """Everything that a draft proposes in one round.

    Attributes:
        scores: (M,) cumulative log-probabilities.
        parents: (M,) ids of the parents, -1 for the root.
        depths: (M,) depths, from 1.
        right: ids of the candidates on the text's own path, from the root down.
        widths: rows of the levels after the first.
    """

    scores: np.ndarray
    parents: np.ndarray
    depths: np.ndarray
    right: list[int]
    widths: list[int]

    def best(self, count: int) -> np.ndarray:
        """Ids of the likeliest candidates, rising; a candidate is never chosen without its parent."""
        return np.sort(np.argsort(-self.scores, kind="stable")[:count])


@dataclass(frozen=True)
class Pair:
    """A target's text and a draft that guesses it.

    At each position the draft gives one child a probability and halves what is left among the others, best first. How
    often each of them is right follows from that: as often as the draft says (as under sampling), or the first one
    more often (`greedy`). The same positions are guessed right whoever asks, so that policies and budgets meet the
    same text.

    Attributes:
        quality: (first position, factor) of how often the draft is right.
        fading: factor of the same for each level.
        greedy: whether the likeliest child is right more often than the draft says.
        sureness: parameters of the beta distribution of the first child's probability.
        seed: seed of the text.
        length: tokens of the text.
    """

    quality: tuple[tuple[int, float], ...] = ((0, 0.95),)
    fading: float = 0.97
    greedy: bool = False
    sureness: tuple[float, float] = (2.0, 1.0)
    seed: int = 1
    length: int = 4000

    @functools.cached_property
    def _text(self) -> tuple[np.ndarray, np.ndarray]:
        rng, size = np.random.default_rng(self.seed), self.length + LIMITS.depth
        return 0.97 * rng.beta(*self.sureness, size=size), rng.random(size)

    def quality_at(self, position: int) -> float:
        """Factor of how often the draft is right there."""
        return [quality for start, quality in self.quality if start <= position][-1]

    def _rates(self, said: np.ndarray) -> np.ndarray:
        """How often each child is right, given what the draft says of it."""
        if not self.greedy:
            return said
        first = 1.0 - (1.0 - said[0]) ** 1.8
        return np.concatenate([[first], said[1:] * (1.0 - first) / (1.0 - said[0])])

    def propose(self, position: int, budget: TreeBudget, judge: "TreeJudge | None" = None) -> Candidates:
        """Propose what `FeatureDrafter.grow` would, with simulated probabilities."""
        rng, top_k = np.random.default_rng((self.seed, position)), budget.top_k
        sure, chance = self._text
        scores, ids, row = np.zeros(1), np.array([-1]), 0  # of the frontier; the row on the text's path, or None
        levels, right, widths, seen = [], [], [], 0
        for depth in range(1, budget.depth + 1):
            first = 0.97 * rng.beta(*self.sureness, size=len(scores))
            if row is not None:
                first[row] = sure[position + depth - 1]
            said = np.column_stack([first, (1.0 - first)[:, None] * 0.5 ** np.arange(1, LIMITS.top_k)])
            said = -np.sort(-said, axis=1)[:, :top_k]
            level = (scores[:, None] + np.log(said)).ravel()
            levels.append((level, np.repeat(ids, top_k), np.full(level.size, depth)))
            child = None
            if row is not None:
                rates = self._rates(said[row]) * self.quality_at(position) * self.fading ** (depth - 1)
                rank = int(np.searchsorted(rates.cumsum(), chance[position + depth - 1], side="right"))
                child = row * top_k + rank if rank < top_k else None
            if child is not None:
                right.append(seen + child)
            width = 0 if depth == budget.depth else top_k if judge is None else judge.width(level)
            if width == 0:
                break
            frontier = np.argsort(-level, kind="stable")[:width]
            widths.append(len(frontier))
            row = next((i for i, at in enumerate(frontier) if at == child), None)
            scores, ids = level[frontier], frontier + seen
            seen += level.size
        return Candidates(*(np.concatenate(part) for part in zip(*levels, strict=True)), right, widths)

    def round(self, position: int, budget: TreeBudget, judge: TreeJudge) -> tuple[DraftTree, list[int]]:
        """Grow a tree; returns it and its accepted path."""
        candidates = self.propose(position, budget, judge)
        chosen = candidates.best(judge.rows(candidates.scores) - 1)
        place = np.zeros(len(candidates.scores) + 1, dtype=np.int64)  # of candidate i at i + 1; 0 if left out
        place[chosen + 1] = np.arange(1, len(chosen) + 1)
        columns = (
            np.zeros(len(chosen) + 1, dtype=np.int64),
            np.concatenate([[-1], place[candidates.parents[chosen] + 1]]),
            np.concatenate([[0], candidates.depths[chosen]]),
            np.concatenate([[0.0], candidates.scores[chosen]]).astype(np.float32),
        )
        path = [0]
        for right in candidates.right:
            if not place[right + 1]:
                break
            path.append(int(place[right + 1]))
        return DraftTree(*(torch.from_numpy(column) for column in columns)), path


CHAINS = [TreeBudget(depth + 1, depth, 1) for depth in range(1, LIMITS.depth + 1)]

TREES = [
    TreeBudget(nodes, depth, LIMITS.top_k)
    for nodes in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
    for depth in (1, 2, 3, 4, 6, 8, 10)
    if depth < nodes
]
"""With `CHAINS`, the static budgets that the policy is compared with."""


@functools.cache
def static_tokens(pair: Pair, start: int, end: int) -> dict[TreeBudget, list[int]]:
    """Tokens of a round at each position, for every budget of the grid."""
    tokens: dict[TreeBudget, list[int]] = {budget: [] for budget in [*TREES, *CHAINS]}
    for position in range(start, end):
        all_ = pair.propose(position, LIMITS)
        for depth in {budget.depth for budget in TREES}:
            upto = all_.scores[all_.depths <= depth]
            ranks = np.argsort(np.argsort(-upto, kind="stable"))  # a node is in the tree if its rank is low enough
            right = [int(ranks[node]) for node in all_.right if node < len(upto)]
            for budget in (budget for budget in TREES if budget.depth == depth):
                tokens[budget].append(1 + sum(rank < budget.nodes - 1 for rank in right))
        line = len(pair.propose(position, CHAINS[-1]).right)
        for budget in CHAINS:
            tokens[budget].append(1 + min(line, budget.depth))
    return tokens


def best_static_rate(pair: Pair, computer: Computer, start: int, end: int) -> float:
    """Tokens per second of the best budget of the grid or of plain decoding, which is known afterwards only."""
    rates = [computer.plain_rate()]
    for budget, gains in static_tokens(pair, start, end).items():
        widths, position, seconds = [budget.top_k] * (budget.depth - 1), 0, 0.0
        while position < len(gains):
            tokens = gains[position]
            seconds += sum(computer.seconds(budget.nodes, widths, tokens, last=budget.nodes).values())
            position += tokens
        rates.append(position / seconds)
    return max(rates)


@dataclass(frozen=True)
class Played:
    """One simulated round.

    Attributes:
        position: tokens of the text before the round, without the prompt.
        drafted: whether a tree was grown.
        nodes: rows verified.
        tokens: tokens emitted.
        seconds: seconds of the round.
        rest: plain rounds that follow it.
    """

    position: int
    drafted: bool
    nodes: int
    tokens: int
    seconds: float
    rest: int


def planner_on(computer: Computer, directory: Path, temperature: float = 1.0, **options) -> AdaptivePlanner:
    """Return the planner of a new policy that has measured this computer."""
    policy = DeviceSplitPolicy(vram_budget=0, measured_in=directory, **options)
    planner = policy.planner("simulated", temperature=temperature)
    planner.prepare(lambda _: computer.measurements())
    return planner


def play(
    planner: AdaptivePlanner,
    pair: Pair,
    computers: dict[int, Computer],
    end: int,
    *,
    noise: float = 0.05,
    seed: int = 0,
) -> list[Played]:
    """Run a generation of `end` tokens as `Decoder` does.

    Args:
        planner: the policy's.
        pair: text and draft.
        computers: position -> the computer from there on.
        end: tokens to generate.
        noise: standard deviation of the logarithm of every measured time.
        seed: seed of that noise.
    """
    rng, position, played = np.random.default_rng(seed), 0, []
    while position < end:
        computer = [computer for start, computer in computers.items() if start <= position][-1]
        context = PROMPT + position
        plan = planner.plan(context, LIMITS)
        drafted = plan.budget.nodes > 1
        tree, path = pair.round(position, plan.budget, plan.judge) if drafted else (DraftTree.root(0), [0])
        forecast = planner.forecast(plan, len(tree), context)
        last = played[-1].nodes if played else None
        widths = plan.judge.widths if drafted else None
        seconds = computer.seconds(len(tree), widths, len(path), last)
        seen = {name: spent * math.exp(rng.normal(0, noise)) for name, spent in seconds.items()} | {"other": 0.0}
        levels = None if widths is None else tuple(widths)
        planner.observe(Round(len(tree), len(path), widths=levels, context=context, seconds=seen), tree, path, forecast)
        played.append(Played(position, drafted, len(tree), len(path), sum(seconds.values()), planner.switch.rest))
        position += len(path)
    return played


def rate(played: list[Played], start: int = 0) -> float:
    """Tokens per second from this position on."""
    part = [one for one in played if one.position >= start]
    return sum(one.tokens for one in part) / sum(one.seconds for one in part)


KINDS = {"greedy": 0.0, "sampling": 1.0}
"""Kind of pair -> temperature that the policy is given."""
