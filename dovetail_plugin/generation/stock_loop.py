"""Chains for transformers' own assisted loop, for people who want its verification instead of ours.

Enters: the stock loop's text and the target's outputs (it asks for them through `requires_model_outputs`,
transformers 5.8 or later). Leaves: candidate ids and, when sampling, the draft logits whose softmax the
candidates were sampled from. Select it with `draft.verification = "stock"`.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.candidate_generator import CandidateGenerator

from ..drafts.feature_drafter import FeatureDrafter, without_padding
from ..drafts.model import DovetailDraft
from ..report import GenerationReport, Round
from ..tree import TreeBudget


class DovetailCandidateGenerator(CandidateGenerator):
    """Drafts a chain of `draft.budget.depth` tokens (or `TreeBudget`'s default) each round for the stock loop.

    Args:
        draft: the draft model.
        target: the model that `generate` was called on.
        generation_config: as prepared by `generate`.
        logits_processor: applied to the draft's logits too, when sampling.

    Raises:
        ImportError: transformers is older than 5.8.
    """

    requires_model_outputs = True
    model_kwargs_overrides = {"output_hidden_states": -1}

    def __init__(
        self,
        draft: DovetailDraft,
        target: PreTrainedModel,
        generation_config: GenerationConfig,
        logits_processor: LogitsProcessorList,
    ) -> None:
        if not hasattr(CandidateGenerator, "requires_model_outputs"):
            from transformers import __version__

            raise ImportError(
                'draft.verification = "stock" needs transformers 5.8 or later, whose assisted loop hands the '
                f'target\'s features to candidate generators; this is {__version__}. "tree" works here.'
            )
        draft.attach_once(target)
        self.draft = draft
        self._layers = draft.config.layers_of(target.config)
        if self._layers is not None:
            self.model_kwargs_overrides = {"output_hidden_states": True}
        self.report = draft.report = GenerationReport()
        self._processors, self._do_sample = logits_processor, generation_config.do_sample
        self._max_length = generation_config.max_length
        self._drafter = FeatureDrafter(draft, self._max_length, self.report.clock)
        self._drafted = 0

    def get_candidates(
        self,
        input_ids: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        model_outputs: Any = None,
        is_first_iteration: bool = False,
        n_last_matches: int = 0,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Candidates below the text (1, t): ids (1, t + depth) and, when sampling, logits (1, depth, V)."""
        if is_first_iteration:  # the target has not run yet: no features to draft from
            self._started = False
            self.report.prompt_tokens = input_ids.shape[1]
            return input_ids, None
        states = model_outputs.hidden_states
        layers = (-1,) if self._layers is None else self._layers
        features = torch.cat([states[layer][0] for layer in layers], dim=-1)
        self._follow(input_ids, features, model_kwargs or {}, int(n_last_matches))
        depth = min((self.draft.budget or TreeBudget()).depth, self._max_length - input_ids.shape[1] - 1)
        self._drafted = max(depth, 0)
        if depth < 1:
            return input_ids, None

        def pick(logits: Tensor, drafted: list[Tensor]) -> tuple[Tensor, Tensor]:
            logits = logits.float()
            if not self._do_sample:
                return logits.argmax(-1), logits
            text = torch.cat([input_ids, *(d[None].to(input_ids.device) for d in drafted)], dim=1)
            scores = self._processors(text, logits.to(input_ids.device)).to(logits.device)
            return torch.multinomial(scores.softmax(-1), 1)[:, 0], scores

        tokens, logits = self._drafter.grow_chain(depth, pick)
        candidates = torch.cat([input_ids, tokens[None].to(input_ids.device)], dim=1)
        return candidates, logits[None].to(input_ids.device) if self._do_sample else None

    def _follow(self, input_ids: Tensor, features: Tensor, model_kwargs: dict[str, Any], matches: int) -> None:
        """Hand the drafter the features (n, H) of the rows that were accepted in the last pass."""
        if self._started:
            self.report.rounds.append(Round(self._drafted + 1, matches + 1))
            self._drafter.advance(features[: matches + 1], input_ids[0, -(matches + 1) :])
            return
        self._started = True
        mask = model_kwargs.get("attention_mask")  # of the text with its newest token
        features, ids = without_padding(features, input_ids[0], None if mask is None else mask[:, :-1])
        self._drafter.begin(features, ids)

    def update_candidate_strategy(self, input_ids: Tensor, *_args: Any) -> None:
        """Count what the text has grown by; the length of the next chain does not depend on it."""
        self.report.new_tokens = input_ids.shape[1] - self.report.prompt_tokens
