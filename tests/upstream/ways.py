"""Names of the ways in which transformers' tests are run."""

STOCK = "stock"
"""Nothing is changed: what passes here must pass with drafts."""

DRAFTS = ("dovetail", "lookup", "small-model")
"""Kinds of drafts: an untrained `DovetailDraft`, a `PromptLookupDraft`, a `SmallModelDraft` of the test's assistant.

Where a test has no assistant, a copy of the target drafts, so that everything is accepted.
"""

SCOPES = ("assistant", "everywhere")
"""Calls of `generate` that get a draft: those that ask for an assistant or for prompt lookup, or all."""

WAYS = tuple(f"{scope}/{draft}" for scope in SCOPES for draft in DRAFTS)
