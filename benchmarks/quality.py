"""Measure how far a target with quantized weights is from the same target in fp32: perplexity and KL divergence.

    python benchmarks/quality.py                          # all bundled held-out texts, some minutes on two cores
    python benchmarks/quality.py --count 2 --tokens 64    # a quick check

The texts are the held-out chats of the bundled data, which the bundled target was not trained on. The same is measured
on a target with planted outliers: some channels of each norm's weight are 50 times as large, and the columns of the
matrices that read them 50 times as small, so its function in fp32 is the same. Rows are:

    packed KIND             `CpuWeights(KIND)`, in passes over a few rows, as drafts are verified
    KIND, weights only      the weights of this kind with activations in fp32
    Q8_0 and Q4_0           the same with GGUF's quantizers, if the package gguf is installed
    openvino int8           exported with optimum-intel, if it is installed, with OpenVINO's dynamic quantization
"""

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import PAIR, TARGET, argument_parser, positive, store
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from dovetail_plugin import CpuWeights
from dovetail_plugin.bench.engines_result import aligned
from dovetail_plugin.cli.engines import export_for_comparison
from dovetail_plugin.cli.export import NEEDS, is_installed
from dovetail_plugin.compat import CACHE
from dovetail_plugin.kernels import KINDS
from dovetail_plugin.kernels.linear import PackedLinear

sys.path.insert(0, str(PAIR))
from corpus import load_chats

ROWS = 16
"""Rows of a pass of packed targets. Larger passes may run in other kernels."""

OUTLIERS, SCALE = 4, 50.0
"""Channels of each norm that are scaled up, and by how much."""

GGUF_TYPES = ("Q8_0", "Q4_0")

Logits = Callable[[Tensor], Tensor]
"""Tokens of a text (1, T) -> logits (T, V) float32 of every row."""


@dataclass
class Quality:
    """How a target differs from the one in fp32, over all tokens of all texts.

    Attributes:
        perplexity: of the texts.
        kl: mean Kullback-Leibler divergence from the target in fp32, in nats a token.
        kl_worst: the divergence that one token in a hundred exceeds.
        agreement: share of tokens whose likeliest successor is the same.
        tokens: number of predicted tokens.
    """

    perplexity: float
    kl: float
    kl_worst: float
    agreement: float
    tokens: int


# --- targets -----------------------------------------------------------------------------------------


def plant_outliers(model: Any, seed: int = 0) -> None:
    """Scale channels of the norms of a Llama up and the columns that read them down, in place."""
    generator = torch.Generator().manual_seed(seed)
    layers = model.model.layers
    pairs = [(model.model.norm, [model.lm_head])]
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        pairs.append((layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]))
        pairs.append((layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]))
    with torch.no_grad():
        for norm, readers in pairs:
            channels = torch.randperm(len(norm.weight), generator=generator)[:OUTLIERS]
            norm.weight[channels] *= SCALE
            for reader in readers:
                reader.weight[:, channels] /= SCALE


def targets() -> Iterator[tuple[str, Any]]:
    """Yield the names and models of the targets in fp32."""
    for name in ("bundled", "outliers"):
        model = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32)
        if name == "outliers":
            plant_outliers(model)
        yield name, model


def with_weights(model: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a copy of a model whose linear layers have changed weights (M, K)."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for module in changed.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(change(module.weight))
    return changed


def gguf_weights(kind: str) -> Callable[[Tensor], Tensor]:
    """Return what GGUF's quantizer of a type makes of weights."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    number = GGMLQuantizationType[kind]
    return lambda weight: torch.from_numpy(dequantize(quantize(weight.numpy(), number), number))


def kind_weights(kind: str) -> Callable[[Tensor], Tensor]:
    """Return what packing makes of weights."""

    def change(weight: Tensor) -> Tensor:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
        return PackedLinear.of(layer, kind).unpacked()

    return change


# --- logits ------------------------------------------------------------------------------------------


def logits_of(model: Any) -> Logits:
    """Return the logits of a whole text in one pass."""
    return lambda ids: model(input_ids=ids).logits[0].float()


def logits_in_parts(model: Any) -> Logits:
    """Return the logits of a text in passes over ROWS rows."""

    def logits(ids: Tensor) -> Tensor:
        cache = DynamicCache()
        parts = [model(input_ids=part, use_cache=True, **{CACHE: cache}).logits[0] for part in ids.split(ROWS, 1)]
        return torch.cat(parts).float()

    return logits


@contextmanager
def openvino_target(model: Any) -> Iterator[Any]:
    """Yield the model, exported to OpenVINO in int8."""
    from dovetail_plugin.adapters import load_exported

    with tempfile.TemporaryDirectory(prefix="dovetail-quality-") as folder:
        source, out = Path(folder) / "source", Path(folder) / "exported"
        model.save_pretrained(source)
        AutoTokenizer.from_pretrained(TARGET).save_pretrained(source)
        export_for_comparison(str(source), out)
        yield load_exported(str(out))


def variants(model: Any, left_out: dict[str, str]) -> Iterator[tuple[str, Logits]]:
    """Yield each kind of weights of a model in fp32; notes in `left_out` what is not installed."""
    yield "fp32", logits_of(model)
    with tempfile.TemporaryDirectory(prefix="dovetail-quality-") as folder:
        model.save_pretrained(folder)
        for kind in KINDS:
            packed = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, quantization_config=CpuWeights(kind)
            )
            yield f"packed {kind}", logits_in_parts(packed)
            yield f"{kind}, weights only", logits_of(with_weights(model, kind_weights(kind)))
    if is_installed("gguf"):
        for kind in GGUF_TYPES:
            yield f"{kind}, weights only", logits_of(with_weights(model, gguf_weights(kind)))
    else:
        left_out["gguf"] = "not installed"
    if is_installed("openvino") and is_installed(NEEDS["openvino"][0]):
        with openvino_target(model) as target:
            yield "openvino int8", logits_of(target)
    else:
        left_out["openvino"] = "openvino and optimum-intel are not both installed"


# --- measurement -------------------------------------------------------------------------------------


@torch.inference_mode()
def quality(logits: Logits, texts: list[Tensor], expected: list[Tensor]) -> Quality:
    """Compare logits with those of the target in fp32.

    Args:
        logits: of the target.
        texts: each (1, T) int64.
        expected: log-probabilities (T, V) of each text in fp32.
    """
    losses, divergences, same = [], [], []
    for ids, right in zip(texts, expected, strict=True):
        found = F.log_softmax(logits(ids), -1)
        losses.append(-found[:-1].gather(1, ids[0, 1:, None])[:, 0])
        divergences.append((right.exp() * (right - found)).sum(-1)[:-1])
        same.append((found.argmax(-1) == right.argmax(-1))[:-1])
    kl = torch.cat(divergences).double()
    loss = torch.cat(losses).double().mean()
    agreement = torch.cat(same).double().mean()
    return Quality(loss.exp().item(), kl.mean().item(), kl.quantile(0.99).item(), agreement.item(), len(kl))


def held_out(count: int, tokens: int) -> list[Tensor]:
    """Return up to `count` held-out chats, evenly spread, with at most `tokens` tokens each: (1, T) int64."""
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    _, chats = load_chats()
    chosen = chats[:: max(len(chats) // count, 1)][:count]
    ids = [tokenizer.apply_chat_template(chat, return_dict=False)[:tokens] for chat in chosen]
    return [torch.tensor([one]) for one in ids]


def table(name: str, found: dict[str, Quality]) -> str:
    """Return the figures of a target as a Markdown table."""
    rows = [[f"{name} target", "perplexity", "KL to fp32, nats", "KL, 99th percentile", "same likeliest token"]]
    for kind, q in found.items():
        rows.append([kind, f"{q.perplexity:.4f}", f"{q.kl:.2e}", f"{q.kl_worst:.2e}", f"{q.agreement:.2%}"])
    return aligned(rows)


def main() -> None:
    parser = argument_parser(__doc__, "quality.jsonl")
    parser.add_argument("--count", type=positive, default=200, help="number of texts, at most 200")
    parser.add_argument("--tokens", type=tokens, default=512, help="tokens of a text at most, at least 2")
    args = parser.parse_args()
    texts = held_out(args.count, args.tokens)
    for name, model in targets():
        with torch.inference_mode():
            expected = [F.log_softmax(logits_of(model)(ids), -1) for ids in texts]
        left_out: dict[str, str] = {}
        found = {kind: quality(one, texts, expected) for kind, one in tqdm(variants(model, left_out), desc=name)}
        print(f"\n{table(name, found)}")
        figures = {kind: asdict(q) for kind, q in found.items()}
        store({"target": name, "texts": len(texts), "quality": figures, "left_out": left_out}, args.out)


def tokens(text: str) -> int:
    """Type of --tokens: an integer of at least 2, because the first token is not predicted."""
    value = positive(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is too short; give at least 2 tokens.")
    return value


if __name__ == "__main__":
    main()
