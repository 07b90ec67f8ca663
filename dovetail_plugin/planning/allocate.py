"""Assigns GPU memory to the draft, then to as much of the target's tables as fits, then to the target's last layers.

`place_draft` takes a `Request` and the target's sizes and returns a `DraftPlace`; `layers_on_gpu` chooses the layers
that fit into the rest. Both count bytes as `drafts/cuda_graphs.py`, `DovetailDraft.attach` and `place_layers` allocate
them. `make_plan.py` builds the plan from the results.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

from ..drafts.config import DovetailConfig
from ..kernels.library import bytes_per_weight
from .device_plan import MIB, Device, Part, format_bytes
from .memory import DraftSizes, Rows, TargetSizes, draft_sizes
from .storage import EXPORTED, FLOAT_DTYPES, Storage

MARGIN_FIXED_BYTES, MARGIN_SHARE = 420 * MIB, 0.03
"""Margin on each device that a plan leaves free besides the parts it counts: a fixed size and a share of the parts.

The fixed size is the program: Python, torch and transformers take 390 to 440 MiB of RAM after a first generation; the
context of a GPU's driver with its kernels, workspaces and captured graphs takes about as much VRAM. The share is for
blocks that allocators hold without using them. 3 % keeps the total within 5 % of what pairs of 1 to 5 GiB take.
"""

SMALLEST_HEAD = 4096
"""Number of tokens of the smallest cut head. With fewer tokens, most drafts would end at a token it does not have."""


@dataclass(frozen=True)
class Request:
    """The arguments of `make_plan` after they are checked.

    Attributes:
        target: config of the target.
        draft: config of the draft; None for prompt lookup, which has no weights.
        storage: how the target's weights are stored.
        draft_dtype: dtype of the draft.
        vram_bytes: memory of the GPU; 0 without a GPU.
        rows: row counts of the generation.
        gpu_supports_bf16: whether the GPU computes in bfloat16.
    """

    target: PretrainedConfig
    draft: DovetailConfig | None
    storage: Storage
    draft_dtype: str
    vram_bytes: int
    rows: Rows
    gpu_supports_bf16: bool

    @property
    def feature_size(self) -> int:
        """Width of the features that the draft reads (F)."""
        return 0 if self.draft is None else self.draft.feature_size

    @property
    def usable_vram_bytes(self) -> int:
        """VRAM in bytes that parts may use, without the margin."""
        return max(int((self.vram_bytes - MARGIN_FIXED_BYTES) / (1 + MARGIN_SHARE)), 0)


@dataclass(frozen=True)
class DraftPlace:
    """Placement of a draft.

    Attributes:
        device: device of its blocks.
        dtype: dtype of its blocks on that device; None for prompt lookup.
        embedding_device: device on which rows of the embedding table are gathered.
        vocab_size: number of rows of a cut head; None for a whole head.
        parts: memory that the draft takes.
        temporaries_bytes: bytes of temporaries of its passes.
        room_bytes: VRAM that stays free for parts of the target.
        notes: decisions and their reasons, in sentences.
    """

    device: Device
    dtype: str | None
    embedding_device: Device
    vocab_size: int | None
    parts: list[Part]
    temporaries_bytes: int
    room_bytes: int
    notes: list[str]


def total_bytes(parts: Sequence[Part]) -> int:
    """Return the bytes of these parts together."""
    return sum(part.bytes for part in parts)


def margin(parts: Sequence[Part], device: Device) -> Part:
    """Return the margin for these parts, which are all on one device."""
    size = MARGIN_FIXED_BYTES + int(MARGIN_SHARE * total_bytes(parts))
    what = "driver and kernels" if device == "gpu" else "Python, torch and transformers"
    note = f"{format_bytes(MARGIN_FIXED_BYTES)} for {what}, {MARGIN_SHARE:.0%} for allocators"
    return Part("margin", size, device, note)


def place_draft(request: Request, target: TargetSizes) -> DraftPlace:
    """Place the draft on the GPU with as much of its tables as fits, or on the CPU if not even the blocks fit."""
    if request.draft is None:
        note = "prompt lookup has no weights: the draft takes no VRAM"
        return DraftPlace("cpu", None, "cpu", None, [], 0, request.usable_vram_bytes, [note])
    if not request.vram_bytes:
        return _draft_on_cpu(request, request.draft, target, "there is no GPU: the draft runs on the CPU")
    dtype, notes = request.draft_dtype, []
    if dtype == "bfloat16" and not request.gpu_supports_bf16:
        dtype = "float16"
        notes.append("this GPU does not compute in bfloat16: the draft runs in float16")
    draft, rows = draft_sizes(request.draft, dtype), request.rows
    own = [
        Part("draft: blocks", draft.blocks_bytes, "gpu", dtype),
        Part("draft: KV cache", draft.kv_bytes(rows, on_gpu=True), "gpu", "a power of two of rows"),
        Part("draft: temporaries", draft.pass_bytes(rows), "gpu", f"a prompt of {rows.context} tokens at once"),
    ]
    room = request.usable_vram_bytes - total_bytes(own)
    choices = list(_tables(target, draft))
    for tables in choices:
        if tables.bytes > room:
            continue
        notes += _table_notes(tables, choices[0], draft, target, room)
        parts = [own[0], *tables.parts, *own[1:]]
        if tables.embedding_device == "cpu" and target.storage.exported:
            size = target.vocab_size * target.widths.hidden * 4
            note = "a float32 copy: the exported table has fewer bits"
            parts.append(Part("draft: embedding", size, "cpu", note))
        return DraftPlace(
            device="gpu",
            dtype=dtype,
            embedding_device=tables.embedding_device,
            vocab_size=tables.vocab_size,
            parts=parts,
            temporaries_bytes=draft.pass_bytes(rows),
            room_bytes=room - tables.bytes,
            notes=notes,
        )
    least = [*own, *choices[-1].parts]
    needed = format_bytes(total_bytes([*least, margin(least, "gpu")]))
    why = (
        f"the draft runs on the CPU: it needs at least {needed} of VRAM, with its smallest head and the margin, and "
        f"there are {format_bytes(request.vram_bytes)}; a shorter context needs less"
    )
    return _draft_on_cpu(request, request.draft, target, why)


@dataclass(frozen=True)
class _Tables:
    """The target's tables that a draft keeps on the GPU; `vocab_size` is that of a cut head, None for all."""

    vocab_size: int | None
    embedding_device: Device
    parts: list[Part]

    @property
    def bytes(self) -> int:
        """Bytes of all parts."""
        return total_bytes(self.parts)


def _tables(target: TargetSizes, draft: DraftSizes) -> Iterator[_Tables]:
    """Yield the choices, from all tables to the smallest cut head."""
    whole, bias = draft.config.vocab_size, draft.number_bytes if target.head_bias else 0
    embedding = Part("draft: embedding", whole * draft.row_bytes, "gpu")
    if draft.own_head:  # part of its weights, and cut as in training
        yield _Tables(None, "gpu", [] if draft.config.own_embedding else [embedding])
        if not draft.config.own_embedding:
            yield _Tables(None, "cpu", [])
        return
    note = "one table with the embedding" if target.tied else f"all {whole} tokens"
    head = Part("draft: head", whole * (draft.row_bytes + bias), "gpu", note)
    if target.tied:
        yield _Tables(None, "gpu", [head])
    else:
        yield _Tables(None, "gpu", [head, embedding])
        yield _Tables(None, "cpu", [head])
    tokens = 2 ** ((whole - 1).bit_length() - 1)  # the largest power of two below the vocabulary
    while tokens >= SMALLEST_HEAD:
        size = tokens * (draft.row_bytes + bias + 8)  # 8 for the int64 id of each row
        yield _Tables(tokens, "cpu", [Part("draft: head", size, "gpu", f"the {tokens} most frequent of {whole}")])
        tokens //= 2


def _table_notes(tables: _Tables, everything: _Tables, draft: DraftSizes, target: TargetSizes, room: int) -> list[str]:
    if tables.embedding_device == "gpu":
        return []
    if tables.vocab_size is None:
        missing = format_bytes(everything.bytes - room)
        return [f"rows of the embedding table are gathered on the CPU: beside the head it would need {missing} more"]
    what = "the table of embedding and head" if target.tied else "the head"
    return [
        f"the draft proposes only its {tables.vocab_size} most frequent tokens: {what} takes "
        f"{format_bytes(draft.config.vocab_size * draft.row_bytes)} and {format_bytes(room)} are free; the text stays "
        "the same, but fewer drafted tokens may be accepted",
        "rows of the embedding table are gathered on the CPU",
    ]


def _draft_on_cpu(request: Request, config: DovetailConfig, target: TargetSizes, why: str) -> DraftPlace:
    draft, dtype = draft_sizes(config, request.draft_dtype), request.draft_dtype
    parts = [
        Part("draft: blocks", draft.blocks_bytes, "cpu", dtype),
        Part("draft: KV cache", draft.kv_bytes(request.rows, on_gpu=False), "cpu"),
    ]
    copies = _copied_tables(draft, target, dtype) * config.vocab_size * draft.row_bytes
    if copies:
        parts.append(Part("draft: embedding and head", copies, "cpu", f"the target's in {dtype}"))
    parts.append(_weights_again(draft, target))
    return DraftPlace("cpu", dtype, "cpu", None, parts, draft.pass_bytes(request.rows), 0, [why])


def _copied_tables(draft: DraftSizes, target: TargetSizes, dtype: str) -> int:
    """Return how many of the target's tables a draft on the CPU copies, because they have another form there."""
    needs_embedding, needs_head = not draft.config.own_embedding, not draft.own_head
    other_dtype = FLOAT_DTYPES[dtype] != target.storage.dtype
    if target.packed_head:  # the embedding is a float table, and the head is not
        return (needs_embedding and other_dtype) + needs_head
    copies = other_dtype or (target.storage.exported and not target.storage.packs_head)
    return (needs_embedding + (needs_head and not target.tied)) * copies


def _weights_again(draft: DraftSizes, target: TargetSizes) -> Part:
    """Return the second copy of a draft's weights, which runs on the CPU: a graph of the target's engine, or packed."""
    numbers = draft.blocks_bytes // draft.number_bytes
    if target.storage in EXPORTED.values():
        head_rows = 0 if draft.own_head else draft.config.vocab_size
        size = numbers + head_rows * target.widths.hidden
        return Part("draft: blocks and head again", size, "cpu", "in int8, as OpenVINO runs a draft")
    config, form = draft.config, target.storage.matrices
    if config.own_embedding:  # a table, which no pass reads as a whole
        numbers -= config.vocab_size * config.hidden_size
    if config.fusion == "eagle3":  # what projects features stays as it is
        numbers -= config.feature_size * config.hidden_size
    kind = "int4" if target.packed_head and form is not None and form.bits == 4 else "int8"
    return Part("draft: blocks again", int(numbers * bytes_per_weight(kind)), "cpu", f"packed in {kind}")


def layers_on_gpu(request: Request, target: TargetSizes, draft: DraftPlace) -> tuple[tuple[int, ...], list[str]]:
    """Choose as many of the target's last layers as fit beside the draft; returns them and notes with the reasons."""
    if not draft.room_bytes:
        return (), []
    room, storage = f"{format_bytes(draft.room_bytes)} of VRAM stay free", target.storage
    if storage.exported:
        return (), [f"{room}: layers of an {storage.name} target belong to another engine and stay on the CPU"]
    if storage.matrices is not None:
        return (), [f"{room}: layers quantized by {storage.name} stay on the CPU"]
    if storage.name == "bfloat16" and not request.gpu_supports_bf16:
        return (), [f"{room}: layers in bfloat16 stay on the CPU, because this GPU does not compute in it"]
    if not any(isinstance(kind, int) for kind in target.modules.values()):
        return (), [f"{room}: the target's decoder layers cannot be identified, so they stay on the CPU"]
    left, count = draft.room_bytes - total_bytes(target_on_gpu(request, target, draft, ())), 0
    for layer in reversed(target.layers):
        left -= layer.weights_bytes + layer.kv_bytes(request.rows, allocated=True)
        if left < 0:
            break
        count += 1
    if not count:
        return (), [f"{room}, less than a layer of the target with its cache and temporaries takes"]
    note = f"the last {count} of the target's {len(target.layers)} layers go to the GPU"
    if count == len(target.layers):
        note += "; a GPU this large may run the whole target faster by itself"
    return tuple(range(len(target.layers) - count, len(target.layers))), [note]


def layer_span(layers: Sequence[int]) -> str:
    """Return the name of a range of layers, for example "layers 20-31"."""
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}"


def target_on_gpu(request: Request, target: TargetSizes, draft: DraftPlace, layers: tuple[int, ...]) -> list[Part]:
    """Return the parts of the target on the GPU: these layers, and the parts that any number of layers needs."""
    rows = request.rows
    crossing = rows.prefill * target.widths.hidden * target.storage.run_bytes  # hidden states from the CPU
    temporaries = max(target.prefill_bytes(rows), target.score_bytes(rows)) + crossing - draft.temporaries_bytes
    parts = [
        Part("target: final norm", target.weights["final norm"], "gpu"),
        Part("target: features", target.features_bytes(rows, request.feature_size), "gpu", "of the whole prompt"),
        Part("target: temporaries", max(temporaries, 0), "gpu", "beyond the draft's, which are allocated later"),
    ]
    if layers:
        name, kept = layer_span(layers), [target.layers[index] for index in layers]
        kv_bytes = sum(layer.kv_bytes(rows, allocated=True) for layer in kept)
        parts.append(Part(f"target: {name}", sum(layer.weights_bytes for layer in kept), "gpu", target.storage.name))
        parts.append(Part(f"target: KV cache of {name}", kv_bytes, "gpu", f"{rows.context} tokens and a tree"))
    return parts
