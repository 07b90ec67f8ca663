"""`CannotDraft`: why a call of `generate` goes without a draft, found before anything is generated."""

from ..errors import InputError


class CannotDraft(InputError):
    """A call of `generate` cannot be combined with drafting. Nothing has been generated yet.

    Attributes:
        kind: the same for all calls with the same kind of reason: the name of an option, "prompt", "batch" or "target".
        begun: whether a call around this one had begun to generate, and called `generate` from a callback.
    """

    begun = False

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
