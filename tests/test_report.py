"""`GenerationReport`: its sums, what it prints, and what its summary says limited the speed."""

import time

import pytest
import torch
from families import prompt

from dovetail_plugin.report import PHASES, GenerationReport, PhaseClock, Round


def report_of(rounds, *, prefill_s=0.5, new_tokens=None, **seconds):
    """A report whose phases took these seconds over all rounds; "other" is what `decode_s` has beyond the phases."""
    report = GenerationReport(prompt_tokens=7, prefill_s=prefill_s, rounds=list(rounds))
    report.new_tokens = 1 + sum(r.emitted for r in rounds) if new_tokens is None else new_tokens
    report.clock.seconds |= {name: value for name, value in seconds.items() if name != "other"}
    report.decode_s = sum(seconds.values())
    return report


DRAFTED = [Round(nodes=8, emitted=4, depth=3), Round(nodes=6, emitted=2, depth=2)]
POORLY_DRAFTED = [Round(nodes=8, emitted=1, depth=3), Round(nodes=8, emitted=2, depth=3)]
MOSTLY_PLAIN = [Round(nodes=8, emitted=3, depth=3), Round(nodes=1, emitted=1), Round(nodes=1, emitted=1)]

SUMMARIES = {
    "plain rounds": (
        report_of(MOSTLY_PLAIN, draft=0.03, verify=0.06),
        "A round took 30.0 ms (draft 33%, transfer 0%, verify 67%) and emitted 1.67 tokens from 3.3 verified nodes. "
        "67% of the rounds were plain.",
        "Limited by acceptance: the draft's tokens were not worth their time, so most rounds ran without a draft.",
        "a draft trained for this target",
    ),
    "drafting": (
        report_of(DRAFTED, draft=0.05, transfer=0.01, verify=0.04),
        "A round took 50.0 ms (draft 50%, transfer 10%, verify 40%) and emitted 3.00 tokens from 7.0 verified nodes. "
        "0% of the rounds were plain.",
        "Limited by drafting: 50% of the time was spent in the draft.",
        "the draft on a GPU",
    ),
    "transfers": (
        report_of(DRAFTED, draft=0.01, transfer=0.05, verify=0.03, other=0.01),
        "A round took 50.0 ms (draft 10%, transfer 50%, verify 30%) and emitted 3.00 tokens from 7.0 verified nodes. "
        "0% of the rounds were plain.",
        "Limited by transfers: 50% of the time was spent copying between devices.",
        "the draft on the target's device",
    ),
    "low acceptance": (
        report_of(POORLY_DRAFTED, draft=0.02, verify=0.08),
        "A round took 50.0 ms (draft 20%, transfer 0%, verify 80%) and emitted 1.50 tokens from 8.0 verified nodes. "
        "0% of the rounds were plain.",
        "Limited by acceptance: a round emitted only 1.50 tokens.",
        "a draft trained longer",
    ),
    "verification": (
        report_of(DRAFTED, draft=0.02, verify=0.07, accept=0.005, other=0.005),
        "A round took 50.0 ms (draft 20%, transfer 0%, verify 70%) and emitted 3.00 tokens from 7.0 verified nodes. "
        "0% of the rounds were plain.",
        "Limited by verification: 70% of the time was spent in the target's passes.",
        "a quantized target",
    ),
}


@pytest.mark.parametrize("case", SUMMARIES)
def test_summary_names_the_bottleneck_and_a_remedy(case):
    report, first, second, remedy = SUMMARIES[case]
    lines = report.summary().splitlines()
    assert lines[:2] == [first, second]
    assert len(lines) == 3
    assert lines[2].startswith("What would help: ") and remedy in lines[2]


def test_half_of_the_rounds_plain_is_not_most():
    rounds = [Round(nodes=8, emitted=4), Round(nodes=1, emitted=1)]
    assert "Limited by verification" in report_of(rounds, verify=0.1).summary()


@pytest.mark.parametrize("new_tokens", [0, 1])
def test_summary_without_rounds(new_tokens):
    report = report_of([], new_tokens=new_tokens)
    assert report.summary() == "No rounds were run: the prompt pass gave the only new token, if any."
    assert (report.acceptance_length, report.nodes_per_round) == (0.0, 0.0)


def test_summary_says_why_no_draft_ran():
    report = GenerationReport(warnings=["no draft ran: drafting needs the key/value cache."])
    assert report.summary().splitlines() == ["No rounds were run.", *report.warnings]


def test_summary_of_rounds_that_took_no_time():
    """A clock with a coarse resolution can report zero seconds."""
    summary = report_of(DRAFTED, prefill_s=0.0).summary()
    assert summary.startswith("A round took 0.0 ms (draft 0%, transfer 0%, verify 0%)")


def test_phases_sum_to_the_seconds_of_the_rounds():
    report = report_of(DRAFTED, draft=0.25, transfer=0.125, verify=1.0, accept=0.0625, other=0.5)
    assert report.phase_seconds == {"draft": 0.25, "transfer": 0.125, "verify": 1.0, "accept": 0.0625, "other": 0.5}
    assert sum(report.phase_seconds.values()) == report.decode_s
    report.decode_s = 1.0  # less than the phases, as rounding can make it
    assert report.phase_seconds["other"] == 0.0


def test_tokens_per_second_count_prefill_but_not_the_probe():
    report = report_of(DRAFTED, prefill_s=1.0, verify=2.5)
    report.probe_s = 100.0
    assert report.tokens_per_s == 7 / 3.5
    assert GenerationReport().tokens_per_s == 0.0


def test_text_lists_totals_phases_and_warnings():
    report = report_of(DRAFTED, draft=0.25, verify=1.0, other=0.25)
    report.warnings.append("The draft ran out of memory.")
    assert str(report).splitlines() == [
        "7 tokens in 2.00 s (3.5 tokens/s)",
        "2 rounds, acceptance length 3.00, 7.0 nodes verified per round",
        "seconds: prefill 0.500, draft 0.250, transfer 0.000, verify 1.000, accept 0.000, other 0.250",
        "warning: The draft ran out of memory.",
    ]


def test_clock_adds_up_phases_and_resets():
    clock = PhaseClock()
    for _ in range(2):
        with clock.phase("verify"):
            time.sleep(0.002)
    with pytest.raises(RuntimeError, match="inside"), clock.phase("draft"):
        raise RuntimeError("inside")
    assert clock.seconds["verify"] >= 0.004
    assert clock.seconds["draft"] > 0
    clock.reset()
    assert clock.seconds == dict.fromkeys(PHASES, 0.0)


def test_rounds_compare_by_what_they_verified():
    """Two runs of the same text have equal rounds, whatever they took."""
    assert Round(8, 4, 3, seconds={"verify": 1.0}, predicted_s=2.0) == Round(8, 4, 3, seconds={"verify": 3.0})
    assert Round(8, 4, 3) != Round(8, 3, 3)
    assert Round(8, 4, seconds={"verify": 1.0, "other": 0.5}).total_s == 1.5


def test_report_of_a_real_generation(llama, draft):
    llama.generate(prompt(), max_new_tokens=12, do_sample=False, eos_token_id=None, assistant_model=draft)
    report = draft.report
    assert (report.prompt_tokens, report.new_tokens) == (17, 12)
    assert sum(r.emitted for r in report.rounds) == 11  # the prompt pass gives the first token
    assert 0 < sum(r.total_s for r in report.rounds) <= report.decode_s
    assert sum(report.phase_seconds.values()) == pytest.approx(report.decode_s)
    assert report.summary().count("\n") == 2
    assert torch.isfinite(torch.tensor(report.tokens_per_s))
