"""Sampling with a draft has the distribution of plain sampling: chi-square test against exact enumeration."""

import itertools

import engines
import pytest
import torch
from families import tiny_model
from scipy.stats import chisquare
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from dovetail_plugin import DovetailDraft, TreeBudget

VOCAB = 7
LENGTH = 3
DRAWS = 1500


@pytest.fixture(scope="module")
def small():
    model = tiny_model("llama", vocab_size=VOCAB, eos_token_id=None, bos_token_id=None, pad_token_id=0)
    model.lm_head.weight.data *= 0.4
    target = engines.current().target(model)
    target.generation_config.eos_token_id = None
    torch.manual_seed(3)
    draft = DovetailDraft.for_target(target)
    for parameter in draft.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    return target, draft


@torch.no_grad()
def exact_distribution(target, ids, warpers):
    """Probability of every continuation of LENGTH tokens, one forward pass for each prefix."""
    probabilities = {}
    for tokens in itertools.product(range(VOCAB), repeat=LENGTH):
        probability = 1.0
        for k, token in enumerate(tokens):
            text = torch.cat([ids, torch.tensor([tokens[:k]], dtype=torch.long)], dim=1)
            if (key := tuple(text[0].tolist())) not in exact_distribution.cache:
                exact_distribution.cache[key] = target(text).logits[:, -1].float()
            scores = warpers(text, exact_distribution.cache[key].clone())
            probability *= float(scores.softmax(-1)[0, token])
        probabilities[tokens] = probability
    return probabilities


exact_distribution.cache = {}


ONE = pytest.mark.one_environment("acceptance is independent of engine and transformers; elsewhere two cases suffice")

CASES = [
    (TreeBudget(12, 3, 3), 1.0, 1.0),
    (TreeBudget(4, 3, 1), 0.6, 1.0),
    pytest.param(TreeBudget(30, 3, 5), 0.6, 0.9, marks=ONE),
    pytest.param(TreeBudget(12, 3, 3), 1.5, 0.8, marks=ONE),
    pytest.param(TreeBudget(4, 3, 1), 1.5, 0.8, marks=ONE),
]


@pytest.mark.parametrize(("budget", "temperature", "top_p"), CASES, ids=str)
def test_distribution_with_a_fixed_budget(small, budget, temperature, top_p):
    assert_sampled_distribution(*small, budget, temperature, top_p)


def test_distribution_with_the_default_policy(small, fake_clock):
    """The policy chooses trees by what was accepted before, which must not change the distribution."""
    assert_sampled_distribution(*small, None, 1.0, 0.9)


def assert_sampled_distribution(target, draft, budget, temperature, top_p):
    """Draw DRAWS texts with the draft and compare their frequencies with the exact probabilities."""
    draft.budget, draft.policy = budget, None
    ids = torch.tensor([[3, 5, 1, 6]])
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)])
    wanted = exact_distribution(target, ids, warpers)
    torch.manual_seed(11)
    counts = dict.fromkeys(wanted, 0)
    emitted = rounds = 0
    for _ in range(DRAWS):
        out = target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=temperature,
            top_p=top_p,
            top_k=0,
            max_new_tokens=LENGTH,
            assistant_model=draft,
        )
        counts[tuple(out[0, 4:].tolist())] += 1
        emitted += sum(r.emitted for r in draft.report.rounds)
        rounds += len(draft.report.rounds)
    assert emitted / rounds > 1.05  # otherwise no draft was accepted, and nothing was tested
    assert all(counts[tokens] == 0 for tokens, p in wanted.items() if p == 0.0)
    # The chi-square approximation needs five expected draws for each category: rarer continuations are pooled.
    observed, expected, rest = [], [], [0, 0.0]
    for tokens, p in wanted.items():
        if p * DRAWS >= 5:
            observed.append(counts[tokens])
            expected.append(p * DRAWS)
        else:
            rest = [rest[0] + counts[tokens], rest[1] + p * DRAWS]
    if rest[1] >= 5:
        observed.append(rest[0])
        expected.append(rest[1])
    scale = sum(observed) / sum(expected)
    result = chisquare(observed, [e * scale for e in expected])
    assert result.pvalue > 1e-3, result
