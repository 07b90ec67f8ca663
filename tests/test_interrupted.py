"""Generations that are interrupted anywhere: the caller's cache holds a beginning of the text, in all layers alike."""

import copy
import gc
import linecache
import random
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from families import prompt, tiny_target
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import dovetail_plugin
from dovetail_plugin import DovetailDraft, TreeBudget
from dovetail_plugin.drafts.feature_drafter import FeatureDrafter

pytestmark = [pytest.mark.torch_only("caches of transformers"), pytest.mark.usefixtures("fixed_budget")]

PACKAGE = str(Path(dovetail_plugin.__file__).parent)
NEW_TOKENS = 24
TAKES_LOCK = re.compile(r"\s*with (self\.|kept\.)?(_?lock|_making)\b")
GREEDY = dict(do_sample=False, eos_token_id=None, pad_token_id=0)


class Stopped(BaseException):
    """As Ctrl-C, it is not an Exception."""


class Counted:
    """Raises at the given call."""

    def __init__(self, calls):
        self.calls = calls

    def count(self):
        self.calls -= 1
        if self.calls == 0:
            raise Stopped


class Streamer(Counted):
    def put(self, value):
        self.count()

    def end(self):
        pass


class Processor(Counted, LogitsProcessor):
    def __call__(self, input_ids, scores):
        self.count()
        return scores


class Criterion(Counted, StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        self.count()
        return torch.zeros(1, dtype=torch.bool)


WAYS = {
    "streamer": lambda calls: {"streamer": Streamer(calls + 1)},
    "processor": lambda calls: {"logits_processor": LogitsProcessorList([Processor(calls)])},
    "criterion": lambda calls: {"stopping_criteria": StoppingCriteriaList([Criterion(calls)])},
}


class Case:
    """A target, its plain text, and a draft with an oracle."""

    def __init__(self, kind, oracle):
        fields = {"sliding_window": 24} if kind == "mistral" else {}
        self.target = tiny_target(kind, **fields)
        self.ids = prompt(30)
        self.text = self.target.generate(self.ids, max_new_tokens=2 * NEW_TOKENS, **GREEDY)
        self.draft = DovetailDraft.for_target(self.target)
        self.draft.budget = TreeBudget(12, 4, 3)
        oracle(self.text, 30)

    def interrupted(self, cache, **options):
        """Generate with the draft until something raises. Returns whether it did."""
        options = GREEDY | dict(max_new_tokens=NEW_TOKENS, past_key_values=cache, assistant_model=self.draft) | options
        before, stopped = self.thread_state(), None
        try:
            self.target.generate(self.ids, **options)
        except Stopped as error:
            stopped = error
        assert self.thread_state() == before  # while the traceback still refers to the frames of the call
        was_stopped, stopped = stopped is not None, None
        assert self.thread_state() == before
        gc.collect()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in self.target.modules())
        return was_stopped

    def thread_state(self):
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_num_threads()

    def check(self, cache):
        """The cache holds a beginning of the text, and both ways to go on give the text of a fresh run."""
        rows = {layer.get_seq_length() for layer in cache.layers}
        assert len(rows) == 1, "the layers have different lengths"
        held = rows.pop()
        assert held <= self.text.shape[1]
        if held:
            right = self.target(self.text[:, :held], use_cache=True).past_key_values
            for own, other in zip(cache.layers, right.layers, strict=True):
                assert type(own) is type(other)
                torch.testing.assert_close(own.keys, other.keys[:, :, -own.keys.shape[2] :], atol=1e-4, rtol=1e-4)
        given = self.text[:, : max(held + 1, 30)]
        left = self.text.shape[1] - given.shape[1]
        for assistant in (None, self.draft):
            options = GREEDY | dict(max_new_tokens=left, past_key_values=copy.deepcopy(cache))
            assert torch.equal(self.target.generate(given, assistant_model=assistant, **options), self.text)


@pytest.fixture(params=["llama", "mistral"])
def case(request, oracle):
    return Case(request.param, oracle)


@pytest.mark.parametrize("calls", [1, 2, 9])
@pytest.mark.parametrize("way", WAYS)
def test_what_the_caller_passed_raises(case, way, calls):
    cache = DynamicCache(config=case.target.config)
    assert case.interrupted(cache, **WAYS[way](calls))
    case.check(cache)


def test_an_error_in_the_target(case, monkeypatch):
    """In the second of its layers, in the prompt's pass and in a later one."""
    module = case.target.model.layers[1]
    forward = module.forward
    for calls in (1, 4):
        counted = Counted(calls)
        monkeypatch.setattr(module, "forward", lambda *a, _c=counted, **k: (_c.count(), forward(*a, **k))[1])
        cache = DynamicCache(config=case.target.config)
        assert case.interrupted(cache)
        monkeypatch.setattr(module, "forward", forward)
        case.check(cache)


class AtLine:
    """Raises when the given number of lines of the package has run.

    Python takes a lock and gives it back in one instruction each, which no interrupt splits from the block between
    them; only a trace function could. So nothing raises where a lock is taken or given back.
    """

    def __init__(self, lines):
        self.left = lines

    def __enter__(self):
        self._before = sys.gettrace()  # of coverage
        sys.settrace(self._call)
        return self

    def __exit__(self, *exc_info):
        sys.settrace(self._before)

    def _call(self, frame, event, arg):
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _line(self, frame, event, arg):
        if event == "line" and not TAKES_LOCK.match(linecache.getline(frame.f_code.co_filename, frame.f_lineno)):
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise Stopped
        return self._line


def lines_of_a_call(case, **options):
    """Lines of the package that a call runs."""
    case.interrupted(DynamicCache(config=case.target.config), **options)  # the first call looks at the target
    with AtLine(10**9) as counter:
        case.interrupted(DynamicCache(config=case.target.config), **options)
    return 10**9 - counter.left


def test_an_interrupt_at_each_of_the_last_lines():
    """Where a generation closes: torch's modes are as before, although the traceback still refers to its frames."""
    case = Case("llama", oracle=lambda *_: None)  # which would give each call other trees
    case.draft.budget = TreeBudget(2, 1, 1)
    lines, stopped = lines_of_a_call(case, max_new_tokens=4), 0
    for number in range(lines - 50, lines):
        with AtLine(number):
            stopped += case.interrupted(DynamicCache(config=case.target.config), max_new_tokens=4)
    assert stopped > 40


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.nightly) for part in range(1, 12))])
def test_an_interrupt_at_any_line(case, part):
    """Ctrl-C and signals arrive between any two lines, also while the cache is handed back."""
    lines = lines_of_a_call(case)
    rng = random.Random(part)
    chosen = [rng.randrange(1, lines) for _ in range(16)] + [lines - rng.randrange(120) for _ in range(9)]
    for number in chosen:
        cache = DynamicCache(config=case.target.config)
        with AtLine(number):
            case.interrupted(cache)
        case.check(cache)


def test_an_interrupt_in_a_later_turn(case):
    """The rows of earlier turns stay."""
    for number in (300, 900, 2000, 3500):
        cache = DynamicCache(config=case.target.config)
        case.target.generate(case.ids, max_new_tokens=6, past_key_values=cache, assistant_model=case.draft, **GREEDY)
        before = cache.get_seq_length()
        given, options = case.text[:, :36], GREEDY | dict(past_key_values=cache, assistant_model=case.draft)
        with AtLine(number), pytest.raises(Stopped):
            case.target.generate(given, max_new_tokens=NEW_TOKENS, **options)
        assert cache.get_seq_length() >= before
        case.check(cache)


def test_exceptions_of_signal_handlers_are_not_the_drafts(case, monkeypatch):
    """A time limit that is set by a signal ends the call, also while the draft runs."""

    def limit(_signal, _frame):
        raise TimeoutError("the time is over")

    before = signal.signal(signal.SIGUSR1, limit)
    advance = FeatureDrafter.advance

    def signalled(self, features, tokens):
        signal.raise_signal(signal.SIGUSR1)
        return advance(self, features, tokens)

    monkeypatch.setattr(FeatureDrafter, "advance", signalled)
    try:
        with pytest.raises(TimeoutError, match="the time is over"):
            case.target.generate(case.ids, max_new_tokens=9, assistant_model=case.draft, **GREEDY)
    finally:
        signal.signal(signal.SIGUSR1, before)
