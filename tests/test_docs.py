"""Figures in the documents that can be computed are."""

import re
from pathlib import Path

import pytest

from dovetail_plugin.drafts.known_pairs import KNOWN
from dovetail_plugin.planning.count_weights import draft_sizes
from dovetail_plugin.planning.device_plan import parse_bytes
from dovetail_plugin.planning.draft_config import config_alone
from dovetail_plugin.planning.known_shapes import SHAPES

DOCS = Path(__file__).parent.parent / "docs"
LLAMA_8B, LLAMA_70B = "llama-3.1-8b-shape", "llama-3.1-70b-shape"
SHAPE_OF = {
    "meta-llama/Llama-3.1-8B-Instruct": SHAPES[LLAMA_8B],
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": SHAPES[LLAMA_8B],
    "lmsys/vicuna-13b-v1.3": SHAPES["llama-2-13b-shape"],
    "meta-llama/Meta-Llama-3-8B-Instruct": SHAPES[LLAMA_8B],
    "meta-llama/Meta-Llama-3-70B-Instruct": SHAPES[LLAMA_70B],
    "Qwen/Qwen2-7B-Instruct": SHAPES["qwen2.5-7b-shape"],
    "Qwen/Qwen2-72B-Instruct": SHAPES[LLAMA_70B] | {"vocab_size": 152064, "intermediate_size": 29568},
    "meta-llama/Llama-3.2-3B-Instruct": SHAPES["llama-3.2-3b-shape"],
    "Qwen/Qwen3-8B": SHAPES["qwen3-8b-shape"],
}
"""Targets whose published heads have the target's own widths."""


def documented() -> "dict[str, list[str]]":
    """Target -> the other cells of the table of known pairs."""
    lines = (DOCS / "drafts.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.count("|") == 7]
    return {target: cells for target, *cells in rows[2:]}


def test_the_table_is_that_of_the_package():
    assert {(pair.target, pair.draft, pair.format, pair.license) for pair in KNOWN} == {
        (target, cells[0], cells[1], cells[4]) for target, cells in documented().items()
    }


@pytest.mark.parametrize("target", SHAPE_OF)
def test_sizes_of_known_drafts(target):
    _, kind, weights, tables, _ = documented()[target]
    shape = SHAPE_OF[target]
    fields = shape | {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
    if kind != "EAGLE-1/2":
        fields["draft_vocab_size"] = 32000
    sizes = draft_sizes(config_alone(target, fields), "bfloat16")
    borrowed = 1 if sizes.own_head or shape.get("tie_word_embeddings") else 2
    assert parse_bytes(weights.replace(" ", "")) == pytest.approx(sizes.blocks_bytes, rel=0.01)
    assert parse_bytes(tables.replace(" ", "")) == pytest.approx(
        borrowed * sizes.vocab_size * sizes.row_bytes, rel=0.01
    )


@pytest.mark.parametrize("file", sorted(path.name for path in DOCS.glob("*.md")))
def test_links_lead_somewhere(file):
    text = (DOCS / file).read_text()
    for link in re.findall(r"\]\(([^)#]+)", text):
        if not link.startswith("http"):
            assert (DOCS / link).exists(), link
