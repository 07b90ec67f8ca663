"""The loop: prefill, then rounds of draft, verify, accept and keep. Only this module knows their order.

    prompt -> target.prefill -> drafter.begin -> (once on this machine) probe
    round:  rounds.next -> drafter.grow -> target.score -> accept -> target.keep -> drafter.advance -> rounds.observe

Its input is a session, a drafter, the text and the budgets of its rounds, all prepared. Its results are the finished
text and a report. If the drafter fails, the loop continues with trees of one node, which is plain decoding, so the text
is not affected.
"""

import logging
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import machine
from ..drafts.base import Drafter
from ..drafts.feature_drafter import without_padding
from ..policy.probe import measure
from ..policy.rounds import PLAIN, FixedRounds, Outcome, RoundPlan, Rounds
from ..report import PHASES, GenerationReport, Round
from ..targets.base import TargetOutput, TargetSession
from ..tree import DraftTree, TreeBudget
from ..verify import Acceptance, accept
from .text import Text

logger = logging.getLogger(__name__)


@dataclass
class Decoder:
    """One generation. `run` is the algorithm; the rest makes a failing draft harmless.

    Attributes:
        target: an open session.
        drafter: proposes trees. None decodes plainly through the same code.
        text: the prompt, to which tokens are added.
        rounds: how much each round may draft.
        report: receives the figures of this generation.
        cached: tokens at the start of the text whose rows the target holds from earlier turns.
        attention_mask: (1, tokens before the first new one) with 0 at padding, or None.
        vary_threads: whether the number of torch's threads may be changed. The caller restores it.
    """

    target: TargetSession
    drafter: Drafter | None
    text: Text
    rounds: Rounds
    report: GenerationReport
    cached: int = 0
    attention_mask: Tensor | None = None
    vary_threads: bool = False

    def run(self) -> None:
        """Generate until the text stops."""
        report, text = self.report, self.text
        report.prompt_tokens = text.length
        start_s = time.perf_counter()
        output = self.target.prefill(text.ids[:, self.cached :], self.attention_mask)
        choice = text.choose(output.logits)
        self._begin(output)
        report.prefill_s = time.perf_counter() - start_s

        start_s = time.perf_counter()
        if not choice.stop:
            self._prepare(choice.token)
        report.probe_s = time.perf_counter() - start_s
        report.clock.reset()

        start_s = time.perf_counter()
        last, stop = choice.token, choice.stop
        while not stop:
            acceptance = self._round(last)
            last, stop = acceptance.tokens[-1], acceptance.stop
        report.decode_s = time.perf_counter() - start_s
        report.new_tokens = text.length - text.prompt_tokens

    def _round(self, last: int) -> Acceptance:
        start_s = time.perf_counter()
        clock, text, context = self.report.clock, self.text, self.text.length
        before = dict(clock.seconds)
        plan = self.rounds.next(context, self._bound())
        tree = self._grow(last, plan)
        forecast = self.rounds.forecast(plan, len(tree), context)
        with clock.phase("verify"):
            output = self.target.score(tree)
        with clock.phase("accept"):
            acceptance = accept(tree, lambda node: text.choose(output.logits[node : node + 1]))
            self.target.keep(acceptance.path)
        self._advance(output, acceptance)  # in the last round too: another turn may follow
        seconds = {name: clock.seconds[name] - before[name] for name in PHASES}
        seconds["other"] = max(time.perf_counter() - start_s - sum(seconds.values()), 0.0)
        drafted = plan.budget.nodes > 1 and self.drafter is not None
        self.report.rounds.append(
            Round(
                nodes=len(tree),
                emitted=len(acceptance.tokens),
                depth=int(tree.depths.max()),
                widths=tuple(plan.judge.widths) if plan.judge else None,
                context=context,
                seconds=seconds,
                predicted_s=forecast.cost.total_s if forecast.cost else None,
                predicted_tokens=forecast.tokens,
            )
        )
        self.rounds.observe(Outcome(tree, acceptance, context, drafted, seconds), forecast)
        return acceptance

    def _bound(self) -> TreeBudget:
        """Return the largest tree allowed: the policy's limits, the room in the text and in the target's positions."""
        room = self.text.room
        if self.target.max_length is not None:  # no node beyond the target's positions
            room = min(room, self.target.max_length - self.text.length + 1)
        bound = self.rounds.limits.clipped(max(room, 1)) if self.drafter is not None else PLAIN
        return bound if self.target.supports_tree else bound.as_chain()

    # --- calls of the draft, whose failures must not affect the text ---------------------------

    def _begin(self, output: TargetOutput) -> None:
        if self.drafter is None:
            return
        features, ids = without_padding(output.features, self.text.ids[0], self.attention_mask)
        try:
            self.drafter.begin(features, ids)
            if self.rounds.drafting:
                self.drafter.catch_up()
        except Exception as error:
            self._give_up(error)

    def _prepare(self, token: int) -> None:
        drafter, limits, positions = self.drafter, self.rounds.limits, self.target.max_length
        if drafter is None:
            return
        if positions is not None and self.text.length + limits.depth >= positions:
            self.rounds = FixedRounds(PLAIN)  # there is no room for the trees of a measurement, and little for text
            return
        try:
            measured = self.rounds.prepare(
                lambda: measure(
                    self.target,
                    drafter,
                    token=token,
                    context=self.text.length,
                    limits=limits if self.target.supports_tree else limits.as_chain(),
                    vary_threads=self.vary_threads,
                )
            )
        except Exception as error:
            self._give_up(error)
            return
        if measured is not None and measured.threads is not None and self.vary_threads:
            machine.use(measured.threads, measured.processors)

    def _grow(self, last: int, plan: RoundPlan) -> DraftTree:
        if self.drafter is not None and plan.budget.nodes > 1:
            try:
                return self.drafter.grow(plan.budget, plan.judge)
            except Exception as error:
                self._give_up(error)
        return DraftTree.root(last)

    def _advance(self, output: TargetOutput, acceptance: Acceptance) -> None:
        if self.drafter is None:
            return
        features = output.features[: len(acceptance.path)]
        if acceptance.path[-1] != len(acceptance.path) - 1:
            features = output.features[torch.tensor(acceptance.path, device=output.features.device)]
        try:
            self.drafter.advance(features, torch.tensor(acceptance.tokens))
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.drafter, self.rounds = None, FixedRounds(PLAIN)
        message = f"drafting stopped and generation continues without a draft: {type(error).__name__}: {error}"
        self.report.warnings.append(message)
        logger.warning(message)
