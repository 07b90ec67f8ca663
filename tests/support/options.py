"""Options of `generate` that change the target's logits, by name, for tests that run over all of them."""

import torch
from families import VOCAB
from transformers import LogitsProcessor, LogitsProcessorList


class PreferUnseen(LogitsProcessor):
    """A processor of a user that depends on the whole text: tokens that occurred before are less likely."""

    def __call__(self, input_ids, scores):
        return scores - 0.3 * torch.bincount(input_ids[0], minlength=scores.shape[1])


PROCESSORS = {
    "none": {},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "bad_words": {"bad_words_ids": [[5], [6, 7]]},
    "min_new_tokens": {"min_new_tokens": 30},
    "prefix_allowed": {
        "prefix_allowed_tokens_fn": lambda _batch, ids: [int(ids[-1] * 3 + k) % VOCAB for k in range(20)]
    },
    "own": {"logits_processor": LogitsProcessorList([PreferUnseen()])},
    "forced_eos": {"forced_eos_token_id": 2},
    "suppress": {"suppress_tokens": list(range(10, 40))},
}
WARPERS = {
    "temperature": {"temperature": 0.4},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.7, "temperature": 1.5},
    "min_p": {"min_p": 0.1},
    "typical": {"typical_p": 0.8},
}
