"""The text of one generation. It chooses the next token from the target's logits exactly as `generate` does.

`Text` owns the token buffer. It applies logits processors along the accepted path, makes one random draw per emitted
token, and calls stopping criteria and the streamer for each token. Logits of a node are processed only when acceptance
reaches this node, so processors that depend on the history get the same calls in the same order as in plain decoding.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import EosTokenCriteria, MaxTimeCriteria

from ..verify import Choice

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList


class Text:
    """Prompt and generated tokens of one sequence.

    Args:
        input_ids: (1, T) int64, the prompt.
        processors: logits processors, as `generate` prepared them.
        criteria: stopping criteria, as `generate` prepared them.
        config: generation config, as `generate` prepared it.
        streamer: receives every token when it is chosen; None for no streaming.

    Attributes:
        prompt_tokens: number of tokens of the prompt.
        length: number of tokens so far.
        max_length: number of tokens that the text may have.
        scores: processed scores (1, V) float32 of each new token if `config` asks for them, else None.
        logits: raw logits (1, V) float32 of each new token if `config` asks for them, else None.
    """

    def __init__(
        self,
        input_ids: Tensor,
        processors: "LogitsProcessorList",
        criteria: "StoppingCriteriaList",
        config: "GenerationConfig",
        streamer: Any = None,
    ) -> None:
        self.prompt_tokens = self.length = input_ids.shape[1]
        self.max_length = config.max_length
        self._buffer = input_ids.new_empty(1, min(self.max_length, self.length + 1024) + 1)
        self._buffer[:, : self.length] = input_ids
        self._processors, self._criteria, self._streamer = processors, criteria, streamer
        self._do_sample = config.do_sample
        wants = config.return_dict_in_generate
        self.scores: tuple[Tensor, ...] | None = () if wants and config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if wants and config.output_logits else None

    @property
    def ids(self) -> Tensor:
        """Token ids (1, length) int64, a view."""
        return self._buffer[:, : self.length]

    @property
    def room(self) -> int:
        """Number of tokens that may still be added."""
        return self.max_length - self.length

    @property
    def time_is_limited(self) -> bool:
        """Whether the text ends after some seconds (`max_time`)."""
        return any(isinstance(criterion, MaxTimeCriteria) for criterion in self._criteria)

    def ends_with(self, token: int) -> bool:
        """Whether a token is one of the end tokens."""
        return any(
            isinstance(criterion, EosTokenCriteria) and token in criterion.eos_token_id.tolist()
            for criterion in self._criteria
        )

    def choose(self, logits: Tensor, before_stream: Callable[[int], None] | None = None) -> Choice:
        """Choose the next token, append it and stream it.

        All tensor operations and random draws are those of `GenerationMixin._sample`.

        Args:
            logits: of the target, (1, V).
            before_stream: called with the token before the streamer gets it.
        """
        raw = logits.to(copy=True, dtype=torch.float32, device=self._buffer.device)
        scores = self._processors(self.ids, raw)
        token = self._pick(scores)
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (raw,)
        self._append(token)
        if before_stream is not None:
            before_stream(int(token))
        if self._streamer is not None:
            self._streamer.put(token.cpu())
        return Choice(int(token), bool(self._criteria(self.ids, self.scores).all()))

    def _pick(self, scores: Tensor) -> Tensor:
        """Return the token (1,) for processed scores (1, V): a random one if sampling, else the best one."""
        if self._do_sample:
            return torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
        return torch.argmax(scores, dim=-1)

    def _append(self, token: Tensor) -> None:
        if self.length == self._buffer.shape[1]:
            self._buffer = torch.cat([self._buffer, torch.empty_like(self._buffer)], dim=1)
        self._buffer[:, self.length] = token
        self.length += 1

    def end(self) -> None:
        """Tell the streamer that the text is complete."""
        if self._streamer is not None:
            self._streamer.end()
