"""Compares plain `generate` with the same call with a draft. The two take turns and are counted by the same code.

Takes a target, a draft, prompts as token ids and options of `generate`, and returns a `BenchResult` that prints as a
table and as one JSON line. The texts of both sides are compared: where greedy texts differ, the target's logits at the
first different token show whether rounding only broke a tie.
"""

import json
import statistics
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..drafts.base import Draft
from ..report import PHASES
from ..targets.engine import engine_of, next_logits
from .provenance import provenance


@dataclass(frozen=True)
class Run:
    """One generation.

    Attributes:
        tokens: number of new tokens.
        seconds: seconds of the whole call of `generate`, prompt included.
        ids: (1, T) int64, prompt and new tokens.
    """

    tokens: int
    seconds: float
    ids: Tensor

    @property
    def tokens_per_s(self) -> float:
        """New tokens divided by all seconds."""
        return self.tokens / self.seconds


def timed_generate(target: PreTrainedModel, input_ids: Tensor, **options: Any) -> Run:
    """Time one call of `target.generate` from outside. Both sides of every comparison use this function."""
    start_s = time.perf_counter()
    ids = target.generate(input_ids, **options)
    return Run(ids.shape[1] - input_ids.shape[1], time.perf_counter() - start_s, ids)


@dataclass
class BenchResult:
    """Figures of a comparison: medians over prompts; phases and acceptance over all rounds of all prompts.

    Attributes:
        plain_tokens_per_s: median speed without a draft.
        draft_tokens_per_s: median speed with the draft.
        ratio: median over prompts of draft speed divided by plain speed.
        ratio_quartiles: first and third quartile of these ratios.
        acceptance_length: mean tokens emitted per round.
        nodes_per_round: mean nodes verified per round.
        rounds: number of rounds.
        phase_ms_per_round: mean milliseconds per round by phase, "other" included.
        round_ms: mean milliseconds per round.
        prompts: number of prompts.
        new_tokens: tokens generated with the draft, over all prompts.
        identical: number of prompts whose two texts are the same.
        ties: number of greedy texts that diverge where the plain run's two best logits were equal up to rounding.
        differences: number of texts that diverge otherwise. Must be 0 in greedy generation.
        settings: what was measured, for example models, dtype and options.
        synthetic_acceptance: rate at which acceptance was simulated, in which case there are no texts to compare. None
            for real acceptance.
    """

    plain_tokens_per_s: float
    draft_tokens_per_s: float
    ratio: float
    ratio_quartiles: tuple[float, float]
    acceptance_length: float
    nodes_per_round: float
    rounds: int
    phase_ms_per_round: dict[str, float]
    round_ms: float
    prompts: int
    new_tokens: int
    identical: int
    ties: int
    differences: int
    settings: dict[str, Any] = field(default_factory=dict)
    synthetic_acceptance: float | None = None

    def table(self) -> str:
        """The result as a table of several lines."""
        lines = [
            f"{'':24}{'plain':>10}{'draft':>10}{'ratio':>10}",
            f"{'tokens/s (median)':24}{self.plain_tokens_per_s:10.2f}{self.draft_tokens_per_s:10.2f}{self.ratio:10.2f}",
            f"{'ratio, quartiles':24}{self.ratio_quartiles[0]:20.2f}{self.ratio_quartiles[1]:10.2f}",
            f"{'acceptance length':24}{self.acceptance_length:20.2f}",
            f"{'nodes per round':24}{self.nodes_per_round:20.1f}",
            f"{'rounds':24}{self.rounds:20d}",
        ]
        for phase, ms in self.phase_ms_per_round.items():
            share = ms / self.round_ms if self.round_ms else 0.0
            lines.append(f"{'  ' + phase + ', ms per round':24}{ms:20.2f}{share:10.1%}")
        lines.append(f"{'  round, ms':24}{self.round_ms:20.2f}")
        if self.synthetic_acceptance is not None:
            return "\n".join([*lines, f"SYNTHETIC: acceptance simulated at {self.synthetic_acceptance:.2f}"])
        return "\n".join([*lines, f"{'texts':24}{self.about_texts():>30}"])

    def about_texts(self) -> str:
        """How many texts are the same with the draft and without."""
        texts = f"{self.identical} of {self.prompts} identical"
        if self.ties:
            texts += f", {self.ties} diverge at a tie of the target"
        if self.differences:
            texts += f", {self.differences} DIFFER"
        return texts

    def json_line(self) -> str:
        """All figures with command, versions and machine, as one line of JSON."""
        return json.dumps(asdict(self) | provenance())


@dataclass
class Comparison:
    """Runs plain and drafted generations in turns and collects their figures.

    Attributes:
        target: the target, on its device.
        draft: a draft for it, on its device.
        options: keyword arguments of `generate`, for both sides.
        seed: seed for sampling. Prompt number i uses `seed + i` on both sides.
        pairs: plain run and drafted run of each prompt.
        reports: `GenerationReport` of each drafted run.
        gaps: relative logit gap at the divergence of each pair of different texts, see `top_gap_at_difference`.
    """

    target: PreTrainedModel
    draft: Draft
    options: dict[str, Any]
    seed: int = 0
    pairs: list[tuple[Run, Run]] = field(default_factory=list)
    reports: list[Any] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    def add(self, input_ids: Tensor) -> None:
        """Run one prompt (1, T) both ways. Which way comes first alternates."""
        order = (False, True) if len(self.pairs) % 2 == 0 else (True, False)
        runs = {}
        for drafted in order:
            runs[drafted] = self.run(input_ids, drafted=drafted, number=len(self.pairs))
        self.pairs.append((runs[False], runs[True]))
        self.reports.append(self.draft.report)
        self._compare_texts(runs[False], runs[True])

    def run(self, input_ids: Tensor, *, drafted: bool, number: int = 0, **changes: Any) -> Run:
        """Run one generation without adding it to the result.

        Args:
            input_ids: (1, T) int64 prompt.
            drafted: whether to use the draft.
            number: is added to the seed.
            changes: replace entries of `options`.
        """
        torch.manual_seed(self.seed + number)
        extra = {"assistant_model": self.draft} if drafted else {}
        return timed_generate(self.target, input_ids, **(self.options | changes), **extra)

    def _compare_texts(self, plain: Run, drafted: Run) -> None:
        if not torch.equal(plain.ids, drafted.ids):
            self.gaps.append(top_gap_at_difference(self.target, plain.ids, drafted.ids))

    def warm_up(self, input_ids: Tensor) -> None:
        """Run one short generation of each kind without adding it to the result."""
        for drafted in (False, True):
            self.run(input_ids, drafted=drafted, max_new_tokens=8)

    def result(self, **settings: Any) -> BenchResult:
        """The figures of all prompts added so far. `settings` are stored with them."""
        plain = [p.tokens_per_s for p, _ in self.pairs]
        drafted = [d.tokens_per_s for _, d in self.pairs]
        ratios = [d / p for p, d in zip(plain, drafted, strict=True)]
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        rounds = [r for report in self.reports for r in report.rounds]
        count = max(len(rounds), 1)
        phases = {
            name: 1e3 * sum(report.phase_seconds[name] for report in self.reports) / count
            for name in (*PHASES, "other")
        }
        sampling = bool(self.options.get("do_sample"))
        ties = 0 if sampling else sum(gap <= tie_tolerance(engine_of(self.target).rounding) for gap in self.gaps)
        return BenchResult(
            plain_tokens_per_s=statistics.median(plain),
            draft_tokens_per_s=statistics.median(drafted),
            ratio=statistics.median(ratios),
            ratio_quartiles=(quartiles[0], quartiles[2]),
            acceptance_length=sum(r.emitted for r in rounds) / count,
            nodes_per_round=sum(r.nodes for r in rounds) / count,
            rounds=len(rounds),
            phase_ms_per_round=phases,
            round_ms=sum(phases.values()),
            prompts=len(self.pairs),
            new_tokens=sum(d.tokens for _, d in self.pairs),
            identical=len(self.pairs) - len(self.gaps),
            ties=ties,
            differences=len(self.gaps) - ties,
            settings=settings,
        )


def tie_tolerance(dtype: torch.dtype) -> float:
    """Largest relative gap of two logits that counts as a tie: a few roundings of the dtype.

    It is 0 for float32, where texts must be identical.
    """
    return 0.0 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps


def top_gap_at_difference(target: PreTrainedModel, plain: Tensor, drafted: Tensor) -> float:
    """Gap between the target's two best logits where two texts diverge, relative to the best logit.

    The logits come from a plain pass over the common text.

    Args:
        target: of any engine.
        plain: (1, T) int64 text of the plain run.
        drafted: (1, T) int64 text of the drafted run.

    Returns:
        The gap, or infinity if one text is a prefix of the other.
    """
    shared = min(plain.shape[1], drafted.shape[1])
    differs = (plain[0, :shared] != drafted[0, :shared]).nonzero()
    if not len(differs):
        return float("inf")
    at = int(differs[0])
    best = next_logits(target, plain[:, :at])[0].float().topk(2).values
    return float((best[0] - best[1]) / best[0].abs())
