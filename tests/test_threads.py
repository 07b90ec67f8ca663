"""Several calls of `generate` at once on one target and one draft: right texts, each with its own report."""

import asyncio
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from families import prompt
from helpers import command_environment

from dovetail_plugin import DovetailConfig, DovetailDraft, PromptLookupDraft, TreeBudget

GREEDY = dict(do_sample=False, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True)
THREADS, CALLS = 4, 6


def drafts_for(target):
    torch.manual_seed(7)
    eagle3 = DovetailConfig.for_target(target.config, fusion="eagle3", fusion_bias=False, feature_layers=[0, 1, 2])
    drafts = {"dovetail": DovetailDraft.for_target(target), "lookup": PromptLookupDraft(shortest=1)}
    return drafts | {"three layers": DovetailDraft(eagle3)}


@pytest.fixture(scope="module")
def texts(llama):
    """Prompts of different lengths and their plain texts."""
    prompts = [prompt(5 + 7 * number, seed=number) for number in range(THREADS * CALLS)]
    return [(ids, llama.generate(ids, max_new_tokens=20, **GREEDY).sequences) for ids in prompts]


def hooks_of(model):
    return [len(m._forward_hooks) for m in model.modules()] if isinstance(model, torch.nn.Module) else []


def run_at_once(llama, texts, draft_of):
    """Run the texts in threads that start together. `draft_of` gives the draft of each call, or None."""
    barrier, before = threading.Barrier(THREADS), (torch.get_num_threads(), hooks_of(llama))

    def work(thread):
        barrier.wait()
        for number in range(thread, len(texts), THREADS):
            ids, plain = texts[number]
            draft = draft_of(number)
            out = llama.generate(ids, max_new_tokens=20, assistant_model=draft, **GREEDY)
            assert torch.equal(out.sequences, plain), number
            if draft is not None:
                assert out.report.prompt_tokens == ids.shape[1] and out.report.new_tokens == 20
                assert not out.report.warnings

    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(work, thread) for thread in range(THREADS)]:
            done.result()
    assert (torch.get_num_threads(), hooks_of(llama)) == before


@pytest.mark.torch_only("features of several layers")
@pytest.mark.parametrize("kind", ["dovetail", "lookup", "three layers"])
def test_one_draft_for_all_threads(kind, llama, texts, fixed_budget):
    draft = drafts_for(llama)[kind]
    run_at_once(llama, texts, lambda _number: draft)


def test_one_draft_with_the_policy(llama, texts):
    draft = DovetailDraft.for_target(llama)
    run_at_once(llama, texts, lambda _number: draft)


@pytest.mark.torch_only("plain generation of a stored target takes its request as well")
def test_drafted_and_plain_calls_at_once(llama, texts, fixed_budget):
    drafts = [DovetailDraft.for_target(llama), DovetailDraft.for_target(llama, blocks=2), None]
    run_at_once(llama, texts, lambda number: drafts[number % 3])


def test_sampled_calls_at_once_keep_to_their_draws(llama, fixed_budget):
    """torch has one random state for all threads, so only the set of possible tokens can be compared."""
    draft = DovetailDraft.for_target(llama)
    options = dict(max_new_tokens=10, do_sample=True, top_k=1, eos_token_id=None, pad_token_id=0)
    plain = llama.generate(prompt(), **options)
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(llama.generate, prompt(), assistant_model=draft, **options) for _ in range(9)]
        assert all(torch.equal(call.result(), plain) for call in calls)


def test_executors_of_asyncio(llama, texts, fixed_budget):
    draft = DovetailDraft.for_target(llama)

    async def main():
        calls = (
            asyncio.to_thread(llama.generate, ids, max_new_tokens=20, assistant_model=draft, **GREEDY)
            for ids, _ in texts[:8]
        )
        return await asyncio.gather(*calls)

    for out, (_, plain) in zip(asyncio.run(main()), texts[:8], strict=True):
        assert torch.equal(out.sequences, plain)


@pytest.mark.torch_only("a stored target's cache is in use during a call")
def test_a_call_inside_a_call(llama, texts, fixed_budget):
    """A stopping criterion generates on the same target with the same draft; no lock is held meanwhile."""
    draft, (ids, plain), (other, other_plain) = DovetailDraft.for_target(llama), texts[3], texts[4]
    seen = []

    def criterion(_ids, _scores, **_kwargs):
        out = llama.generate(other, max_new_tokens=20, assistant_model=draft, **GREEDY)
        seen.append(torch.equal(out.sequences, other_plain))
        return torch.zeros(1, dtype=torch.bool)

    out = llama.generate(ids, max_new_tokens=20, assistant_model=draft, stopping_criteria=[criterion], **GREEDY)
    assert torch.equal(out.sequences, plain)
    assert len(seen) == 20 and all(seen)


@pytest.mark.torch_only("passes of torch targets")
def test_no_lock_is_held_during_a_callback(llama, texts, fixed_budget):
    """While a streamer of one call waits, another thread generates on the same target and draft."""
    draft = DovetailDraft.for_target(llama)
    draft.budget = TreeBudget(6, 3, 2)
    (ids, plain), (other, other_plain) = texts[3], texts[4]
    results = []

    class Streamer:
        def put(self, value):
            if value.numel() == 1 and not results:
                call = threading.Thread(target=self.other)
                call.start()
                call.join(60)
                assert not call.is_alive()

        def end(self):
            pass

        def other(self):
            out = llama.generate(other, max_new_tokens=20, assistant_model=draft, **GREEDY)
            results.append(torch.equal(out.sequences, other_plain))

    out = llama.generate(ids, max_new_tokens=20, assistant_model=draft, streamer=Streamer(), **GREEDY)
    assert torch.equal(out.sequences, plain) and results == [True]


# --- processes -------------------------------------------------------------------------------------

GENERATE = """
import sys, torch
from transformers import AutoModelForCausalLM
from dovetail_plugin import DovetailDraft

target, draft = AutoModelForCausalLM.from_pretrained("target"), DovetailDraft.from_pretrained("draft")
options = dict(max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
ids = torch.arange(5, 25)[None]
print("ready", flush=True)
sys.stdin.readline()
same = torch.equal(target.generate(ids, assistant_model=draft, **options), target.generate(ids, **options))
print(same, draft.report.warnings)
"""


@pytest.mark.torch_only("a directory with a transformers model")
def test_two_processes_at_once(pair, tmp_path):
    """Both measure the machine into one directory, and generate meanwhile."""
    environment = command_environment() | {"DOVETAIL_CACHE": str(tmp_path / "measured")}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([sys.executable, "-c", GENERATE], cwd=pair, env=environment, **pipes) for _ in range(2)]
    for process in running:
        assert process.stdout.readline() == "ready\n"
    for process in running:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.communicate(timeout=300)[0] for process in running] == ["True []\n", "True []\n"]
