"""Inflate a small trained pair to the shape of a big one without changing the function it computes.

Enters: a Llama target, its `DovetailDraft` and a shape. Leaves: a pair with the same logits, texts and
acceptance that costs what the big shape costs, every weight being a dense tensor of its own, read in full.
The residual stream keeps the source's H numbers first and exact zeros beyond (`RULES`); eps becomes
eps * H/H2. The source's layers come first, added ones behind. Equal to 1e-5 in float32; bfloat16 rounds the
scaled norm weights once more. Label all figures measured on such a pair "inflated"; both configs say it in
`inflated_from`. This module knows nothing of generation or timing.
"""

import argparse
import copy
import math
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from dovetail_plugin import DovetailDraft
from dovetail_plugin.cli.common import HelpFormatter
from dovetail_plugin.drafts.compatibility import check_fits

EPILOG = """\
shapes, with the parameters they have for two query heads on each key/value head and 3072 tokens:
  500m   1536,4096,19    0.50 billion
  1b     2048,5632,22    1.05
  7b     4096,11008,32   5.96    Llama 2's widths and depth; grouped heads and the small vocabulary save the rest
  13b    5120,13824,40   11.67
  H,I,L  hidden size, MLP size and layers of your own

examples:
  python benchmarks/inflate.py --target DIR --draft DIR --shape 1b --out big
  dovetail bench --target big/target --draft big/draft
"""

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "chat_*")


@dataclass(frozen=True)
class Shape:
    """Widths (H2, I2) of target and draft, and layers of the target; `label` goes into the model's name."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    label: str

    @classmethod
    def parse(cls, text: "Shape | str") -> "Shape":
        """A shape by its name, or from "H,I,L"; a `Shape` stays as it is.

        Raises:
            ValueError: neither a known name nor three positive numbers.
        """
        if isinstance(text, Shape):
            return text
        if text in SHAPES:
            return SHAPES[text]
        parts = [part.strip() for part in text.split(",")]
        if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise ValueError(f"unknown shape {text!r}: use {', '.join(SHAPES)}, or numbers H,I,L as in 1024,2816,24.")
        hidden, intermediate, layers = map(int, parts)
        return cls(hidden, intermediate, layers, f"{hidden}x{intermediate}x{layers}")


SHAPES = {
    "500m": Shape(1536, 4096, 19, "500m"),
    "1b": Shape(2048, 5632, 22, "1b"),
    "7b": Shape(4096, 11008, 32, "7b"),
    "13b": Shape(5120, 13824, 40, "13b"),
}


Fill = Literal["random", "zeros", "ones"]


@dataclass(frozen=True)
class Rule:
    """How a tensor grows. The source block goes to the start of every dimension.

    fill: what the added entries hold.
    added: what all of it holds in a layer that the source lacks, if not `fill`. Such a layer's norms are zeros, so
        its dense random matrices multiply zeros and it writes zeros; zero matrices would be stored once by
        engines that store equal bytes once, quantised ones above all, and cost less than they should.
    joins: the dimension in which two streams lie one after the other; each half grows by itself.
    writes: the dimension that writes the stream; its entries beyond the source's get zeros.
    """

    fill: Fill
    added: Fill | None = None
    joins: int | None = None
    writes: int | None = None


RULES = {
    r"embed_tokens\.weight$": Rule("zeros"),
    r"lm_head\.weight$": Rule("random"),
    r"norm\.weight$": Rule(
        "ones", added="zeros"
    ),  # the source block also times sqrt(H/H2): the mean is over more entries
    r"_proj\.bias$": Rule("zeros"),
    r"(q|k|v|gate|up)_proj\.weight$": Rule("random"),  # added columns meet the stream's zeros
    r"(o|down)_proj\.weight$": Rule("zeros", added="random"),  # drops added heads and units
    r"fusion\.W_[12]$": Rule("random", writes=1),  # used as x @ W: rows read, columns write
    r"fusion\.W_z$": Rule("random", joins=0),  # its columns gate the stream, and a gated zero is zero
    r"fusion\.fc\.weight$": Rule("random", joins=1, writes=0),
    r"fusion\.fc\.bias$": Rule("zeros"),
}


class Noise:
    """Random values in bulk: slices of one normal block, which saves minutes of drawing billions of numbers."""

    STD = 0.02
    LENGTH = 1_048_583  # a prime, so that rows of common widths do not repeat each other

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._block = (torch.randn(self.LENGTH, generator=self._generator) * self.STD).to(dtype)

    def tensor(self, size: Sequence[int]) -> Tensor:
        """A new dense tensor, contiguous, on the CPU."""
        out = torch.empty(size, dtype=self._block.dtype)
        flat, done = out.view(-1), 0
        offset = int(torch.randint(self.LENGTH, (1,), generator=self._generator))
        while done < len(flat):
            piece = self._block[offset : offset + len(flat) - done]
            flat[done : done + len(piece)] = piece
            done, offset = done + len(piece), 0
        return out


def widen(source: Tensor | None, size: Sequence[int], rule: Rule, noise: Noise, scale: float = 1.0) -> Tensor:
    """A tensor of `size` in `noise`'s dtype with `source * scale` in its first entries, the rest by `rule`.

    Args:
        source: at most `size` in every dimension; None for a layer that the source lacks.
    """
    out = noise.tensor(size)
    fill = rule.added if source is None and rule.added else rule.fill
    if fill == "zeros":
        out.zero_()
    elif fill == "ones":
        out.fill_(1)
    if source is None:
        return out
    if rule.writes is not None:
        width = source.shape[rule.writes]
        out.narrow(rule.writes, width, out.shape[rule.writes] - width).zero_()
    halves, dim = (1, 0) if rule.joins is None else (2, rule.joins)
    for big, small in zip(out.chunk(halves, dim), source.detach().float().chunk(halves, dim), strict=True):
        big[tuple(slice(n) for n in small.shape)] = small * scale
    return out


def inflate_target(
    target: PreTrainedModel, shape: Shape | str, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> LlamaForCausalLM:
    """A new target of `shape` on the CPU that computes `target`'s function; it needs its own size of memory.

    Its `config.name_or_path` is "<source>-inflated-<shape>". Tied tables are untied: the big head is dense.

    Raises:
        ValueError: not a Llama, or `shape` is smaller than the source or gives no whole number of heads.
    """
    if not isinstance(target, LlamaForCausalLM):
        raise ValueError(f"only LlamaForCausalLM targets can be inflated, got {type(target).__name__}.")
    shape = Shape.parse(shape)
    config = inflated_config(target.config, shape, shape.num_hidden_layers, dtype)
    config.tie_word_embeddings = False
    config.name_or_path = f"{_short(target.config.name_or_path)}-inflated-{shape.label}"
    big = _build(target, config, Noise(dtype, seed))
    big.generation_config = copy.deepcopy(target.generation_config)
    return big


def inflate_draft(
    draft: DovetailDraft, shape: Shape | str, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> DovetailDraft:
    """A new draft of `shape`'s widths on the CPU, with `draft`'s blocks, budget and function; not attached.

    Raises:
        ValueError: `shape` is narrower than the source or gives no whole number of heads.
    """
    shape = Shape.parse(shape)
    config = inflated_config(draft.config, shape, draft.config.num_hidden_layers, dtype)
    config.target_name_or_path = f"{_short(draft.config.target_name_or_path)}-inflated-{shape.label}"
    big = _build(draft, config, Noise(dtype, seed))
    big.budget, big.verification = draft.budget, draft.verification
    return big


def inflate_pair(
    target: LlamaForCausalLM,
    draft: DovetailDraft,
    shape: Shape | str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> tuple[LlamaForCausalLM, DovetailDraft]:
    """Both on the CPU in `dtype`, the draft attached to the target; `shape` is one, or text for `Shape.parse`.

    Raises:
        ValueError: the two do not fit each other, or see `inflate_target` and `inflate_draft`.
    """
    check_fits(draft.config, target.config)
    big_draft = inflate_draft(draft, shape, dtype=dtype, seed=seed + 1)  # first: it is small and refuses early
    big_target = inflate_target(target, shape, dtype=dtype, seed=seed)
    big_draft.config.target_name_or_path = big_target.config.name_or_path
    big_draft.attach(big_target)
    return big_target, big_draft


def inflated_config(config: Any, shape: Shape, layers: int, dtype: torch.dtype) -> Any:
    """A copy of a Llama or Dovetail config with the sizes of `shape`, `layers` layers and scaled eps."""
    sizes = dict(hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size, num_hidden_layers=layers)
    own = {name: getattr(config, name) for name in sizes}
    for name, new in sizes.items():
        if new < own[name]:
            raise ValueError(
                f"{name} {new} is smaller than the source's; a pair can only grow: use {own[name]} or more."
            )
    hidden, kv_heads = config.hidden_size, config.num_key_value_heads
    new_kv_heads, rest = divmod(kv_heads * shape.hidden_size, hidden)
    if rest:
        raise ValueError(
            f"hidden_size {shape.hidden_size} gives no whole number of key/value heads (the source has {kv_heads} "
            f"for {hidden}); use a multiple of {hidden // math.gcd(hidden, kv_heads)}."
        )
    changes = dict(
        num_attention_heads=config.num_attention_heads // kv_heads * new_kv_heads,
        num_key_value_heads=new_kv_heads,
        rms_norm_eps=config.rms_norm_eps * hidden / shape.hidden_size,
        dtype=dtype,
        inflated_from={"name": _short(config.name_or_path)} | own,
    )
    return type(config).from_dict(config.to_dict() | sizes | changes)


def _short(name: str | None) -> str:
    """Last part of a path or hub id; no path of this machine enters a config."""
    return Path(name or "unnamed").resolve().name


def _build(source: PreTrainedModel, config: Any, noise: Noise) -> Any:
    """A model of `source`'s class and the big `config`, filled tensor by tensor from `source`."""
    with init_empty_weights():  # buffers (the rotary frequencies) are real
        model = type(source)(config)
    known = source.state_dict()
    norm_scale = math.sqrt(source.config.hidden_size / config.hidden_size)
    weights = {}
    for name, parameter in model.named_parameters():
        rule = next(rule for pattern, rule in RULES.items() if re.search(pattern, name))
        scale = norm_scale if rule.fill == "ones" else 1.0
        weights[name] = widen(known.get(name), parameter.shape, rule, noise, scale)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def main(argv: list[str] | None = None) -> int:
    """Load, inflate, save; returns the exit status."""
    description = "Write a pair of a bigger shape that computes the same function as a small trained one."
    parser = argparse.ArgumentParser(
        prog="inflate.py", description=description, epilog=EPILOG, formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("--target", required=True, type=Path, metavar="DIR", help="the small Llama target")
    add("--draft", required=True, type=Path, metavar="DIR", help="its Dovetail draft")
    add("--shape", required=True, metavar="500m|1b|7b|13b|H,I,L", help="see below")
    add("--out", required=True, type=Path, metavar="DIR", help="gets DIR/target and DIR/draft")
    add("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"], help="of both models")
    add("--seed", type=int, default=0, help="of the random values")
    args = parser.parse_args(argv)
    try:
        write_pair(args.target, args.draft, args.shape, args.out, dtype=getattr(torch, args.dtype), seed=args.seed)
    except (ValueError, OSError) as error:
        print(f"inflate.py: {error}", file=sys.stderr)
        return 2
    return 0


def write_pair(target_dir: Path, draft_dir: Path, shape: str, out: Path, *, dtype: torch.dtype, seed: int) -> None:
    """Inflate a stored pair to `out`/target, with the tokenizer's files, and `out`/draft; raises as `inflate_pair`."""
    for place in (target_dir, draft_dir):
        if not place.is_dir():
            raise ValueError(f"{place} is not a directory; pass one that holds a stored model.")
    if (out / "target").exists() or (out / "draft").exists():
        raise ValueError(f"{out} holds a pair already; delete it or choose another --out.")
    source = AutoModelForCausalLM.from_pretrained(target_dir, dtype="auto")
    target, draft = inflate_pair(source, DovetailDraft.from_pretrained(draft_dir), shape, dtype=dtype, seed=seed)
    # A loaded model is named by its directory; with this name the stored draft still knows its target.
    draft.config.target_name_or_path = f"{target.config.name_or_path}/target"
    for model, name in ((target, "target"), (draft, "draft")):
        model.save_pretrained(out / name)
        print(f"{out / name}: {model.num_parameters() / 1e6:.1f} million parameters, inflated")
    for pattern in TOKENIZER_FILES:
        for file in target_dir.glob(pattern):
            shutil.copy(file, out / "target" / file.name)


if __name__ == "__main__":
    sys.exit(main())
