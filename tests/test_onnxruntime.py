"""ONNX Runtime targets: their graphs, their buffers and packed weights. Runs with `--engine onnxruntime`.

Files that run over every engine test the generated text.
"""

import random

import engines
import numpy as np
import pytest
import torch
from families import CASE_IDS, CASES, VOCAB, prompt, tiny_model
from support.sessions import assert_close, exported, open_session, torch_rows
from support.trees import random_tree

if not engines.is_current("onnxruntime"):
    pytest.skip("runs with --engine onnxruntime", allow_module_level=True)

import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from dovetail_plugin import DovetailDraft, TreeBudget
from dovetail_plugin.adapters.onnxruntime import OnnxRuntimeTarget, graph
from dovetail_plugin.adapters.onnxruntime import session as sessions
from dovetail_plugin.targets.engine import engine_of
from dovetail_plugin.tree import DraftTree

GREEDY = dict(max_new_tokens=40, do_sample=False, eos_token_id=None)
pytestmark = pytest.mark.usefixtures("fixed_budget")
TREES = [(name, fields) for name, fields in CASES if not fields.get("sliding_window")]


def chain(tokens: list[int]) -> DraftTree:
    count = torch.arange(len(tokens))
    return DraftTree(torch.tensor(tokens), count - 1, count, torch.zeros(len(tokens)))


# --- what is computed ------------------------------------------------------------------------------


@pytest.mark.parametrize(("model_type", "fields"), CASES, ids=CASE_IDS)
def test_logits_and_features_equal_torchs(model_type, fields):
    model = tiny_model(model_type, **fields)
    target, ids = engines.current().target(model), prompt(40)
    logits, features = torch_rows(model, ids)
    assert_close(target(ids).logits[0], logits)
    with open_session(target) as session:
        output = session.prefill(ids, None)
    assert_close(output.logits, logits[-1:])
    assert_close(output.features, features)


@pytest.mark.parametrize("same_kernels", [False, True])
@pytest.mark.parametrize("length", [1, 2, 17])
def test_single_rows_run_as_two(same_kernels, length):
    """Single rows of a prompt, of the head and of a tree run as two rows; the second one has no effect."""
    model = tiny_model("llama")
    target, ids = engines.current().target(model, same_kernels=same_kernels), prompt(length + 1)
    logits, features = torch_rows(model, ids)
    with open_session(target) as session:
        output = session.prefill(ids[:, :-1], None)
        assert_close(output.logits, logits[-2:-1])
        assert_close(output.features, features[:-1])
        output = session.score(chain(ids[0, -1:].tolist()))
        assert_close(output.logits, logits[-1:])
        assert_close(output.features, features[-1:])
        session.keep([0])
        assert session._cache.get_seq_length() == length + 1


@pytest.mark.parametrize(("model_type", "fields"), [*TREES, ("mistral", {"sliding_window": 200})], ids=str)
def test_logits_of_tree_nodes_equal_those_of_their_paths(model_type, fields):
    """Several trees, with a path kept after each: every node against a pass of torch over the node's path."""
    model, rng = tiny_model(model_type, **fields), random.Random(3)
    target, ids = engines.current().target(model), prompt(30)
    truth = [5, 9, 11, 40, 41, 42]
    with open_session(target) as session:
        assert session.supports_tree
        session.prefill(ids, None)
        text = ids[0].tolist()
        for _ in range(3):
            tree = random_tree(3, truth, TreeBudget(14, 5, 4), rng, VOCAB)
            output = session.score(tree)
            paths = [_path(tree, node) for node in range(len(tree))]
            for node, path in enumerate(paths):
                whole = torch.tensor([text + tree.tokens[path].tolist()])
                logits, features = torch_rows(model, whole)
                assert_close(output.logits[node], logits[-1])
                assert_close(output.features[node], features[-1])
            longest = max(paths, key=len)
            session.keep(longest)
            text += tree.tokens[longest].tolist()
        assert session._cache.get_seq_length() == len(text)


def _path(tree, node):
    path = []
    while node >= 0:
        path.append(node)
        node = int(tree.parents[node])
    return path[::-1]


def test_positions_become_an_input_where_the_graph_counts_them():
    """Gemma's export has no position ids; without them only chains could be drafted."""
    directory = exported(model_type="gemma", head_dim=8)[1]
    names = {value.name for value in onnx.load(directory / "model.onnx").graph.input}
    assert graph.POSITIONS not in names
    with open_session(OnnxRuntimeTarget.from_pretrained(directory, threads=1)) as session:
        assert session.supports_tree


def test_window_turns_trees_into_chains():
    target = engines.current().target(tiny_model("mistral", sliding_window=24))
    with open_session(target) as session:
        assert not session.supports_tree


# --- buffers ---------------------------------------------------------------------------------------


def test_only_what_is_kept_is_written(oracle):
    """Buffers contain the rows of the text, in order, and few free rows, whatever was rejected."""
    target = engines.current().target(tiny_model("llama"))
    plain = target.generate(prompt(), **GREEDY, return_dict_in_generate=True)
    oracle(plain.sequences, 17)
    draft = DovetailDraft.for_target(target)
    drafted = target.generate(prompt(), **GREEDY, return_dict_in_generate=True, assistant_model=draft)
    assert torch.equal(plain.sequences, drafted.sequences)
    one, other = plain.past_key_values, drafted.past_key_values
    assert one.get_seq_length() == other.get_seq_length() == 17 + 39
    assert other.capacity <= 17 + 39 + sessions.STEP
    for rows, wanted in zip(other.rows, one.rows, strict=True):
        np.testing.assert_allclose(rows[:, :, :56], wanted[:, :, :56], atol=1e-4)
        assert not rows[:, :, 56:].any()


def test_several_texts_at_a_time():
    """Each cache owns its buffers, so two texts can be generated in turns."""
    target = engines.current().target(tiny_model("llama"))
    draft = DovetailDraft.for_target(target)
    options = dict(GREEDY, max_new_tokens=9, return_dict_in_generate=True, assistant_model=draft)
    texts = [prompt(seed=1), prompt(seed=2)]
    caches = [None, None]
    for _ in range(3):
        for index, text in enumerate(texts):
            out = target.generate(text, past_key_values=caches[index], **options)
            texts[index], caches[index] = out.sequences, out.past_key_values
    for seed, text in zip((1, 2), texts, strict=True):
        whole = target.generate(prompt(seed=seed), **dict(GREEDY, max_new_tokens=27))
        assert torch.equal(text, whole)


def test_cache_of_another_target_is_refused():
    first = engines.current().target(tiny_model("llama"))
    other = engines.current().target(tiny_model("llama", num_hidden_layers=2))
    cache = engine_of(other).cache(None)
    with pytest.raises(ValueError, match="does not belong to this target"):
        first.generate(prompt(), past_key_values=cache, **GREEDY)


def test_padding_stays_hidden_in_later_turns():
    target = engines.current().target(tiny_model("llama"))
    ids = torch.cat([torch.zeros(1, 9, dtype=torch.long), prompt()], dim=1)
    mask = (torch.arange(26) >= 9).long()[None]
    out = target.generate(ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    mask = torch.cat([mask, mask.new_ones(1, 40)], dim=1)
    again = target.generate(out.sequences, attention_mask=mask, past_key_values=out.past_key_values, **GREEDY)
    assert torch.equal(again[:, 9:], target.generate(prompt(), **dict(GREEDY, max_new_tokens=80)))


def test_prompt_in_chunks(monkeypatch):
    target, ids = engines.current().target(tiny_model("llama")), prompt(300)
    whole = target.generate(ids, **GREEDY)
    for size in (1, 7, 64, 100):
        assert torch.equal(whole, target.generate(ids, prefill_chunk_size=size, **GREEDY))


def test_interrupted_prompt(monkeypatch):
    """After an interrupted prompt the cache is valid: the rest of the prompt can be run after it."""
    target, ids = engines.current().target(tiny_model("llama")), prompt(30)
    engine, passes = engine_of(target), []
    cache, run = engine.cache(None), engine._runtime.run_with_ort_values

    def second_pass_fails(*arguments):
        passes.append(arguments)
        if len(passes) == 2:
            raise KeyboardInterrupt
        return run(*arguments)

    monkeypatch.setattr(engine._runtime, "run_with_ort_values", second_pass_fails)
    with pytest.raises(KeyboardInterrupt):
        target.generate(ids, past_key_values=cache, prefill_chunk_size=10, **GREEDY)
    assert cache.get_seq_length() == cache.position == 10
    assert torch.equal(target.generate(ids, past_key_values=cache, **GREEDY), target.generate(ids, **GREEDY))


# --- packed weights --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_tables_are_what_the_graph_computes_with(kind):
    """The unpacked head equals the graph's output for unit vectors, the embedding its output for every token id."""
    directory = exported(kind=kind)[1]
    tables = engine_of(OnnxRuntimeTarget.from_pretrained(directory, threads=1)).tables()
    model = onnx.load(directory / "model.onnx")
    links = graph.Links(model.graph)
    head = graph.head_of(links)
    assert head.op_type == "MatMulNBits"
    assert torch.equal(tables.embedding, torch.from_numpy(_answer(model, "input_ids", np.arange(VOCAB)[None])))
    unit = np.eye(tables.head.shape[1], dtype=np.float32)
    assert_close(tables.head.T, torch.from_numpy(_answer(model, head.input[0], unit, head.output[0])))


def _answer(model, fed, value, wanted=None):
    """Run a part of a graph on a value: the first node that reads it, or the node that computes `wanted`."""
    node = next(n for n in model.graph.node if fed in n.input and (wanted is None or wanted in n.output))
    kind = TensorProto.INT64 if value.dtype == np.int64 else TensorProto.FLOAT
    stored = [tensor for tensor in model.graph.initializer if tensor.name in node.input]
    part = helper.make_graph(
        [node],
        "part",
        [helper.make_tensor_value_info(fed, kind, value.shape)],
        [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)],
        stored,
    )
    small = helper.make_model(part, opset_imports=model.opset_import, ir_version=model.ir_version)
    session = ort.InferenceSession(small.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {fed: value})[0].reshape(-1, session.get_outputs()[0].shape[-1] or value.shape[-1])


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_packed_models(kind, oracle):
    """Drafted text equals plain text on a packed tiny model, whose products are in float32."""
    target = OnnxRuntimeTarget.from_pretrained(exported(kind=kind)[1], threads=1, same_kernels=True)
    draft, plain = DovetailDraft.for_target(target), target.generate(prompt(), **GREEDY)
    assert torch.equal(plain, target.generate(prompt(), **GREEDY, assistant_model=draft))
    oracle(plain, 17)
    assert torch.equal(plain, target.generate(prompt(), **GREEDY, assistant_model=draft))
    assert draft.report.acceptance_length > 1.2


@pytest.mark.parametrize(("kind", "dtype"), [("f32", "float32"), ("int4", "float32"), ("int4_rounded", "bfloat16")])
def test_rounding_of_activations_is_known(kind, dtype):
    target = OnnxRuntimeTarget.from_pretrained(exported(kind=kind)[1], threads=1)
    assert engine_of(target).rounding == getattr(torch, dtype)


@pytest.mark.parametrize("kind", ["f32", "int8", "int4", "int8_rounded", "int4_rounded"])
def test_exact_targets_are_equal_to_the_bit(kind):
    """Logits of single rows and of chains followed by wrong tokens, over 150 tokens: no bit differs."""
    target = OnnxRuntimeTarget.from_pretrained(exported(kind=kind)[1], threads=1, exact=True)
    assert engine_of(target).rounding == torch.float32
    text = target.generate(prompt(), **dict(GREEDY, max_new_tokens=150))[0, 17:].tolist()
    alone = _in_chains(target, text, 1, 0)
    for rows, decoys in ((2, 0), (3, 5), (8, 0), (1, 7), (16, 3)):
        assert torch.equal(alone, _in_chains(target, text, rows, decoys)), (rows, decoys)


def _in_chains(target, text, rows, decoys):
    """Logits of every token after the prompt, scored `rows` at a time and followed by wrong tokens."""
    found = []
    with open_session(target) as session:
        assert not session.supports_tree
        session.prefill(prompt(), None)
        for start in range(0, len(text), rows):
            part = text[start : start + rows]
            output = session.score(chain(part + [7] * decoys))
            found.append(output.logits[: len(part)])
            session.keep(list(range(len(part))))
    return torch.cat(found)
