"""OpenVINO targets: the key/value state, its holes, and prompts in chunks. Runs with `--engine openvino`."""

import copy
import itertools
import random

import engines
import pytest
import torch
from families import VOCAB, prompt, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from support.sessions import assert_close, open_session
from support.trees import random_tree

if not engines.is_current("openvino"):
    pytest.skip("runs with --engine openvino", allow_module_level=True)

from dovetail_plugin import DovetailDraft, TreeBudget, machine
from dovetail_plugin.adapters.openvino import session as openvino_session
from dovetail_plugin.drafts.network import DraftNetwork
from dovetail_plugin.targets.engine import engine_of

pytestmark = pytest.mark.usefixtures("fixed_budget")

GREEDY = dict(max_new_tokens=40, do_sample=False, eos_token_id=None)


@pytest.fixture
def rows(monkeypatch):
    """A list with an entry for each round: (tokens, rows in the engine's state, rows that the cache counts)."""
    seen, keep = [], openvino_session.OpenVINOSession.keep

    def spy(session, path):
        keep(session, path)
        held = [state.state.shape[session._row_axis] for state in session._request.query_state()]
        assert len(set(held)) == 1
        seen.append((session._cache.length, held[0], session._cache.slots))

    monkeypatch.setattr(openvino_session.OpenVINOSession, "keep", spy)
    return seen


@pytest.mark.parametrize("free", [0, 8, 128])
def test_holes_are_bounded_and_taken_out(llama, draft, oracle, rows, monkeypatch, free):
    options = GREEDY | {"max_new_tokens": 200}
    plain = llama.generate(prompt(), **options)
    oracle(plain, 17)
    monkeypatch.setattr(openvino_session, "FREE_HOLES", free)
    rows.clear()
    assert torch.equal(plain, llama.generate(prompt(), **options, assistant_model=draft))
    holes = [held - tokens for tokens, held, _ in rows]
    assert all(held == counted for _, held, counted in rows)
    assert all(count <= free + tokens // 2 for count, (tokens, _, _) in zip(holes, rows, strict=True))
    compactions = [after for before, after in itertools.pairwise(holes) if after < before]
    assert compactions, "no compaction happened, so nothing was tested"
    assert set(compactions) == {0}


def test_exact_targets_keep_no_holes(oracle, rows):
    """With chains, the state has the same rows as in plain generation, and logits have the same bits.

    That a row's product does not depend on how many rows there are is a property of the CPU plugin's int8 kernels for
    VNNI; elsewhere it computes one row by another kernel, and what is left is a rounding of float32.
    """
    target = engines.current().target(tiny_model("llama"), kind="int8", exact=True)
    draft = DovetailDraft.for_target(target)
    options = GREEDY | {"max_new_tokens": 60, "output_logits": True, "return_dict_in_generate": True}
    plain = target.generate(prompt(), **options)
    oracle(plain.sequences, 17)
    rows.clear()
    drafted = target.generate(prompt(), **options, assistant_model=draft)
    assert all(tokens == held for tokens, held, _ in rows)
    assert draft.report.acceptance_length > 1
    assert torch.equal(plain.sequences, drafted.sequences)
    one, other = torch.cat(plain.logits), torch.cat(drafted.logits)
    if "vnni" in machine.cpu_name():
        assert torch.equal(one, other)
    torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("free", [-1000, 1000])
def test_turns_with_holes_and_without(llama, draft, oracle, monkeypatch, free):
    monkeypatch.setattr(openvino_session, "FREE_HOLES", free)
    options = GREEDY | {"return_dict_in_generate": True}
    first = llama.generate(prompt(), **GREEDY)
    text = torch.cat([first, prompt(6)], dim=1)
    second = llama.generate(text, **GREEDY)
    oracle(second, 17)
    out = llama.generate(prompt(), **options, assistant_model=draft)
    assert (out.past_key_values.holes == 0) == (free < 0)
    oracle(second, text.shape[1])
    other = DovetailDraft.for_target(llama)  # a draft that did not take part in the first turn
    out = llama.generate(text, **options, past_key_values=out.past_key_values, assistant_model=other)
    assert torch.equal(out.sequences, second)


def test_a_cache_of_another_target_is_refused(llama):
    first = llama.generate(prompt(), **GREEDY, return_dict_in_generate=True)
    more = torch.cat([first.sequences, prompt(3)], dim=1)
    another = engines.current().target(tiny_model("llama"))
    with pytest.raises(ValueError, match=r"another target.*whole text without past_key_values"):
        another.generate(more, **GREEDY, past_key_values=first.past_key_values)
    assert torch.equal(another.generate(more, **GREEDY), llama.generate(more, **GREEDY))


def test_a_copied_cache_goes_on_by_itself(llama, draft):
    first = llama.generate(prompt(), **GREEDY, return_dict_in_generate=True, assistant_model=draft)
    copied = copy.deepcopy(first.past_key_values)
    for cache, length in ((first.past_key_values, 3), (copied, 9), (first.past_key_values, 5)):
        text = torch.cat([first.sequences, prompt(length)], dim=1)
        assert torch.equal(
            llama.generate(text, **GREEDY, past_key_values=copy.deepcopy(cache), assistant_model=draft),
            llama.generate(text, **GREEDY),
        )
    text = torch.cat([first.sequences, prompt(3)], dim=1)
    for cache in (first.past_key_values, copied):
        drafted = llama.generate(text, **GREEDY, past_key_values=cache, assistant_model=draft)
        assert torch.equal(drafted, llama.generate(text, **GREEDY))


def test_a_session_that_cannot_be_opened_leaves_the_cache_free(llama, monkeypatch):
    cache = engine_of(llama).cache(None)

    def fail(cache, request):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(openvino_session.OpenVINOCache, "move_to", fail)
        with pytest.raises(MemoryError), open_session(llama, cache):
            pass
    with open_session(llama, cache) as session:
        assert session.prefill(prompt(), None).logits.isfinite().all()


def test_an_interrupted_round_leaves_a_valid_cache(llama):
    """Rows that were scored and neither kept nor rejected stay hidden when the text goes on."""
    text, cache = prompt(), engine_of(llama).cache(None)
    with open_session(llama) as session:
        wanted = session.prefill(text, None)
    with open_session(llama, cache) as session:
        session.prefill(text[:, :-1], None)
        session.score(random_tree(5, [], TreeBudget(14, 5, 4), random.Random(4), VOCAB))
    assert cache.get_seq_length() == text.shape[1] - 1
    with open_session(llama, cache) as session:
        output = session.prefill(text[:, -1:], None)
    assert_close(output.logits, wanted.logits)
    assert_close(output.features, wanted.features[-1:])


def test_prompt_in_chunks(llama, draft, monkeypatch):
    plain = llama.generate(prompt(50), **GREEDY)
    monkeypatch.setattr(openvino_session, "PREFILL_ROWS", 7)
    passes, infer = [], openvino_session.OpenVINOSession._infer

    def spy(session, ids, *args, **kwargs):
        passes.append(len(ids))
        return infer(session, ids, *args, **kwargs)

    monkeypatch.setattr(openvino_session.OpenVINOSession, "_infer", spy)
    assert torch.equal(plain, llama.generate(prompt(50), **GREEDY, assistant_model=draft))
    assert passes[:8] == [7] * 7 + [1]


@given(st.integers(0, 2000), st.integers(1, 600))
def test_passes_over_a_prompt_are_whole_blocks_and_a_short_rest(rows, most):
    passes = openvino_session.prompt_passes(rows, most)
    assert sum(passes) == rows and all(0 < count <= most for count in passes)
    assert len(passes) <= -(-rows // most) + 1
    assert all(count == most for count in passes[:-2])


@pytest.mark.parametrize(
    ("rows", "passes"),
    [(40, [40]), (64, [64]), (65, [64, 1]), (112, [64, 48]), (113, [113]), (131, [128, 3]), (600, [512, 64, 24])],
)
def test_a_short_rest_is_run_by_itself(rows, passes):
    assert openvino_session.prompt_passes(rows, 512) == passes


def test_interrupted_generation_leaves_a_usable_target(llama, draft, monkeypatch):
    plain = llama.generate(prompt(), **GREEDY)

    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DraftNetwork, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llama.generate(prompt(), **GREEDY, assistant_model=draft)
    assert torch.equal(plain, llama.generate(prompt(), **GREEDY, assistant_model=draft))


def test_preparing_a_draft_takes_no_random_numbers():
    """The first drafted text is sampled with the numbers that a plain one would be sampled with."""
    pytest.importorskip("nncf")
    target = engines.current().target(tiny_model("llama"), own_runner=True)
    draft = DovetailDraft.for_target(target)
    options = GREEDY | {"do_sample": True}
    torch.manual_seed(3)
    plain = target.generate(prompt(), **options)
    torch.manual_seed(3)
    assert torch.equal(plain, target.generate(prompt(), **options, assistant_model=draft))


def test_name_of_the_directory_is_no_reason_to_warn(llama, draft, recwarn):
    draft.config.target_name_or_path = "org/the-model-that-was-exported"
    llama.generate(prompt(), **GREEDY, assistant_model=DovetailDraft(draft.config))
    assert not [w for w in recwarn if "was trained for" in str(w.message)]
