"""Passes of models with packed weights: a node of a tree has the logits of plain generation, to the bit."""

import copy
import random
from types import SimpleNamespace

import pytest
import torch
from families import CASE_IDS, CASES, VOCAB, prompt, tiny_model
from support.sessions import open_session
from support.trees import random_tree
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
)

from dovetail_plugin import CpuWeights, TreeBudget, compat
from dovetail_plugin.kernels import KINDS
from dovetail_plugin.targets import row_exact
from dovetail_plugin.targets.row_exact import NAME, Activation, attention

pytestmark = [
    pytest.mark.torch_only("weights are packed in transformers' own models"),
    pytest.mark.usefixtures("kernels"),
]

EXACT = [case for case in CASES if case[0] != "gpt2"]  # whose layers are no linear layers of torch
EXACT_IDS = [name for name in CASE_IDS if name != "gpt2"]


def load(directory, kind="int8", **options):
    options.setdefault("dtype", torch.float32)
    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=CpuWeights(kind), **options)


def lone_rows(model, ids, start):
    """Logits (T - start, V) of the tokens from `start` on, each in its own pass, as in plain generation."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :start], use_cache=True, **{compat.CACHE: cache})
        rows = [
            model(ids[:, at : at + 1], use_cache=True, **{compat.CACHE: cache}) for at in range(start, ids.shape[1])
        ]
    return torch.cat([row.logits[0] for row in rows])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("model_type", "fields"), EXACT, ids=EXACT_IDS)
def test_nodes_of_trees_are_lone_rows(model_type, fields, kind, tmp_path):
    """A tree behind a tree, at lengths before and behind the windows."""
    tiny_model(model_type, **fields).save_pretrained(tmp_path)
    rng = random.Random(0)
    for dtype in (torch.float32, torch.bfloat16):
        model = load(tmp_path, kind, dtype=dtype)
        text = prompt(40)[0].tolist()
        with open_session(model) as session:
            session.prefill(torch.tensor([text[:18]]), None)
            committed = 18
            while committed < 34:
                truth = text[committed + 1 : committed + 6]
                tree = random_tree(text[committed], truth, TreeBudget(nodes=14, depth=5, top_k=4), rng, VOCAB)
                logits = session.score(tree).logits
                path = deepest(tree)
                for node in {path[-1], len(tree) - 1}:
                    nodes = path_to(tree, node)
                    ids = torch.tensor([text[:committed] + tree.tokens[nodes].tolist()])
                    assert torch.equal(logits[nodes], lone_rows(model, ids, committed)), (dtype, committed)
                kept = [0] + [n for n in path[1:] if text[committed : committed + int(tree.depths[n]) + 1] ==
                              tree.tokens[path_to(tree, n)].tolist()]  # fmt: skip
                session.keep(kept)
                committed += len(kept)


def path_to(tree, node):
    path = []
    while node >= 0:
        path.append(node)
        node = int(tree.parents[node])
    return path[::-1]


def deepest(tree):
    return path_to(tree, int(tree.depths.argmax()))


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_numbers_of_rows_and_threads(activation, tmp_path):
    """With sizes at which the threads of torch's own activations would meet in the middle of a register."""
    fields = {"hidden_size": 64, "intermediate_size": 11016, "num_hidden_layers": 1, "hidden_act": activation}
    tiny_model("llama", **fields).save_pretrained(tmp_path)
    model, ids, states = load(tmp_path), prompt(64), []
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0][0]))
    torch.set_num_threads(1)
    wanted = lone_rows(model, ids, 1)
    alone = torch.cat(states)
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        for rows in (2, 5, 17, 64):
            with torch.no_grad():
                assert torch.equal(model(ids[:, :rows]).logits[0, 1:], wanted[: rows - 1]), (threads, rows)
            assert torch.equal(states[-1], alone[:rows]), (threads, rows)


def test_sequences_of_a_batch_are_lone_sequences(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    model = load(tmp_path)
    long, short = prompt(30), prompt(12, seed=2)
    ids = torch.cat([long, torch.cat([torch.zeros(1, 18, dtype=torch.int64), short], 1)])
    mask = torch.ones_like(ids)
    mask[1, :18] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        both = model(ids, attention_mask=mask, position_ids=positions).logits
        assert torch.equal(both[0], model(long).logits[0])
        assert torch.equal(both[1, 18:], model(short).logits[0])


def test_what_a_model_gets(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    model = load(tmp_path)
    assert compat.attention_of(model.config) == NAME
    assert isinstance(model.model.layers[0].mlp.act_fn, Activation)
    assert "attn" not in str(model.config.to_diff_dict()), "another process may not know the name"
    ids = prompt()
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(ids).logits, model(ids).logits)
    eager = load(tmp_path, attn_implementation="eager")
    assert compat.attention_of(eager.config) == "eager"


def test_without_kernels_nothing_changes(tmp_path, monkeypatch):
    tiny_model("llama").save_pretrained(tmp_path)
    monkeypatch.setattr(row_exact, "library", lambda: None)
    model = load(tmp_path)
    assert compat.attention_of(model.config) == "sdpa"
    assert not isinstance(model.model.layers[0].mlp.act_fn, Activation)


# --- where attention runs in torch -----------------------------------------------------------------


def heads(batch=1, rows=5, cached=9, **options):
    torch.manual_seed(0)
    return [torch.randn(batch, h, n, 16, **options) for h, n in ((4, rows), (2, cached), (2, cached))]


LAYER = SimpleNamespace(num_key_value_groups=2, is_causal=True, training=False)


def in_torch(q, k, v, mask, **options):
    return AttentionInterface()["sdpa"](LAYER, q, k, v, mask, scaling=0.25, **options)[0]


def mask_of(q, k):
    rows, cached = q.shape[2], k.shape[2]
    return torch.ones(1, 1, rows, cached, dtype=torch.bool).tril(cached - rows)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_is_that_of_torch(batch, dtype):
    q, k, v = heads(batch, dtype=dtype)
    mask = mask_of(q, k)
    for given in (mask, mask.expand(batch, -1, -1, -1), torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -1e38)):
        out, weights = attention(LAYER, q, k, v, given, scaling=0.25)
        assert weights is None and out.shape == (batch, 5, 4, 16)
        assert torch.allclose(out, in_torch(q, k, v, mask), atol=1e-5)
    for rows in (1, 9):
        few = torch.randn(batch, 4, rows, 16, dtype=dtype)
        assert torch.allclose(attention(LAYER, few, k, v, None)[0], in_torch(few, k, v, None), atol=1e-5)


def test_gradients_and_long_prompts_run_in_torch(monkeypatch):
    monkeypatch.setattr(row_exact, "LONG_PROMPT", 8)
    q, k, v = heads(rows=9)
    assert torch.equal(attention(LAYER, q, k, v, None, scaling=0.25)[0], in_torch(q, k, v, None))
    q, k, v = heads(rows=9, cached=12)  # a long tree
    assert not torch.equal(attention(LAYER, q, k, v, mask_of(q, k))[0], in_torch(q, k, v, mask_of(q, k)))
    q, k, v = heads(requires_grad=True)
    attention(LAYER, q, k, v, mask_of(q, k), scaling=0.25)[0].sum().backward()
    assert q.grad is not None
    with torch.no_grad():
        bias = torch.randn(1, 4, 5, 9)
        out = attention(LAYER, q, k, v, bias.tril(), scaling=0.25)[0]  # a mask for each head
        assert torch.equal(out, in_torch(q, k, v, bias.tril()))


def test_a_softcap_and_sinks_without_kernels(monkeypatch):
    q, k, v = heads()
    for options in ({"softcap": 2.0}, {"s_aux": torch.randn(4)}, {"softcap": 1.0, "s_aux": torch.randn(4)}):
        for mask in (mask_of(q, k), torch.zeros(1, 1, 5, 9).masked_fill(~mask_of(q, k), -torch.inf)):
            right = attention(LAYER, q, k, v, mask, scaling=0.25, **options)[0]
            with monkeypatch.context() as patch:
                patch.setattr(row_exact, "library", lambda: None)
                other = attention(LAYER, q, k, v, mask, scaling=0.25, **options)[0]
            assert torch.allclose(right, other, atol=1e-5)


def test_other_parts_of_a_model_keep_eager_attention():
    text = tiny_model("gemma3_text").config
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = Gemma3Config(text_config=text, vision_config=vision | {"image_size": 8, "patch_size": 4})
    for tower, expected in (("eager", "eager"), ("sdpa", NAME)):
        loaded = copy.deepcopy(config)
        attention_of_parts = {"": "sdpa", "text_config": "sdpa", "vision_config": tower}
        model = Gemma3ForConditionalGeneration._from_config(loaded, attn_implementation=attention_of_parts)
        row_exact.make_row_exact(model)
        assert compat.attention_of(model.config.get_text_config()) == NAME
        assert compat.attention_of(model.config.vision_config) == expected
