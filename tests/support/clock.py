"""A clock that only moves with the work that is done, so that the policy's decisions can be repeated exactly."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from dovetail_plugin.drafts.blocks import Block, Eagle3Block

READ_S = 1e-6
"""Seconds that pass between two readings, so that no measured time is zero."""

TARGET_PASS_S, TARGET_ROW_S = 10e-3, 1e-3
"""Seconds of a pass of the target: a constant for reading the weights, and a part for each row."""

DRAFT_BLOCK_S, DRAFT_ROW_S = 0.5e-3, 0.02e-3
"""Seconds of one block of the draft: a constant, and a part for each row."""


class FakeClock:
    """Replaces `time.perf_counter`. Calling it returns the time in seconds.

    Attributes:
        now_s: seconds since the clock was made.
        target_passes: passes of the target that were charged.
    """

    def __init__(self) -> None:
        self.now_s = 0.0
        self.target_passes = 0

    def __call__(self) -> float:
        self.now_s += READ_S
        return self.now_s

    def charged_pass(self, run: Callable[..., Any], rows: Callable[[Any], int]) -> Callable[..., Any]:
        """A method of a session, `run(session, tokens, ...)`, that also takes time on this clock.

        Args:
            run: the method.
            rows: number of rows of its first argument.
        """

        def charged(session: Any, tokens: Any, *args: Any, **kwargs: Any) -> Any:
            self.target_passes += 1
            self.now_s += TARGET_PASS_S + TARGET_ROW_S * rows(tokens)
            return run(session, tokens, *args, **kwargs)

        return charged

    @contextmanager
    def charging_draft_blocks(self) -> Iterator[None]:
        """While this is open, every pass of a draft's block in torch takes time on this clock."""

        def charge(module: Any, inputs: tuple[Tensor, ...]) -> None:
            if isinstance(module, Block | Eagle3Block) and not torch.jit.is_tracing():  # engines trace drafts once
                self.now_s += DRAFT_BLOCK_S + DRAFT_ROW_S * inputs[0].shape[1]

        hook = register_module_forward_pre_hook(charge)
        try:
            yield
        finally:
            hook.remove()
