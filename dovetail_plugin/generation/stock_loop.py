"""Drafts chains for transformers' own assisted loop, which runs with `draft.verification = "stock"`.

That loop passes its text and the target's outputs (transformers 5.8 or later). It receives candidate ids and, when
sampling, the draft logits whose softmax the candidates were sampled from.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from ..compat import CandidateGenerator, hands_features_to_generators
from ..drafts.base import Draft
from ..drafts.feature_drafter import ChainDrafter, without_padding
from ..report import GenerationReport, Round
from ..targets.engine import engine_of
from ..tree import TreeBudget


class DovetailCandidateGenerator(CandidateGenerator):
    """Drafts a chain of `draft.budget.depth` tokens (or `TreeBudget`'s default) each round for the stock loop.

    Args:
        draft: must have `supports_stock_loop`. Its `report` is set.
        target: the model that `generate` was called on.
        generation_config: generation config, as `generate` prepared it.
        logits_processor: logits processors. When sampling, they are applied to the draft's logits too.

    Raises:
        ImportError: transformers is older than 5.8.
    """

    requires_model_outputs = True
    model_kwargs_overrides = {"output_hidden_states": -1}

    def __init__(
        self,
        draft: Draft,
        target: PreTrainedModel,
        generation_config: GenerationConfig,
        logits_processor: LogitsProcessorList,
    ) -> None:
        if not hands_features_to_generators():
            from transformers import __version__

            raise ImportError(
                'draft.verification = "stock" needs transformers 5.8 or later, whose assisted loop gives the '
                f"target's features to candidate generators, and {__version__} is installed. "
                'Use draft.verification = "tree".'
            )
        draft.ensure_attached(target)
        self.draft = draft
        self._layers = draft.feature_layers(target.config)
        if self._layers is not None:
            self.model_kwargs_overrides = {"output_hidden_states": True}
        self.report = draft.report = GenerationReport()
        self._processors, self._do_sample = logits_processor, generation_config.do_sample
        self._max_length = generation_config.max_length
        drafter = draft.new_drafter(engine_of(target), capacity=self._max_length, clock=self.report.clock)
        assert isinstance(drafter, ChainDrafter), "supports_stock_loop promises it"
        self._drafter = drafter
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
        """Draft a chain after the text.

        Args:
            input_ids: (1, t) int64, the text.
            model_kwargs: arguments of the target's latest pass.
            model_outputs: outputs of that pass.
            is_first_iteration: whether the target has not run yet.
            n_last_matches: number of candidates that the target accepted in that pass.

        Returns:
            ids (1, t + depth) int64 and, when sampling, logits (1, depth, V); else None.
        """
        if is_first_iteration:  # the target has not run yet, so there are no features to draft from
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
        """Give the drafter the features (n, F) of the latest pass, up to the last accepted token."""
        if self._started:
            self.report.rounds.append(Round(self._drafted + 1, matches + 1))
            self._drafter.advance(features[: matches + 1], input_ids[0, -(matches + 1) :])
            return
        self._started = True
        mask = model_kwargs.get("attention_mask")  # covers the text with its newest token
        features, ids = without_padding(features, input_ids[0], None if mask is None else mask[:, :-1])
        self._drafter.begin(features, ids)

    def update_candidate_strategy(self, input_ids: Tensor, *_args: Any) -> None:
        """Update the number of new tokens. The length of the next chain does not depend on acceptance."""
        self.report.new_tokens = input_ids.shape[1] - self.report.prompt_tokens
