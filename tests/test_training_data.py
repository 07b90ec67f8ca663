"""Text becomes masked sequences and batches; target features are computed directly or read from the cache."""

import errno
from itertools import chain, product

import pytest
import torch
from helpers import MARKED_TEMPLATE, PLAIN_TEMPLATE, byte_target, byte_tokenizer, chat, write_jsonl
from transformers import AutoModelForCausalLM

from dovetail_plugin.errors import InputError, MissingFileError, OccupiedError, WriteError
from dovetail_plugin.training import chats
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
    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dovetail_plugin.training.features.save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            FeatureCache(tmp_path, target, sequences, 0)
    assert FeatureCache(tmp_path, target, sequences, 0).load([0]).shape[1] == len(sequences[0])


def test_a_full_disk_while_features_are_written(tmp_path, target, sequences, monkeypatch):
    """Names the file; the next try works."""
    monkeypatch.setattr("dovetail_plugin.training.features.SHARD_SEQUENCES", 3)
    saved = []

    def full(tensors, file, **options):
        saved.append(file)
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("dovetail_plugin.training.features.save_file", full)
        with pytest.raises(WriteError, match=r"features-00000\.safetensors cannot be written: the disk is full"):
            FeatureCache(tmp_path / "new" / "cache", target, sequences, 0)
    assert len(saved) == 1 and list((tmp_path / "new" / "cache").iterdir()) == []
    cache = FeatureCache(tmp_path / "new" / "cache", target, sequences, 0)
    assert cache.load([6]).shape[1] == len(sequences[6])


def test_shards_in_each_others_place(tmp_path, target, sequences, monkeypatch):
    """Of one cache, or of the caches of two targets."""
    monkeypatch.setattr("dovetail_plugin.training.features.SHARD_SEQUENCES", 3)
    FeatureCache(tmp_path / "other", byte_target(seed=1), sequences, 0)
    cache = FeatureCache(tmp_path / "cache", target, sequences, 0)
    shard = tmp_path / "cache" / "features-00000.safetensors"
    shard.write_bytes((tmp_path / "other" / shard.name).read_bytes())
    with pytest.raises(InputError, match=r"features-00000\.safetensors holds features of another target"):
        cache.load([0])
    shard.write_bytes((tmp_path / "cache" / "features-00001.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"features-00000\.safetensors is damaged or missing"):
        cache.load([0])
    (tmp_path / "file").write_text("")
    with pytest.raises(OccupiedError, match="is a file"):
        FeatureCache(tmp_path / "file", target, sequences, 0)


def test_fingerprint_follows_the_weights(tmp_path, target):
    """The fingerprint depends on weights and config but not on the directory."""

    def loaded_from(name, target):
        target.save_pretrained(tmp_path / name)
        return fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path / name))

    mark = loaded_from("here", target)
    assert mark == loaded_from("there", target)
    assert mark != loaded_from("other weights", byte_target(seed=1))
    assert mark != loaded_from("other epsilon", byte_target(rms_norm_eps=1e-3))


# --- files with other content ------------------------------------------------------------------------

GOOD = '{"text": "good \u00e9"}\n'


def test_a_byte_order_mark_is_skipped(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + (GOOD * 2).encode())
    assert read_jsonl([tmp_path / "rows.jsonl"]) == [{"text": "good \u00e9"}] * 2


ENCODED = {
    r"line 1: the file is UTF-16. Save it as UTF-8": (GOOD * 3).encode("utf-16"),
    r"line 1: there are zero bytes, as in UTF-16": (GOOD * 3).encode("utf-16-le"),
    r"line 2: byte 16 \(0xe9\) is not UTF-8": GOOD.encode() + GOOD.encode("latin-1"),
    r"line 3: its JSON is nested too deeply": (GOOD * 2).encode() + b'{"text": ' + b"[" * 100_000,
    r"line 2: not valid JSON": GOOD.encode() + b'{"text": ' + b"1" * 5000 + b"}",
    r"line 1: '\\ud83d' is half of a character": b'{"text": "\\ud83d"}\n',
    r"line 1: .*messages": b'{"messages": [{"role": "assistant", "content": ["a"]}]}',
    r"no rows in": b"\xef\xbb\xbf\n \n",
}


@pytest.mark.parametrize("message", ENCODED)
def test_files_that_cannot_be_read_are_named(tmp_path, message):
    """With the line, on one line."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(ENCODED[message])
    with pytest.raises(InputError, match=r"rows\.jsonl.*" + message if "no rows" not in message else message) as error:
        read_jsonl([file])
    assert str(file) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(InputError, match=r"is a directory\. Name its files"):
        read_jsonl([tmp_path])
    with pytest.raises(MissingFileError, match=r"nothing\.jsonl: there is no such file"):
        read_jsonl([tmp_path / "nothing.jsonl"])


# --- chats without generation marks ------------------------------------------------------------------

TEMPLATES = {
    "plain": PLAIN_TEMPLATE,
    "stripped": PLAIN_TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] | trim }}"),
    "lines": "{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}",
    "system first": "{{ 'You help.' }}" + PLAIN_TEMPLATE,
    "thought before the last answer": PLAIN_TEMPLATE.replace(
        "<|assistant|>{{ m", "<|assistant|>{% if loop.last %}hm... {% endif %}{{ m"
    ),
    "opened with a thought": PLAIN_TEMPLATE[: PLAIN_TEMPLATE.rindex("<|assistant|>")] + "<|assistant|>hm{% endif %}",
    "numbered": PLAIN_TEMPLATE.replace("<|user|>", "{{ loop.index }}<|user|>"),
    "upper case": PLAIN_TEMPLATE.replace("m['content']", "m['content'] | upper"),
    "without earlier thoughts": PLAIN_TEMPLATE.replace(
        "<|assistant|>{{ m['content'] }}",
        "<|assistant|>{% if loop.last %}{{ m['content'] }}{% else %}{{ m['content'].split('|')[-1] }}{% endif %}",
    ),
}
CHATS = {
    "two turns": chat(4),
    "repeated": [{"role": role, "content": "no no"} for role in ("user", "assistant") * 4],
    "like the template": [
        {"role": "user", "content": "<|assistant|>0<|end|>"},
        {"role": "assistant", "content": "<|user|>"},
        {"role": "user", "content": " "},
        {"role": "assistant", "content": "think|\n answer "},
    ],
    "several answers": [*chat(3), *chat(3)[1:2], {"role": "system", "content": "stop"}],
    "empty": [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}],
}


# Left out: a beginning of the chat that ends between two answers shows neither as it was written.
SHOWN = [pair for pair in product(CHATS, TEMPLATES) if pair != ("several answers", "thought before the last answer")]


@pytest.mark.parametrize(("name", "template"), SHOWN)
def test_answers_are_what_beginnings_of_the_chat_show(name, template):
    tokenizer = byte_tokenizer(TEMPLATES[template])
    expected = chats._by_beginnings(CHATS[name], tokenizer, 10**6)
    assert chats.encode_unmarked(CHATS[name], tokenizer, 10**6) == expected


@pytest.mark.parametrize("template", ["plain", "upper case"])
def test_an_answer_at_the_start(template):
    """Only its text counts, or, where the template changes contents, nothing of it."""
    messages, tokenizer = [{"role": "assistant", "content": "hello"}, *chat(2)], byte_tokenizer(TEMPLATES[template])
    written = split(encode({"messages": messages}, tokenizer, 999), tokenizer)[1]
    rest = "0 1 2 3 4<|end|>no no no <|end|>"
    assert written == (f"hello<|end|>{rest}" if template == "plain" else rest.replace("no", "NO"))


@pytest.mark.parametrize("template", ["plain", "stripped", "lines", "thought before the last answer"])
def test_common_templates_are_not_rendered_for_each_answer(template):
    tokenizer = byte_tokenizer(TEMPLATES[template])

    def render(part, prompt=False):
        return tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=prompt)

    assert chats.answer_spans(render(chat(4)), chat(4), render)


@pytest.mark.parametrize(
    ("template", "max_length"),
    [(MARKED_TEMPLATE, 10**6), (PLAIN_TEMPLATE, 10**6), (PLAIN_TEMPLATE, 64), (TEMPLATES["upper case"], 64)],
    ids=["marked", "plain", "plain, cut", "contents that the template changes, cut"],
)
def test_long_chats_take_time_in_proportion(template, max_length, monkeypatch):
    """1600 short messages: the characters that are encoded and rendered are a small multiple of the chat's."""
    messages = [m for number in range(400) for m in chat(number)]
    tokenizer, rendered, encoded = byte_tokenizer(template), [], []
    apply, call = type(tokenizer).apply_chat_template, type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer), "apply_chat_template", lambda s, m, **o: rendered.append(len(m)) or apply(s, m, **o)
    )
    monkeypatch.setattr(
        type(tokenizer), "__call__", lambda s, text, **o: encoded.append(len(str(text))) or call(s, text, **o)
    )
    sequence = encode({"messages": messages}, tokenizer, max_length)
    assert len(sequence) == min(max_length, sum(len(m["content"]) + 1 + (m["role"] == "assistant") for m in messages))
    assert sum(rendered) <= 10 * len(messages)
    assert sum(encoded) <= 4 * max(encoded)


def test_a_template_that_refuses_a_chat(tokenizer):
    refusing = byte_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match=r"the chat template refuses a chat of 4 messages .roles must alternate"):
        encode({"messages": chat(1)}, refusing, 99)
