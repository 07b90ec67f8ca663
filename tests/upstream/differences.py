"""What differs with drafts in transformers' own tests, and why that is right."""

from .judgement import Difference

REFUSALS = {
    "beams": "drafting works with greedy search and sampling, not with num_beams=*",
    "no cache": "drafting needs the key/value cache. Leave out use_cache=False.",
    "other cache": "drafting brings its own preallocated cache.*",
    "embeddings": "drafting needs the prompt's tokens. Pass input_ids instead of inputs_embeds.",
}
"""Key in outcomes -> pattern of the message of a refusal. Each says what to do instead."""

DIFFERENCES: tuple[Difference, ...] = ()
