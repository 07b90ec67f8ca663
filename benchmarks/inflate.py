"""Inflate a small trained pair to a larger shape without changing the function it computes.

Takes a Llama target, its `DovetailDraft` and a shape, and builds a pair with the same logits, texts and acceptance but
the cost of the larger shape: every weight is a dense tensor that is stored once and read in full. The first H numbers
of the residual stream are the source's and the rest are exact zeros (see `RULES`); eps becomes eps * H/H2. The source's
layers come first and the added layers follow. Results are equal to 1e-5 in float32; bfloat16 rounds the scaled norm
weights once more. Figures measured on such a pair must be labeled "inflated"; both configs have `inflated_from`. This
module does not generate or time anything.
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
shapes, with their parameters for two query heads per key/value head and a vocabulary of 3072 tokens:
  500m   1536,4096,19    0.50 billion
  1b     2048,5632,22    1.05 billion
  7b     4096,11008,32   5.96 billion  (widths and depth of Llama 2 7B, with fewer key/value heads and tokens)
  13b    5120,13824,40   11.67 billion
  H,I,L  your own hidden size, MLP size and number of layers

examples:
  python benchmarks/inflate.py --target DIR --draft DIR --shape 1b --out big
  dovetail bench --target big/target --draft big/draft
"""

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "chat_*")


@dataclass(frozen=True)
class Shape:
    """The shape to inflate to.

    Attributes:
        hidden_size: H2, hidden size of target and draft.
        intermediate_size: MLP size of target and draft.
        num_hidden_layers: layers of the target. The draft keeps its number of blocks.
        label: becomes part of the model's name.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    label: str

    @classmethod
    def parse(cls, text: "Shape | str") -> "Shape":
        """Read the name of a shape or "H,I,L". A `Shape` is returned unchanged.

        Raises:
            ValueError: the text is neither a known name nor three positive integers.
        """
        if isinstance(text, Shape):
            return text
        if text in SHAPES:
            return SHAPES[text]
        parts = [part.strip() for part in text.split(",")]
        if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise ValueError(
                f"{text!r} is not a valid shape. Use {', '.join(SHAPES)}, or H,I,L, for example 1024,2816,24."
            )
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

    Attributes:
        fill: content of the added entries.
        added: content of the whole tensor in a layer that the source does not have, if it differs from `fill`. The
            norms of such a layer are zeros, so its dense random matrices multiply zeros and it writes zeros. Zero
            matrices would not do: engines that store equal bytes once, as many do for quantized weights, would make
            them cheaper than they should be.
        joins: dimension in which two streams are concatenated. Each half grows separately.
        writes: dimension that writes the residual stream. Its entries beyond the source's are zeros.
    """

    fill: Fill
    added: Fill | None = None
    joins: int | None = None
    writes: int | None = None


RULES = {
    r"embed_tokens\.weight$": Rule("zeros"),
    r"lm_head\.weight$": Rule("random"),
    # The source block is also multiplied by sqrt(H/H2), because the mean is over more entries.
    r"norm\.weight$": Rule("ones", added="zeros"),
    r"_proj\.bias$": Rule("zeros"),
    r"(q|k|v|gate|up)_proj\.weight$": Rule("random"),  # added columns meet the stream's zeros
    r"(o|down)_proj\.weight$": Rule("zeros", added="random"),  # drops added heads and units
    r"fusion\.W_[12]$": Rule("random", writes=1),  # used as x @ W: rows read the stream, columns write it
    r"fusion\.W_z$": Rule("random", joins=0),  # its columns gate the stream, and gated zeros are zeros
    r"fusion\.fc\.weight$": Rule("random", joins=1, writes=0),
    r"fusion\.fc\.bias$": Rule("zeros"),
}
"""Pattern of a parameter's name -> its rule. The first match counts."""


class Noise:
    """Random values in bulk: slices of one normally distributed block, much faster than billions of new numbers.

    Args:
        dtype: dtype of the values.
        seed: seed of the block and of where slices start.
    """

    STD = 0.02
    LENGTH = 1_048_583  # a prime, so rows of common widths do not repeat each other

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._block = (torch.randn(self.LENGTH, generator=self._generator) * self.STD).to(dtype)

    def tensor(self, size: Sequence[int]) -> Tensor:
        """A new dense, contiguous tensor of this size on the CPU."""
        out = torch.empty(size, dtype=self._block.dtype)
        flat, done = out.view(-1), 0
        offset = int(torch.randint(self.LENGTH, (1,), generator=self._generator))
        while done < len(flat):
            piece = self._block[offset : offset + len(flat) - done]
            flat[done : done + len(piece)] = piece
            done, offset = done + len(piece), 0
        return out


def widen(source: Tensor | None, size: Sequence[int], rule: Rule, noise: Noise, scale: float = 1.0) -> Tensor:
    """A larger tensor with `source * scale` in its first entries and the rest filled by `rule`.

    Args:
        source: at most `size` in every dimension. None for a layer that the source does not have.
        size: size of the result.
        rule: how the tensor grows.
        noise: source of random values; decides the dtype of the result.
        scale: factor for the source's entries.
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
    """Build a new target of `shape` on the CPU that computes the same function as `target`.

    Its `config.name_or_path` is "<source>-inflated-<shape>". Tied embeddings are untied, because the large head is
    dense.

    Args:
        target: a Llama; it is not changed.
        shape: a `Shape`, or text for `Shape.parse`.
        dtype: of the new weights.
        seed: of the random values.

    Raises:
        ValueError: `target` is not a Llama, or `shape` is smaller than the source, or the number of key/value heads
            would not be an integer.
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
    """Build a new draft with the widths of `shape` on the CPU that computes the same function as `draft`.

    It has the blocks, the budget and the verification of `draft` and is not attached to a target.

    Args:
        draft: is not changed.
        shape: a `Shape`, or text for `Shape.parse`.
        dtype: of the new weights.
        seed: of the random values.

    Raises:
        ValueError: `shape` is narrower than the source, or the number of key/value heads would not be an integer.
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
    """Inflate both models; see `inflate_target` and `inflate_draft`.

    Returns:
        The new target and the new draft, on the CPU in `dtype`. The draft is attached to the target.

    Raises:
        ValueError: the two do not fit each other, or one of them cannot be inflated to `shape`.
    """
    check_fits(draft.config, target.config)
    big_draft = inflate_draft(draft, shape, dtype=dtype, seed=seed + 1)  # first: it is small and refuses early
    big_target = inflate_target(target, shape, dtype=dtype, seed=seed)
    big_draft.config.target_name_or_path = big_target.config.name_or_path
    big_draft.attach(big_target)
    return big_target, big_draft


def inflated_config(config: Any, shape: Shape, layers: int, dtype: torch.dtype) -> Any:
    """A copy of a Llama or Dovetail config with the widths of `shape`, `layers` layers and a scaled eps."""
    sizes = dict(hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size, num_hidden_layers=layers)
    own = {name: getattr(config, name) for name in sizes}
    for name, new in sizes.items():
        if new < own[name]:
            raise ValueError(
                f"{name} {new} is smaller than the source's {own[name]}. A pair can only grow: use {own[name]} or more."
            )
    hidden, kv_heads = config.hidden_size, config.num_key_value_heads
    new_kv_heads, rest = divmod(kv_heads * shape.hidden_size, hidden)
    if rest:
        raise ValueError(
            f"hidden_size {shape.hidden_size} does not give an integer number of key/value heads (the source has "
            f"{kv_heads} for a hidden size of {hidden}). Use a multiple of {hidden // math.gcd(hidden, kv_heads)}."
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
    """Last part of a path or hub id, so that configs do not contain paths of this machine."""
    return Path(name or "unnamed").resolve().name


def _build(source: PreTrainedModel, config: Any, noise: Noise) -> Any:
    """A model of the class of `source` with the larger `config`, filled tensor by tensor from `source`."""
    with init_empty_weights():  # buffers (the rotary frequencies) are not empty
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
    """Run the command line; returns the exit status."""
    description = "Write a pair of a larger shape that computes the same function as a small trained pair."
    parser = argparse.ArgumentParser(
        prog="inflate.py", description=description, epilog=EPILOG, formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("--target", required=True, type=Path, metavar="DIR", help="the small Llama target")
    add("--draft", required=True, type=Path, metavar="DIR", help="its Dovetail draft")
    add("--shape", required=True, metavar="500m|1b|7b|13b|H,I,L", help="a shape from the list below, or sizes")
    add("--out", required=True, type=Path, metavar="DIR", help="the pair is written to DIR/target and DIR/draft")
    add("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"], help="dtype of both models")
    add("--seed", type=int, default=0, help="seed of the random values")
    args = parser.parse_args(argv)
    try:
        write_pair(args.target, args.draft, args.shape, args.out, dtype=getattr(torch, args.dtype), seed=args.seed)
    except (ValueError, OSError) as error:
        print(f"inflate.py: {error}", file=sys.stderr)
        return 2
    return 0


def write_pair(target_dir: Path, draft_dir: Path, shape: str, out: Path, *, dtype: torch.dtype, seed: int) -> None:
    """Inflate a stored pair and save it, with the tokenizer's files, to `out`/target and `out`/draft.

    Raises:
        ValueError: a directory is missing, `out` already holds a pair, or see `inflate_pair`.
    """
    for place in (target_dir, draft_dir):
        if not place.is_dir():
            raise ValueError(f"{place} is not a directory. Pass a directory with a stored model.")
    if (out / "target").exists() or (out / "draft").exists():
        raise ValueError(f"{out} already holds a pair. Delete it or choose another --out.")
    source = AutoModelForCausalLM.from_pretrained(target_dir, dtype="auto")
    target, draft = inflate_pair(source, DovetailDraft.from_pretrained(draft_dir), shape, dtype=dtype, seed=seed)
    # A loaded model is named by its directory; this name lets the stored draft recognize its target.
    draft.config.target_name_or_path = f"{target.config.name_or_path}/target"
    for model, name in ((target, "target"), (draft, "draft")):
        model.save_pretrained(out / name)
        print(f"{out / name}: {model.num_parameters() / 1e6:.1f} million parameters, inflated")
    for pattern in TOKENIZER_FILES:
        for file in target_dir.glob(pattern):
            shutil.copy(file, out / "target" / file.name)


if __name__ == "__main__":
    sys.exit(main())
