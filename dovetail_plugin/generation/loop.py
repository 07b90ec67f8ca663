"""The loop: prefill, then rounds of draft, verify, accept and keep. Only this module knows their order.

    prompt -> session.prefill -> drafter.begin -> (once on this machine) probe
    round:  planner.plan -> drafter.grow -> session.score -> accept -> session.keep -> drafter.advance
            -> planner.observe

Its input is a session, a drafter, the text and the budgets of its rounds, all prepared. Its results are the finished
text and a report. If the drafter fails, the loop continues with trees of one node, which is plain decoding, so the text
is not affected.
"""

import logging
import signal
import time
import traceback
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import machine
from ..drafts.base import Drafter, DraftError
from ..drafts.feature_drafter import without_padding
from ..policy.planner import PLAIN, FixedPlanner, Forecast, RoundPlan, RoundPlanner
from ..policy.probe import Measurements, measure
from ..policy.settings import PolicySettings
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
        session: of the target, open.
        drafter: proposes trees. None decodes plainly through the same code.
        text: the prompt, to which tokens are added.
        planner: decides how much each round may draft.
        report: receives the figures of this generation.
        cached: tokens at the start of the text whose rows the target holds from earlier turns.
        attention_mask: (1, tokens before the first new one) with 0 at padding, or None.
        vary_threads: whether the number of torch's threads may be changed. The caller restores it.
    """

    session: TargetSession
    drafter: Drafter | None
    text: Text
    planner: RoundPlanner
    report: GenerationReport
    cached: int = 0
    attention_mask: Tensor | None = None
    vary_threads: bool = False

    def run(self) -> None:
        """Generate until the text stops."""
        report, text = self.report, self.text
        report.prompt_tokens = text.length
        start_s = time.perf_counter()
        output = self.session.prefill(text.ids.clone(), self.attention_mask, self.cached)
        self._vocab_size = output.logits.shape[-1]
        # A streamer that has the first token gets the next ones without a pause for measurements.
        choice = text.choose(output.logits, before_stream=lambda token: self._begin(output, token))
        report.prefill_s = time.perf_counter() - start_s - report.probe_s
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
        plan, tree, forecast = self._draft(last, context)
        with clock.phase("verify"):
            output = self.session.score(tree)
        with clock.phase("accept"):
            acceptance = accept(tree, lambda node: text.choose(output.logits[node : node + 1]))
            self.session.keep(acceptance.path)
        self._advance(output, acceptance)  # in the last round too: another turn may follow
        seconds = {name: clock.seconds[name] - before[name] for name in PHASES}
        seconds["other"] = max(time.perf_counter() - start_s - sum(seconds.values()), 0.0)
        round_ = Round(
            nodes=len(tree),
            emitted=len(acceptance.tokens),
            depth=int(tree.depths.max()),
            widths=tuple(plan.judge.widths) if plan.judge else None,
            context=context,
            seconds=seconds,
            predicted_s=forecast.total_s if forecast else None,
            predicted_tokens=forecast.tokens if forecast else None,
        )
        self.report.rounds.append(round_)
        try:
            self.planner.observe(round_, tree, acceptance.path, forecast)
        except Exception as error:
            self._give_up(error)
        return acceptance

    def _bound(self) -> TreeBudget:
        """Return the largest tree allowed: the policy's limits, the room in the text and what the session permits."""
        room = self.text.room
        if (levels := self.session.levels_left()) is not None:
            room = min(room, levels + 1)
        if self.session.max_length is not None:  # no node beyond the target's positions
            room = min(room, self.session.max_length - self.text.length + 1)
        bound = self.planner.limits.clipped(max(room, 1)) if self.drafter is not None else PLAIN
        return bound if self.session.supports_tree else bound.as_chain()

    # --- calls of the draft, whose failures must not affect the text ---------------------------

    def _begin(self, output: TargetOutput, token: int) -> None:
        """Let the drafter read the prompt and the first token, and get the measurements of this machine."""
        if self.drafter is None:
            return
        goes_on = self.text.room > 0 and not self.text.ends_with(token)
        features, ids = without_padding(output.features, self.text.ids[0], self.attention_mask)
        try:
            self.drafter.begin(features, ids)
            if self.planner.drafting and goes_on:
                self.drafter.catch_up()
        except Exception as error:
            self._give_up(error)
        if goes_on:
            start_s = time.perf_counter()
            self._prepare(token)
            self.report.probe_s = time.perf_counter() - start_s

    def _prepare(self, token: int) -> None:
        drafter, limits, positions = self.drafter, self.planner.limits, self.session.max_length
        if drafter is None:
            return
        if positions is not None and self.text.length + limits.depth >= positions:
            self.planner = FixedPlanner(PLAIN)  # there is no room for the trees of a measurement, and little for text
            return
        levels = self.session.levels_left()
        if levels is not None:
            limits = limits.clipped(levels + 1)

        def measured_now(settings: PolicySettings) -> Measurements:
            if levels == 0:
                raise DraftError("a boundary of the rotary embedding leaves no room for measurements")
            return measure(
                self.session,
                drafter,
                token=token,
                context=self.text.length,
                limits=limits if self.session.supports_tree else limits.as_chain(),
                vary_threads=self.vary_threads,
                settings=settings,
            )

        try:
            measured = self.planner.prepare(None if self.text.time_is_limited else measured_now)
        except Exception as error:
            self._give_up(error)
            return
        if measured is not None and measured.threads is not None and self.vary_threads:
            machine.use(measured.threads, measured.processors)

    def _draft(self, last: int, context: int) -> tuple[RoundPlan, DraftTree, Forecast | None]:
        """Plan a round and grow its tree below the token `last`; a tree of one node decodes plainly."""
        try:
            plan = self.planner.plan(context, self._bound())
            if self.drafter is None or plan.budget.nodes < 2:
                tree = DraftTree.root(last)
            else:
                tree = self.drafter.grow(plan.budget, plan.judge)
                tree.check(last, plan.budget, self._vocab_size)
            return plan, tree, self.planner.forecast(plan, len(tree), context)
        except Exception as error:
            self._give_up(error)
            return RoundPlan(PLAIN), DraftTree.root(last), None

    def _advance(self, output: TargetOutput, acceptance: Acceptance) -> None:
        if self.drafter is None:
            return
        features = output.features[: len(acceptance.path)]
        if acceptance.path[-1] != len(acceptance.path) - 1:
            features = output.features[torch.tensor(acceptance.path, device=output.features.device)]
        try:
            self.drafter.advance(features, torch.tensor(acceptance.tokens, device="cpu"))
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if raised_by_signal(error):
            raise error
        self.drafter, self.planner = None, FixedPlanner(PLAIN)
        note_failure(self.report, error)


def note_failure(report: GenerationReport, error: Exception) -> None:
    """Write into the report and the log that a draft has failed. Generation continues without it."""
    message = f"drafting stopped and generation continues without a draft: {type(error).__name__}: {error}"
    report.warnings.append(message)
    logger.warning(message)


def raised_by_signal(error: BaseException) -> bool:
    """Return whether a signal handler raised an exception, for example to end a call after some time.

    Handlers run between any two lines of the main thread, so their exceptions appear in whatever runs there.
    """
    handlers = (signal.getsignal(number) for number in signal.valid_signals())
    codes = {getattr(getattr(h, "__func__", h), "__code__", None) or _code_of_call(h) for h in handlers if callable(h)}
    return any(frame.f_code in codes for frame, _ in traceback.walk_tb(error.__traceback__))


def _code_of_call(handler: object) -> Any:
    return getattr(vars(type(handler)).get("__call__"), "__code__", None)
