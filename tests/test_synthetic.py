"""Try before training: the lots are fair, the passes are real, the figures are marked, random weights are whole."""

import json
from statistics import fmean

import pytest
import torch
from families import COMMON, FULL_ATTENTION, SLIDING, VOCAB, prompt
from transformers import AutoConfig, AutoModelForCausalLM

from dovetail_plugin import DovetailDraft, TreeBudget
from dovetail_plugin.bench.random_model import random_model
from dovetail_plugin.bench.synthetic import (
    RANKS,
    SyntheticComparison,
    SyntheticRunner,
    probabilities,
    synthetic_generate,
)
from dovetail_plugin.drafts.feature_drafter import FeatureDrafter
from dovetail_plugin.drafts.torch_runner import TorchRunner
from dovetail_plugin.report import PhaseClock
from dovetail_plugin.runner import Pass
from dovetail_plugin.targets.torch_session import TorchSession

pytestmark = pytest.mark.torch_only("what an engine computes is thrown away")


@pytest.fixture
def counted(monkeypatch):
    """Trees that the target scored, and rows of every step of a draft in torch."""
    trees, steps = [], []
    score, run = TorchSession.score, TorchRunner.run

    def counting_score(self, tree):
        trees.append(tree)
        return score(self, tree)

    def counting_run(self, step, rows):
        steps.append(step.rows)
        return run(self, step, rows)

    monkeypatch.setattr(TorchSession, "score", counting_score)
    monkeypatch.setattr(TorchRunner, "run", counting_run)
    return trees, steps


def generate(llama, draft, rate=0.8, tokens=60, seed=0, budget=None):
    """A run, and its rounds."""
    draft.budget = budget
    run = synthetic_generate(llama, draft, prompt(), rate=rate, max_new_tokens=tokens, seed=seed)
    assert not draft.report.warnings
    assert run.tokens == tokens == draft.report.new_tokens == run.ids.shape[1] - 17
    return run, draft.report.rounds


# --- what is said and what is drawn ----------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.001, 0.3, 0.5, 0.8, 1.0])
def test_probabilities(rate):
    ranks = probabilities(rate)
    assert len(ranks) == RANKS and ranks[0] == rate
    assert ranks == sorted(ranks, reverse=True)
    assert all(p >= 0 for p in ranks) and sum(ranks) <= 1 + 1e-12


def test_probabilities_by_hand():
    assert probabilities(0.8)[:4] == pytest.approx([0.8, 0.1, 0.05, 0.025])
    assert probabilities(0.2)[:3] == pytest.approx([0.2, 0.16, 0.128])


@pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan")])
def test_rate_is_refused(llama, draft, rate):
    with pytest.raises(ValueError, match=r"between 0 and 1, got"):
        synthetic_generate(llama, draft, prompt(), rate=rate, max_new_tokens=3)


def test_the_draft_says_the_rate(llama, draft, counted):
    """Scores of a tree are sums of ranks' log-probabilities, and siblings are different tokens."""
    runner = SyntheticRunner(TorchRunner(draft), 0.7)
    drafter = FeatureDrafter(draft, runner, capacity=64, clock=PhaseClock())
    ids = prompt()[0]
    drafter.begin(torch.randn(16, draft.config.hidden_size), ids)
    tree = drafter.grow(TreeBudget(nodes=20, depth=4, top_k=5))
    assert counted[1] == [16, 5, 5, 5]
    logs = torch.tensor(probabilities(0.7)).log().tolist()
    parents, tokens, scores = tree.parents.tolist(), tree.tokens.tolist(), tree.scores.tolist()
    for node in range(len(tree)):
        below = [n for n in range(len(tree)) if parents[n] == node]
        assert len({tokens[n] for n in below}) == len(below)
        for rank, child in enumerate(sorted(below, key=lambda n: -scores[n])):
            assert scores[child] - scores[node] == pytest.approx(logs[rank], abs=1e-4)
    assert len(set(tokens)) > 5  # not the same few tokens everywhere


def test_logits_replace_in_place(llama, draft):
    """Same shape, dtype and device, whatever the dtype; every row's first choice has the rate; rows differ."""
    for dtype in (torch.float32, torch.bfloat16):
        cast = DovetailDraft.for_target(llama).to(dtype)
        runner = SyntheticRunner(TorchRunner(cast), 0.8)
        assert (runner.device, runner.dtype, runner.runs_in_torch) == (torch.device("cpu"), dtype, True)
        seen = []
        for count in (3, VOCAB - 1, 5):
            features = torch.randn(count, cast.config.hidden_size, dtype=dtype)
            step = Pass(features, torch.arange(count), 0, logits_from=1)
            predicted = runner.run(step, runner.new_rows(8))
            logits = predicted.logits
            assert predicted.features.shape == features.shape
            assert logits.shape == (count - 1, VOCAB) and logits.dtype == dtype
            best = logits.softmax(-1, dtype=torch.float32).max(-1)
            assert best.values.numpy() == pytest.approx(0.8, abs=0.01)
            seen += best.indices.tolist()
        assert len(set(seen)) > VOCAB // 2


@pytest.mark.parametrize("rate", [0.0, 0.4, 0.7, 0.9, 1.0])
def test_chains_give_what_the_rate_promises(llama, draft, rate):
    """1 + r + r^2 + ... tokens a round; the tolerance is four standard errors at most, and far below one level."""
    depth = 5
    _, rounds = generate(llama, draft, rate, tokens=450 if rate else 60, budget=TreeBudget(depth + 1, depth, 1))
    emitted = [r.emitted for r in rounds[:-depth]]  # the last ones are cut by the length
    assert fmean(emitted) == pytest.approx(sum(rate**level for level in range(depth + 1)), rel=0.12)
    if rate in (0.0, 1.0):
        assert set(emitted) == {1 + depth * int(rate)}


@pytest.mark.parametrize("rate", [0.3, 0.75])
def test_trees_give_what_the_draft_believes(llama, draft, counted, rate):
    """A node is accepted as often as its score says, so a round gives the sum of all nodes' probabilities."""
    _, rounds = generate(llama, draft, rate, tokens=500, budget=TreeBudget(14, 5, 4))
    trees = counted[0]
    assert [len(tree) for tree in trees] == [r.nodes for r in rounds]
    believed = fmean(float(tree.scores.exp().sum()) for tree in trees[:-5])
    assert fmean(r.emitted for r in rounds[:-5]) == pytest.approx(believed, rel=0.12)
    assert believed > 1.05 * sum(rate**level for level in range(6))  # more than the chain of the same depth


def test_lots(llama, draft):
    budget = TreeBudget(8, 4, 3)
    first, again, other = (generate(llama, draft, seed=seed, budget=budget)[0].ids for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    fresh = DovetailDraft.for_target(llama, blocks=2)
    assert torch.equal(first, generate(llama, fresh, seed=1, budget=budget)[0].ids)  # weights decide nothing


def passes_of(model):
    """Rows of each pass that a model runs from now on, its probe excepted."""
    passes = []
    synthetic_generate(model, None, prompt(5), rate=0.5, max_new_tokens=1)  # the first session probes the model
    model.register_forward_pre_hook(
        lambda _m, _a, kwargs: passes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return passes


# --- the passes are real ---------------------------------------------------------------------------


def test_passes_are_run(llama, draft, counted, monkeypatch):
    passes = passes_of(llama)
    _, rounds = generate(llama, draft, budget=TreeBudget(9, 3, 4))
    trees, steps = counted
    assert passes == [17, *(r.nodes for r in rounds)] == [17, *map(len, trees)]
    full = [r for r in rounds if r.depth == 3]
    assert len(full) > 5
    assert steps.count(4) >= 2 * len(full)  # two levels behind the first one, four rows each
    assert all(r.seconds["draft"] > 0 and r.seconds["verify"] > 0 for r in full)


def test_policy_chooses(llama, draft, counted):
    """No budget: the machine is measured, every round is forecast, and what comes is near what is forecast."""
    _, rounds = generate(llama, draft, tokens=120)
    assert draft.report.probe_s > 0
    assert all(r.predicted_s and r.predicted_tokens for r in rounds)
    assert any(r.widths is not None for r in rounds)
    assert len(counted[0]) > len(rounds)  # the probe's trees, which no token came from
    assert sum(r.emitted for r in rounds) == 119  # the prompt's pass gives one


def test_plain(llama, draft, monkeypatch):
    passes = passes_of(llama)
    run = synthetic_generate(llama, None, prompt(), rate=0.8, max_new_tokens=30)
    assert run.tokens == 30 and run.seconds > 0
    assert passes == [17] + [1] * 29
    assert draft.report is None


def test_nothing_is_left_behind(llama, draft):
    """Real generation with the same draft, before and after, is what plain generation is."""
    options = dict(max_new_tokens=20, do_sample=False)
    plain = llama.generate(prompt(), **options)
    generate(llama, draft)
    assert torch.equal(plain, llama.generate(prompt(), **options, assistant_model=draft))
    draft.budget = None
    assert torch.equal(plain, llama.generate(prompt(), **options, assistant_model=draft))


def test_bad_requests(llama, draft):
    with pytest.raises(ValueError, match=r"one sequence of tokens, \(1, T\), got \(2, 17\)"):
        synthetic_generate(llama, draft, prompt().repeat(2, 1), rate=0.8, max_new_tokens=3)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        synthetic_generate(llama, draft, prompt(), rate=0.8, max_new_tokens=0)
    other = DovetailDraft.for_target(random_model(config_of("llama", hidden_size=64), torch.float32))
    with pytest.raises(ValueError, match="hidden size is 64, the target's is 32"):
        synthetic_generate(llama, other, prompt(), rate=0.8, max_new_tokens=3)


# --- comparing -------------------------------------------------------------------------------------


def test_comparison_is_marked(llama, draft):
    comparison = SyntheticComparison(llama, draft, {"max_new_tokens": 24, "do_sample": False}, rate=0.65)
    comparison.warm_up(prompt())
    for _ in range(3):
        comparison.add(prompt())
    result = comparison.result(note="mine")
    assert (result.prompts, result.new_tokens, result.identical, result.differences) == (3, 72, 0, 0)
    assert result.acceptance_length == pytest.approx(69 / result.rounds)
    table = result.table().splitlines()
    assert table[-1] == "SYNTHETIC: acceptance simulated at 0.65"
    assert not any("identical" in line for line in table)
    stored = json.loads(result.json_line())
    assert stored["settings"] == {"acceptance": "SYNTHETIC, simulated at 0.65", "note": "mine"}
    assert stored["synthetic_acceptance"] == 0.65
    assert len({tuple(run.ids[0, 17:].tolist()) for _, run in comparison.pairs}) == 3  # new lots every time


# --- random weights --------------------------------------------------------------------------------

FAMILIES = [
    *((name, fields) for name, fields in FULL_ATTENTION.items()),
    ("gemma2", SLIDING["gemma2"]),
    ("gemma3_text", SLIDING["gemma3_text"]),
    ("mixtral", {"num_local_experts": 4}),
    ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
]


def config_of(model_type, **fields):
    return AutoConfig.for_model(model_type, **{k: v for k, v in (COMMON | fields).items() if v is not None})


@pytest.mark.parametrize(("model_type", "fields"), FAMILIES, ids=[name for name, _ in FAMILIES])
def test_random_model(model_type, fields):
    """Parameters, dtypes, norms, biases and buffers as transformers makes them; matrices random, logits finite."""
    config = config_of(model_type, **fields)
    before = config.to_dict()
    model = random_model(config, torch.bfloat16)
    assert config.to_dict() == before
    wanted = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert not model.training and type(model) is type(wanted)
    assert model.num_parameters() == wanted.num_parameters()
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    assert parameters.keys() == dict(wanted.named_parameters()).keys()
    for name, parameter in wanted.named_parameters():
        ours = parameters[name]
        assert (ours.shape, ours.dtype, ours.device) == (parameter.shape, torch.bfloat16, parameter.device)
        if parameter.ndim == 1:
            assert torch.equal(ours, parameter), name
        else:
            assert ours.detach().float().std().item() == pytest.approx(0.02, rel=0.25), name
    for name, buffer in wanted.named_buffers():
        assert torch.equal(buffers[name], buffer) and buffers[name].dtype == buffer.dtype, name
    assert model(prompt()).logits.isfinite().all()


def test_random_matrices_differ(monkeypatch):
    """Although they repeat one block, which is shorter than a matrix here."""
    monkeypatch.setattr("dovetail_plugin.bench.random_model.BLOCK", 997)
    config = config_of("llama")
    model = random_model(config, torch.float32)
    matrices = [m for m in model.parameters() if m.shape == (48, 32)]
    assert len(matrices) == 6
    assert not any(torch.equal(a, b) for i, a in enumerate(matrices) for b in matrices[:i])
    again, other = random_model(config, torch.float32), random_model(config, torch.float32, seed=1)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(other.lm_head.weight, model.lm_head.weight)


def test_random_model_needs_memory(monkeypatch):
    monkeypatch.setattr("dovetail_plugin.machine.available_bytes", lambda: 10_000)
    with pytest.raises(ValueError, match=r"the weights take 0\.0 GB and 0\.0 GB are free"):
        random_model(config_of("llama"), torch.float32)
    monkeypatch.setattr("dovetail_plugin.machine.available_bytes", lambda: None)
    assert random_model(config_of("llama"), torch.float32).num_parameters() > 10_000


def test_random_target_drafts(counted):
    """Random weights, an untrained draft: the whole way, in bfloat16."""
    target = random_model(config_of("qwen2"), torch.bfloat16)
    draft = DovetailDraft.for_target(target)
    generate(target, draft, budget=TreeBudget(6, 3, 2))
    assert draft.dtype == torch.bfloat16 and len(counted[0]) > 10
