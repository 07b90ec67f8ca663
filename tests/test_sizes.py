"""Bytes from configs alone against real models, their caches, and the tensors that live during real passes."""

import weakref
from contextlib import contextmanager

import pytest
import torch
from families import FULL_ATTENTION, SLIDING, prompt, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache

from dovetail_plugin import DovetailDraft
from dovetail_plugin.drafts.base import DRAFT_ROWS
from dovetail_plugin.drafts.cuda_graph_rows import Store, power_of_two
from dovetail_plugin.drafts.feature_drafter import FeatureDrafter
from dovetail_plugin.drafts.torch_runner import TorchRunner
from dovetail_plugin.planning.known_shapes import shape_config
from dovetail_plugin.planning.memory import Rows, draft_sizes, target_sizes
from dovetail_plugin.planning.storage import storage_of
from dovetail_plugin.report import PhaseClock
from dovetail_plugin.targets.engine import engine_of
from dovetail_plugin.tree import DraftTree

pytestmark = pytest.mark.torch_only("targets in torch")

EVERY = [(name, {}) for name in FULL_ATTENTION] + list(SLIDING.items())
TIED = [("llama", {"tie_word_embeddings": True}), ("gpt2", {"tie_word_embeddings": True})]


def name_of(case):
    return "-".join([case[0], *(key for key in case[1] if "window" in key or "tie" in key)])


def sizes_as(config, dtype):
    return target_sizes(config, storage_of(config, dtype))


# --- weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", EVERY + TIED, ids=name_of)
def test_weights_are_those_of_the_real_model(case):
    model = tiny_model(case[0], **case[1])
    sizes = sizes_as(model.config, "float32")
    storages = {t.untyped_storage().data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    assert sizes.weights_bytes == sum(storages.values())
    assert sizes.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    assert sizes.weights["embedding"] >= model.get_input_embeddings().weight.nbytes
    assert (sizes.weights["head"] == 0) == sizes.tied
    assert len(sizes.layers) == model.config.num_hidden_layers
    assert all(layer.weights_bytes == sizes.layers[0].weights_bytes for layer in sizes.layers)
    half = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    storages = {t.untyped_storage().data_ptr(): t.nbytes for t in (*half.parameters(), *half.buffers())}
    assert sizes_as(model.config, "bfloat16").weights_bytes == sum(storages.values())


def test_counting_leaves_the_config_alone():
    config = shape_config("llama-3.2-1b-shape")
    before = config.to_json_string()
    sizes_as(config, "float32")
    assert config.to_json_string() == before


def test_quantised_weights():
    """By hand: H 32, I 48, 4 heads of 8, 2 key/value heads, V 97; one group of inputs for each int4 channel."""
    config = tiny_model("llama").config
    shapes = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]
    norms = 2 * 32 * 2
    int8, int4 = sizes_as(config, "int8"), sizes_as(config, "int4")
    assert int8.layers[0].weights_bytes == sum(out * (inputs + 2) for out, inputs in shapes) + norms
    assert int4.layers[0].weights_bytes == sum(out * (inputs // 2 + 2) for out, inputs in shapes) + norms
    assert int8.weights["embedding"] == int4.weights["embedding"] == int8.weights["head"] == 97 * (32 + 2)
    assert int8.storage.run_bytes == 4


@pytest.mark.parametrize("blocks", [1, 3])
def test_draft_weights_are_those_of_the_real_draft(llama, blocks):
    draft = DovetailDraft.for_target(llama, blocks=blocks)
    fresh = DovetailDraft(draft.config)  # has met no target
    sizes = draft_sizes(draft.config, "float32")
    assert sizes.blocks_bytes == sum(t.nbytes for t in (*fresh.parameters(), *fresh.buffers()))
    assert sizes.row_bytes * sizes.config.vocab_size == draft.embed_weight.nbytes


# --- caches ------------------------------------------------------------------------------------


@contextmanager
def filled(model, rows, prompt_tokens):
    """The cache layers of a target that has run a prompt and a tree, in its session."""
    cache = DynamicCache(config=model.config)
    with engine_of(model).session(cache, max_nodes=rows.nodes) as target:
        target.prefill(prompt(prompt_tokens), None)
        target.score(DraftTree.chain(list(range(3, 3 + rows.nodes))))
        yield target.rows.layers


def bush(nodes):
    """A path of eight nodes, and all others below the root."""
    parents = torch.tensor([-1, *range(7), *[0] * (nodes - 8)])
    depths = torch.tensor([*range(8), *[1] * (nodes - 8)])
    return DraftTree(torch.full((nodes,), 5), parents, depths, torch.zeros(nodes))


def stored_bytes(layers):
    """Bytes of all buffers of cache layers."""
    return sum(buffer.untyped_storage().nbytes() for layer in layers for buffer in layer._stored.buffers)


@pytest.mark.parametrize("case", EVERY, ids=name_of)
@pytest.mark.parametrize("context", [40, 400])
def test_cache_is_that_of_a_real_target(case, context):
    """Longer and shorter than sliding windows with their slack (24 - 1 + 8 + 256 rows)."""
    model, rows = tiny_model(case[0], **case[1]), Rows(context, 8, context)
    sizes = sizes_as(model.config, "float32")
    with filled(model, rows, context) as layers:
        for layer, planned in zip(layers, sizes.layers, strict=True):
            taken = stored_bytes([layer])
            most = planned.kv_bytes(rows, allocated=True)  # the prompt may have been shorter, and the answer longer
            assert taken <= most <= taken + 2 * rows.nodes * planned.kv_row_bytes
            touched = layer.keys.nbytes + layer.values.nbytes
            assert touched <= planned.kv_bytes(rows, allocated=False) <= most
            if planned.window is None:
                assert planned.kv_bytes(rows, allocated=False) == touched


def test_cache_of_latent_attention():
    """Keys and values of different widths, after expansion."""
    fields = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=6)
    experts = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=1, topk_group=1)
    model = tiny_model("deepseek_v3", num_key_value_heads=4, first_k_dense_replace=1, **fields, **experts)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt(10), past_key_values=cache, use_cache=True)
    row_bytes = [(layer.keys.nbytes + layer.values.nbytes) // 10 for layer in cache.layers]
    assert [layer.kv_row_bytes for layer in sizes_as(model.config, "float32").layers] == row_bytes


def test_cache_of_a_draft(llama):
    draft = DovetailDraft.for_target(llama, blocks=2)
    sizes, rows = draft_sizes(draft.config, "float32"), Rows(300, 16, 300)
    store = Store(draft, power_of_two(rows.context + DRAFT_ROWS))
    assert sizes.kv_bytes(rows, on_gpu=True) == store.kv.nbytes
    drafter = FeatureDrafter(draft, TorchRunner(draft), capacity=rows.context + DRAFT_ROWS, clock=PhaseClock())
    drafter.begin(torch.zeros(rows.context, 32), prompt(rows.context + 1)[0])
    drafter.catch_up()
    touched = sum(own.keys.nbytes + own.values.nbytes for own in drafter.rows.layers)
    assert sizes.kv_bytes(Rows(rows.context - 1, 1, 1), on_gpu=False) == touched


# --- temporaries -------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Bytes of storages made in the block that live, and at most. Kernels' inner workspaces are not seen."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage):
        if storage not in self._known:
            self._known.add(storage)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size):
        self.now -= size


WIDE = dict(hidden_size=64, intermediate_size=192, max_position_embeddings=2048)


@pytest.mark.parametrize("rows_at_once", [1200, 300])
@pytest.mark.parametrize("case", [("llama", {}), ("qwen2", {}), ("mistral", {"sliding_window": 256})], ids=name_of)
def test_temporaries_of_a_prompt(case, rows_at_once):
    """Attention converts a mask of truth values inside its kernel, where it is not seen here."""
    model = tiny_model(case[0], **WIDE, **case[1])
    rows = Rows(1200, 16, rows_at_once)
    sizes = sizes_as(model.config, "float32")
    session = engine_of(model).session(DynamicCache(config=model.config), max_nodes=16, prefill_chunk=rows_at_once)
    with session as target, LiveBytes() as live:
        target.prefill(prompt(1200), None)
        temporaries = (
            live.peak
            - stored_bytes(target.rows.layers)
            - (sizes.features_bytes(rows, sizes.widths.hidden) if rows_at_once < 1200 else 0)
        )
    unseen = 0 if rows_at_once == 1200 and not case[1] else rows_at_once * 1200 * 4
    assert temporaries * 0.85 <= sizes.prefill_bytes(rows) <= temporaries * 1.15 + unseen


def test_temporaries_of_a_tree():
    model, rows = tiny_model("llama", **WIDE), Rows(1200, 64, 1200)
    sizes = sizes_as(model.config, "float32")
    with engine_of(model).session(DynamicCache(config=model.config), max_nodes=64) as target:
        target.prefill(prompt(1200), None)
        with LiveBytes() as live:
            target.score(bush(64))
        kept = stored_bytes(target.rows.layers)  # seen through new views
    temporaries, unseen = live.peak - kept, 64 * (1200 + 64) * 4  # the converted mask, as above
    assert temporaries * 0.85 <= sizes.score_bytes(rows) <= temporaries * 1.15 + unseen


@pytest.mark.parametrize("blocks", [1, 2])
def test_temporaries_of_a_draft(blocks):
    model = tiny_model("llama", **WIDE)
    draft, rows = DovetailDraft.for_target(model, blocks=blocks), Rows(1200, 16, 1200)
    sizes = draft_sizes(draft.config, "float32")
    drafter = FeatureDrafter(draft, TorchRunner(draft), capacity=rows.context + DRAFT_ROWS, clock=PhaseClock())
    drafter.begin(torch.zeros(1199, 64), prompt(1200)[0])
    with LiveBytes() as live:
        drafter.catch_up()
        storages = sum(2 * own._buffers[0].untyped_storage().nbytes() for own in drafter.rows.layers)
        peak = live.peak - storages
    assert sizes.pass_bytes(rows) == pytest.approx(peak, rel=0.15)
