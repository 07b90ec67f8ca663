"""Tells refusals from failures: a refusal is an error of ours, raised before the target has run."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

import dovetail_plugin
from dovetail_plugin import DovetailError

FOLDER = dovetail_plugin.__path__[0]


def is_refusal(error: BaseException, passes: list[int]) -> bool:
    """Return whether a call was refused with a reason.

    Args:
        error: what the call raised.
        passes: of the target during the call, from `passes_of`. Those that find out whether a model can be a target are
            no work on the call.
    """
    if not isinstance(error, (ValueError, DovetailError)):
        return False
    if passes and "cannot be a target" not in str(error):
        return False
    return traceback.extract_tb(error.__traceback__)[-1].filename.startswith(FOLDER)


@contextmanager
def passes_of(model: PreTrainedModel) -> Iterator[list[int]]:
    """A list that gets an entry for every pass of the model in the block."""
    passes: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        yield passes
    finally:
        handle.remove()
