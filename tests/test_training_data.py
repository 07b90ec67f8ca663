"""Text becomes masked sequences and batches; target features are computed directly or read from the cache."""

from itertools import chain

import pytest
import torch
from helpers import MARKED_TEMPLATE, PLAIN_TEMPLATE, byte_target, byte_tokenizer, chat, write_jsonl
from transformers import AutoModelForCausalLM

from dovetail_plugin.training.data import Sequence, batch_order, collate, encode, read_jsonl
from dovetail_plugin.training.features import FeatureCache, fingerprint, target_features

# --- rows ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def split(sequence, tokenizer):
    """(text given to the target, text that the target writes)."""
    ids, written = sequence.input_ids, sequence.written
    return tokenizer.decode(ids[~written]), tokenizer.decode(ids[written])


def test_three_kinds_of_rows(tmp_path, tokenizer):
    rows = [{"messages": chat(1)}, {"prompt": "two and two is", "completion": " four"}, {"text": "a plain text"}]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    file.write_text(file.read_text() + "\n")  # blank lines are skipped
    assert read_jsonl([file, file]) == rows * 2
    given, written = split(encode(rows[0], tokenizer, 999), tokenizer)
    assert given == "<|user|>count 1<|assistant|><|user|>again<|assistant|>"
    assert written == "0 1 2 3<|end|>no no <|end|>"
    assert split(encode(rows[1], tokenizer, 999), tokenizer) == ("two and two is", " four<|end|>")
    assert split(encode(rows[2], tokenizer, 999), tokenizer) == ("", "a plain text")


def test_long_rows_are_cut(tokenizer):
    whole, cut = (encode({"messages": chat(5)}, tokenizer, length) for length in (999, 20))
    assert len(whole) > len(cut) == 20
    assert torch.equal(cut.input_ids, whole.input_ids[:20])
    assert torch.equal(cut.written, whole.written[:20])


BAD_ROWS = {
    "not valid JSON": "{'text': 1}",
    "list": '["text"]',
    "empty object": "{}",
    "completion": '{"prompt": "half a pair"}',
    '"text" must be': '{"text": null}',
    '"completion" must be': '{"prompt": "x", "completion": 3}',
    '"messages" must be': '{"messages": "hello"}',
    '"content"': '{"messages": [{"role": "assistant"}]}',
    "assistant": '{"messages": [{"role": "user", "content": "no answer"}]}',
}


@pytest.mark.parametrize("named", BAD_ROWS)
def test_bad_rows_are_named(tmp_path, named):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"text": "good"}\n\n' + BAD_ROWS[named] + "\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 3: ") as error:
        read_jsonl([file])
    assert named in str(error.value)


def test_empty_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no rows in .*empty\.jsonl"):
        read_jsonl([write_jsonl(tmp_path / "empty.jsonl", [])])


def test_chats_need_a_template():
    with pytest.raises(ValueError, match="chat template"):
        encode({"messages": chat(1)}, byte_tokenizer(None), 99)


@pytest.mark.parametrize("number", range(5))
def test_mask_is_the_same_without_generation_marks(number):
    row = {"messages": chat(number)}
    marked, plain = (encode(row, byte_tokenizer(t), 999) for t in (MARKED_TEMPLATE, PLAIN_TEMPLATE))
    assert torch.equal(marked.input_ids, plain.input_ids)
    assert torch.equal(marked.written, plain.written)
    assert 0 < int(plain.written.sum()) < len(plain)


def test_template_that_rewrites_earlier_turns():
    """An earlier turn changes when its reasoning is dropped, so only the last turn stays marked."""
    template = PLAIN_TEMPLATE.replace(
        "<|assistant|>{{ m['content'] }}",
        "<|assistant|>{% if loop.last %}hm... {% endif %}{{ m['content'] }}",
    )
    assert template != PLAIN_TEMPLATE
    tokenizer = byte_tokenizer(template)
    sequence = encode({"messages": chat(4)}, tokenizer, 999)
    text = tokenizer.apply_chat_template(chat(4), tokenize=False)
    assert tokenizer.decode(sequence.input_ids) == text
    assert text.count("hm...") == 1
    assert split(sequence, tokenizer)[1] == "hm... no no <|end|>"


# --- batches ---------------------------------------------------------------------------------------


def test_collate_pads_on_the_right():
    sequences = [Sequence(torch.tensor([1, 2, 3]), torch.tensor([False, True, True]))]
    sequences += [Sequence(torch.tensor([4, 5, 6, 7, 8]), torch.ones(5, dtype=torch.bool))]
    batch = collate(sequences, pad_id=9)
    assert batch.input_ids.tolist() == [[1, 2, 3, 9, 9], [4, 5, 6, 7, 8]]
    assert batch.written.tolist() == [[False, True, True, False, False], [True] * 5]
    assert batch.lengths.tolist() == [3, 5]


@pytest.mark.parametrize(("count", "size"), [(40, 4), (43, 4), (1000, 3), (3, 8)])
def test_batch_order(count, size):
    """Batches are full, do not repeat sequences, have similar lengths, and depend on the seed."""
    lengths = torch.randint(5, 500, (count,), generator=torch.Generator().manual_seed(1)).tolist()
    order = batch_order(lengths, size, seed=3)
    assert order == batch_order(lengths, size, seed=3)
    numbers = list(chain(*order))
    assert len(set(numbers)) == len(numbers)
    if count < size:
        assert sorted(numbers) == list(range(count))
        return
    assert order != batch_order(lengths, size, seed=4)
    assert all(len(batch) == size for batch in order)
    assert len(order) == count // size
    spread = sum(max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in order) / len(order)
    assert spread < 150  # about 250 or more for random batches


# --- features --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def target():
    return byte_target()


@pytest.fixture(scope="module")
def sequences(tokenizer):
    return [encode({"messages": chat(n)}, tokenizer, 99) for n in range(7)]


def test_features_are_what_the_head_reads(target, sequences):
    batch = collate(sequences, 0)
    features = target_features(target, batch)
    for row, sequence in enumerate(sequences):
        logits = target(input_ids=sequence.input_ids[None]).logits[0]
        torch.testing.assert_close(target.lm_head(features[row, : len(sequence)]), logits, atol=1e-4, rtol=1e-4)


def test_cache_equals_direct_features(tmp_path, target, sequences, monkeypatch):
    """The cache works over several shards, in any order and padding, and is written only once."""
    monkeypatch.setattr("dovetail_plugin.training.features.SHARD_SEQUENCES", 3)
    FeatureCache(tmp_path / "cache", target, sequences, 0)
    assert len(list((tmp_path / "cache").glob("features-*.safetensors"))) == 3
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}
    cache = FeatureCache(tmp_path / "cache", target, sequences, 0)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()} == written
    numbers = [6, 0, 3]
    got = cache.load(numbers)
    wanted = target_features(target, collate([sequences[n] for n in numbers], 0))
    assert got.shape == wanted.shape
    for row, number in enumerate(numbers):
        length = len(sequences[number])
        torch.testing.assert_close(got[row, :length], wanted[row, :length], atol=1e-5, rtol=1e-5)
        assert not got[row, length:].any()


def test_cache_of_other_data_is_refused(tmp_path, target, sequences):
    FeatureCache(tmp_path, target, sequences, 0)
    with pytest.raises(ValueError, match="another target"):
        FeatureCache(tmp_path, byte_target(seed=1), sequences, 0)
    with pytest.raises(ValueError, match="other data"):
        FeatureCache(tmp_path, target, sequences[:-1], 0)


def test_interrupted_cache_is_written_again(tmp_path, target, sequences, monkeypatch):
    def interrupted(*_args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dovetail_plugin.training.features.save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            FeatureCache(tmp_path, target, sequences, 0)
    assert FeatureCache(tmp_path, target, sequences, 0).load([0]).shape[1] == len(sequences[0])


def test_fingerprint_follows_the_weights(tmp_path, target):
    """The fingerprint depends on weights and config but not on the directory."""

    def loaded_from(name, target):
        target.save_pretrained(tmp_path / name)
        return fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path / name))

    mark = loaded_from("here", target)
    assert mark == loaded_from("there", target)
    assert mark != loaded_from("other weights", byte_target(seed=1))
    assert mark != loaded_from("other epsilon", byte_target(rms_norm_eps=1e-3))
