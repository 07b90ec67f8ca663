"""The loop: prefill, then rounds of draft, verify, accept, keep. The only file that knows their order.

    prompt -> target.prefill -> drafter.begin
    round:  drafter.grow -> target.score -> accept -> target.keep -> drafter.advance

Enters: a target, a drafter and the text, all prepared. Leaves: the finished text and a report. A drafter
that fails costs speed, never text: the loop goes on with trees of one node, which is plain decoding.
"""

import logging
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from .drafting import Drafter, without_padding
from .report import GenerationReport, Round
from .target import Target, TargetOutput
from .text import Text
from .tree import DraftTree, TreeBudget
from .verify import Acceptance, accept

logger = logging.getLogger(__name__)


@dataclass
class Decoder:
    """One generation. `run` is the algorithm; the rest is what makes a failing draft harmless.

    drafter: None decodes plainly, through the same code.
    budget: of every round; cut where the text may not grow that far.
    cached: tokens at the start of the text whose rows the target holds from earlier turns.
    attention_mask: (1, tokens before the first new one) with 0 at padding, or None.
    """

    target: Target
    drafter: Drafter | None
    text: Text
    budget: TreeBudget
    report: GenerationReport
    cached: int = 0
    attention_mask: Tensor | None = None

    def run(self) -> None:
        """Generate until the text stops."""
        report, text = self.report, self.text
        report.prompt_tokens = text.length
        start_s = time.perf_counter()
        output = self.target.prefill(text.ids[:, self.cached :], self.attention_mask)
        choice = text.choose(output.logits)
        self._begin(output)
        report.clock.reset()
        report.prefill_s = time.perf_counter() - start_s

        start_s = time.perf_counter()
        last, stop = choice.token, choice.stop
        while not stop:
            acceptance = self._round(last)
            last, stop = acceptance.tokens[-1], acceptance.stop
        report.decode_s = time.perf_counter() - start_s
        report.new_tokens = text.length - text.prompt_tokens

    def _round(self, last: int) -> Acceptance:
        clock, text = self.report.clock, self.text
        tree = self._grow(last)
        with clock.phase("verify"):
            output = self.target.score(tree)
        with clock.phase("accept"):
            acceptance = accept(tree, lambda node: text.choose(output.logits[node : node + 1]))
            self.target.keep(acceptance.path)
        self._advance(output, acceptance)  # in the last round too: another turn may follow
        self.report.rounds.append(Round(len(tree), len(acceptance.tokens)))
        return acceptance

    # --- the draft, whose failures are not ours ------------------------------------------------

    def _begin(self, output: TargetOutput) -> None:
        if self.drafter is None:
            return
        features, ids = without_padding(output.features, self.text.ids[0], self.attention_mask)
        try:
            self.drafter.begin(features, ids)
        except Exception as error:
            self._give_up(error)

    def _grow(self, last: int) -> DraftTree:
        room = self.text.room
        if self.target.max_length is not None:  # no node beyond the target's positions
            room = min(room, self.target.max_length - self.text.length + 1)
        budget = self.budget.clipped(max(room, 1))
        if not self.target.supports_tree:
            budget = budget.as_chain()
        if self.drafter is not None and budget.nodes > 1:
            try:
                return self.drafter.grow(budget)
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
        self.drafter = None
        message = f"drafting stopped, generation goes on without it: {type(error).__name__}: {error}"
        self.report.warnings.append(message)
        logger.warning(message)
