"""The arithmetic of benchmarks: counting tokens, recognizing ties, reading prompts."""

import json

import pytest
import torch
from families import prompt, tiny_target
from helpers import PLAIN_TEMPLATE, byte_tokenizer, write_jsonl

from dovetail_plugin import DovetailDraft
from dovetail_plugin.bench.compare import Comparison, Run, tie_tolerance, timed_generate, top_gap_at_difference
from dovetail_plugin.bench.prompts import load_prompts
from dovetail_plugin.bench.provenance import provenance
from dovetail_plugin.machine import thread_count

GREEDY = dict(max_new_tokens=12, do_sample=False, eos_token_id=None)


def run(ids, seconds):
    return Run(tokens=len(ids), seconds=seconds, ids=torch.tensor([ids]))


# --- counting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("early", [False, True], ids=["full length", "ends early"])
def test_both_sides_are_counted_alike(llama, draft, early):
    """Both sides count the new tokens of the returned text, also when it ends early."""
    options = dict(GREEDY)
    if early:
        plain = llama.generate(prompt(), **GREEDY)
        options["eos_token_id"] = int(plain[0, -4])
    plain = timed_generate(llama, prompt(), **options)
    drafted = timed_generate(llama, prompt(), **options, assistant_model=draft)
    assert plain.tokens == drafted.tokens == draft.report.new_tokens == plain.ids.shape[1] - 17
    assert (plain.tokens < 12) == early
    assert plain.seconds > 0
    assert Run(10, 4.0, plain.ids).tokens_per_s == 2.5


def test_sides_alternate_with_equal_options_and_seeds(llama, draft, monkeypatch):
    calls, generate = [], llama.generate

    def spy(ids, **options):
        calls.append((options.pop("assistant_model", None) is not None, torch.initial_seed()))
        assert options == GREEDY
        return generate(ids, **options, **({"assistant_model": draft} if calls[-1][0] else {}))

    monkeypatch.setattr(llama, "generate", spy)
    comparison = Comparison(llama, draft, GREEDY, seed=40)
    for length in (17, 9, 12):
        comparison.add(prompt(length))
    assert calls == [(False, 40), (True, 40), (True, 41), (False, 41), (False, 42), (True, 42)]
    result = comparison.result(note="mine")
    assert (result.prompts, result.identical, result.ties, result.differences) == (3, 3, 0, 0)
    assert result.new_tokens == 36
    assert result.rounds == sum(len(report.rounds) for report in comparison.reports)
    assert result.acceptance_length == pytest.approx(33 / result.rounds)  # the prompt pass gives one token each
    assert result.settings == {"note": "mine"}
    assert result.round_ms == pytest.approx(sum(result.phase_ms_per_round.values()))


def test_warm_up_is_not_counted(llama, draft):
    comparison = Comparison(llama, draft, GREEDY)
    comparison.warm_up(prompt())
    assert comparison.pairs == [] and comparison.reports == []
    assert draft.report.new_tokens == 8


def test_ratio_is_the_median_of_ratios(llama, draft):
    """Not the ratio of the medians. Quartiles are those of the ratios too."""
    comparison = Comparison(llama, draft, GREEDY)
    for plain_s, draft_s in ((8, 4), (4, 4), (6, 1), (9, 2), (2, 1)):
        comparison.pairs.append((run([1] * 12, plain_s), run([1] * 12, draft_s)))
    result = comparison.result()
    assert result.plain_tokens_per_s == 12 / 6
    assert result.draft_tokens_per_s == 12 / 2
    assert result.ratio == 2.0
    assert result.ratio_quartiles == (1.5, 5.25)
    assert result.acceptance_length == 0


def test_table_and_json_have_the_same_figures(llama, draft):
    comparison = Comparison(llama, draft, GREEDY)
    comparison.add(prompt())
    comparison.pairs *= 4
    comparison.reports *= 4
    comparison.gaps = [0.0, 0.3]
    result = comparison.result(budget="16/6/8")
    table = result.table()
    assert "2 of 4 identical, 1 diverge at a tie of the target, 1 DIFFER" in table
    for row in ("tokens/s (median)", "acceptance length", "nodes per round", "draft, ms per round", "round, ms"):
        assert row in table
    assert f"{result.ratio:.2f}" in table
    assert "\n" not in result.json_line()
    stored = json.loads(result.json_line())
    assert stored["ratio"] == result.ratio
    assert stored["settings"] == {"budget": "16/6/8"}
    assert stored.keys() >= {"command", "git", "versions", "machine"}


def test_provenance_names_no_directories(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/some/where/bin/dovetail", "bench", "--count", "3"])
    assert provenance()["command"] == "dovetail bench --count 3"
    monkeypatch.setattr("sys.argv", ["/some/where/dovetail_plugin/__main__.py", "bench"])
    assert provenance()["command"] == "python -m dovetail_plugin bench"
    arguments = [
        "bench",
        "--out",
        "/some/where/a.jsonl",
        "--out=/some/b",
        "--engine",
        "ov=/some/where/ir,exact=true",
        "x/y/z",
    ]
    monkeypatch.setattr("sys.argv", ["/some/where/bin/dovetail", *arguments])
    shown = "dovetail bench --out a.jsonl --out=b --engine ov=ir,exact=true x/y/z"
    assert provenance()["command"] == shown


# --- ties ------------------------------------------------------------------------------------------


def test_gap_is_taken_at_the_first_difference(llama):
    text = llama.generate(prompt(), **GREEDY)
    other = text.clone()
    other[0, 20:] = (other[0, 20:] + 1) % 97
    best = llama(input_ids=text[:, :20]).logits[0, -1].topk(2).values
    wanted = ((best[0] - best[1]) / best[0].abs()).item()
    assert top_gap_at_difference(llama, text, other) == pytest.approx(wanted, rel=1e-4)  # one row
    assert wanted > tie_tolerance(torch.bfloat16)
    assert top_gap_at_difference(llama, text, other[:, :25]) == pytest.approx(wanted, rel=1e-4)
    assert top_gap_at_difference(llama, text, text[:, :25]) == float("inf")


@pytest.mark.parametrize(("dtype", "ties"), [(torch.float32, 0), (torch.bfloat16, 1)])
def test_ties_exist_in_bfloat16_only(dtype, ties):
    """Two tokens with nearly the same row in the head are a tie in bfloat16 and a difference in float32."""
    target = tiny_target("llama").to(dtype)
    text = target.generate(prompt(), **GREEDY)
    best = int(text[0, 20])
    twin = (best + 1) % 97
    row = target.lm_head.weight.data[best]
    target.lm_head.weight.data[twin] = row * (1 - torch.finfo(dtype).eps)
    text = target.generate(prompt(), **GREEDY)
    other = text.clone()
    other[0, 20] = best if int(text[0, 20]) == twin else twin
    gap = top_gap_at_difference(target, text, other)
    assert 0 <= gap <= 4 * torch.finfo(dtype).eps
    comparison = Comparison(target, DovetailDraft.for_target(target), GREEDY)
    comparison.pairs = [(run([1], 1), run([1], 1))]
    comparison.gaps = [max(gap, 1e-9)]
    result = comparison.result()
    assert (result.identical, result.ties, result.differences) == (0, ties, 1 - ties)


# --- prompts ---------------------------------------------------------------------------------------


def test_prompt_fields(tmp_path):
    rows = [
        {"prompt": "one"},
        {"question": "two"},
        {"turns": ["three", "later"]},
        {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "four"}]},
        {"prompt": "five"},
    ]
    file = write_jsonl(tmp_path / "prompts.jsonl", rows)
    tokenizer = byte_tokenizer(PLAIN_TEMPLATE)
    texts = [tokenizer.decode(ids[0]) for ids in load_prompts(file, tokenizer, 4)]
    said = ["one", "two", "three", "be brief<|user|>four"]
    assert texts == [f"<|user|>{text}<|assistant|>" for text in said]
    bare = byte_tokenizer(None)
    assert [bare.decode(ids[0]) for ids in load_prompts(file, bare, 9)] == ["one", "two", "three", "four", "five"]


def test_bundled_prompts():
    prompts = load_prompts(None, byte_tokenizer(), 100)
    assert len(prompts) == 100
    assert all(ids.shape[0] == 1 and ids.shape[1] > 40 and ids.dtype == torch.int64 for ids in prompts)


@pytest.mark.parametrize("line", ['{"answer": "42"}', "[1]", "{'prompt': 1}", '{"turns": []}', '{"prompt": 3}'])
def test_bad_line_is_named(tmp_path, line):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "good"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 3: "):
        load_prompts(tmp_path / "bad.jsonl", byte_tokenizer(), 5)
    assert len(load_prompts(tmp_path / "bad.jsonl", byte_tokenizer(), 1)) == 1


def test_empty_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no prompts in .*empty\.jsonl"):
        load_prompts(write_jsonl(tmp_path / "empty.jsonl", []), byte_tokenizer(), 5)


def test_thread_count_is_restored():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="inside"), thread_count(3):
        assert torch.get_num_threads() == 3
        raise RuntimeError("inside")
    assert torch.get_num_threads() == before
    with thread_count(None):
        assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="at least 1, got 0"), thread_count(0):
        pass
