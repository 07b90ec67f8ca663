"""Who gets the GPU: the draft with as much of the target's tables as fits, then the target's last layers.

Enters: a request and the target's sizes. Leaves: a `DraftPlace`, the layers that follow it, and their parts in bytes.
The draft's needs are what `graph_runner.py` and `DovetailDraft.attach` take with `embedding_device` and
`draft_vocab_size` set as said here; layers are those that `placement.place_layers` takes. `plan.py` puts it together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

from ..drafts.config import DovetailConfig
from .count_weights import QUANTISED, draft_sizes
from .device_plan import MIB, Device, Part, format_bytes
from .memory import DraftSizes, Rows, TargetSizes

CUDA_CONTEXT_BYTES = 300 * MIB
"""What the driver takes for a process before torch allocates anything: context, loaded kernels, captured graphs."""

VRAM_MARGIN = 0.05
"""Of the GPU: blocks that torch's allocator holds without using them, and whatever else uses a display's GPU."""

SMALLEST_HEAD = 4096
"""Tokens of the smallest cut head: with fewer, most drafts would end at a token that is not among them."""


@dataclass(frozen=True)
class Request:
    """`make_plan`'s arguments, checked."""

    target: PretrainedConfig
    draft: DovetailConfig
    vram_bytes: int
    dtype: str
    draft_dtype: str
    rows: Rows
    gpu_supports_bf16: bool


@dataclass(frozen=True)
class DraftPlace:
    """Where a draft goes. parts: of it. temporaries_bytes: of its passes. room_bytes: what it leaves of the GPU."""

    device: Device
    dtype: str
    embedding_device: Device
    vocab_size: int | None
    parts: list[Part]
    temporaries_bytes: int
    room_bytes: int
    notes: list[str]


def reserve(vram_bytes: int) -> Part:
    """What is left alone of a GPU that is used."""
    size = CUDA_CONTEXT_BYTES + int(VRAM_MARGIN * vram_bytes)
    return Part("reserve", size, "gpu", f"CUDA's own, and {VRAM_MARGIN:.0%} as a margin")


def place_draft(request: Request, target: TargetSizes) -> DraftPlace:
    """On the GPU with as much of its tables as fits, else on the CPU."""
    if not request.vram_bytes:
        return _draft_on_cpu(request, target, "there is no GPU: the draft shares the CPU with the target")
    dtype, notes = request.draft_dtype, []
    if dtype == "bfloat16" and not request.gpu_supports_bf16:
        dtype = "float16"
        notes.append("this GPU does not compute in bfloat16: the draft goes there in float16")
    draft, rows = draft_sizes(request.draft, dtype), request.rows
    own = [
        Part("draft: blocks", draft.blocks_bytes, "gpu", dtype),
        Part("draft: KV cache", draft.kv_bytes(rows, on_gpu=True), "gpu", "a power of two of rows"),
        Part("draft: temporaries", draft.pass_bytes(rows), "gpu", f"a prompt of {rows.context} tokens at once"),
        Part("draft: CUDA graphs", draft.graph_bytes(rows), "gpu", "inputs, outputs, workspaces"),
    ]
    room = request.vram_bytes - reserve(request.vram_bytes).bytes - sum(part.bytes for part in own)
    choices = list(_tables(target, draft))
    for tables in choices:
        if tables.bytes > room:
            continue
        notes += _table_notes(tables, choices[0], draft, target, room)
        parts = [own[0], *tables.parts, *own[1:]]
        if tables.embedding_device == "cpu" and target.dtype in QUANTISED:
            parts.append(_table_copy(target))
        left = room - tables.bytes
        temporaries = draft.pass_bytes(rows)
        return DraftPlace("gpu", dtype, tables.embedding_device, tables.vocab_size, parts, temporaries, left, notes)
    least = (sum(part.bytes for part in own) + choices[-1].bytes + CUDA_CONTEXT_BYTES) / (1 - VRAM_MARGIN)
    return _draft_on_cpu(
        request,
        target,
        f"the draft stays on the CPU: it needs {format_bytes(int(least))} of VRAM at least, with its smallest head and "
        f"the reserve, and there are {format_bytes(request.vram_bytes)}; a shorter context takes less",
    )


@dataclass(frozen=True)
class _Tables:
    """What of the target's tables a draft keeps on the GPU. vocab_size: rows of a cut head; None is all."""

    vocab_size: int | None
    embedding_device: Device
    parts: list[Part]

    @property
    def bytes(self) -> int:
        """Of all parts."""
        return sum(part.bytes for part in self.parts)


def _tables(target: TargetSizes, draft: DraftSizes) -> Iterator[_Tables]:
    """From all of the tables to the smallest cut head."""
    whole, bias = draft.vocab_size, draft.number_bytes if target.head_bias else 0
    embedding = Part("draft: embedding", whole * draft.row_bytes, "gpu")
    if draft.own_head:  # in its weights already, and cut as it was trained
        yield _Tables(None, "gpu", [] if draft.own_embedding else [embedding])
        if not draft.own_embedding:
            yield _Tables(None, "cpu", [])
        return
    if target.tied:
        head = Part("draft: head", whole * (draft.row_bytes + bias), "gpu", "one table with the embedding")
        yield _Tables(None, "gpu", [head])
    else:
        head = Part("draft: head", whole * (draft.row_bytes + bias), "gpu", f"all {whole} tokens")
        yield _Tables(None, "gpu", [head, embedding])
        yield _Tables(None, "cpu", [head])
    tokens = 2 ** ((whole - 1).bit_length() - 1)  # the largest power of two below the vocabulary
    while tokens >= SMALLEST_HEAD:
        size = tokens * (draft.row_bytes + bias + 8)  # and the int64 id of every row
        yield _Tables(tokens, "cpu", [Part("draft: head", size, "gpu", f"the {tokens} most frequent of {whole}")])
        tokens //= 2


def _table_notes(
    tables: _Tables, all_tables: _Tables, draft: DraftSizes, target: TargetSizes, room_bytes: int
) -> list[str]:
    if tables.embedding_device == "gpu":
        return []
    table_bytes = draft.vocab_size * draft.row_bytes
    if tables.vocab_size is None:
        missing = format_bytes(all_tables.bytes - room_bytes)
        return [f"rows of the embedding table are gathered on the CPU: beside the head it would need {missing} more"]
    what = "the table of embedding and head" if target.tied else "the head"
    return [
        f"the draft proposes only its {tables.vocab_size} most frequent tokens: {what} takes "
        f"{format_bytes(table_bytes)} and {format_bytes(room_bytes)} are free; the text stays the same, but fewer "
        "drafted tokens may be accepted",
        "rows of the embedding table are gathered on the CPU",
    ]


def _table_copy(target: TargetSizes) -> Part:
    """The adapters give tables of exported targets as float32 copies."""
    size = target.vocab_size * target.widths.hidden * 4
    return Part("draft: embedding", size, "cpu", "a float32 copy: the exported table has fewer bits")


def _draft_on_cpu(request: Request, target: TargetSizes, why: str) -> DraftPlace:
    draft = draft_sizes(request.draft, request.draft_dtype)
    parts = [
        Part("draft: blocks", draft.blocks_bytes, "cpu", request.draft_dtype),
        Part("draft: KV cache", draft.kv_bytes(request.rows, on_gpu=False), "cpu"),
    ]
    if request.draft_dtype != target.dtype:
        tables = (not draft.own_embedding) + (not draft.own_head and not target.tied)
        copies = tables * draft.vocab_size * draft.row_bytes
        parts.append(Part("draft: embedding and head", copies, "cpu", f"the target's in {request.draft_dtype}"))
    if target.dtype in QUANTISED:
        head_rows = 0 if draft.own_head else draft.vocab_size
        numbers = draft.blocks_bytes // draft.number_bytes + head_rows * target.widths.hidden
        parts.append(Part("draft: blocks and head again", numbers, "cpu", "in int8, as OpenVINO runs a draft"))
    temporaries = draft.pass_bytes(request.rows)
    return DraftPlace("cpu", request.draft_dtype, "cpu", None, parts, temporaries, 0, [why])


def layers_on_gpu(request: Request, target: TargetSizes, draft: DraftPlace) -> tuple[tuple[int, ...], list[str]]:
    """The target's last layers, as many as the draft leaves room for, and why there are no more."""
    if draft.device == "cpu":
        return (), []
    room = f"{format_bytes(draft.room_bytes)} of VRAM stay free"
    if target.dtype in QUANTISED:
        return (), [f"{room}: layers of an {target.dtype} target are another engine's and stay on the CPU"]
    if target.dtype == "bfloat16" and not request.gpu_supports_bf16:
        return (), [f"{room}: layers in bfloat16 stay on the CPU, this GPU does not compute in it"]
    if not any(isinstance(kind, int) for kind in target.modules.values()):
        return (), [f"{room}: the target's decoder layers cannot be told apart, so they stay on the CPU"]
    left = draft.room_bytes - sum(part.bytes for part in target_on_gpu(request, target, draft, ()))
    count = 0
    for layer in reversed(target.layers):
        left -= layer.weights_bytes + layer.kv_bytes(request.rows, allocated=True)
        if left < 0:
            break
        count += 1
    layers = tuple(range(len(target.layers) - count, len(target.layers)))
    if not layers:
        return (), [f"{room}, less than a layer of the target with its cache and temporaries takes"]
    note = f"{count} of the target's {len(target.layers)} layers, the last ones, go to the GPU beside the draft"
    if count == len(target.layers):
        note += "; a GPU this large may run the whole target faster by itself"
    return layers, [note]


def layer_span(layers: Sequence[int]) -> str:
    """Neighbouring layers in words."""
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}"


def target_on_gpu(request: Request, target: TargetSizes, draft: DraftPlace, layers: tuple[int, ...]) -> list[Part]:
    """Of the target on the GPU: these layers, and what goes with them whatever their number."""
    rows, stream_bytes = request.rows, target.widths.hidden * target.number_bytes
    crossing = rows.prefill * stream_bytes  # the hidden states as they came from the CPU
    temporaries = max(target.prefill_bytes(rows), target.score_bytes(rows)) + crossing - draft.temporaries_bytes
    parts = [
        Part("target: final norm", target.norm_bytes, "gpu"),
        Part("target: features", target.features_bytes(rows, request.draft.feature_size), "gpu", "of the whole prompt"),
        Part("target: temporaries", max(temporaries, 0), "gpu", "beyond the draft's, which come later"),
    ]
    if layers:
        name = layer_span(layers)
        kept = [target.layers[index] for index in layers]
        kv_bytes = sum(layer.kv_bytes(rows, allocated=True) for layer in kept)
        parts.append(Part(f"target: {name}", sum(layer.weights_bytes for layer in kept), "gpu", target.dtype))
        parts.append(Part(f"target: KV cache of {name}", kv_bytes, "gpu", f"{rows.context} tokens and a tree"))
    return parts
