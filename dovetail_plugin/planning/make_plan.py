"""Where every part of a pair goes, decided before anything is loaded.

Enters: two configs and how much memory the GPU and the machine have. Leaves: a `DevicePlan`: bytes of every part and
its place, what is left, what was decided and why; or a refusal that says what would help. Parts claim the GPU in the
order of what a byte brings there (`claims.py`): the draft's blocks, its head, its embedding table, then the target's
last layers. Nothing here loads, moves or measures anything; sizes come from `counting.py` and `sizes.py`.
"""

from dataclasses import replace

from transformers import PretrainedConfig

from ..drafts.compatibility import check_fits
from ..drafts.config import DovetailConfig
from .allocate import DraftPlace, Request, layer_span, layers_on_gpu, place_draft, reserve, target_on_gpu
from .count_weights import FLOAT_DTYPES, QUANTISED, target_sizes
from .device_plan import MIB, DevicePlan, Part, format_bytes, parse_bytes
from .memory import Rows, TargetSizes

__all__ = ["DevicePlan", "Part", "format_bytes", "make_plan", "parse_bytes"]

PROGRAM_BYTES = 420 * MIB
"""Python, torch and transformers themselves after a first generation; 395 to 440 MiB measured with torch for CPUs."""

HELD_SHARE, MOST_HELD_BYTES = 2, 192 * MIB
"""Freed blocks below 32 MiB that malloc keeps, in multiples of a prompt pass's temporaries, and at most; larger ones go
back to the system by themselves. Measured with glibc 2.36, whose aligned blocks do not fit the holes that their like
left. MALLOC_TRIM_THRESHOLD_=131072 in the environment makes it give them back, for some time."""

SMALLER = {"float32": ("bfloat16", "int8", "int4"), "bfloat16": QUANTISED, "float16": QUANTISED, "int8": ("int4",)}
"""Types that take fewer bytes than another."""


def make_plan(
    target_config: PretrainedConfig,
    draft_config: PretrainedConfig | None,
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
        target_config: of a decoder-only model.
        draft_config: of its draft; None plans for an untrained one of one block.
        vram_bytes: of the GPU; None or 0 without one.
        ram_bytes: of the machine; None sets no limit.
        dtype: of the target: "float32", "bfloat16", "float16", or "int8", "int4" for an exported one (see
            `counting.QUANTISED`); None or "auto" is the config's.
        draft_dtype: one of the first three; "auto" is the draft config's, else the target's.
        context: tokens of prompt and answer to make room for; cut to the target's positions.
        max_nodes: rows of the largest tree (N).
        prefill_rows: prompt rows in one pass of the target (`prefill_chunk_size` of `generate`); None runs the whole
            prompt at once, as `generate` does.
        gpu_supports_bf16: False for GPUs before Ampere: the draft is planned in float16 there.

    Raises:
        ValueError: the target does not fit `ram_bytes`, with what would help; the configs do not fit each other or
            cannot be drafted for; an option is no number or type that there is.
    """
    for name, value in (("context", context), ("max_nodes", max_nodes), ("prefill_rows", prefill_rows)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    for name, value in (("vram_bytes", vram_bytes), ("ram_bytes", ram_bytes)):
        if value is not None and value < 0:
            raise ValueError(f"{name} must not be negative, got {value}.")
    if target_config.is_encoder_decoder:
        raise ValueError(f"{target_config.model_type} models are encoder-decoders; a target must be decoder-only.")
    text = target_config.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None) or context
    rows = Rows(min(context, positions), max_nodes, min(prefill_rows or context, context, positions))
    draft = _draft_config(target_config, draft_config)
    stored = _named(getattr(text, "dtype", None)) or "float32"
    target_dtype = _dtype("dtype", dtype, (*FLOAT_DTYPES, *QUANTISED)) or stored
    own = _dtype("draft_dtype", draft_dtype, tuple(FLOAT_DTYPES)) or _named(draft.dtype)
    own = own or (target_dtype if target_dtype in FLOAT_DTYPES else stored)
    request = Request(target_config, draft, vram_bytes or 0, target_dtype, own, rows, gpu_supports_bf16)
    plan = _plan(request, ram_bytes)
    if ram_bytes is not None and plan.needed_bytes("cpu") > ram_bytes:
        raise ValueError(_refusal(request, plan, ram_bytes))
    if positions < context:
        plan.notes.append(f"the context is cut to the target's {positions} positions")
    return plan


def _dtype(name: str, asked: str | None, known: tuple[str, ...]) -> str | None:
    """The type asked for; None if that is left open."""
    if asked in (None, "auto"):
        return None
    if asked not in known:
        raise ValueError(f"{name} must be auto, {', '.join(known)}, got {asked!r}.")
    return asked


def _named(dtype: object) -> str | None:
    """The name of a config's type, which is a string, a torch type or None; None if nothing is stored in it."""
    name = str(dtype).removeprefix("torch.")
    return name if name in FLOAT_DTYPES else None


def _draft_config(target: PretrainedConfig, draft: PretrainedConfig | None) -> DovetailConfig:
    if draft is None:
        return DovetailConfig.for_target(target)
    if not isinstance(draft, DovetailConfig):
        raise ValueError(
            f"the draft's config is that of a {draft.model_type} model, not of a Dovetail draft; "
            "`draft_configs.load_draft_config` reads those of published drafts."
        )
    check_fits(draft, target)
    return draft


def _plan(request: Request, ram_bytes: int | None) -> DevicePlan:
    target = target_sizes(request.target, request.dtype)
    draft = place_draft(request, target)
    layers, layer_notes = layers_on_gpu(request, target, draft)
    parts = list(draft.parts)
    if layers:
        parts += target_on_gpu(request, target, draft, layers)
    if draft.device == "gpu":
        parts.append(reserve(request.vram_bytes))
    parts += _cpu_parts(request, target, draft, layers)
    moved = {*layers, "norm"} if layers else set()
    return DevicePlan(
        parts=tuple(parts),
        vram_budget_bytes=request.vram_bytes,
        ram_budget_bytes=ram_bytes,
        draft_device=draft.device,
        draft_dtype=draft.dtype,
        target_dtype=request.dtype,
        embedding_device=draft.embedding_device,
        draft_vocab_size=draft.vocab_size,
        gpu_layers=layers,
        device_map={name: 0 if kind in moved else "cpu" for name, kind in target.modules.items()} if layers else None,
        notes=[*draft.notes, *layer_notes],
    )


def _cpu_parts(request: Request, target: TargetSizes, draft: DraftPlace, layers: tuple[int, ...]) -> list[Part]:
    """Of the target on the CPU, and what is there whatever the pair."""
    rows, count = request.rows, len(target.layers) - len(layers)
    kept = target.layers[:count]
    weights_bytes = sum(layer.weights_bytes for layer in kept)
    kv_bytes = sum(layer.kv_bytes(rows, allocated=False) for layer in kept)
    features_bytes = 0 if layers else target.features_bytes(rows, request.draft.feature_size)
    temporaries_bytes = _temporaries_bytes(request, target, draft, features_bytes)
    held_bytes = min(HELD_SHARE * target.prefill_bytes(rows), MOST_HELD_BYTES)
    parts = [
        Part("program", PROGRAM_BYTES, "cpu", "Python, torch, transformers"),
        Part("target: embedding", target.embedding_bytes, "cpu", "and head, one table" if target.tied else ""),
        Part(f"target: {layer_span(range(count)) if count else ''}", weights_bytes, "cpu", request.dtype),
        Part("target: final norm", 0 if layers else target.norm_bytes, "cpu"),
        Part("target: head", target.head_bytes, "cpu"),
        Part("target: rest", target.rest_bytes, "cpu", "positions, frequencies"),
        Part("target: KV cache", kv_bytes, "cpu", f"{rows.context} tokens and a tree of {rows.nodes}"),
        Part("target: features", features_bytes, "cpu", "of the whole prompt"),
        Part("temporaries", temporaries_bytes, "cpu", f"{rows.prefill} rows of the prompt in one pass"),
        Part("held by malloc", held_bytes, "cpu", "freed, but not given back"),
    ]
    later_bytes = kv_bytes + features_bytes + temporaries_bytes
    if target.dtype in QUANTISED:
        tables_bytes = (1 if target.tied else 2) * target.vocab_size * target.widths.hidden * 4
        parts.append(
            Part(
                "draft: tables while it attaches",
                max(tables_bytes - later_bytes, 0),
                "cpu",
                "in float32, beyond caches and temporaries, which come later",
            )
        )
    return [part for part in parts if part.bytes]


def _temporaries_bytes(request: Request, target: TargetSizes, draft: DraftPlace, features_bytes: int) -> int:
    """The largest that come and go on the CPU: in the prompt's pass, in the draft's pass over its features, in a tree.

    Features of a prompt that is run at once exist only when the temporaries of its pass are gone.
    """
    rows = request.rows
    prefill = target.prefill_bytes(rows) - (features_bytes if rows.prefill == rows.context else 0)
    copied_bytes = target.features_bytes(rows, request.draft.feature_size)
    handed_over = draft.temporaries_bytes if draft.device == "cpu" else copied_bytes
    return max(prefill, handed_over, target.score_bytes(rows))


def _refusal(request: Request, plan: DevicePlan, ram_bytes: int) -> str:
    """Why the target does not fit, and which changes would make it fit."""
    needs = {part.name: part.bytes for part in plan.parts if part.device == "cpu"}
    largest = sorted(needs, key=needs.__getitem__, reverse=True)[:3]
    smaller = SMALLER.get(request.dtype, ())
    remedies = [(f"{dtype} weights", replace(request, dtype=dtype)) for dtype in smaller]
    shorter = max(request.rows.context // 4, 1)
    rows = replace(request.rows, context=shorter, prefill=min(request.rows.prefill, shorter))
    remedies.append((f"a context of {shorter}", replace(request, rows=rows)))
    told = [(what, _plan(other, None).needed_bytes("cpu")) for what, other in remedies]
    helps = [f"{what} would need {format_bytes(size)}" for what, size in told if size <= ram_bytes]
    if not helps:
        least, size = min(told, key=lambda pair: pair[1])
        helps = [f"even {least} would need {format_bytes(size)}: this machine needs more memory or a smaller target"]
    return (
        f"the target does not fit: it needs {format_bytes(plan.needed_bytes('cpu'))} of RAM ("
        + ", ".join(f"{name} {format_bytes(needs[name])}" for name in largest)
        + f", ...) and there are {format_bytes(ram_bytes)}. What would help: {'; '.join(helps)}."
    )
