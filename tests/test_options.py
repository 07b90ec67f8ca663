"""Options of `generate` work the same with a draft: processors, stops, streaming, outputs, caches, pipelines."""

import pytest
import torch
from families import VOCAB, prompt, tiny_target
from support.options import PROCESSORS, WARPERS
from transformers import (
    DynamicCache,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput

from dovetail_plugin import DovetailDraft, generate_with_draft

pytestmark = pytest.mark.usefixtures("fixed_budget")


@pytest.mark.parametrize("name", PROCESSORS)
def test_greedy_with_processors(llama, draft, oracle, name):
    options = dict(max_new_tokens=50, do_sample=False) | PROCESSORS[name]
    plain = llama.generate(prompt(), **options)
    assert torch.equal(plain, llama.generate(prompt(), **options, assistant_model=draft))
    oracle(plain, 17)
    assert torch.equal(plain, llama.generate(prompt(), **options, assistant_model=draft))


@pytest.mark.parametrize("name", [*WARPERS, *PROCESSORS])
def test_same_seed_gives_the_same_sample(llama, draft, oracle, name):
    """Each emitted token takes one random draw, so a seed gives the same text with and without a draft."""
    options = dict(max_new_tokens=50, do_sample=True) | (WARPERS | PROCESSORS)[name]
    torch.manual_seed(3)
    plain = llama.generate(prompt(), **options)
    oracle(plain, 17)
    torch.manual_seed(3)
    drafted = llama.generate(prompt(), **options, assistant_model=draft)
    assert torch.equal(plain, drafted)
    assert draft.report.acceptance_length > 1


def test_eos_inside_an_accepted_path(llama, draft, oracle):
    """With each token of the text as EOS, alone and in a list, the text ends where plain text ends."""
    full = llama.generate(prompt(), max_new_tokens=30, do_sample=False, eos_token_id=None)
    oracle(full, 17)
    for eos in full[0, 17:40].tolist():
        for given in (eos, [90, eos]):
            options = dict(max_new_tokens=30, do_sample=False, eos_token_id=given, pad_token_id=0)
            plain = llama.generate(prompt(), **options)
            assert torch.equal(plain, llama.generate(prompt(), **options, assistant_model=draft))


class StopAtLength(StoppingCriteria):
    def __init__(self, length):
        self.length, self.seen = length, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.shape[1])
        return torch.full((1,), input_ids.shape[1] >= self.length)


def test_own_stopping_criterion_sees_every_token(llama, draft, oracle):
    full = llama.generate(prompt(), max_new_tokens=40, do_sample=False, eos_token_id=None)
    oracle(full, 17)
    stop = StopAtLength(31)
    options = dict(max_new_tokens=40, do_sample=False, eos_token_id=None)
    out = llama.generate(prompt(), **options, assistant_model=draft, stopping_criteria=StoppingCriteriaList([stop]))
    assert torch.equal(out, full[:, :31])
    assert stop.seen == list(range(18, 32))


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:VOCAB]
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=letters[2], pad_token=letters[0])


def test_stop_strings(llama, draft, oracle, tokenizer):
    full = llama.generate(prompt(), max_new_tokens=40, do_sample=False, eos_token_id=None)
    oracle(full, 17)
    word = tokenizer.decode(full[0, 26])
    options = dict(max_new_tokens=40, do_sample=False, stop_strings=[word], tokenizer=tokenizer, eos_token_id=None)
    plain = llama.generate(prompt(), **options)
    assert plain.shape[1] <= 27
    assert torch.equal(plain, full[:, : plain.shape[1]])
    assert torch.equal(plain, llama.generate(prompt(), **options, assistant_model=draft))


def test_streamers_get_the_same_text(llama, draft, oracle, tokenizer, capsys):
    options = dict(max_new_tokens=30, do_sample=False)
    plain = llama.generate(prompt(), **options, streamer=TextStreamer(tokenizer, skip_prompt=True))
    said = capsys.readouterr().out
    oracle(plain, 17)
    llama.generate(prompt(), **options, streamer=TextStreamer(tokenizer, skip_prompt=True), assistant_model=draft)
    assert capsys.readouterr().out == said
    iterator = TextIteratorStreamer(tokenizer, skip_prompt=True)
    llama.generate(prompt(), **options, streamer=iterator, assistant_model=draft)
    assert "".join(iterator).strip() == said.strip()


def test_return_dict(llama, draft, oracle):
    options = dict(
        max_new_tokens=30,
        do_sample=False,
        repetition_penalty=1.2,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    plain = llama.generate(prompt(), **options)
    oracle(plain.sequences, 17)
    drafted = llama.generate(prompt(), **options, assistant_model=draft)
    assert isinstance(drafted, GenerateDecoderOnlyOutput) and type(plain) in type(drafted).__mro__
    assert drafted.report is draft.report
    assert torch.equal(plain.sequences, drafted.sequences)
    assert len(drafted.scores) == len(plain.scores) == len(drafted.logits) == 30
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.cat(getattr(drafted, name)), torch.cat(getattr(plain, name)))
    assert drafted.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length() == 17 + 29


@pytest.mark.torch_only("transformers' cache classes")
def test_returned_cache(llama, draft, oracle):
    options = dict(max_new_tokens=30, do_sample=False, return_dict_in_generate=True)
    plain = llama.generate(prompt(), **options)
    oracle(plain.sequences, 17)
    cache, wanted = llama.generate(prompt(), **options, assistant_model=draft).past_key_values, plain.past_key_values
    for layer, stock in zip(cache.layers, wanted.layers, strict=True):
        assert type(layer) is type(stock)
        torch.testing.assert_close(layer.keys, stock.keys, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(layer.values, stock.values, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
@pytest.mark.parametrize("whole_text", [True, False], ids=["whole text", "only new tokens"])
def test_turns(model_type, whole_text):
    """Four turns, each with the cache that the previous turn returned, alternating plain and drafted generation."""
    target = tiny_target(model_type, **({"sliding_window": 24} if model_type == "mistral" else {}))
    draft = DovetailDraft.for_target(target)
    options = dict(max_new_tokens=15, do_sample=False, eos_token_id=None)
    wanted = [prompt()]
    for turn in range(4):  # on every engine, caches of several texts stay valid
        wanted[-1] = target.generate(wanted[-1], **options)
        wanted.append(torch.cat([wanted[-1], prompt(6, seed=turn)], dim=1))
    for order in ((True, True, True, True), (False, True, False, True), (True, False, True, True)):
        cache, text, known = None, prompt(), 0
        for turn, drafted in enumerate(order):
            extra = {"assistant_model": draft} if drafted else {}
            mask = torch.ones(1, text.shape[1], dtype=torch.long)
            given = text if whole_text else text[:, known:]
            out = target.generate(
                given, attention_mask=mask, past_key_values=cache, return_dict_in_generate=True, **options, **extra
            )
            text = out.sequences if whole_text else torch.cat([text[:, :known], out.sequences], dim=1)
            cache, known = out.past_key_values, out.past_key_values.get_seq_length()
            assert torch.equal(text, wanted[turn])
            assert known == text.shape[1] - 1
            text = torch.cat([text, prompt(6, seed=turn)], dim=1)


@pytest.mark.torch_only("transformers' cache classes")
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
@pytest.mark.parametrize("with_config", [True, False], ids=["windowed cache", "full cache"])
@pytest.mark.parametrize("whole_text", [True, False], ids=["whole text", "only new tokens"])
def test_cache_reuse_over_turns(model_type, whole_text, with_config):
    """Three turns with one cache, alternating drafted and plain generation in several orders."""
    target = tiny_target(model_type, **({"sliding_window": 24} if model_type == "mistral" else {}))
    draft = DovetailDraft.for_target(target)
    options = dict(max_new_tokens=15, do_sample=False, eos_token_id=None)
    for order in ((True, True, True), (False, True, False), (True, False, True)):
        cache = DynamicCache(config=target.config) if with_config else DynamicCache()
        text, wanted = prompt(), prompt()
        for turn, drafted in enumerate(order):
            known = cache.get_seq_length()
            given = text if whole_text else text[:, known:]
            extra = {"assistant_model": draft} if drafted else {}
            mask = torch.ones(1, text.shape[1], dtype=torch.long)
            out = target.generate(given, attention_mask=mask, past_key_values=cache, **options, **extra)
            text = out if whole_text else torch.cat([text[:, :known], out], dim=1)
            wanted = target.generate(wanted, **options)
            assert torch.equal(text, wanted)
            more = prompt(6, seed=turn)
            text, wanted = torch.cat([text, more], dim=1), torch.cat([wanted, more], dim=1)


@pytest.mark.torch_only("transformers' cache classes")
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("with_config", [True, False, None], ids=["windowed cache", "full cache", "no cache"])
def test_the_cache_holds_the_rows_of_plain_generation(with_config, batch):
    """A cache without a config keeps all rows, also where the model sees a window; it can be cropped later."""
    target = tiny_target("mistral", sliding_window=24)
    options = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, return_dict_in_generate=True)

    def rows(**how):
        given = {None: None, True: DynamicCache(config=target.config), False: DynamicCache()}[with_config]
        out = target.generate(prompt().repeat(batch, 1), past_key_values=given, **options, **how)
        assert given is None or out.past_key_values is given
        return out.past_key_values.layers

    drafted = rows(assistant_model=DovetailDraft.for_target(target))
    for own, plain in zip(drafted, rows(), strict=True):
        assert type(own) is type(plain)
        assert own.get_seq_length() == plain.get_seq_length() == 36
        torch.testing.assert_close(own.keys, plain.keys)
        torch.testing.assert_close(own.values, plain.values)


def test_draft_remembers_earlier_turns(llama):
    """With a reused cache the draft has the whole context: rounds equal those with the full text as one prompt."""
    torch.manual_seed(5)
    draft = DovetailDraft.for_target(llama)
    options = dict(max_new_tokens=30, do_sample=False, eos_token_id=None, assistant_model=draft)
    cache, text, turns = None, prompt(), []
    for turn in range(3):
        out = llama.generate(text, past_key_values=cache, return_dict_in_generate=True, **options)
        cache = out.past_key_values
        turns.append((out.sequences, draft.report.rounds))
        assert len(draft.turns) == 1
        text = torch.cat([out.sequences, prompt(6, seed=turn)], dim=1)
    del cache, out
    assert len(draft.turns) == 0
    for text, rounds in turns:
        assert torch.equal(text, llama.generate(text[:, :-30], **options))
        assert rounds == draft.report.rounds


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_left_padding(model_type, oracle):
    target = tiny_target(model_type, **({"sliding_window": 24, "head_dim": 8} if model_type != "llama" else {}))
    draft = DovetailDraft.for_target(target)
    ids = torch.cat([torch.zeros(1, 9, dtype=torch.long), prompt()], dim=1)
    mask = (torch.arange(26) >= 9).long()[None]
    options = dict(attention_mask=mask, max_new_tokens=40, do_sample=False)
    plain = target.generate(ids, **options)
    assert torch.equal(plain, target.generate(ids, **options, assistant_model=draft))
    oracle(plain, 26)
    assert torch.equal(plain, target.generate(ids, **options, assistant_model=draft))
    assert torch.equal(plain[:, 9:], target.generate(prompt(), max_new_tokens=40, do_sample=False))


def test_custom_generate_needs_no_registration(llama, draft):
    options = dict(max_new_tokens=20, do_sample=False)
    plain = llama.generate(prompt(), **options)
    drafted = llama.generate(prompt(), **options, custom_generate=generate_with_draft, draft=draft)
    assert torch.equal(plain, drafted)
    assert draft.report.new_tokens == 20


def test_pipeline(llama, draft, tokenizer):
    options = dict(max_new_tokens=12, do_sample=False)
    plain = pipeline("text-generation", model=llama, tokenizer=tokenizer)
    drafted = pipeline("text-generation", model=llama, tokenizer=tokenizer, assistant_model=draft)
    assert plain("ABC:", **options) == drafted("ABC:", **options)
    assert draft.report.new_tokens == 12


def test_report(llama, draft, oracle):
    plain = llama.generate(prompt(), max_new_tokens=40, do_sample=False, eos_token_id=None)
    oracle(plain, 17)
    llama.generate(prompt(), max_new_tokens=40, do_sample=False, eos_token_id=None, assistant_model=draft)
    report = draft.report
    assert (report.prompt_tokens, report.new_tokens) == (17, 40)
    assert 1 + sum(r.emitted for r in report.rounds) == 40  # the prompt's pass gives the first token
    assert report.acceptance_length == pytest.approx(39 / len(report.rounds))
    assert sum(report.phase_seconds.values()) == pytest.approx(report.decode_s, rel=1e-6)
    assert "acceptance length" in str(report)
