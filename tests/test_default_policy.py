"""Drafting as it is without any settings: the policy measures the machine once and then chooses every tree.

Time is a fake clock's, so each run makes the same decisions. Most tests first use a random draft, whose trees
are rejected until the policy rests it, then an oracle, whose paths are accepted.
"""

import pytest
import torch
from families import CASE_IDS, CASES, prompt, tiny_target
from support.bundled import TARGET, load_pair
from support.options import PROCESSORS, WARPERS
from transformers import AutoTokenizer

from dovetail_plugin import DeviceSplitPolicy, DovetailDraft
from dovetail_plugin.bench.prompts import load_prompts
from dovetail_plugin.policy.device_split import UNMEASURED

pytestmark = pytest.mark.usefixtures("fake_clock")

GREEDY = dict(max_new_tokens=60, do_sample=False, eos_token_id=None, pad_token_id=0)


def generate(target, ids, draft=None, seed=3, **options):
    """Text (1, T) with the given seed; the draft is used if there is one."""
    torch.manual_seed(seed)
    return target.generate(ids, **(GREEDY | options), **({} if draft is None else {"assistant_model": draft}))


def assert_chosen_by_policy(report):
    """The rounds were the policy's, and account for the whole text."""
    assert not report.warnings
    assert 1 + sum(one.emitted for one in report.rounds) == report.new_tokens
    assert all(one.predicted_s > 0 and 1 <= one.predicted_tokens <= one.nodes for one in report.rounds)


def random_draft(target):
    """A draft with large random weights: it is sure of its proposals, and they are wrong."""
    torch.manual_seed(7)
    draft = DovetailDraft.for_target(target)
    for parameter in draft.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    return draft


def assert_plain_text(target, ids, oracle, **options):
    """Text with a random draft and with an oracle equals plain text; returns both reports."""
    plain = generate(target, ids, **options)
    wrong, knowing = random_draft(target), random_draft(target)
    assert torch.equal(plain, generate(target, ids, wrong, **options))
    oracle(plain, ids.shape[1])
    assert torch.equal(plain, generate(target, ids, knowing, **options))
    for draft in (wrong, knowing):
        assert draft.budget is None and isinstance(draft.policy, DeviceSplitPolicy)
        assert_chosen_by_policy(draft.report)
    return wrong.report, knowing.report


@pytest.fixture
def draft_of_policy(llama):
    """A random draft without a budget, so that the policy chooses its trees."""
    return random_draft(llama)


@pytest.mark.parametrize(("model_type", "fields"), CASES, ids=CASE_IDS)
def test_families(model_type, fields, oracle):
    wrong, knowing = assert_plain_text(tiny_target(model_type, **fields), prompt(30), oracle)
    nodes = [one.nodes for one in wrong.rounds]
    assert max(nodes) > 1, "the policy never drafted"
    assert 1 in nodes, "the policy did not rest a draft that is always wrong"
    assert knowing.acceptance_length > 1.2


@pytest.mark.parametrize("name", PROCESSORS)
def test_greedy_with_processors(llama, oracle, name):
    assert_plain_text(llama, prompt(), oracle, **PROCESSORS[name])


@pytest.mark.parametrize("name", [*WARPERS, "repetition_penalty", "own"])
def test_same_seed_gives_the_same_sample(llama, oracle, name):
    assert_plain_text(llama, prompt(), oracle, do_sample=True, **(WARPERS | PROCESSORS)[name])


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 5])
def test_few_new_tokens(llama, oracle, new_tokens):
    assert_plain_text(llama, prompt(), oracle, max_new_tokens=new_tokens)


def test_left_padding(llama, oracle):
    ids = torch.cat([torch.zeros(1, 9, dtype=torch.long), prompt()], dim=1)
    assert_plain_text(llama, ids, oracle, attention_mask=(torch.arange(26) >= 9).long()[None])


def test_turns(llama, draft_of_policy):
    """Three turns on one cache."""
    wanted, text, cache = [], prompt(), None
    for turn in range(3):  # on every engine, caches of several texts stay valid
        wanted.append(generate(llama, text, max_new_tokens=15))
        text = torch.cat([wanted[-1], prompt(6, seed=turn)], dim=1)
    text = prompt()
    for turn, plain in enumerate(wanted):
        out = generate(
            llama, text, draft_of_policy, max_new_tokens=15, past_key_values=cache, return_dict_in_generate=True
        )
        assert torch.equal(out.sequences, plain)
        assert_chosen_by_policy(draft_of_policy.report)
        cache = out.past_key_values
        text = torch.cat([out.sequences, prompt(6, seed=turn)], dim=1)


def test_decisions_are_repeated_exactly(llama, draft_of_policy, monkeypatch, tmp_path):
    """Two runs that both measure: every round has the same tree, the same seconds and the same forecast."""
    runs = []
    for run in range(2):
        monkeypatch.setenv("DOVETAIL_CACHE", str(tmp_path / f"records {run}"))
        draft_of_policy.policy = None
        generate(llama, prompt(), draft_of_policy)
        report = draft_of_policy.report
        assert report.probe_s > 0
        runs.append(
            [(one.nodes, one.depth, one.widths, one.predicted_tokens, one.predicted_s) for one in report.rounds]
        )
        seconds = [one.total_s for one in report.rounds]
        assert min(seconds) > 0
    assert [one[:4] for one in runs[0]] == [one[:4] for one in runs[1]]
    assert [one[4] for one in runs[0]] == pytest.approx([one[4] for one in runs[1]], rel=1e-6)


def test_the_machine_is_measured_once(llama, draft_of_policy, fake_clock):
    """A later generation, and a policy of a later process, find what the first one measured."""
    passes = []
    for policy in (None, None, DeviceSplitPolicy()):
        draft_of_policy.policy = policy or draft_of_policy.policy
        before = fake_clock.target_passes
        generate(llama, prompt(), draft_of_policy)
        passes.append(fake_clock.target_passes - before - 1 - len(draft_of_policy.report.rounds))
    assert passes[0] > 10
    assert passes[1:] == [0, 0]


def test_a_limited_time_is_not_spent_on_measurements(llama, draft_of_policy, fake_clock, oracle):
    """Such a call drafts small trees until another one has measured the machine."""
    plain = generate(llama, prompt())
    oracle(plain, prompt().shape[1])
    before = fake_clock.target_passes
    assert torch.equal(plain, generate(llama, prompt(), draft_of_policy, max_time=1000.0))
    report = draft_of_policy.report
    assert fake_clock.target_passes - before == 1 + len(report.rounds)
    assert {one.nodes for one in report.rounds[:-1]} == {UNMEASURED.nodes}
    generate(llama, prompt(), draft_of_policy)
    generate(llama, prompt(), draft_of_policy, max_time=1000.0)
    assert_chosen_by_policy(draft_of_policy.report)


class Watched:
    """A streamer that notes when tokens come."""

    def __init__(self, clock):
        self.clock, self.target_passes = clock, []

    def put(self, _):
        self.target_passes.append(self.clock.target_passes)

    def end(self):
        pass


def test_a_stream_does_not_stop_for_measurements(llama, draft_of_policy, fake_clock):
    streamer = Watched(fake_clock)
    generate(llama, prompt(), draft_of_policy, streamer=streamer)
    assert draft_of_policy.report.probe_s > 0
    of_prompt, first, second = streamer.target_passes[:3]
    assert first - of_prompt > 10 and second - first <= 1


def test_bundled_pair_is_faster_than_plain():
    """A trained draft: the policy keeps drafting, and a round gives more tokens a second than a plain pass."""
    target, draft = load_pair(torch.float32)
    for ids in load_prompts(None, AutoTokenizer.from_pretrained(TARGET), 3):
        plain = generate(target, ids, max_new_tokens=48)
        assert torch.equal(plain, generate(target, ids, draft, max_new_tokens=48))
        assert_chosen_by_policy(draft.report)
        assert draft.report.acceptance_length > 2
        assert draft.report.nodes_per_round > 2
