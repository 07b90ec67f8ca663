"""The bundled pair on real text: identical text in fp32, ties in bf16, acceptance length, file size, answers."""

import pytest
import torch
from support.bundled import DRAFT, TARGET, load_pair
from transformers import AutoTokenizer

from dovetail_plugin import TreeBudget
from dovetail_plugin.bench.compare import Comparison
from dovetail_plugin.bench.prompts import load_prompts

pytestmark = pytest.mark.usefixtures("fixed_budget")


@pytest.fixture(scope="module")
def prompts():
    return load_prompts(None, AutoTokenizer.from_pretrained(TARGET), 40)


def compare(dtype, prompts, budget=None, **options) -> "Comparison":
    target, draft = load_pair(dtype)
    draft.budget = budget or draft.budget
    comparison = Comparison(target, draft, {"max_new_tokens": 96, "do_sample": False} | options)
    for input_ids in prompts:
        comparison.add(input_ids)
    return comparison


def test_greedy_fp32_is_identical_and_accepted(prompts):
    result = compare(torch.float32, prompts[:12]).result()
    assert result.identical == 12
    assert result.acceptance_length >= 3.5


@pytest.mark.parametrize("budget", [TreeBudget(8, 5, 4), TreeBudget(6, 5, 1), TreeBudget(60, 7, 10)], ids=str)
def test_greedy_fp32_in_other_shapes(prompts, budget):
    assert compare(torch.float32, prompts[12:17], budget).result().identical == 5


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.2},
        {"no_repeat_ngram_size": 3},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
        {"do_sample": True, "temperature": 1.2, "top_k": 20},
    ],
    ids=str,
)
def test_options_fp32(prompts, options):
    assert compare(torch.float32, prompts[17:21], **options).result().identical == 4


@pytest.mark.torch_only("bfloat16 weights")
def test_greedy_bf16_differs_only_at_ties(prompts):
    result = compare(torch.bfloat16, prompts[:12]).result()
    assert result.identical + result.ties == 12
    assert result.differences == 0
    assert result.acceptance_length >= 3.5


@pytest.mark.nightly
def test_two_hundred_texts():
    """All prompts of the package, 128 tokens each."""
    every = load_prompts(None, AutoTokenizer.from_pretrained(TARGET), 200)
    assert compare(torch.float32, every, max_new_tokens=128).result().identical == 200


@pytest.mark.nightly
@pytest.mark.torch_only("bfloat16 weights")
def test_two_hundred_texts_bf16():
    every = load_prompts(None, AutoTokenizer.from_pretrained(TARGET), 200)
    assert compare(torch.bfloat16, every, max_new_tokens=128).result().differences == 0


@pytest.mark.torch_only("the files of the pair")
def test_pair_is_small_and_complete():
    files = [f for directory in (TARGET, DRAFT) for f in directory.iterdir()]
    assert sum(f.stat().st_size for f in files) <= 30e6
    for directory in (TARGET, DRAFT):
        assert (directory / "README.md").read_text().startswith("---\n")  # a model card with its metadata
    target, draft = load_pair("auto")
    assert target.dtype == draft.dtype == torch.bfloat16
    assert draft.config.target_name_or_path == TARGET.name
    assert target.config.num_hidden_layers >= 12


def test_answers_end_and_have_the_form_of_gsm8k(prompts):
    """Most answers end with EOS and contain the line with the final answer that GSM8K's answers have."""
    target, draft = load_pair(torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    ended = answered = 0
    for input_ids in prompts[:20]:
        out = target.generate(input_ids, assistant_model=draft, max_new_tokens=300, do_sample=False)
        ended += int(out[0, -1]) == tokenizer.eos_token_id
        answered += "####" in tokenizer.decode(out[0, input_ids.shape[1] :])
    assert ended >= 15
    assert answered >= 15
