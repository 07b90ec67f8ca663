"""Wraps `GenerationMixin.generate`, so that calls of transformers' tests are drafted.

A drafted call is repeated plainly on copies of its arguments. Its tokens, scores, logits and cache are compared with
the plain ones. A call that is refused runs as the test wrote it. What became of each call is recorded.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from support.refusals import is_refusal, passes_of
from torch import Tensor
from transformers import GenerationMixin

from dovetail_plugin import DovetailDraft, Draft, PromptLookupDraft, SmallModelDraft, TreeBudget, compat

STATES = ("attentions", "hidden_states")
"""Fields that drafted generation does not return. A test that asks for them gets those of plain generation."""

FULL_CACHE = "dynamic_full"
"""Before 5.24, `generate` sets this for every assistant, so that drafts cannot tell whether the caller wants it. They
return the cache of plain generation without the option, where layers with a window keep the rows of the window only."""

TOLERANCE = 1e-4
"""Of scores, logits and cache rows: passes over several tokens round in another way."""


@dataclass
class Calls:
    """What became of the calls of one test.

    Attributes:
        total: calls of `generate`, without those inside of others.
        asking: those that ask for an assistant or for prompt lookup.
        drafted: those that were drafted.
        compared: those whose results were compared with plain ones.
        refused: messages of refusals.
        without_states: number of drafted calls that got attentions or hidden states from plain generation.
        faults: drafts that failed, and results that differ from plain ones.
    """

    total: int = 0
    asking: int = 0
    drafted: int = 0
    compared: int = 0
    without_states: int = 0
    refused: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


class Wrapper:
    """The wrapped `generate`.

    Args:
        kind: one of `ways.DRAFTS`, or None to only count calls.
        everywhere: whether calls that ask for no assistant are drafted too.

    Attributes:
        calls: of the running test.
    """

    def __init__(self, kind: str | None, everywhere: bool) -> None:
        self.calls = Calls()
        self._kind, self._everywhere, self._inside = kind, everywhere, False
        self._drafts: WeakKeyDictionary[Any, Draft] = WeakKeyDictionary()
        self._original: Callable[..., Any] = GenerationMixin.generate

    def install(self) -> None:
        """Wrap transformers' method."""
        wrapper = self

        @functools.wraps(self._original)
        def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
            if wrapper._inside:  # of an assistant, or from an overridden method
                return wrapper._original(model, *args, **kwargs)
            wrapper._inside = True
            try:
                return wrapper._generate(model, compat.bound_arguments(wrapper._original, (model, *args), kwargs))
            finally:
                wrapper._inside = False

        GenerationMixin.generate = generate

    def _generate(self, model: Any, arguments: dict[str, Any]) -> Any:
        del arguments["self"]
        asks = asks_for_assistant(model, arguments)
        self.calls.total += 1
        self.calls.asking += asks
        if self._kind is None or not (asks or self._everywhere):
            return self._original(model, **arguments)
        plain_arguments = without_assistant(arguments)
        copies, generator = copies_of(plain_arguments), torch.get_rng_state()
        passes: list[int] = []
        try:
            draft = self._draft_for(model, arguments.get("assistant_model"))
            with passes_of(model) as passes:
                output, trimmed = self._drafted(model, plain_arguments | {"assistant_model": draft}, copies is not None)
        except Exception as error:
            if not is_refusal(error, passes):
                raise
            self.calls.refused.append(str(error))
            return self._original(model, **arguments)
        self.calls.drafted += 1
        if draft.report is not None:
            self.calls.faults += draft.report.warnings
        if copies is not None:
            self._compare(model, copies, generator, output, trimmed)
        return output

    def _drafted(self, model: Any, arguments: dict[str, Any], compared: bool) -> tuple[Any, bool]:
        """Generate with a draft. If it is refused for its states, and these can come from elsewhere, without them."""
        try:
            return self._original(model, **arguments), False
        except ValueError as error:
            if not compared or not str(error).startswith("output_attentions and output_hidden_states"):
                raise
        return self._original(model, **arguments | {f"output_{name}": False for name in STATES}), True

    def _compare(self, model: Any, arguments: dict[str, Any], generator: Tensor, output: Any, trimmed: bool) -> None:
        """Generate plainly with the same random numbers, and compare.

        Raises:
            AssertionError: the results differ.
        """
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(generator)
            plain = self._original(model, **arguments)
        self.calls.compared += 1
        if trimmed:
            self.calls.without_states += 1
            for name in STATES:
                setattr(output, name, getattr(plain, name))
        if difference := difference_of(plain, output, same_draws=not draws_for_several(model, arguments, output)):
            self.calls.faults.append(difference)
            raise AssertionError(difference)

    def _draft_for(self, model: Any, assistant: Any) -> Draft:
        """The draft of a target, the same in all calls, so that later turns of a text find it again."""
        reader = model if assistant is None else assistant
        if reader not in self._drafts:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(7)
                self._drafts[reader] = new_draft(self._kind, model, reader)
        return self._drafts[reader]


def new_draft(kind: str | None, target: Any, assistant: Any) -> Draft:
    """A draft of one of the kinds in `ways.DRAFTS`, with trees of the same size in each round."""
    draft: Draft
    if kind == "dovetail":
        draft = DovetailDraft.for_target(target)
    elif kind == "lookup":
        draft = PromptLookupDraft(shortest=1)
    else:
        draft = SmallModelDraft(copy.deepcopy(assistant) if assistant is target else assistant)
    draft.budget = TreeBudget(nodes=8, depth=3, top_k=3)
    return draft


def asks_for_assistant(model: Any, arguments: dict[str, Any]) -> bool:
    """Whether a call is for an assistant or for prompt lookup."""
    configs = (arguments.get("generation_config"), model.generation_config)
    given = [arguments.get(name) for name in ("assistant_model", "prompt_lookup_num_tokens")]
    return any(x is not None for x in (*given, *(getattr(c, "prompt_lookup_num_tokens", None) for c in configs)))


def copies_of(arguments: dict[str, Any]) -> dict[str, Any] | None:
    """Copies of arguments for a plain call, or None if one cannot be copied, as a streamer."""
    try:
        copies = {name: copy.deepcopy(value) for name, value in arguments.items()}
    except (TypeError, RuntimeError):
        return None
    if copies.get("cache_implementation") == FULL_CACHE:
        del copies["cache_implementation"]
    return copies


def without_assistant(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the same call without an assistant and prompt lookup."""
    dropped = ("assistant_model", "assistant_tokenizer", "prompt_lookup_num_tokens")
    return {name: value for name, value in arguments.items() if name not in dropped}


def draws_for_several(model: Any, arguments: dict[str, Any], output: Any) -> bool:
    """Whether a call samples a batch, where drafts draw for one sequence after another, and so other texts."""
    config = arguments.get("generation_config") or model.generation_config
    samples = arguments.get("do_sample", config.do_sample)
    return bool(samples) and (output if isinstance(output, Tensor) else output.sequences).shape[0] > 1


def difference_of(plain: Any, drafted: Any, *, same_draws: bool = True) -> str:
    """Return the first difference of two results of `generate` in words, or an empty string.

    Args:
        plain: result without a draft.
        drafted: result with one.
        same_draws: False compares only the kind of the result and the shape of the tokens.
    """
    if isinstance(plain, Tensor) or isinstance(drafted, Tensor):
        if not (isinstance(plain, Tensor) and isinstance(drafted, Tensor)):
            return f"a {type(drafted).__name__} instead of a {type(plain).__name__}"
        equal = torch.equal(plain, drafted) if same_draws else plain.shape == drafted.shape
        return "" if equal else f"tokens differ: {drafted.tolist()} instead of {plain.tolist()}"
    if difference := difference_of(plain.sequences, drafted.sequences, same_draws=same_draws):
        return difference
    names = {name for name in plain if name not in STATES}
    if names != {name for name in drafted if name not in (*STATES, "report")}:
        return f"the output has {sorted(drafted)} instead of {sorted(plain)}"
    if not same_draws:
        return ""
    for name in names & {"scores", "logits"}:
        if len(plain[name]) != len(drafted[name]):
            return f"{len(drafted[name])} {name} instead of {len(plain[name])}"
        for step, (expected, found) in enumerate(zip(plain[name], drafted[name], strict=True)):
            if not close(expected, found):
                return f"{name} of step {step} differ"
    return difference_of_caches(plain.get(compat.CACHE), drafted.get(compat.CACHE))


def difference_of_caches(plain: Any, drafted: Any) -> str:
    """Return the first difference of two caches in words, or an empty string."""
    if plain is None or drafted is None:
        return "" if plain is drafted else f"cache: {type(drafted).__name__} instead of {type(plain).__name__}"
    if len(plain.layers) != len(drafted.layers):
        return f"the cache has {len(drafted.layers)} layers instead of {len(plain.layers)}"
    for number, (expected, found) in enumerate(zip(plain.layers, drafted.layers, strict=True)):
        if type(expected) is not type(found):
            return f"layer {number} of the cache is a {type(found).__name__} instead of a {type(expected).__name__}"
        if expected.get_seq_length() != found.get_seq_length():
            return f"layer {number} has {found.get_seq_length()} rows instead of {expected.get_seq_length()}"
        for name in ("keys", "values"):
            if not close(getattr(expected, name), getattr(found, name)):
                return f"{name} of layer {number} of the cache differ"
    return ""


def close(expected: Tensor, found: Tensor) -> bool:
    """Whether two tensors have one shape and dtype and differ by rounding at most."""
    alike = expected.shape == found.shape and expected.dtype == found.dtype
    return alike and torch.allclose(expected, found, atol=TOLERANCE, rtol=TOLERANCE, equal_nan=True)
