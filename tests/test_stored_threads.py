"""Stored targets in several threads: each text has its own keys and values. Runs with every engine except torch."""

import random
import threading

import engines
import pytest
import torch
from families import VOCAB, prompt, tiny_model
from support import checkpoints
from support.sessions import open_session
from support.trees import random_tree
from support.workers import workers

if engines.is_current("torch"):
    pytest.skip("runs with --engine openvino and --engine onnxruntime", allow_module_level=True)

from dovetail_plugin import DovetailDraft, TreeBudget
from dovetail_plugin.targets.engine import engine_of

pytestmark = pytest.mark.usefixtures("fixed_budget")

GREEDY = dict(max_new_tokens=30, do_sample=False, eos_token_id=None)
BUDGET = TreeBudget(14, 5, 4)


def passes(target, seed, rounds=6):
    """Run a prompt and some trees, and yield the logits of every pass; the caller decides when the next one runs."""
    rng = random.Random(seed)
    with open_session(target) as session:
        text = prompt(10 + 7 * seed)
        yield session.prefill(text, None).logits
        last = int(text[0, -1])
        for _ in range(rounds):
            tree = random_tree(last, [], BUDGET, rng, VOCAB)
            yield session.score(tree).logits
            path = [0, 1] if len(tree) > 1 and int(tree.parents[1]) == 0 else [0]
            session.keep(path)
            last = int(tree.tokens[path[-1]])


def test_passes_of_two_texts_in_turns(llama):
    """Each text's logits are those of a lone run, to the bit, whatever the other thread runs in between."""
    wanted = [list(passes(llama, seed)) for seed in (0, 1)]
    found: list[list[torch.Tensor]] = [[], []]
    with workers(2) as threads:
        running = [passes(llama, seed) for seed in (0, 1)]
        open_texts = [0, 1]
        turns = random.Random(5)
        while open_texts:
            text = turns.choice(open_texts)
            logits = threads[text](next, running[text], None)
            if logits is None:
                open_texts.remove(text)
            else:
                found[text].append(logits)
    for text in (0, 1):
        assert len(found[text]) == len(wanted[text])
        assert all(map(torch.equal, found[text], wanted[text]))


@pytest.mark.parametrize("drafted", [True, False])
def test_whole_texts_in_the_middle_of_another(llama, draft, oracle, monkeypatch, drafted):
    """Another thread generates plainly and with the same draft between any two passes of this one."""
    plain = llama.generate(prompt(), **GREEDY)
    other_plain = llama.generate(prompt(9), **GREEDY)
    if drafted:
        oracle(plain, 17)
    session, others = engines.current().session_class(), []
    score, mine = session.score, threading.get_ident()

    def meanwhile():
        return (
            llama.generate(prompt(9), **GREEDY),
            llama.generate(prompt(9), **GREEDY, assistant_model=draft),
        )

    def between(self, tree):
        if threading.get_ident() == mine and len(others) < 3:
            others.append(other(meanwhile))
        return score(self, tree)

    monkeypatch.setattr(session, "score", between)
    with workers(1) as (other,):
        text = llama.generate(prompt(), **GREEDY, **({"assistant_model": draft} if drafted else {}))
    assert torch.equal(text, plain)
    assert len(others) == 3
    assert all(torch.equal(found, other_plain) for pair in others for found in pair)


def test_threads_at_once(llama, draft):
    """Four threads start together and generate several texts each, plainly and with one draft."""
    lengths = [5, 17, 30, 9]
    wanted = {length: llama.generate(prompt(length), **GREEDY) for length in lengths}
    ready = threading.Barrier(4)

    def run(length):
        ready.wait(timeout=60)
        return [
            llama.generate(prompt(length), **GREEDY, **extra)
            for extra in ({"assistant_model": draft}, {}, {"assistant_model": draft})
        ]

    with workers(4) as threads:
        waits = [worker.start(run, length) for worker, length in zip(threads, lengths, strict=True)]
        for length, wait in zip(lengths, waits, strict=True):
            assert all(torch.equal(text, wanted[length]) for text in wait())


def test_caches_of_several_texts_stay_valid(llama, draft):
    texts = [prompt(), prompt(9)]
    options = GREEDY | {"return_dict_in_generate": True, "assistant_model": draft}
    with workers(2) as threads:
        firsts = []
        for worker, text in zip(threads, texts, strict=True):
            firsts.append(worker(lambda text=text: llama.generate(text, **options)))
        longer = [torch.cat([first.sequences, prompt(3)], dim=1) for first in firsts]
        for worker, text, first in zip(reversed(threads), longer, firsts, strict=True):
            second = worker(lambda t=text, f=first: llama.generate(t, past_key_values=f.past_key_values, **options))
            assert torch.equal(second.sequences, llama.generate(text, **GREEDY))


def test_a_cache_serves_one_generation_at_a_time(llama):
    cache, text = engine_of(llama).cache(None), prompt()
    with workers(1) as (other,):
        with open_session(llama, cache) as session:
            wanted = session.prefill(text, None).logits
            with pytest.raises(ValueError, match="in use by another call of generate"):
                other(lambda: open_session(llama, cache).__enter__())
        assert other(lambda: llama.generate(torch.cat([text, text], 1), past_key_values=cache, **GREEDY)).shape[1] == 64
    with open_session(llama) as session:
        assert torch.equal(session.prefill(text, None).logits, wanted)


def loads(target, monkeypatch, meanwhile=lambda: None):
    """A list with an entry for each time that the engine loads its graph. `meanwhile` runs in the middle of each."""
    engine, made = engine_of(target), []
    name = "_compile" if engines.is_current("openvino") else "_load"
    original = getattr(engine, name)

    def load():
        made.append(1)
        meanwhile()
        return original()

    monkeypatch.setattr(engine, name, load)
    return made


@pytest.fixture
def deep():
    """A target with layers for an EAGLE-3 draft."""
    return engines.current().target(tiny_model("llama", num_hidden_layers=checkpoints.TARGET_LAYERS))


def eagle3(directory):
    torch.manual_seed(0)
    made = checkpoints.eagle3(states=(1, 3, 7), own_embedding=True)
    draft = DovetailDraft.from_pretrained(made.write(directory))
    draft.budget = TreeBudget(6, 3, 3)
    return draft


def test_layers_are_read_for_the_first_time_while_others_generate(deep, tmp_path, monkeypatch):
    """In the middle of a plain text, and plain passes of others go on while the graph is loaded once more."""
    draft, session = eagle3(tmp_path), engines.current().session_class()
    plain, other_plain = deep.generate(prompt(), **GREEDY), deep.generate(prompt(9), **GREEDY)
    score, mine, found = session.score, threading.get_ident(), []

    def while_loading():
        found.append(third(lambda: deep.generate(prompt(9), **GREEDY)))

    def between(self, tree):
        if threading.get_ident() == mine and len(found) < 2:
            found.append(other(lambda: deep.generate(prompt(9), **GREEDY, assistant_model=draft)))
        return score(self, tree)

    made = loads(deep, monkeypatch, while_loading)
    monkeypatch.setattr(session, "score", between)
    with workers(2) as (other, third):
        text = deep.generate(prompt(), **GREEDY)
    assert torch.equal(text, plain)
    assert len(made) == 1 and len(found) == 2 and not draft.report.warnings
    assert all(torch.equal(text, other_plain) for text in found)


def test_layers_are_exposed_once_for_all_threads(deep, tmp_path, monkeypatch):
    waits, draft = [], eagle3(tmp_path)

    def generate():
        return deep.generate(prompt(), **GREEDY, assistant_model=draft)

    def while_loading():
        waits.append(other.start(generate))

    plain = deep.generate(prompt(), **GREEDY)
    made = loads(deep, monkeypatch, while_loading)
    with workers(1) as (other,):
        assert torch.equal(generate(), plain)
        assert torch.equal(waits[0](), plain)
    assert len(made) == 1


def test_a_plain_cache_goes_on_with_a_draft_that_reads_layers(deep, tmp_path):
    """The cache's rows were made by a graph without outputs for the layers."""
    first = deep.generate(prompt(), **GREEDY, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, prompt(4)], dim=1)
    draft = eagle3(tmp_path)
    text = deep.generate(longer, **GREEDY, past_key_values=first.past_key_values, assistant_model=draft)
    assert torch.equal(text, deep.generate(longer, **GREEDY)) and not draft.report.warnings
