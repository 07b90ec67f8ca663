"""What differs with drafts in transformers' own tests, and why that is right."""

from .judgement import STATES, Difference

REFUSALS = {
    "beams": "drafting works with greedy search and sampling, not with num_beams=*",
    "no cache": "drafting needs the key/value cache. Leave out use_cache=False.",
    "other cache": "drafting brings its own preallocated cache.*",
    "embeddings": "drafting needs the prompt's tokens. Pass input_ids instead of inputs_embeds.",
}
"""Key in outcomes -> pattern of the message of a refusal. Each says what to do instead."""

REASONS = {
    "beams": "drafts propose one text; transformers' own assisted generation refuses beams too",
    "no cache": "without a cache there are no rows to keep; transformers' own assisted generation refuses this too",
    "other cache": "rows of rejected tokens are taken back from a cache that grows, not from a static one",
    "embeddings": "drafts read the tokens of the prompt, and embeddings have none",
    STATES: "attentions and hidden states of a tree are not those of a text, so drafted generation does not return "
    "them. The call is repeated without them. Tokens, scores, logits and cache that the test sees are drafted ones",
}
"""Key in outcomes -> why."""

COMPARED_IN_PART = {
    "sampled batches": "drafts draw for one sequence after another: the distribution is the same, the text is not",
    "cache_implementation='dynamic_full'": "before 5.24 `generate` sets this for every assistant. With a draft, layers "
    "with a window keep the rows of the window, as in plain generation without the option",
}
"""What `drafting.py` compares in part only -> why."""

DIFFERENCES: tuple[Difference, ...] = ()
"""Tests that pass without drafts and not with them. None is known."""
