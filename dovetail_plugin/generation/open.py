"""Opens a generation: creates session, drafter and budgets for the loop.

`generate` with a draft, plain generation on engines without their own loop, and synthetic runs all use this module.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..drafts.base import DRAFT_ROWS, MADE_POLICY, Draft, Drafter
from ..drafts.identity import config_identity
from ..machine import thread_count
from ..policy import DeviceSplitPolicy, records
from ..policy.cost import Shape
from ..policy.planner import PLAIN, FixedPlanner, RoundPlanner
from ..report import GenerationReport
from ..targets.base import Engine
from ..targets.config_sizes import sizes_of
from .loop import Decoder, note_failure, raised_by_signal
from .text import Text

_lock = threading.Lock()


@dataclass(frozen=True)
class Request:
    """One generation, as it was asked for.

    Attributes:
        text: prompt, and how its next tokens are chosen.
        config: as `generate` prepared it.
        cache: of the engine, perhaps with rows of earlier turns.
        cached: tokens at the start of the prompt whose rows the cache holds.
        attention_mask: (1, tokens before the first new one), 0 at padding; None without padding.
        model_kwargs: further arguments of the target's forward pass over the prompt.
    """

    text: Text
    config: GenerationConfig
    cache: Any
    cached: int = 0
    attention_mask: Tensor | None = None
    model_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def temperature(self) -> float:
        """Temperature of sampling; 0 is greedy."""
        return (self.config.temperature or 1.0) if self.config.do_sample else 0.0


@dataclass(frozen=True)
class _Turn:
    """A drafter that has seen all `tokens` rows of a cache, kept for the next turn with that cache."""

    drafter: Drafter
    tokens: int


@contextmanager
def open_generation(model: Any, engine: Engine, request: Request, draft: Draft | None) -> Iterator[Decoder]:
    """Prepare a generation for `Decoder.run`, and keep what a later turn needs when it has ended.

    The caller turns gradients off. Done here, an interrupt could turn them on or off long after the call: when the
    traceback goes, which may hold this generator.

    Args:
        model: the target.
        engine: runs it.
        request: what to generate.
        draft: fits the target; its `report` is set. None generates plainly, one token per pass.

    Raises:
        ValueError: see `Draft.attach` and `Engine.session`.
    """
    text, cache, report = request.text, request.cache, GenerationReport()
    drafter: Drafter | None = None
    planner: RoundPlanner = FixedPlanner(PLAIN)
    if draft is not None:
        draft.report = report
        drafter, planner = _start(draft, model, engine, request, report)
    opening = engine.session(
        cache,
        max_nodes=planner.limits.nodes,
        prefill_chunk=request.config.prefill_chunk_size,
        model_kwargs=request.model_kwargs,
        feature_layers=None if draft is None else draft.feature_layers(model.config),
    )
    in_torch = engine.runs_in_torch or (drafter is not None and drafter.runs_in_torch)
    # Threads that wait for torch's next small operation spin, on the cores that the other engine computes on.
    with opening as session, thread_count(None if in_torch else 1):
        if session.limitation and drafter is not None:
            report.warnings.append(f"{session.limitation}. Generation goes on one token at a time.")
            drafter, planner = None, FixedPlanner(PLAIN)
        decoder = Decoder(
            session,
            drafter,
            text,
            planner,
            report,
            cached=request.cached,
            attention_mask=request.attention_mask,
            vary_threads=engine.runs_in_torch and draft is not None and policy_of(draft).threads == "auto",
        )
        yield decoder
    if draft is not None and drafter is not None and decoder.drafter is drafter:  # it did not fail
        draft.turns[cache] = _Turn(drafter, cache.get_seq_length())  # vanishes with the cache


def _start(
    draft: Draft, model: Any, engine: Engine, request: Request, report: GenerationReport
) -> tuple[Drafter | None, RoundPlanner]:
    """Attach the draft and make what drafts and plans. A draft that cannot start costs speed only.

    Raises:
        ValueError: the draft does not fit the target.
    """
    fits = False
    try:
        draft.ensure_attached(model)
        fits = True
        drafter = _drafter_for(draft, engine, request, report)
        return drafter, planner_for(draft, drafter, model, engine, request.temperature)
    except Exception as error:
        if isinstance(error, ValueError) and not fits:
            raise
        if raised_by_signal(error):
            raise
        note_failure(report, error)
        return None, FixedPlanner(PLAIN)


def _drafter_for(draft: Draft, engine: Engine, request: Request, report: GenerationReport) -> Drafter:
    """Return the drafter of the turn before if this draft filled the cache, else a new one."""
    turn = draft.turns.pop(request.cache, None)
    followed = turn is not None and turn.tokens == request.cache.get_seq_length() > 0
    if turn is not None and followed and draft.can_resume(turn.drafter, engine):
        turn.drafter.clock = report.clock
        return turn.drafter
    return draft.new_drafter(engine, capacity=request.text.length + DRAFT_ROWS, clock=report.clock)


def policy_of(draft: Draft) -> Any:
    """Return the draft's policy. The first call makes one; threads that call at once get the same."""
    with _lock:
        if draft.policy is None:
            draft.policy = draft.__dict__[MADE_POLICY] = DeviceSplitPolicy()
        return draft.policy


def planner_for(draft: Draft, drafter: Drafter, model: Any, engine: Engine, temperature: float) -> RoundPlanner:
    """Return the draft's own budget for every round if it has one, else the policy's choices."""
    policy = policy_of(draft)
    if draft.budget is not None:
        return FixedPlanner(draft.budget)
    key = records.key_of(
        engine=type(engine).__name__,
        model=config_identity(model.config),
        name=model.config.name_or_path,
        rounding=engine.rounding,
        draft=draft.identity(),
        runner=drafter.identity(),
        limits=asdict(policy.limits),
        torch=torch.__version__,
    )
    return policy.planner(key, temperature=temperature, shape=lambda: _shape(engine), calibration=draft.calibration)


def _shape(engine: Engine) -> Shape | None:
    """Return the sizes that say what context costs; None for a model whose config does not give them."""
    try:
        sizes = sizes_of(engine.config)
    except ValueError:
        return None
    kv_numbers = 2 * sizes.layers * sizes.kv_heads * sizes.head_dim
    return Shape(engine.num_parameters(), kv_numbers, sizes.layers * sizes.heads * sizes.head_dim)
