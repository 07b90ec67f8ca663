"""Makes a `DevicePlan` for a pair from its configs, before anything is loaded.

`make_plan` takes two configs and the memory of the GPU and of the machine. It returns the plan or raises a ValueError
that says what would help. GPU memory goes first to the parts that gain most per byte (`allocate.py`): the draft's
blocks, its head, its embedding table, then the target's last layers. The module loads, moves and measures nothing.
"""

from dataclasses import replace

from transformers import PretrainedConfig

from ..drafts.compatibility import check_fits
from ..drafts.config import DovetailConfig
from ..drafts.known_pairs import LOOKUP
from ..targets.config_sizes import sizes_of
from .allocate import DraftPlace, Request, layer_span, layers_on_gpu, margin, place_draft, target_on_gpu
from .device_plan import DevicePlan, Part, format_bytes
from .memory import Rows, TargetSizes, target_sizes
from .storage import EXPORTED, FLOAT_DTYPES, storage_of, stored_dtype

SMALLER = {"float32": ("bfloat16", *EXPORTED), "bfloat16": EXPORTED, "float16": EXPORTED, "int8": ("int4",)}
"""Dtype of a target -> dtypes whose weights take fewer bytes."""


def make_plan(
    target_config: PretrainedConfig,
    draft_config: PretrainedConfig | str | None,
    *,
    vram_bytes: int | None,
    ram_bytes: int | None = None,
    dtype: str | None = None,
    draft_dtype: str = "auto",
    context: int = 4096,
    max_nodes: int = 64,
    prefill_rows: int | None = None,
    gpu_supports_bf16: bool = True,
) -> DevicePlan:
    """Plan for a pair before loading it.

    Args:
        target_config: config of a decoder-only model.
        draft_config: config of its draft. "lookup" plans for prompt lookup, None for an untrained draft with one block.
        vram_bytes: memory of the GPU; None or 0 without a GPU.
        ram_bytes: memory of the machine; None sets no limit.
        dtype: dtype of the target: "float32", "bfloat16" or "float16", or "int8" or "int4" for an exported target. None
            or "auto" uses the dtype or quantization of the config (see `storage_of`).
        draft_dtype: dtype of the draft: "float32", "bfloat16" or "float16". "auto" uses the dtype of the draft's config
            or, if it has none, the target's.
        context: number of tokens of prompt and answer to make room for, at most the target's positions.
        max_nodes: number of nodes of the largest tree (N).
        prefill_rows: number of prompt rows in one pass of the target (`prefill_chunk_size` of `generate`). None runs
            the whole prompt in one pass, as `generate` does.
        gpu_supports_bf16: whether the GPU computes in bfloat16. GPUs before Ampere do not; the draft is then planned in
            float16.

    Raises:
        ValueError: the target does not fit in `ram_bytes` (the message says what would help), the two configs do not
            fit each other, there can be no draft for such a target, or an argument is out of range.
    """
    for name, count in (("context", context), ("max_nodes", max_nodes), ("prefill_rows", prefill_rows)):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}.")
    for name, size in (("vram_bytes", vram_bytes), ("ram_bytes", ram_bytes)):
        if size is not None and size < 0:
            raise ValueError(f"{name} must not be negative, got {size}.")
    positions = sizes_of(target_config).positions or context
    rows = Rows(min(context, positions), max_nodes, min(prefill_rows or context, context, positions))
    draft = _draft_config(target_config, draft_config)
    storage = storage_of(target_config, dtype)
    plan = _plan(
        Request(
            target=target_config,
            draft=draft,
            storage=storage,
            draft_dtype=_draft_dtype(draft_dtype, draft, target_config, dtype),
            vram_bytes=vram_bytes or 0,
            rows=rows,
            gpu_supports_bf16=gpu_supports_bf16,
        ),
        ram_bytes,
    )
    if positions < context:
        plan.notes.append(f"the context is cut to the target's {positions} positions")
    if storage.matrices is not None and not storage.exported:
        plan.notes.append(
            f"the target's weights are counted as stored, {storage.name}; if transformers unpacks them to compute, "
            "plan with the dtype of the unpacked weights (--dtype bfloat16)"
        )
    return plan


def _draft_config(target: PretrainedConfig, draft: PretrainedConfig | str | None) -> DovetailConfig | None:
    if draft is None:
        return DovetailConfig.for_target(target)
    if draft == LOOKUP:
        return None
    if not isinstance(draft, DovetailConfig):
        kind = f"the name {draft!r}" if isinstance(draft, str) else f"the config of a {draft.model_type} model"
        raise ValueError(
            f"the draft is {kind}, not the config of a Dovetail draft. `draft_config.load_draft_config` reads the "
            "configs of published drafts."
        )
    check_fits(draft, target)
    return draft


def _draft_dtype(asked: str, draft: DovetailConfig | None, target: PretrainedConfig, target_dtype: str | None) -> str:
    if asked != "auto":
        if asked not in FLOAT_DTYPES:
            raise ValueError(f"draft_dtype must be auto, {', '.join(FLOAT_DTYPES)}, got {asked!r}.")
        return asked
    stored = None if draft is None else stored_dtype(draft)
    return stored or (target_dtype if target_dtype in FLOAT_DTYPES else None) or stored_dtype(target) or "float32"


def _plan(request: Request, ram_bytes: int | None) -> DevicePlan:
    """Make the plan, and refuse a target that does not fit in `ram_bytes`."""
    target = target_sizes(request.target, request.storage)
    draft = place_draft(request, target)
    layers, layer_notes = layers_on_gpu(request, target, draft)
    parts = [*draft.parts, *(target_on_gpu(request, target, draft, layers) if layers else [])]
    on_gpu = [part for part in parts if part.device == "gpu" and part.bytes]
    on_cpu = [part for part in parts if part.device == "cpu"] + _target_on_cpu(request, target, draft, layers)
    on_cpu = [part for part in on_cpu if part.bytes]
    moved = {*layers, "norm"} if layers else set()
    plan = DevicePlan(
        parts=(*on_gpu, *([margin(on_gpu, "gpu")] if on_gpu else []), *on_cpu, margin(on_cpu, "cpu")),
        vram_budget_bytes=request.vram_bytes,
        ram_budget_bytes=ram_bytes,
        draft_device=draft.device,
        draft_dtype=draft.dtype,
        target_dtype=request.storage.name,
        embedding_device=draft.embedding_device,
        draft_vocab_size=draft.vocab_size,
        gpu_layers=layers,
        device_map={name: 0 if kind in moved else "cpu" for name, kind in target.modules.items()} if layers else None,
        notes=[*draft.notes, *layer_notes],
    )
    if ram_bytes is not None and plan.needed_bytes("cpu") > ram_bytes:
        raise ValueError(_refusal(request, plan, ram_bytes))
    return plan


def _target_on_cpu(request: Request, target: TargetSizes, draft: DraftPlace, layers: tuple[int, ...]) -> list[Part]:
    rows, count = request.rows, len(target.layers) - len(layers)
    kept = target.layers[:count]
    kv_bytes = sum(layer.kv_bytes(rows, allocated=False) for layer in kept)
    copied_bytes = target.features_bytes(rows, request.feature_size)
    features_bytes = 0 if layers else copied_bytes
    # The largest temporaries: in the prompt's pass, in the draft's pass over its features, or in a tree. Features of
    # a prompt that runs at once exist only when the temporaries of its pass are gone.
    prefill_bytes = target.prefill_bytes(rows) - (features_bytes if rows.prefill == rows.context else 0)
    handed_over_bytes = draft.temporaries_bytes if draft.device == "cpu" else copied_bytes
    temporaries_bytes = max(prefill_bytes, handed_over_bytes, target.score_bytes(rows))
    layers_bytes = sum(layer.weights_bytes for layer in kept)
    weights = target.weights
    parts = [
        Part("target: embedding", weights["embedding"], "cpu", "and head, one table" if target.tied else ""),
        Part(f"target: {layer_span(range(count)) if count else ''}", layers_bytes, "cpu", target.storage.name),
        Part("target: final norm", 0 if layers else weights["final norm"], "cpu"),
        Part("target: head", weights["head"], "cpu"),
        Part("target: rest", weights["rest"], "cpu", "everything outside the decoder layers"),
        Part("target: KV cache", kv_bytes, "cpu", f"{rows.context} tokens and a tree of {rows.nodes}"),
        Part("target: features", features_bytes, "cpu", "of the whole prompt"),
        Part("temporaries", temporaries_bytes, "cpu", f"{rows.prefill} rows of the prompt in one pass"),
    ]
    if target.storage.exported and request.draft is not None:
        tables_bytes = (1 if target.tied else 2) * target.vocab_size * target.widths.hidden * 4
        beyond_bytes = max(tables_bytes - kv_bytes - features_bytes - temporaries_bytes, 0)
        note = "in float32, beyond caches and temporaries, which are allocated later"
        parts.append(Part("draft: tables while it attaches", beyond_bytes, "cpu", note))
    return parts


def _refusal(request: Request, plan: DevicePlan, ram_bytes: int) -> str:
    """Say why the target does not fit and which changes would make it fit."""
    largest = sorted((part for part in plan.parts if part.device == "cpu"), key=lambda part: -part.bytes)[:3]
    remedies = [
        (f"{name} weights", replace(request, storage=storage_of(request.target, name)))
        for name in SMALLER.get(request.storage.name, ())
    ]
    shorter = max(request.rows.context // 4, 1)
    rows = replace(request.rows, context=shorter, prefill=min(request.rows.prefill, shorter))
    remedies.append((f"a context of {shorter}", replace(request, rows=rows)))
    needs = [(what, _plan(other, None).needed_bytes("cpu")) for what, other in remedies]
    helps = [f"{what} would need {format_bytes(size)}" for what, size in needs if size <= ram_bytes]
    if not helps:
        what, size = min(needs, key=lambda pair: pair[1])
        helps = [f"even {what} would need {format_bytes(size)}: use a machine with more memory or a smaller target"]
    return (
        f"the target does not fit: it needs {format_bytes(plan.needed_bytes('cpu'))} of RAM ("
        + ", ".join(f"{part.name} {format_bytes(part.bytes)}" for part in largest)
        + f", ...) and there are {format_bytes(ram_bytes)}. What would help: {'; '.join(helps)}."
    )
