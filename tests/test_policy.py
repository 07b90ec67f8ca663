"""The policy: its judge against brute force, its rounds in a simulated world, its records, real text under it.

The simulated world is numbers only: an invented computer says what a round takes, an invented pair says what the
draft proposes and where it is right. Nothing here depends on how fast the machine is.
"""

import functools
import logging
import math
import shutil
import threading
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from families import prompt, tiny_target
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.drafts import make_draft, text_and_features

import dovetail_plugin.generation.generate
import dovetail_plugin.generation.loop
from dovetail_plugin import DovetailDraft, DraftTree, TreeBudget
from dovetail_plugin.drafts.calibration import BINS, CENTERS
from dovetail_plugin.drafts.feature_drafter import FeatureDrafter
from dovetail_plugin.drafts.torch_runner import TorchRunner
from dovetail_plugin.policy.acceptance import SAMPLING, AcceptanceCurve
from dovetail_plugin.policy.device_split import LIMITS, REFRESH, AdaptiveRounds, DeviceSplitPolicy
from dovetail_plugin.policy.measurements import Measurements
from dovetail_plugin.policy.on_off import FIRST_REST, FIRST_TRIAL, LONG_TRIAL, LONGEST_REST, TRIAL, Mode
from dovetail_plugin.policy.rounds import Outcome
from dovetail_plugin.policy.tree_rule import Lookahead, TreeJudge
from dovetail_plugin.report import PHASES, PhaseClock
from dovetail_plugin.verify import Acceptance

# --- the judge of one tree -------------------------------------------------------------------------

scores_lists = st.lists(st.floats(-8, 0), min_size=1, max_size=40).map(np.array)
prices = st.floats(0.1, 1000)


@st.composite
def tables(draw, size, start=0.0):
    """(size,) seconds that never fall."""
    steps = draw(st.lists(st.floats(0, 0.02), min_size=size, max_size=size))
    return start + np.cumsum(steps)


def a_mode(seed=0):
    """A curve that has learnt something."""
    rng = np.random.default_rng(seed)
    curve = AcceptanceCurve(SAMPLING)
    for _ in range(seed % 30):
        scores = -5 * rng.random(10)
        curve.observe(scores, rng.random(10) < np.exp(scores) ** 0.6)
    return Mode(curve)


def judge_of(budget, price, verify_s, level_s=None, mode=None, switch=0.0):
    level_s = np.zeros(budget.top_k + 1) if level_s is None else level_s
    return TreeJudge(
        budget, price, verify_s, level_s, mode.curve, mode.lookahead, np.broadcast_to(switch, verify_s.shape)
    )


@settings(deadline=None)
@given(scores_lists, prices, st.integers(2, 30), st.integers(0, 1000), st.data())
def test_rows_are_worth_most(scores, price, nodes, seed, data):
    """Of all numbers of nodes none gives more tokens after the price of its seconds."""
    verify_s, mode = data.draw(tables(nodes, start=0.01)), a_mode(seed)
    judge = judge_of(TreeBudget(nodes, 6, 8), price, verify_s, mode=mode)
    chosen = judge.rows(scores)
    likely = sorted(mode.curve(scores).tolist(), reverse=True)

    def worth(count):
        return 1.0 + sum(likely[: count - 1]) - price * verify_s[count - 1]

    assert 1 <= chosen <= min(nodes, len(scores) + 1)
    assert worth(chosen) == pytest.approx(max(worth(n) for n in range(1, min(nodes, len(scores) + 1) + 1)), abs=1e-9)
    assert judge.expected == pytest.approx(1.0 + sum(likely[: chosen - 1]))


@settings(deadline=None)
@given(scores_lists, prices, st.integers(2, 30), st.floats(0, 0.5), st.data())
def test_rows_are_worth_their_switch(scores, price, nodes, share, data):
    """The number of the pass before is cheaper than all others by what these take more after another one."""
    verify_s, mode = data.draw(tables(nodes, start=0.01)), a_mode(3)
    last = data.draw(st.integers(1, nodes))
    switch = np.where(np.arange(1, nodes + 1) == last, 0.0, share)
    chosen = judge_of(TreeBudget(nodes, 6, 8), price, verify_s, mode=mode, switch=switch).rows(scores)
    likely = sorted(mode.curve(scores).tolist(), reverse=True)

    def worth(count):
        return sum(likely[: count - 1]) - price * verify_s[count - 1] * (1.0 + share * (count != last))

    assert worth(chosen) == pytest.approx(max(worth(n) for n in range(1, min(nodes, len(scores) + 1) + 1)), abs=1e-9)


def a_mode_whose_children_are(share):
    """Every node's only child is accepted that often if the node itself is."""
    mode = Mode(AcceptanceCurve(CENTERS))
    mode.lookahead.observe(np.ones(200), np.full((200, 1), np.log(share)))
    mode.lookahead.refresh(mode.curve)
    return mode


@settings(deadline=None)
@given(scores_lists, prices, st.integers(2, 30), st.floats(0.05, 1.0), st.floats(0, 0.05), st.data())
def test_a_level_is_drafted_if_the_tree_is_worth_more_with_it(scores, price, nodes, share, level_s, data):
    """One row of one child, which takes the place of another node or makes the pass longer, whatever is cheaper."""
    steps = sorted(data.draw(st.lists(st.floats(0, 0.02), min_size=nodes, max_size=nodes)))
    verify_s, mode = 0.01 + np.cumsum(steps), a_mode_whose_children_are(share)
    chosen = judge_of(TreeBudget(nodes, 6, 1), price, verify_s, np.array([0.0, level_s]), mode).width(scores)
    likely = mode.curve(scores).tolist()
    child = max(likely) * mode.lookahead.gains(np.ones(1), np.zeros(2))[0]

    def worth(candidates):
        best = sorted(candidates, reverse=True)
        return max(sum(best[:n]) - price * verify_s[n] for n in range(min(len(best), nodes - 1) + 1))

    gain = worth([*likely, child]) - worth(likely) - price * level_s
    assume(abs(gain) > 1e-9)
    assert chosen == int(gain > 0)


@settings(deadline=None)
@given(scores_lists, prices, st.floats(1.01, 20), st.integers(2, 30), st.data())
def test_dearer_seconds_never_buy_more(scores, price, factor, nodes, data):
    verify_s = data.draw(tables(nodes, start=0.01))
    level_s = np.concatenate([[0.0], data.draw(tables(8, start=1e-4))])
    budget = TreeBudget(nodes, 6, 8)
    cheap = judge_of(budget, price, verify_s, level_s, a_mode(7))
    dear = judge_of(budget, price * factor, verify_s, level_s, a_mode(7))
    assert dear.width(scores) <= cheap.width(scores)
    assert dear.rows(scores) <= cheap.rows(scores)


@given(scores_lists, prices, st.integers(2, 60))
def test_what_is_free_is_taken(scores, price, nodes):
    judge = judge_of(TreeBudget(nodes, 6, 8), price, np.full(nodes, 0.1), mode=a_mode())
    room = nodes - 1 - len(scores)  # for children
    assert judge.width(scores) >= min(8, len(scores), max((room + 1) // 2, 0))
    assert judge.rows(scores) == min(nodes, len(scores) + 1)


@given(scores_lists)
def test_what_is_too_dear_is_left(scores):
    """A row that takes as long as a plain pass, a level that does: no draft is worth that."""
    judge = judge_of(TreeBudget(16, 6, 8), 10.0, 0.1 * np.arange(1, 17), 0.1 * np.arange(9), a_mode())
    assert judge.width(scores) == 0
    assert (judge.rows(scores), judge.expected) == (1, 1.0)


@pytest.mark.parametrize("price", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("children", [(0.7, 0.2), (0.4, 0.35), (0.9,)], ids=str)
def test_lookahead_is_what_children_brought(children, price):
    """Children are accepted that often if their parent is; a further node brings what the price leaves of that."""
    curve, lookahead, rng = AcceptanceCurve(CENTERS), Lookahead(), np.random.default_rng(2)
    for _ in range(100):
        parents = rng.uniform(0.3, 1.0, 3)
        lookahead.observe(parents, np.log(parents[:, None] * np.array(children)))
        lookahead.refresh(curve)
    likely = np.array([0.2, 0.5, 0.84])
    brought = sum(np.maximum(likely * child - price, 0.0) for child in children)
    np.testing.assert_allclose(lookahead.gains(likely, np.full(6, price)), brought, atol=0.02)
    assert lookahead.gains(np.zeros(1), np.zeros(2)) == 0.0


def test_the_likeliest_child_takes_the_cheapest_place():
    lookahead = a_mode_whose_children_are(0.5).lookahead
    share = lookahead.gains(np.ones(1), np.zeros(2))[0]
    gains = lookahead.gains(np.array([0.4, 0.8]), np.array([0.1, 0.15, np.inf, np.inf]))
    np.testing.assert_allclose(gains, [0.4 * share - 0.15, 0.8 * share - 0.1])


def drafter_of(draft):
    return FeatureDrafter(draft, TorchRunner(draft), capacity=64, clock=PhaseClock())


@pytest.mark.parametrize("bound", [TreeBudget(7, 6, 1), TreeBudget(3, 5, 1), TreeBudget(48, 4, 1)], ids=str)
@torch.no_grad()
def test_chains_stay_chains(bound):
    """Under a bound of one child a real drafter's tree is a line, no longer than nodes and depth allow."""
    ids, features = text_and_features()
    drafter = drafter_of(make_draft())
    drafter.begin(features, ids)
    judge = judge_of(bound, 1e-3, np.full(bound.nodes, 0.1), mode=a_mode())
    tree = drafter.grow(bound, judge)
    assert len(tree) == min(bound.nodes, bound.depth + 1)
    assert tree.parents.tolist() == list(range(-1, len(tree) - 1))
    assert judge.widths == [1] * (min(bound.depth, bound.nodes - 1) - 1)  # no level for which there is no row


@torch.no_grad()
def test_the_drafter_does_what_the_judge_says():
    ids, features = text_and_features()
    drafter = drafter_of(make_draft())
    drafter.begin(features, ids)

    class Told:
        seen = []

        def width(self, scores):
            self.seen.append(len(scores))
            return [3, 2, 0][len(self.seen) - 1]

        def rows(self, scores):
            self.seen.append(len(scores))
            return 6

    tree = drafter.grow(TreeBudget(20, 8, 5), Told())
    assert Told.seen == [5, 3 * 5, 2 * 5, 5 + 3 * 5 + 2 * 5]  # candidates of three levels, then all of them
    assert len(tree) == 6 and tree.depths.max() <= 3


# --- a simulated world -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Computer:
    """What passes and levels take: seconds of one row, and of each further row."""

    pass_s: float
    pass_row_s: float
    tree_s: float  # of the draft's first level
    level_s: float
    level_row_s: float = 0.0
    token_s: float = 0.0
    switch: float = 0.0  # share of a pass that it takes more after one over another number of rows

    def verify_s(self, nodes: int) -> float:
        return self.pass_s + (nodes - 1) * self.pass_row_s

    def further_level_s(self, rows: int) -> float:
        return self.level_s + (rows - 1) * self.level_row_s

    def seconds(self, nodes: int, widths: "list[int] | None", tokens: int, last: int | None = None) -> dict[str, float]:
        """Of a round, by phase; no widths where nothing was drafted; last: nodes of the round before."""
        draft_s = 0.0 if widths is None else self.tree_s + sum(self.further_level_s(rows) for rows in widths)
        verify_s = self.verify_s(nodes) * (1.0 if nodes == last else 1.0 + self.switch)
        return {"draft": draft_s, "transfer": 0.0, "verify": verify_s, "accept": self.token_s * tokens}

    def measurements(self) -> Measurements:
        """What a probe finds."""
        return Measurements(
            {nodes: self.verify_s(nodes) for nodes in (1, 2, 4, 8, 16, 32, 48)},
            {rows: self.further_level_s(rows) for rows in (1, 2, 4, 8)},
            draft_s=self.tree_s,
            transfer_s={0: 0.0},
            context=PROMPT,
        )

    def plain_rate(self) -> float:
        return 1.0 / sum(self.seconds(1, None, 1).values())


PROMPT = 10

COMPUTERS = {
    "passes cost, rows hardly do": Computer(0.1, 0.001, 0.004, 0.003),
    "rows cost a little": Computer(0.01, 0.0008, 0.002, 0.0015, 0.0001, 0.0003),
    "rows cost a lot": Computer(0.02, 0.004, 0.003, 0.002),
    "the draft is slow": Computer(0.03, 0.001, 0.012, 0.010, 0.001),
}


@dataclass(frozen=True)
class Candidates:
    """All that a draft proposes in a round. right: those on the text's own path, from the root down."""

    scores: np.ndarray
    parents: np.ndarray
    depths: np.ndarray
    right: list[int]
    widths: list[int]

    def best(self, count: int) -> np.ndarray:
        """The likeliest ones, in order of their ids; never one without its parent."""
        return np.sort(np.argsort(-self.scores, kind="stable")[:count])


@dataclass(frozen=True)
class Pair:
    """A target's text and a draft that guesses it.

    At each position the draft is sure of one child and halves what is left among the others, best first. How often
    which of them is right follows from that: as often as it says (as under sampling), or the first one more often
    (`greedy`); `quality`, from some position on, and `fading` with each level make it less often. The same positions
    are guessed right whoever asks, so that policies and budgets meet the same text.
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
        return [quality for start, quality in self.quality if start <= position][-1]

    def _rates(self, said: np.ndarray) -> np.ndarray:
        """How often each child is right, of what the draft says of it."""
        if not self.greedy:
            return said
        first = 1.0 - (1.0 - said[0]) ** 1.8
        return np.concatenate([[first], said[1:] * (1.0 - first) / (1.0 - said[0])])

    def propose(self, position: int, budget: TreeBudget, judge: "TreeJudge | None" = None) -> Candidates:
        """What `FeatureDrafter.grow` does, with invented probabilities."""
        rng, top_k = np.random.default_rng((self.seed, position)), budget.top_k
        sure, chance = self._text
        scores, ids, row = np.zeros(1), np.array([-1]), 0  # of the frontier; the row on the text's path, or None
        levels, right, widths, seen = [], [], [], 0
        for depth in range(1, budget.depth + 1):
            first = 0.97 * rng.beta(*self.sureness, size=len(scores))
            if row is not None:
                first[row] = sure[position + depth - 1]
            said = np.column_stack([first, (1.0 - first)[:, None] * 0.5 ** np.arange(1, top_k)])
            said = -np.sort(-said, axis=1)
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

    def round(self, position: int, plan_budget: TreeBudget, judge: TreeJudge) -> tuple[DraftTree, list[int]]:
        """The tree of a round, and its accepted path."""
        candidates = self.propose(position, plan_budget, judge)
        chosen = candidates.best(judge.rows(candidates.scores) - 1)
        place = np.zeros(len(candidates.scores) + 1, dtype=np.int64)  # of a candidate, one further on; 0 if left out
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


GRID = [
    TreeBudget(nodes, depth, LIMITS.top_k)
    for nodes in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
    for depth in (1, 2, 3, 4, 6, 8, 10)
    if depth < nodes
]


@functools.cache
def static_tokens(pair: Pair, start: int, end: int) -> dict[TreeBudget, list[int]]:
    """Tokens of a round at each position, for every budget of the grid."""
    tokens: dict[TreeBudget, list[int]] = {budget: [] for budget in GRID}
    for position in range(start, end):
        all_ = pair.propose(position, LIMITS)
        for depth in {budget.depth for budget in GRID}:
            upto = all_.scores[all_.depths <= depth]
            ranks = np.argsort(np.argsort(-upto, kind="stable"))  # a node is in if its rank is
            right = [int(ranks[node]) for node in all_.right if node < len(upto)]
            for budget in (budget for budget in GRID if budget.depth == depth):
                tokens[budget].append(1 + sum(rank < budget.nodes - 1 for rank in right))
    return tokens


def best_static_rate(pair: Pair, computer: Computer, start: int, end: int) -> float:
    """Tokens a second of the best budget of the grid, plain decoding included; known afterwards only."""
    rates = [computer.plain_rate()]
    for budget, gains in static_tokens(pair, start, end).items():
        position, seconds = 0, 0.0
        while position < len(gains):
            tokens = gains[position]
            seconds += sum(computer.seconds(budget.nodes, [budget.top_k] * (budget.depth - 1), tokens).values())
            position += tokens
        rates.append(position / seconds)
    return max(rates)


@dataclass(frozen=True)
class Played:
    """A simulated round. rest: plain rounds that follow it."""

    position: int
    drafted: bool
    nodes: int
    tokens: int
    seconds: float
    rest: int


def rounds_on(computer: Computer, directory, temperature: float = 1.0) -> AdaptiveRounds:
    rounds = DeviceSplitPolicy(vram_budget=0, measured_in=directory).rounds("simulated", temperature=temperature)
    rounds.prepare(computer.measurements)
    return rounds


def play(rounds: AdaptiveRounds, pair: Pair, computers: dict[int, Computer], end: int, seed: int = 0) -> list[Played]:
    """A generation of `end` tokens as `Decoder` runs it, on clocks that are off by a twentieth.

    Args:
        computers: position from which on it is this one.
    """
    rng, position, played = np.random.default_rng(seed), 0, []
    while position < end:
        computer = [computer for start, computer in computers.items() if start <= position][-1]
        context = PROMPT + position
        plan = rounds.next(context, LIMITS)
        drafted = plan.budget.nodes > 1
        tree, path = pair.round(position, plan.budget, plan.judge) if drafted else (DraftTree.root(0), [0])
        forecast = rounds.forecast(plan, len(tree), context)
        last = played[-1].nodes if played else None
        seconds = computer.seconds(len(tree), plan.judge.widths if drafted else None, len(path), last)
        seen = {name: spent * math.exp(rng.normal(0, 0.05)) for name, spent in seconds.items()} | {"other": 0.0}
        acceptance = Acceptance(path, [0] * len(path), stop=False)
        rounds.observe(Outcome(tree, acceptance, context, drafted, seen), forecast)
        played.append(Played(position, drafted, len(tree), len(path), sum(seconds.values()), rounds.mode.rest))
        position += len(path)
    return played


def rate(played: list[Played], start: int = 0) -> float:
    """Tokens a second from this position on."""
    part = [one for one in played if one.position >= start]
    return sum(one.tokens for one in part) / sum(one.seconds for one in part)


def test_simulated_budgets_are_what_rounds_give():
    """The table of static budgets against trees grown for these budgets."""

    class All:
        def __init__(self, budget):
            self.budget = budget

        def width(self, scores):
            return self.budget.top_k

        def rows(self, scores):
            return self.budget.nodes

    pair = Pair()
    for budget, gains in static_tokens(pair, 0, 60).items():
        for position in range(60):
            tree, path = pair.round(position, budget, All(budget))
            assert (len(tree), len(path)) == (min(budget.nodes, len(tree)), gains[position])
            assert tree.parents[path[1:]].tolist() == path[:-1]


KINDS = {"greedy": 0.0, "sampling": 1.0}
"""Kind of pair -> temperature that the policy is told."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("computer", COMPUTERS)
@pytest.mark.parametrize("draft", ["good", "very good"])
def test_a_good_draft_is_used_as_well_as_the_best_budget(computer, draft, kind, tmp_path):
    """On average over three texts: on a single one, luck decides a hundredth."""
    computer, shares = COMPUTERS[computer], []
    for text in range(1, 4):
        pair = Pair(greedy=kind == "greedy", seed=text)
        if draft == "very good":
            pair = replace(pair, quality=((0, 1.0),), fading=1.0, sureness=(6.0, 1.0))
        best = best_static_rate(pair, computer, 0, 2000)
        assert best > 1.1 * computer.plain_rate()  # or there is nothing to find
        played = play(rounds_on(computer, tmp_path / str(text), KINDS[kind]), pair, {0: computer}, 2000)
        shares.append(rate(played) / best)
    assert np.mean(shares) >= 0.97


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_that_prepares_a_graph_for_each_shape_is_given_few_shapes(kind, tmp_path):
    """Where another number of rows costs a tenth of a pass, the policy is at least as good as the best fixed one."""
    pair = Pair(greedy=kind == "greedy")
    computer = replace(COMPUTERS["rows cost a little"], switch=0.1)
    rounds = rounds_on(computer, tmp_path, KINDS[kind])
    played = play(rounds, pair, {0: computer}, 2000)
    assert rounds.cost.verify.switch == pytest.approx(math.log(1.1), abs=0.03)
    free = replace(computer, switch=0.0)
    freely = play(rounds_on(free, tmp_path / "free", KINDS[kind]), pair, {0: free}, 2000)
    seldom, often = (np.mean(np.diff([one.nodes for one in p if one.position >= 500]) != 0) for p in (played, freely))
    assert seldom < 0.5 * often
    assert rate(played) >= 0.97 * best_static_rate(pair, computer, 0, 2000)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("computer", COMPUTERS)
def test_a_useless_draft_costs_little(computer, kind, tmp_path):
    computer = COMPUTERS[computer]
    played = play(rounds_on(computer, tmp_path, KINDS[kind]), Pair(quality=((0, 0.0),)), {0: computer}, 500)
    assert rate(played) >= 0.95 * computer.plain_rate()
    rests = [one.rest for one in played if one.drafted and one.rest]
    assert rests == [FIRST_REST * 2**i for i in range(len(rests))] and len(rests) >= 3
    first = next(i for i, one in enumerate(played) if not one.drafted)
    assert first >= FIRST_TRIAL
    assert not any(one.drafted for one in played[first : first + FIRST_REST])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("computer", COMPUTERS)
def test_a_draft_that_becomes_good_is_found_again(computer, kind, tmp_path):
    """Useless for 300 tokens: after a thousand good ones nearly all rounds are drafted, but for an unlucky text."""
    computer, found = COMPUTERS[computer], 0
    for text in range(1, 6):
        pair = Pair(quality=((0, 0.0), (300, 0.95)), greedy=kind == "greedy", seed=text)
        played = play(rounds_on(computer, tmp_path / str(text), KINDS[kind]), pair, {0: computer}, 1600)
        assert not all(one.drafted for one in played if one.position < 300)
        late = [one.drafted for one in played if one.position >= 1300]
        found += sum(late) >= 0.9 * len(late)
    assert found >= 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("computer", COMPUTERS)
def test_verification_that_becomes_dearer_is_followed(computer, kind, tmp_path):
    pair, before = Pair(greedy=kind == "greedy"), COMPUTERS[computer]
    after = replace(before, pass_s=2 * before.pass_s, pass_row_s=2 * before.pass_row_s)
    played = play(rounds_on(before, tmp_path, KINDS[kind]), pair, {0: before, 1000: after}, 2000)
    assert rate(played, 1000) >= 0.95 * best_static_rate(pair, after, 1000, 2000)


# --- policies, their measurements and their files --------------------------------------------------

MEASURED = COMPUTERS["rows cost a little"].measurements()


class Measure:
    """Counts how often the machine is measured."""

    def __init__(self):
        self.times = 0

    def __call__(self) -> Measurements:
        self.times += 1
        return replace(MEASURED, draft_s=0.001 * self.times)  # so that each can be told from the others


def policy_in(directory, **options):
    return DeviceSplitPolicy(vram_budget=0, measured_in=directory, **options)


@pytest.mark.parametrize("threads", ["all", 4, None])
def test_threads_are_measured_or_kept(threads, tmp_path):
    with pytest.raises(ValueError, match=r'"auto" or "keep".*torch\.set_num_threads'):
        policy_in(tmp_path, threads=threads)


def test_a_target_is_looked_through_once(tmp_path):
    """Counting an exported graph's parameters takes fifty milliseconds, which no later generation pays."""
    policy, asked = policy_in(tmp_path), []
    for _ in range(3):
        policy.rounds("a", temperature=0.0, shape=lambda: asked.append(1)).prepare(Measure())
    assert asked == [1]


def test_a_machine_is_measured_once(tmp_path):
    policy, measure = policy_in(tmp_path), Measure()
    first = policy.rounds("a", temperature=0.0).prepare(measure)
    again = policy.rounds("a", temperature=0.7).prepare(measure)
    assert measure.times == 1 and first == again


def test_measurements_are_found_by_later_processes(tmp_path):
    measure = Measure()
    first = policy_in(tmp_path).rounds("a", temperature=0.0).prepare(measure)
    assert policy_in(tmp_path).rounds("a", temperature=0.0).prepare(measure) == first
    assert measure.times == 1
    policy_in(tmp_path / "elsewhere").rounds("a", temperature=0.0).prepare(measure)
    assert measure.times == 2


def test_measurements_are_found_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("DOVETAIL_CACHE", str(tmp_path / "said"))
    DeviceSplitPolicy(vram_budget=0).rounds("a", temperature=0.0).prepare(Measure())
    assert len(list((tmp_path / "said").iterdir())) == 1


def test_another_key_is_measured_anew(tmp_path):
    policy, measure = policy_in(tmp_path), Measure()
    for key in ("a", "b", "a"):
        policy.rounds(key, temperature=0.0).prepare(measure)
    assert measure.times == 2
    assert policy.costs["a"].measured != policy.costs["b"].measured


def test_a_file_of_another_machine_is_not_used(tmp_path):
    """A directory that was copied: the name fits, the key inside does not."""
    measure = Measure()
    for key in ("this machine", "another machine"):
        policy_in(tmp_path / key).rounds(key, temperature=0.0).prepare(measure)
    (own,), (other,) = (list((tmp_path / key).iterdir()) for key in ("this machine", "another machine"))
    shutil.copy(other, own)
    measured = policy_in(own.parent).rounds("this machine", temperature=0.0).prepare(measure)
    assert measure.times == 3 and measured.draft_s == 0.003
    assert policy_in(own.parent).rounds("this machine", temperature=0.0).prepare(measure) == measured
    assert measure.times == 3


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"key": "a"}', '{"key": "a", "measurements": {}}'])
def test_a_broken_file_is_measured_anew(content, tmp_path, caplog):
    measure = Measure()
    policy_in(tmp_path).rounds("a", temperature=0.0).prepare(measure)
    (file,) = tmp_path.iterdir()
    file.write_text(content)
    with caplog.at_level(logging.WARNING):
        policy_in(tmp_path).rounds("a", temperature=0.0).prepare(measure)
    assert measure.times == 2
    assert len(caplog.records) == 1 and str(file) in caplog.text and "measured again" in caplog.text
    policy_in(tmp_path).rounds("a", temperature=0.0).prepare(measure)
    assert measure.times == 2  # and written anew


def test_a_directory_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    policy, measure = policy_in(tmp_path / "file" / "records"), Measure()
    assert policy.rounds("a", temperature=0.0).prepare(measure) == policy.rounds("a", temperature=0.0).prepare(measure)
    assert measure.times == 1
    assert (tmp_path / "file").read_text() == "in the way"


def test_temperatures_learn_apart_and_generations_together(tmp_path):
    policy = policy_in(tmp_path)
    calibration = {"greedy": [0.3] * BINS, "sampling": [0.1] * BINS}
    greedy = policy.rounds("a", temperature=0.0, calibration=calibration)
    hot = policy.rounds("a", temperature=1.0, calibration=calibration)
    assert policy.rounds("a", temperature=0.0).mode is greedy.mode
    assert policy.rounds("a", temperature=1.0).mode is hot.mode is not greedy.mode
    assert policy.rounds("b", temperature=0.0).mode is not greedy.mode
    scores = np.log([0.2, 0.9])
    assert greedy.mode.curve(scores).tolist() == pytest.approx([0.3, 0.3])
    assert hot.mode.curve(scores).tolist() == pytest.approx([0.1, 0.1])


def test_what_one_generation_learns_the_next_one_knows(tmp_path):
    computer, pair = COMPUTERS["rows cost a little"], Pair(quality=((0, 0.0),))
    policy = policy_in(tmp_path)
    for _ in range(2):
        rounds = policy.rounds("a", temperature=1.0)
        rounds.prepare(computer.measurements)
        played = play(rounds, pair, {0: computer}, 100)
    assert sum(one.drafted for one in played) <= 4  # at most a trial or two, where the first took five rounds and more


@pytest.mark.parametrize("bound", [TreeBudget(1, 1, 1), TreeBudget(5, 2, 3), TreeBudget(4, 3, 1)], ids=str)
def test_plans_stay_within_the_bound(bound, tmp_path):
    rounds = rounds_on(COMPUTERS["passes cost, rows hardly do"], tmp_path)
    plan = rounds.next(PROMPT, bound)
    assert plan.budget == bound
    assert (plan.judge is None) == (bound.nodes == 1)
    if plan.judge:
        assert 1 < plan.judge.rows(np.log(np.linspace(0.9, 0.3, 20))) <= bound.nodes
        assert 1 <= plan.judge.width(np.log([0.6, 0.3, 0.02, 0.01])) <= bound.top_k


def test_plans_follow_a_bound_that_changes(tmp_path):
    """Near the end of a text trees get smaller; tables of seconds made for one bound are not used for another."""
    computer = COMPUTERS["passes cost, rows hardly do"]
    rounds = rounds_on(computer, tmp_path)
    likely = np.log(np.linspace(0.95, 0.5, 40))
    for bound in (LIMITS, TreeBudget(5, 2, 3), LIMITS):
        play(rounds, Pair(), {0: computer}, 1)
        assert rounds.drafting and rounds.cost.rounds % REFRESH  # tables would be used again
        plan = rounds.next(PROMPT, bound)
        assert plan.budget == bound and plan.judge is not None
        rows = plan.judge.rows(likely)
        assert (rows > 5) == (bound == LIMITS)


def rounds_before_rest(mode: Mode, accepted: "list[int]") -> int:
    """Drafted rounds, far slower than plain ones, of so many accepted tokens each, until drafting rests."""
    for number, tokens in enumerate(accepted, start=1):
        mode.count(1.0 + tokens, 1.0, seconds=1.0)
        mode.judge(plain_rate=10.0)
        if mode.rest:
            return number
    return 0


def test_trials_are_short_where_nothing_is_right():
    mode = Mode(AcceptanceCurve(SAMPLING))
    for rest, trial in ((FIRST_REST, FIRST_TRIAL), (2 * FIRST_REST, TRIAL), (4 * FIRST_REST, TRIAL)):
        assert rounds_before_rest(mode, [0] * 20) == trial
        assert mode.rest == rest
        mode.rest = 0
    for _ in range(20):
        rounds_before_rest(mode, [0] * 20)
        longest, mode.rest = mode.rest, 0
    assert longest == LONGEST_REST


def test_trials_are_longer_where_something_is_right():
    mode = Mode(AcceptanceCurve(SAMPLING))
    assert rounds_before_rest(mode, [1] + [0] * 20) == LONG_TRIAL


def test_a_rest_lets_what_was_learnt_fade():
    """Or the next trial would verify nothing, and learn nothing."""
    mode, scores = Mode(AcceptanceCurve(SAMPLING)), np.log(np.full(30, 0.65))
    for _ in range(FIRST_TRIAL):
        mode.curve.observe(scores, np.zeros(30, dtype=bool))
    before = mode.curve(scores[:1]).item()
    assert before < 0.1
    rounds_before_rest(mode, [0] * 20)
    assert before < mode.curve(scores[:1]).item() < 0.65 * 0.9


# --- text ------------------------------------------------------------------------------------------

OPTIONS = dict(max_new_tokens=60, eos_token_id=None, pad_token_id=0)
SAMPLED = dict(do_sample=True, temperature=0.8, top_k=20)


def generate(target, draft=None, seed=5, length=17, **options):
    torch.manual_seed(seed)
    extra = {} if draft is None else {"assistant_model": draft}
    return target.generate(prompt(length), **(OPTIONS | {"do_sample": False} | options), **extra)


@pytest.fixture
def adaptive(draft, tmp_path):
    """A draft whose budgets the policy chooses."""
    draft.budget = None
    draft.policy = policy_in(tmp_path)
    return draft


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("knows", [True, False], ids=["oracle", "random"])
def test_text_is_the_plain_one(llama, adaptive, oracle, options, knows):
    plain = generate(llama, **options)
    if knows:
        oracle(plain, 17)
    for _ in range(2):  # measured now, known then
        assert torch.equal(generate(llama, adaptive, **options), plain)
        assert not adaptive.report.warnings
    assert len(adaptive.policy.costs) == 1


def test_rounds_are_reported_with_what_was_expected(llama, adaptive):
    generate(llama, adaptive)
    report = adaptive.report
    assert report.probe_s > 0
    assert sum(one.emitted for one in report.rounds) == report.new_tokens - 1  # the first token is the prompt's
    context = 17 + 1
    for one in report.rounds:
        assert one.context == context
        assert one.predicted_s > 0 and 1 <= one.predicted_tokens <= one.nodes
        assert one.seconds.keys() == {*PHASES, "other"} and one.total_s > 0
        assert one.widths is None or len(one.widths) >= one.depth - 1
        context += one.emitted
    drafted = [one for one in report.rounds if one.widths is not None]
    assert len(drafted) >= FIRST_TRIAL


def test_a_policy_is_made_where_there_is_none(llama, draft):
    draft.budget = None
    assert torch.equal(generate(llama, draft), generate(llama))
    assert isinstance(draft.policy, DeviceSplitPolicy) and len(draft.policy.costs) == 1


@pytest.mark.parametrize("new_tokens", [1, 2, 3])
def test_a_short_first_text_is_enough_to_measure(llama, adaptive, new_tokens):
    """What is learnt of the machine does not depend on how much the first text had room for."""
    assert torch.equal(generate(llama, adaptive, max_new_tokens=new_tokens), generate(llama, max_new_tokens=new_tokens))
    assert torch.equal(generate(llama, adaptive), generate(llama))
    (cost,) = adaptive.policy.costs.values()
    assert cost.measured.verify_s.keys() >= {1, 8, LIMITS.nodes}
    assert cost.measured.level_s.keys() == {1, 2, 4, 8}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(("positions", "measured"), [(40, 0), (45, 1)])
def test_measuring_stays_within_the_targets_positions(family, positions, measured, tmp_path):
    """A prompt that all but fills the target's positions: measured if there is room for that, the text whole anyway."""
    target = tiny_target(family, max_position_embeddings=positions)
    draft = DovetailDraft.for_target(target)
    draft.budget, draft.policy = None, policy_in(tmp_path)
    options = dict(length=30, max_new_tokens=positions - 30)
    assert torch.equal(generate(target, draft, **options), generate(target, **options))
    assert not draft.report.warnings
    assert len(draft.policy.costs) == len(list(tmp_path.iterdir())) == measured
    generate(target, draft, length=5, max_new_tokens=positions - 5)
    assert len(draft.policy.costs) == 1  # another text has room


def test_a_drafter_that_fails_while_it_is_measured(llama, adaptive, monkeypatch, caplog):
    class Failing(FeatureDrafter):
        broken = True

        def grow(self, budget, judge=None):
            if self.broken:
                raise RuntimeError("out of memory")
            return super().grow(budget, judge)

    monkeypatch.setattr(dovetail_plugin.generation.generate, "FeatureDrafter", Failing)
    plain = generate(llama)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(generate(llama, adaptive), plain)
    assert len(adaptive.report.warnings) == len(caplog.records) == 1
    assert "out of memory" in caplog.text
    assert {one.nodes for one in adaptive.report.rounds} == {1} and len(adaptive.report.rounds) == 59
    assert not adaptive.policy.costs
    Failing.broken = False  # the next generation measures, and drafts
    assert torch.equal(generate(llama, adaptive), plain)
    assert len(adaptive.policy.costs) == 1 and not adaptive.report.warnings


def test_a_pass_that_fails_while_it_is_measured(adaptive):
    """Half-way through the target's layers: no rows of it may stay in the cache, the text goes on."""
    target = tiny_target("llama")
    passes = []

    def fail(_module, _args):
        passes.append(len(passes))
        if len(passes) == 4:  # the prompt's is the first
            raise RuntimeError("out of memory")

    plain = generate(target)
    hook = target.model.layers[1].register_forward_pre_hook(fail)
    try:
        assert torch.equal(generate(target, adaptive), plain)
    finally:
        hook.remove()
    assert len(passes) > 4 and len(adaptive.report.warnings) == 1


def test_generations_at_once_share_a_policy(tmp_path, monkeypatch):
    """Two threads, each with a target and a draft of its own, of one kind: measured once, and both texts right."""
    policy, texts, ready = policy_in(tmp_path), {}, threading.Barrier(2)
    measured, measure = [], dovetail_plugin.generation.loop.measure

    def counted(*args, **kwargs):
        measured.append(threading.get_ident())
        return measure(*args, **kwargs)

    monkeypatch.setattr(dovetail_plugin.generation.loop, "measure", counted)
    pairs = []
    for _ in range(2):
        target = tiny_target("llama")
        torch.manual_seed(7)
        pairs.append((target, DovetailDraft.for_target(target, blocks=2)))
        pairs[-1][1].budget, pairs[-1][1].policy = None, policy

    def run(number):
        target, draft = pairs[number]
        ready.wait()
        texts[number] = [generate(target, draft, max_new_tokens=80, length=20 + number + i) for i in range(3)]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert len(measured) == 1 and len(policy.costs) == 1
    for number, (target, draft) in enumerate(pairs):
        assert not draft.report.warnings
        for i, text in enumerate(texts[number]):
            assert torch.equal(text, generate(target, max_new_tokens=80, length=20 + number + i))
