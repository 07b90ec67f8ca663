"""Plans from configs alone: what goes to the GPU, device maps, refusals."""

import itertools
import re
import warnings

import pytest
import torch
from accelerate.utils import check_device_map
from families import FULL_ATTENTION, SLIDING, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from dovetail_plugin import DovetailConfig, DovetailDraft
from dovetail_plugin.cache import reserved
from dovetail_plugin.planning.allocate import MARGIN_FIXED_BYTES, MARGIN_SHARE
from dovetail_plugin.planning.apply import apply_plan
from dovetail_plugin.planning.known_shapes import shape_config
from dovetail_plugin.planning.make_plan import make_plan
from dovetail_plugin.planning.memory import target_sizes
from dovetail_plugin.planning.storage import storage_of

pytestmark = pytest.mark.torch_only("plans for targets in torch")

MIB, GIB = 2**20, 2**30


def plan_for(shape, vram_bytes, **options):
    return make_plan(shape_config(shape), None, vram_bytes=vram_bytes, **options)


def bytes_of(plan, pattern, device="cpu|gpu"):
    """Bytes of the parts whose names match."""
    return sum(p.bytes for p in plan.parts if re.fullmatch(pattern, p.name) and re.fullmatch(device, p.device))


# --- what goes to the GPU --------------------------------------------------------------------------

TABLES = 128256 * 4096 * 2  # bytes of Llama 3.1 8B's embedding, and of its head


def test_large_gpu_holds_everything():
    plan = plan_for("llama-3.1-8b-shape", 24 * GIB)
    assert (plan.draft_device, plan.embedding_device, plan.draft_vocab_size) == ("gpu", "gpu", None)
    assert plan.gpu_layers == tuple(range(32))
    assert (plan.draft_dtype, plan.target_dtype) == ("bfloat16", "bfloat16")
    assert bytes_of(plan, "draft: head") == bytes_of(plan, "draft: embedding") == TABLES
    assert bytes_of(plan, "target: embedding", "cpu") == bytes_of(plan, "target: head", "cpu") == TABLES
    assert "run the whole target faster" in plan.notes[-1]


def test_layers_fill_what_is_left():
    plan = plan_for("llama-3.1-8b-shape", 8 * GIB)
    count = len(plan.gpu_layers)
    assert plan.gpu_layers == tuple(range(32 - count, 32)) and 5 < count < 20
    layer_bytes = 218_112_000 * 2
    row_bytes = 2 * 8 * 128 * 2
    kv_bytes = row_bytes * reserved(4096 + 64)  # whole buffers on a GPU, written rows on a CPU
    assert bytes_of(plan, "target: layers .*", "gpu") == count * layer_bytes
    assert bytes_of(plan, "target: layers .*", "cpu") == (32 - count) * layer_bytes
    assert bytes_of(plan, "target: KV cache.*", "gpu") == count * kv_bytes
    assert bytes_of(plan, "target: KV cache.*", "cpu") == (32 - count) * row_bytes * (4096 + 64)
    assert 0 <= plan.left_bytes("gpu") < layer_bytes + kv_bytes


def test_embedding_moves_first():
    plan = plan_for("llama-3.1-8b-shape", 3 * GIB)
    assert (plan.draft_device, plan.embedding_device, plan.draft_vocab_size) == ("gpu", "cpu", None)
    assert bytes_of(plan, "draft: embedding") == 0  # rows are gathered in the target's own table
    assert any("gathered on the CPU" in note for note in plan.notes)


def test_head_is_cut_if_it_does_not_fit():
    plan = plan_for("llama-3.1-8b-shape", 2 * GIB)
    assert (plan.draft_device, plan.embedding_device, plan.draft_vocab_size) == ("gpu", "cpu", 65536)
    assert bytes_of(plan, "draft: head") == 65536 * (4096 * 2 + 8)
    assert plan.gpu_layers == () and plan.device_map is None
    assert any("65536 most frequent tokens" in note for note in plan.notes)


def test_draft_runs_on_the_cpu_if_nothing_else_fits():
    plan = plan_for("llama-3.1-8b-shape", GIB)
    assert (plan.draft_device, plan.embedding_device, plan.draft_vocab_size) == ("cpu", "cpu", None)
    assert plan.needed_bytes("gpu") == 0 and plan.gpu_layers == ()
    (note,) = plan.notes
    needed = float(re.search(r"needs at least ([\d.]+) GiB of VRAM", note).group(1))
    assert plan_for("llama-3.1-8b-shape", int((needed + 0.02) * GIB)).draft_device == "gpu"
    assert plan_for("llama-3.1-8b-shape", int((needed - 0.02) * GIB)).draft_device == "cpu"


@pytest.mark.parametrize("vram_bytes", [0, None])
def test_no_gpu(vram_bytes):
    plan = plan_for("qwen2.5-7b-shape", vram_bytes)
    assert plan.draft_device == "cpu" and plan.vram_budget_bytes == 0
    assert not [part for part in plan.parts if part.device == "gpu"]
    assert bytes_of(plan, "draft: embedding and head") == 0  # the target's own tables, shared
    other = plan_for("qwen2.5-7b-shape", vram_bytes, draft_dtype="float32")
    assert bytes_of(other, "draft: embedding and head") == 2 * 152064 * 3584 * 4


def test_tied_tables_count_once():
    """A tied table is never split: all of it is on the GPU, or a part of it that serves as the head only."""
    table = 128256 * 2048 * 2
    plan = plan_for("llama-3.2-1b-shape", 2 * GIB)
    assert bytes_of(plan, "draft: head") == table and bytes_of(plan, "draft: embedding") == 0
    assert bytes_of(plan, "target: embedding") == table and bytes_of(plan, "target: head") == 0
    for size in range(600 * MIB, 2 * GIB, 150 * MIB):
        plan = plan_for("llama-3.2-1b-shape", size)
        if plan.draft_device == "gpu":
            assert (plan.embedding_device == "gpu") == (plan.draft_vocab_size is None)


def test_budgets_hold_and_more_memory_brings_more():
    """For all sizes of a GPU: the plan never exceeds it, and a larger GPU never holds less."""
    config = shape_config("llama-3.1-8b-shape")
    steps, weights = [], target_sizes(config, storage_of(config, None)).weights_bytes
    for size in range(512 * MIB, 21 * GIB, 1536 * MIB):
        plan = plan_for("llama-3.1-8b-shape", size)
        assert plan.left_bytes("gpu") >= 0
        vocab_size = plan.draft_vocab_size or 128256
        assert vocab_size == 128256 or (vocab_size >= 4096 and vocab_size.bit_count() == 1)
        on_gpu = plan.draft_device == "gpu"
        steps.append((on_gpu, on_gpu and vocab_size, plan.embedding_device == "gpu", len(plan.gpu_layers)))
        assert bytes_of(plan, "target: (embedding|layers? .*|head|final norm|rest)") == weights
    for before, after in itertools.pairwise(steps):
        assert before[:3] <= after[:3]
        if before[:3] == after[:3]:
            assert before[3] <= after[3]
    assert steps[0][0] is False and steps[-1] == (True, 128256, True, 32)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_exported_targets_stay_on_the_cpu(dtype):
    plan = plan_for("llama-2-13b-shape", 16 * GIB, dtype=dtype)
    assert plan.draft_device == "gpu" and plan.gpu_layers == () and plan.device_map is None
    assert plan.draft_dtype == "float16" and plan.target_dtype == dtype
    assert any(f"layers of an {dtype} target belong to another engine" in note for note in plan.notes)
    assert bytes_of(plan, "target: KV cache") == 40 * 2 * 5120 * 4 * (4096 + 64)  # float32, the adapters' default


def test_exported_targets_give_copies_of_their_tables():
    small = plan_for("llama-3.1-8b-shape", 3 * GIB, dtype="int4")
    assert small.embedding_device == "cpu"
    assert bytes_of(small, "draft: embedding", "cpu") == 128256 * 4096 * 4
    on_cpu = plan_for("llama-3.1-8b-shape", 0, dtype="int8")
    assert bytes_of(on_cpu, "draft: embedding and head", "cpu") == 2 * TABLES
    assert bytes_of(on_cpu, "draft: blocks and head again", "cpu") > TABLES // 2


def test_gpu_without_bfloat16():
    plan = plan_for("llama-3.1-8b-shape", 8 * GIB, gpu_supports_bf16=False)
    assert plan.draft_dtype == "float16" and plan.gpu_layers == ()
    assert "float16" in plan.notes[0] and "bfloat16" in plan.notes[-1]
    half = plan_for("llama-3.1-8b-shape", 8 * GIB, dtype="float16", gpu_supports_bf16=False)
    assert half.draft_dtype == half.target_dtype == "float16" and half.gpu_layers


def test_longer_contexts_and_smaller_chunks():
    short, long = (plan_for("llama-2-7b-shape", 0, context=n) for n in (1024, 4096))
    assert bytes_of(long, "target: KV cache") - bytes_of(short, "target: KV cache") == 3072 * 32 * 2 * 4096 * 2
    chunked = plan_for("llama-2-7b-shape", 8 * GIB, prefill_rows=256)
    assert bytes_of(chunked, "temporaries") < bytes_of(plan_for("llama-2-7b-shape", 8 * GIB), "temporaries")
    cut = plan_for("llama-2-7b-shape", 0, context=10_000)
    assert any("cut to the target's 4096 positions" in note for note in cut.notes)
    assert bytes_of(cut, "target: KV cache") == bytes_of(long, "target: KV cache")


# --- the device map ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", [(n, {}) for n in FULL_ATTENTION] + list(SLIDING.items()), ids=lambda case: case[0])
def test_device_map_covers_the_model(case):
    model = tiny_model(case[0], **case[1])
    plan = make_plan(model.config, None, vram_bytes=8 * GIB)
    count = model.config.num_hidden_layers
    assert plan.gpu_layers == tuple(range(count))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_device_map(model, plan.device_map)
    names = list(plan.device_map)
    assert not [a for a in names for b in names if a != b and a.startswith(b + ".")]
    where = {
        name: next(v for k, v in plan.device_map.items() if f"{name}.".startswith(f"{k}."))
        for name in (name for name, _ in model.named_parameters())
    }
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    assert where[f"{head}.weight"] == "cpu"
    assert sum(v == 0 for v in plan.device_map.values()) == count + 1  # and the final norm


def test_device_map_of_a_part():
    config = shape_config("llama-3.1-8b-shape")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    plan = make_plan(config, None, vram_bytes=6 * GIB)
    check_device_map(model, plan.device_map)
    on_gpu = {name for name, place in plan.device_map.items() if place == 0}
    assert on_gpu == {f"model.layers.{i}" for i in plan.gpu_layers} | {"model.norm"}
    assert 0 < len(plan.gpu_layers) < 32


def test_a_plan_can_be_applied(llama):
    """With the CPU standing in for the GPU."""
    model = tiny_model("llama")
    draft = DovetailDraft.for_target(model)
    plan = make_plan(model.config, draft.config, vram_bytes=8 * GIB)
    placed = apply_plan(plan, model, DovetailDraft(draft.config), gpu="cpu")
    assert placed.active
    ids = torch.arange(3, 20)[None]
    plain = llama.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), plain)
    placed.remove()
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), plain)


# --- prompt lookup and the margin --------------------------------------------------------------


def test_lookup_leaves_the_gpu_to_the_target():
    plan = make_plan(shape_config("llama-3.1-8b-shape"), "lookup", vram_bytes=4 * GIB)
    assert not [part for part in plan.parts if part.name.startswith("draft")]
    assert plan.notes[0] == "prompt lookup has no weights: the draft takes no VRAM"
    assert len(plan.gpu_layers) > len(plan_for("llama-3.1-8b-shape", 4 * GIB).gpu_layers)
    assert plan.draft_dtype is None and plan.left_bytes("gpu") >= 0
    without_gpu = make_plan(shape_config("llama-3.1-8b-shape"), "lookup", vram_bytes=0, dtype="int8")
    assert without_gpu.gpu_layers == () and without_gpu.needed_bytes("gpu") == 0
    model = tiny_model("llama")
    plan = make_plan(model.config, "lookup", vram_bytes=8 * GIB)
    with apply_plan(plan, model, gpu="cpu") as placed:
        assert placed.active


@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_margin_is_one_line_on_each_device(device):
    parts = [part for part in plan_for("llama-3.1-8b-shape", 8 * GIB).parts if part.device == device]
    (margin,) = [part for part in parts if part.name == "margin"]
    rest = sum(part.bytes for part in parts if part is not margin)
    assert margin.bytes == MARGIN_FIXED_BYTES + int(MARGIN_SHARE * rest)


# --- refusals ----------------------------------------------------------------------------------


def test_target_beyond_the_ram():
    with pytest.raises(ValueError, match="the target does not fit") as refused:
        plan_for("llama-2-13b-shape", 4 * GIB, ram_bytes=16 * GIB, context=2048)
    said = str(refused.value)
    needs = float(re.search(r"needs ([\d.]+) GiB of RAM", said).group(1))
    assert 24 < needs < 27 and "there are 16.00 GiB" in said
    for dtype in ("int8", "int4"):
        would = re.search(rf"{dtype} weights would need ([\d.]+) GiB", said)
        fits = plan_for("llama-2-13b-shape", 4 * GIB, dtype=dtype, context=2048).needed_bytes("cpu")
        assert (would is None) == (fits > 16 * GIB)
        if would is not None:
            assert float(would.group(1)) == pytest.approx(fits / GIB, abs=0.006)
    plan = plan_for("llama-2-13b-shape", 4 * GIB, ram_bytes=int((needs + 0.01) * GIB), context=2048)
    assert 0 <= plan.left_bytes("cpu") < 20 * MIB


def test_target_beyond_all_remedies():
    with pytest.raises(ValueError, match=r"even int4 weights would need .*a smaller target"):
        plan_for("llama-3.1-70b-shape", 4 * GIB, ram_bytes=32 * GIB)


def test_shorter_contexts_help():
    with pytest.raises(ValueError, match="a context of 8192 would need"):
        plan_for("llama-3.1-8b-shape", 0, ram_bytes=20 * GIB, context=32768)


def test_pairs_that_do_not_fit():
    target, other = shape_config("llama-2-7b-shape"), shape_config("llama-2-13b-shape")
    with pytest.raises(ValueError, match="hidden size is 5120, the target's is 4096"):
        make_plan(target, DovetailConfig.for_target(other), vram_bytes=0)
    with pytest.raises(ValueError, match="the config of a llama model, not the config of a Dovetail draft"):
        make_plan(target, other, vram_bytes=0)


def gemma4_has_one_head_dim() -> bool:
    """Whether the installed transformers is too old to say that Gemma 4's heads differ between layers."""
    try:
        return AutoConfig.for_model("gemma4").get_text_config().head_dim > 0
    except (RuntimeError, AttributeError):
        return False


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("t5", "t5 models are encoder-decoders"),
        ("mamba", "MambaConfig has no num_attention_heads"),
        ("qwen2_vl", "qwen2_vl model, which AutoModelForCausalLM cannot load"),
        ("gemma4", "Gemma4TextConfig has no single head_dim"),
    ],
)
def test_models_that_cannot_be_targets(model_type, message):
    if model_type == "gemma4" and gemma4_has_one_head_dim():
        pytest.skip("this transformers gives one head_dim for layers that differ")
    with pytest.raises(ValueError, match=message) as refused:
        make_plan(AutoConfig.for_model(model_type), None, vram_bytes=0)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"context": 0}, "context must be at least 1, got 0"),
        ({"max_nodes": 0}, "max_nodes must be at least 1"),
        ({"prefill_rows": -1}, "prefill_rows must be at least 1"),
        ({"ram_bytes": -1}, "ram_bytes must not be negative"),
        ({"dtype": "fp8"}, r"dtype must be auto, float32, .*int4, got 'fp8'"),
        ({"draft_dtype": "int8"}, r"draft_dtype must be auto, .*float16, got 'int8'"),
    ],
)
def test_options_that_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        plan_for("llama-2-7b-shape", 0, **option)
