"""Measures what a draft would bring before it is trained: real passes, random tokens, simulated acceptance.

A target (with random weights if need be), any draft that fits it, and the rate at which the draft's first choice is to
be right give what real generation gives: a text, its seconds and a report. Everything that costs time is done as in
real generation: passes, levels, cache moves, the policy. Two things are replaced, by the same probabilities: what the
draft says, and how often it is right.

    rank of a child     0      1      2      3     ...
    rate 0.8          0.8    0.1   0.05   0.025

Each further child gets half of what is left, or `rate` of it where that is less. The loop, the policy and the engines
do not know of this module.
"""

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PretrainedConfig,
    StoppingCriteriaList,
)

from ..drafts.base import Draft, Drafter, Judge
from ..drafts.feature_drafter import FeatureDrafter
from ..generation.open import Request, open_generation, policy_of
from ..generation.text import Text
from ..report import PhaseClock
from ..runner import DraftRunner, Pass, Predicted, RowStorage
from ..targets.base import Engine, TargetModel
from ..targets.engine import engine_of
from ..tree import DraftTree, TreeBudget
from .compare import BenchResult, Comparison, Run

RANKS = 32
"""Number of children of a node that may be right; further ones never are."""

LEAST = 1e-9
"""Probability used in place of 0, whose logarithm is not finite."""


def probabilities(rate: float) -> list[float]:
    """Return the probability of being the next token for each of a node's RANKS children, the likeliest first.

    Raises:
        ValueError: the rate is not between 0 and 1.
    """
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"the rate of acceptance must be between 0 and 1, got {rate}.")
    share, left, ranks = min(rate, 0.5), 1.0 - rate, [rate]
    while len(ranks) < RANKS:
        ranks.append(left * share)
        left -= ranks[-1]
    return ranks


class SyntheticRunner:
    """Runs a draft's steps as another runner does, and replaces the logits; implements `DraftRunner`.

    The likeliest tokens of a row differ from those of the row before it.

    Args:
        runner: does the work.
        rate: see `probabilities`.
    """

    def __init__(self, runner: DraftRunner[Any], rate: float) -> None:
        self._runner, self._ranks = runner, probabilities(rate)
        self.device, self.dtype, self.runs_in_torch = runner.device, runner.dtype, runner.runs_in_torch
        self.weights = runner.weights
        self._windows: Tensor | None = None  # (V + 1, V): the same row, one place further to the left each time
        self._next = 0

    def new_rows(self, capacity: int) -> RowStorage:
        """Make rows of the runner that does the work."""
        return self._runner.new_rows(capacity)

    def run(self, step: Pass, rows: RowStorage) -> Predicted:
        """Run the pass and replace its logits."""
        predicted = self._runner.run(step, rows)
        return Predicted(predicted.features, self._instead_of(predicted.logits))

    def _instead_of(self, logits: Tensor) -> Tensor:
        """Return synthetic logits in the shape, dtype and place of `logits` (n, V)."""
        count, size = logits.shape
        if self._windows is None:
            row = self._row(size).to(logits)
            self._windows = torch.cat([row, row]).unfold(0, size, 1)
        if self._next + count > size:
            self._next = 0
        first, self._next = self._next, self._next + count
        return self._windows[first : first + count]

    def _row(self, size: int) -> Tensor:
        """Return (V,) float32 logits: log-probabilities by rank, and equal ones for all other tokens."""
        ranks = torch.tensor(self._ranks)[:size]
        others = (1.0 - ranks.sum()) / max(size - len(ranks), 1)
        return torch.cat([ranks, others.expand(size - len(ranks))]).clamp(min=LEAST).log()


class SyntheticText(Text):
    """A text whose next token is drawn at random: a child in the latest tree, each with its rank's probability.

    What the target predicts is computed and read as in greedy search, then ignored. Only its length ends the text.

    Args:
        input_ids: (1, T) int64 prompt.
        rate: see `probabilities`.
        max_new_tokens: tokens to generate.
        seed: of the random choices.
    """

    def __init__(self, input_ids: Tensor, *, rate: float, max_new_tokens: int, seed: int) -> None:
        config = GenerationConfig(max_length=input_ids.shape[1] + max_new_tokens, do_sample=False)
        stop = StoppingCriteriaList([MaxLengthCriteria(config.max_length)])
        super().__init__(input_ids, processors=LogitsProcessorList(), criteria=stop, config=config)
        self.config = config
        ranks = probabilities(rate)
        self._weights, self._random = [*ranks, max(1.0 - sum(ranks), 0.0)], random.Random(seed)  # the last: none
        self._tree_tokens: list[int] = []
        self._children: dict[int, list[int]] = {}  # node -> nodes below it, the likeliest first
        self._node = 0

    def watch(self, tree: DraftTree) -> None:
        """Let the next tokens come from this tree, until one of them is not in it."""
        self._tree_tokens, self._node, self._children = tree.tokens.tolist(), 0, {}
        parents, scores = tree.parents.tolist(), tree.scores.tolist()
        for node in sorted(range(1, len(tree)), key=lambda node: -scores[node]):
            self._children.setdefault(parents[node], []).append(node)

    def _pick(self, scores: Tensor) -> Tensor:
        int(super()._pick(scores))  # waits for the target, on whatever device it is
        children = self._children.get(self._node, [])
        (rank,) = self._random.choices(range(RANKS + 1), self._weights)
        if rank < len(children):
            self._node = children[rank]
            token = self._tree_tokens[self._node]
        else:
            wrong = {self._tree_tokens[child] for child in children}
            token = self._random.randrange(scores.shape[-1])
            while token in wrong:
                token = self._random.randrange(scores.shape[-1])
            self._children = {}  # the path has left the tree
        return torch.tensor([token], device=self.ids.device)


class WatchedDrafter(Drafter):
    """Another drafter, whose trees a `SyntheticText` is shown.

    Args:
        drafter: does the work.
        text: is shown the trees.
    """

    def __init__(self, drafter: Drafter, text: SyntheticText) -> None:
        self._drafter, self._text = drafter, text
        self.clock, self.device, self.runs_in_torch = drafter.clock, drafter.device, drafter.runs_in_torch

    def identity(self) -> list[Any] | None:
        """Return the identity of the drafter that does the work."""
        return self._drafter.identity()

    def begin(self, features: Tensor, input_ids: Tensor) -> None:
        """Start the text."""
        self._drafter.begin(features, input_ids)

    def advance(self, features: Tensor, tokens: Tensor) -> None:
        """Take note that the text grew."""
        self._drafter.advance(features, tokens)

    def catch_up(self) -> None:
        """Run what was handed over."""
        self._drafter.catch_up()

    def grow(self, budget: TreeBudget, judge: Judge | None = None) -> DraftTree:
        """Grow a tree and show it to the text."""
        tree = self._drafter.grow(budget, judge)
        self._text.watch(tree)
        return tree


class SyntheticDraft(Draft):
    """Another draft with all its passes, but other logits, for one synthetic text.

    Args:
        draft: does the work. Its budget and policy are used.
        text: is shown the trees.
        rate: see `probabilities`.
    """

    def __init__(self, draft: Draft, text: SyntheticText, rate: float) -> None:
        self._draft, self._text, self._rate = draft, text, rate
        self.budget, self.policy = draft.budget, draft.policy

    @property
    def device(self) -> torch.device:
        """Device of the draft that does the work."""
        return self._draft.device

    @property
    def calibration(self) -> Mapping[str, Sequence[float]] | None:
        """Calibration of the draft that does the work."""
        return self._draft.calibration

    def check_target(self, target: TargetModel) -> None:
        """Refuse what the draft that does the work refuses."""
        self._draft.check_target(target)

    def attach(self, target: TargetModel) -> None:
        """Attach the draft that does the work."""
        self._draft.ensure_attached(target)

    def feature_layers(self, target: PretrainedConfig) -> tuple[int, ...] | None:
        """Return the layers that the draft that does the work reads."""
        return self._draft.feature_layers(target)

    def identity(self) -> list[Any]:
        """Return the identity of the draft that does the work."""
        return self._draft.identity()

    def new_drafter(self, engine: Engine, *, capacity: int, clock: PhaseClock) -> WatchedDrafter:
        """Make a drafter whose logits are replaced.

        Raises:
            ValueError: the draft computes no logits.
        """
        drafter = self._draft.new_drafter(engine, capacity=capacity, clock=clock)
        if not isinstance(drafter, FeatureDrafter):
            raise ValueError(
                f"acceptance can only be simulated for a draft that computes logits, not for a "
                f"{type(self._draft).__name__}."
            )
        drafter.runner = SyntheticRunner(drafter.runner, self._rate)
        return WatchedDrafter(drafter, self._text)


def synthetic_generate(
    target: Any, draft: Draft | None, input_ids: Tensor, *, rate: float, max_new_tokens: int, seed: int = 0
) -> Run:
    """Generate as `generate` does with a draft, or plainly without one, but with random tokens.

    Budgets are the draft's own or its policy's. A policy remembers what was accepted with its draft, so use a new draft
    for another rate.

    Args:
        target: of any engine.
        draft: fits the target; its `report` is set. None decodes plainly through the same code.
        input_ids: (1, T) int64.
        rate: probability that the likeliest child of a node is right; see `probabilities` for the others.
        max_new_tokens: tokens to generate.
        seed: of the random choices.

    Raises:
        ValueError: the rate is not between 0 and 1; no tokens to start from or to generate; more than one sequence; the
            target cannot be verified, or the draft does not fit it.
    """
    if input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
        raise ValueError(f"the prompt must be one sequence of tokens, (1, T), got {tuple(input_ids.shape)}.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    start_s = time.perf_counter()
    engine = engine_of(target)
    engine.check()
    text = SyntheticText(input_ids, rate=rate, max_new_tokens=max_new_tokens, seed=seed)
    synthetic = None
    if draft is not None:
        policy_of(draft)
        synthetic = SyntheticDraft(draft, text, rate)
    with (
        torch.no_grad(),
        open_generation(target, engine, Request(text, text.config, engine.cache(None)), synthetic) as decoder,
    ):
        decoder.run()
    if draft is not None and synthetic is not None:
        draft.report = synthetic.report
    return Run(text.length - text.prompt_tokens, time.perf_counter() - start_s, text.ids.clone())


@dataclass
class SyntheticComparison(Comparison):
    """A `Comparison` with random tokens on both sides, whose texts are not compared.

    Args:
        options: of `generate`; only `max_new_tokens` is used.
        rate: see `synthetic_generate`.
    """

    rate: float = 0.8

    def run(self, input_ids: Tensor, *, drafted: bool, number: int = 0, **changes: Any) -> Run:
        """Run one synthetic generation. See `Comparison.run`."""
        return synthetic_generate(
            self.target,
            self.draft if drafted else None,
            input_ids,
            rate=self.rate,
            max_new_tokens=(self.options | changes)["max_new_tokens"],
            seed=self.seed + number,
        )

    def _compare_texts(self, plain: Run, drafted: Run) -> None:
        """Compare nothing: the texts are random."""

    def result(self, **settings: Any) -> BenchResult:
        """Return the result of `Comparison.result`, marked as simulated."""
        label = {"acceptance": f"SYNTHETIC, simulated at {self.rate:.2f}"}
        return replace(super().result(**label, **settings), identical=0, synthetic_acceptance=self.rate)
