"""Batches and several sequences of one prompt: each gives what plain `generate` gives."""

import pytest
import torch
from families import VOCAB, prompt, tiny_target
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from dovetail_plugin import DovetailDraft, PromptLookupDraft, TreeBudget

pytestmark = pytest.mark.usefixtures("fixed_budget")

PAD = 0


@pytest.fixture(params=["llama", "mistral"])
def target(request):
    window = {"sliding_window": 24} if request.param == "mistral" else {}
    return tiny_target(request.param, **window)


@pytest.fixture(params=["dovetail", "lookup"])
def draft(request, target):
    torch.manual_seed(7)
    return DovetailDraft.for_target(target) if request.param == "dovetail" else PromptLookupDraft(shortest=1)


def batch(*lengths):
    """Prompts of different lengths, padded on the left, and their mask."""
    longest = max(lengths)
    rows = [prompt(length, seed=length)[0] for length in lengths]
    ids = torch.stack([torch.cat([torch.full((longest - len(row),), PAD), row]) for row in rows])
    mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])
    return ids, mask


def test_greedy_batches(target, draft):
    ids, mask = batch(9, 30, 17)
    options = dict(attention_mask=mask, max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=PAD)
    plain = target.generate(ids, **options)
    assert torch.equal(target.generate(ids, assistant_model=draft, **options), plain)
    assert draft.report.new_tokens == 90


def test_sequences_end_one_by_one(target, draft):
    """Behind its end a sequence is padded until the longest one has ended."""
    ids, mask = batch(9, 30, 17)
    options = dict(attention_mask=mask, max_new_tokens=30, do_sample=False, pad_token_id=PAD)
    free = target.generate(ids, eos_token_id=None, **options)
    ends = [int(free[0, 30 + 4]), int(free[1, 30 + 11])]
    plain = target.generate(ids, eos_token_id=ends, **options)
    assert (plain == PAD).sum() > (ids == PAD).sum()
    assert torch.equal(target.generate(ids, eos_token_id=ends, assistant_model=draft, **options), plain)


def test_output_of_a_batch(target, draft):
    ids, mask = batch(9, 30)
    wanted = dict(output_scores=True, output_logits=True, return_dict_in_generate=True)
    options = dict(attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=PAD)
    plain, drafted = (target.generate(ids, **options, **wanted, **a) for a in ({}, {"assistant_model": draft}))
    assert torch.equal(plain.sequences, drafted.sequences)
    assert drafted.report is draft.report
    for name in ("scores", "logits"):
        for one, other in zip(plain[name], drafted[name], strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.torch_only("caches of transformers")
def test_the_cache_of_a_batch_goes_on(target, draft):
    """Plain generation continues with it as with its own."""
    ids, mask = batch(9, 30)
    options = dict(do_sample=False, eos_token_id=None, pad_token_id=PAD, return_dict_in_generate=True)
    options["max_new_tokens"] = 8
    first = [target.generate(ids, attention_mask=mask, assistant_model=a, **options) for a in (None, draft)]
    assert torch.equal(first[0].sequences, first[1].sequences)
    longer = torch.cat([mask, mask.new_ones(2, 8)], dim=1)
    plain, drafted = (
        target.generate(one.sequences, attention_mask=longer, past_key_values=one.past_key_values, **options)
        for one in first
    )
    assert torch.equal(plain.sequences, drafted.sequences)


def test_several_greedy_sequences_of_one_prompt(target, draft):
    options = dict(max_new_tokens=15, do_sample=True, top_k=1, num_return_sequences=3, eos_token_id=None)
    plain = target.generate(prompt(), **options)
    assert torch.equal(target.generate(prompt(), assistant_model=draft, **options), plain)


def test_sampled_sequences_of_one_prompt(target, draft):
    """As many first tokens of each kind as in plain generation, up to chance."""
    options = dict(max_new_tokens=2, do_sample=True, temperature=0.7, top_k=4, eos_token_id=None)
    options["num_return_sequences"] = 200
    torch.manual_seed(1)
    plain, drafted = (target.generate(prompt(), **options, **a)[:, -2:] for a in ({}, {"assistant_model": draft}))
    for column in range(2):
        counts = [torch.bincount(text[:, column], minlength=97).float() for text in (plain, drafted)]
        assert (counts[0] - counts[1]).abs().max() < 45  # over five standard deviations of a difference of counts


def test_processors_that_know_the_sequence(target, draft):
    """A function of allowed tokens gets the number of the sequence in the batch."""
    ids, mask = batch(9, 30)
    allowed = {0: list(range(10, 20)), 1: list(range(50, 70))}
    options = dict(attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=PAD)
    options |= dict(prefix_allowed_tokens_fn=lambda index, _ids: allowed[index])
    plain = target.generate(ids, **options)
    assert torch.equal(target.generate(ids, assistant_model=draft, **options), plain)


def test_a_penalty_that_ignores_padding(target, draft):
    """Since transformers 5.24 the processor counts the padding of each sequence."""
    ids, mask = batch(9, 30, 17)
    options = dict(attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=PAD)
    plain = target.generate(ids, repetition_penalty=1.8, **options)
    assert not torch.equal(plain, target.generate(ids, **options))
    assert torch.equal(target.generate(ids, repetition_penalty=1.8, assistant_model=draft, **options), plain)


def test_sequences_that_go_on_after_they_stopped_are_refused(target, draft):
    """Without an end token, plain generation goes on with a stopped sequence until all have stopped."""
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=PAD)
    ids, mask = batch(9, 30)
    options["stopping_criteria"] = [lambda ids, _scores, **_: ids[:, -1] == 5]
    with pytest.raises(ValueError, match=r"go on until all have stopped\. Pass eos_token_id"):
        target.generate(ids, attention_mask=mask, assistant_model=draft, **options)


def test_streamers_take_one_sequence(target, draft):
    class Streamer:
        def put(self, value):
            pass

        def end(self):
            pass

    with pytest.raises(ValueError, match="takes one sequence, not a batch of 2"):
        target.generate(*batch(9, 9)[:1], assistant_model=draft, max_new_tokens=3, streamer=Streamer())


@pytest.mark.torch_only("arguments of the forward pass")
def test_arguments_that_cannot_be_divided(target, draft):
    draft.budget = TreeBudget(4, 2, 2)
    ids, mask = batch(9, 9)
    with pytest.raises(ValueError, match=r"position_ids of shape \(1, 9\) cannot be divided among the 2 sequences"):
        target.generate(ids, attention_mask=mask, position_ids=torch.arange(9)[None], assistant_model=draft)


def gemma3():
    """A tiny Gemma 3 whose images are two tokens."""
    text = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    text |= dict(num_key_value_heads=2, head_dim=8, sliding_window=16)
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    vision |= dict(image_size=8, patch_size=4)
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=vision, image_token_index=4, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config).eval()


@pytest.mark.torch_only("a model that sees images")
@pytest.mark.parametrize("copies", [1, 2])
def test_each_sequence_sees_its_image(copies):
    model = gemma3()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    ids = torch.cat([torch.full((2, 4), 4), torch.cat([prompt(9, seed=1), prompt(9, seed=2)]) % 80 + 10], dim=1)
    options = dict(pixel_values=torch.randn(2, 3, 8, 8), token_type_ids=(ids == 4).long(), max_new_tokens=20)
    options |= dict(do_sample=False, eos_token_id=[VOCAB - 1], pad_token_id=PAD, bad_words_ids=[[4], [VOCAB - 1]])
    ids, options["pixel_values"] = ids[: 3 - copies], options["pixel_values"][: 3 - copies]
    options["token_type_ids"] = options["token_type_ids"][: 3 - copies]
    draft = PromptLookupDraft(shortest=1)
    draft.budget = TreeBudget(8, 3, 3)
    sampled = dict(do_sample=True, num_return_sequences=2, top_k=1) if copies == 2 else {}
    plain = model.generate(ids, **options | sampled)
    assert torch.equal(model.generate(ids, assistant_model=draft, **options | sampled), plain)
    assert len(plain) == 2 and draft.report.acceptance_length > 1
