"""Try before training: real passes of target and draft, tokens that mean nothing, acceptance simulated at a rate.

Enters: a target, with random weights if need be, any draft that fits it, and the rate at which the draft's first
choice is to be right. Leaves: what real generation leaves, a text, its seconds and a report. All that costs time is
done as ever: passes, levels, cache moves, the policy. Only two things are replaced, and by the same probabilities:

    rank of a child     0      1      2      3     ...
    rate 0.8          0.8    0.1   0.05   0.025          what the draft says of it, and how often it is right

Half of what is left goes to each further child, or `rate` of what is left where that is less. The loop, the
policy and the engines do not know of this module.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from .. import machine
from ..drafts.base import DraftRunner
from ..drafts.feature_drafter import FeatureDrafter
from ..drafts.model import DovetailDraft
from ..generation.generate import DRAFT_ROWS, draft_runner_for, planner_for
from ..generation.loop import Decoder
from ..generation.text import Text
from ..policy.device_split import DeviceSplitPolicy
from ..policy.planner import PLAIN, FixedPlanner, RoundPlanner
from ..report import GenerationReport
from ..targets.base import Target, TargetOutput
from ..targets.engine import engine_of
from ..tree import DraftTree
from .compare import BenchResult, Comparison, Run

RANKS = 32
"""Children of a node that may be right; further ones never are."""

LEAST = 1e-9
"""Probability that stands for 0, whose logarithm is no number."""


def probabilities(rate: float) -> list[float]:
    """(RANKS,) of being the next token, for a node's children, the likeliest first.

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
    """Runs a draft's steps as another runner does, and replaces what the logits say; implements `DraftRunner`.

    The likeliest tokens of a row are other ones than those of the row before it.

    Args:
        runner: does the work.
        rate: see `probabilities`.
    """

    def __init__(self, runner: DraftRunner, rate: float) -> None:
        self._runner, self._ranks = runner, probabilities(rate)
        self.device, self.dtype, self.runs_in_torch = runner.device, runner.dtype, runner.runs_in_torch
        self.weights = runner.weights
        self._windows: Tensor | None = None  # (V + 1, V): the same row, further to the left every time
        self._next = 0

    def new_rows(self, capacity: int) -> Sequence[Any]:
        """As `DraftRunner.new_rows`."""
        return self._runner.new_rows(capacity)

    def run(
        self,
        features: Tensor,
        tokens: Tensor,
        rope: tuple[Tensor, Tensor],
        rows: Any,
        mask: Tensor | None,
        logits_from: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """As `DraftRunner.run`."""
        predicted, logits = self._runner.run(features, tokens, rope, rows, mask, logits_from)
        return predicted, self._instead_of(logits)

    def _instead_of(self, logits: Tensor) -> Tensor:
        """A view in the shape, dtype and place of (n, V) logits."""
        count, size = logits.shape
        if self._windows is None:
            row = self._row(size).to(logits)
            self._windows = torch.cat([row, row]).unfold(0, size, 1)
        if self._next + count > size:
            self._next = 0
        first, self._next = self._next, self._next + count
        return self._windows[first : first + count]

    def _row(self, size: int) -> Tensor:
        """(V,) float32 logits: log-probabilities by rank, and all other tokens alike."""
        ranks = torch.tensor(self._ranks)[:size]
        others = (1.0 - ranks.sum()) / max(size - len(ranks), 1)
        return torch.cat([ranks, others.expand(size - len(ranks))]).clamp(min=LEAST).log()


class SyntheticText(Text):
    """A text whose next token is drawn by lot: a child in the tree scored last, each with its rank's probability.

    What the target says is computed and read as in greedy search, then thrown away. Nothing ends it but its length.

    Args:
        input_ids: (1, T) int64 prompt.
        rate: see `probabilities`.
        max_new_tokens: its length beyond the prompt.
        seed: of its own random numbers.
    """

    def __init__(self, input_ids: Tensor, *, rate: float, max_new_tokens: int, seed: int) -> None:
        config = GenerationConfig(max_length=input_ids.shape[1] + max_new_tokens, do_sample=False)
        stop = StoppingCriteriaList([MaxLengthCriteria(config.max_length)])
        super().__init__(input_ids, processors=LogitsProcessorList(), criteria=stop, config=config)
        self.config = config
        ranks = probabilities(rate)
        self._weights, self._random = [*ranks, max(1.0 - sum(ranks), 0.0)], random.Random(seed)  # the last is "none"
        self._tree_tokens: list[int] = []
        self._children: dict[int, list[int]] = {}  # nodes below a node, the likeliest first
        self._node = 0

    def watch(self, tree: DraftTree) -> None:
        """The next tokens may come from this tree."""
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
        return torch.tensor([token], device=self.ids.device)


class WatchedTarget:
    """A target that shows a text what it scores; implements `Target`."""

    def __init__(self, target: Target, text: SyntheticText) -> None:
        self._target, self._text = target, text
        self.supports_tree, self.max_length = target.supports_tree, target.max_length

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None) -> TargetOutput:
        """As `Target.prefill`."""
        return self._target.prefill(input_ids, attention_mask)

    def score(self, tree: DraftTree) -> TargetOutput:
        """As `Target.score`."""
        self._text.watch(tree)
        return self._target.score(tree)

    def keep(self, path: list[int]) -> None:
        """As `Target.keep`."""
        self._target.keep(path)


def synthetic_generate(
    target: Any, draft: DovetailDraft | None, input_ids: Tensor, *, rate: float, max_new_tokens: int, seed: int = 0
) -> Run:
    """Generate as `generate` does with a draft, or plainly without one, but by lot.

    Budgets are the draft's own or its policy's, as ever. A policy remembers what was accepted with its draft: take
    a new draft for another rate.

    Args:
        target: of any engine. draft: fits it; its `report` is set. None decodes plainly, through the same code.
        input_ids: (1, T) int64.
        rate: at which the likeliest child of a node is right; see `probabilities` for the others.
        max_new_tokens: that are generated.
        seed: of the lots.

    Raises:
        ValueError: the rate is not between 0 and 1; no tokens to start from or to make; more than one sequence; the
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
    report, drafter = GenerationReport(), None
    planner: RoundPlanner = FixedPlanner(PLAIN)
    if draft is not None:
        draft.attach_once(target)
        draft.report = report
        draft.policy = draft.policy or DeviceSplitPolicy()
        runner = SyntheticRunner(draft_runner_for(draft, engine), rate)
        drafter = FeatureDrafter(draft, text.length + DRAFT_ROWS, report.clock, runner)
        planner = planner_for(draft, target, engine, runner, text.config)
    sizes = dict(max_length=text.max_length, max_nodes=planner.limits.nodes)
    session = engine.session(engine.cache(None), **sizes, prefill_chunk=None, model_kwargs={})
    in_torch = engine.runs_in_torch or (drafter is not None and drafter.runner.runs_in_torch)
    vary = engine.runs_in_torch and draft is not None and draft.policy.threads == "auto"
    with session as verified, torch.no_grad(), machine.thread_count(None if in_torch else 1):
        Decoder(WatchedTarget(verified, text), drafter, text, planner, report, vary_threads=vary).run()
    return Run(text.length - text.prompt_tokens, time.perf_counter() - start_s, text.ids.clone())


@dataclass
class SyntheticComparison(Comparison):
    """As `Comparison`, with both sides by lot; their texts have nothing to do with each other.

    Args:
        options: of `generate`, of which `max_new_tokens` is used.
        rate: of `synthetic_generate`.
    """

    rate: float = 0.8

    def run(self, input_ids: Tensor, *, drafted: bool, number: int = 0, **changes: Any) -> Run:
        """As `Comparison.run`."""
        assert isinstance(self.draft, DovetailDraft), "other drafts read no features whose passes could be timed"
        return synthetic_generate(
            self.target,
            self.draft if drafted else None,
            input_ids,
            rate=self.rate,
            max_new_tokens=(self.options | changes)["max_new_tokens"],
            seed=self.seed + number,
        )

    def _compare_texts(self, plain: Run, drafted: Run) -> None:
        """Nothing to compare."""

    def result(self, **settings: Any) -> BenchResult:
        """As `Comparison.result`, marked as simulated."""
        label = {"acceptance": f"SYNTHETIC, simulated at {self.rate:.2f}"}
        return replace(super().result(**label, **settings), identical=0, synthetic_acceptance=self.rate)
