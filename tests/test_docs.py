"""The documentation: figures are recomputed, links lead somewhere, and code blocks run.

Blocks run in a temporary folder where the names that the pages use ("Qwen/Qwen3-8B", "my-draft", ...) are links to the
bundled pair. Python blocks of a page share one namespace, which starts with `target`, `tokenizer`, `draft` and
`inputs`; `dovetail` commands run in this process, with small sizes. A block that cannot run carries a comment with the
reason: `<!-- not run: needs vLLM -->`.
"""

import dataclasses
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.pages import Block, blocks_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from dovetail_plugin import DovetailDraft, TreeBudget
from dovetail_plugin.cli import main
from dovetail_plugin.drafts.known_pairs import KNOWN
from dovetail_plugin.planning.device_plan import parse_bytes
from dovetail_plugin.planning.draft_config import config_alone
from dovetail_plugin.planning.known_shapes import SHAPES
from dovetail_plugin.planning.memory import draft_sizes
from dovetail_plugin.training.config import TrainingConfig

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(str(page.relative_to(ROOT)) for page in [ROOT / "README.md", *DOCS.rglob("*.md")])
OTHER_PAGES = sorted(
    str(page.relative_to(ROOT)) for page in [*ROOT.glob("[CRS]*.md"), *ROOT.glob("benchmarks/**/*.md")]
)
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

PAIR = ROOT / "examples" / "tiny_pair"
TARGET, DRAFT = PAIR / "dovetail-tiny-target", PAIR / "dovetail-tiny-draft"
STAND_INS = {
    "examples": ROOT / "examples",
    "my-target": TARGET,
    "DIR": TARGET,
    "Qwen/Qwen3-8B": TARGET,
    "Qwen/Qwen3-0.6B": TARGET,
    "meta-llama/Llama-2-7b-chat-hf": TARGET,
    "my-draft": DRAFT,
    "DRAFT": DRAFT,
    "RedHatAI/Qwen3-8B-speculator.eagle3": DRAFT,
}
"""Names on the pages -> what they are in the folder where blocks run."""
SMALL = {
    "generate": ["--max-new-tokens", "8"],
    "bench": ["--max-new-tokens", "8", "--count", "1"],
    "train": ["--steps", "2", "--batch-size", "2", "--max-length", "64", "--held-out", "2"],
}
"""Options that are added to commands; the last one of a kind counts."""
MOST_SKIPPED = 1 / 5
"""Share of the blocks that may say why they are not run."""
LANGUAGES = {"python", "bash"}
OTHER_LANGUAGES = {"text", "json", "yaml"}
OWN_ENVIRONMENT = {"docs/clients.md": "tests/test_clients.py"}
"""Pages whose blocks need other libraries -> the test file that runs them."""


def blocks(page: str) -> list[Block]:
    return blocks_of((ROOT / page).read_text(encoding="utf-8"))


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
        borrowed * sizes.config.vocab_size * sizes.row_bytes, rel=0.01
    )


@pytest.mark.parametrize("page", sorted({*PAGES, *OTHER_PAGES}))
def test_links_lead_somewhere(page):
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text(encoding="utf-8")):
        if not link.startswith("http"):
            assert (folder / link).exists(), link


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} == set(re.findall(r": (\S+\.md)$", nav, re.M))


def test_the_training_reference_describes_every_setting():
    hook = runpy.run_path(str(DOCS / "hooks" / "training_settings.py"))
    assert hook["MARK"] in (DOCS / hook["PAGE"]).read_text(encoding="utf-8")
    rows = hook["table"]().splitlines()[2:]
    assert len(rows) == len(dataclasses.fields(TrainingConfig))
    for row, field in zip(rows, dataclasses.fields(TrainingConfig), strict=True):
        assert row.startswith(f"| `{field.name}` |") and row.endswith(f"| {field.metadata['help']} |")


# --- code blocks -------------------------------------------------------------------------------------


def test_blocks_name_their_language_and_few_are_skipped():
    found = [block for page in PAGES for block in blocks(page)]
    assert {block.language for block in found} <= LANGUAGES | OTHER_LANGUAGES
    runnable = [block for block in found if block.language in LANGUAGES]
    skipped = [block.reason for block in runnable if block.reason]
    assert len(skipped) <= MOST_SKIPPED * len(runnable), skipped


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where blocks run. Measurements of the machine are shared by all pages."""
    root = tmp_path_factory.mktemp("docs")
    for name, original in STAND_INS.items():
        link = root / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(original)
    texts = [{"prompt": f"How much is {n} plus {n}?", "completion": f"{n} plus {n} is {2 * n}."} for n in range(8)]
    (root / "chats.jsonl").write_text("\n".join(map(json.dumps, texts)))
    return root


@pytest.fixture
def namespace(folder, monkeypatch):
    """The names that every page may use, loaded as the quickstart does."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DOVETAIL_CACHE", str(folder / "measurements"))
    tokenizer = AutoTokenizer.from_pretrained("my-target")
    return {
        "target": AutoModelForCausalLM.from_pretrained("my-target", dtype="auto"),
        "tokenizer": tokenizer,
        "draft": DovetailDraft.from_pretrained("my-draft", dtype="auto"),
        "inputs": tokenizer("How much is 17 times 3?", return_tensors="pt"),
        "TreeBudget": TreeBudget,
        "DovetailDraft": DovetailDraft,
    }


RUN_HERE = [p for p in PAGES if p not in OWN_ENVIRONMENT and any(b.language in LANGUAGES for b in blocks(p))]


@pytest.mark.parametrize("page", RUN_HERE)
def test_code_blocks_run(page, namespace, capsys):
    for block in blocks(page):
        if block.reason is not None:
            continue
        if block.language == "python":
            code = re.sub(r"max_new_tokens=\d+", "max_new_tokens=8", block.code)
            exec(compile(code, f"{page}, a python block", "exec"), namespace)
        elif block.language == "bash":
            for command in commands(block.code):
                run_command(command)
    capsys.readouterr()
    stopped = {name: value.report.warnings for name, value in namespace.items() if getattr(value, "report", None)}
    assert not any(stopped.values()), stopped  # a draft that fails leaves the text right, so nothing else shows it


def commands(code: str) -> list[list[str]]:
    """Words of each command of a shell block."""
    lines = code.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def run_command(words: list[str]) -> None:
    """One command of a page; `make` only shows what it would do, and a benchmark script its help."""
    program, *arguments = words
    if program == "dovetail":
        assert main([*adapted(arguments), *SMALL.get(arguments[0], [])]) == 0, words
    elif program == "make":
        subprocess.run(["make", "--dry-run", *arguments], check=True, capture_output=True, cwd=ROOT)
    elif program == "python" and arguments[0].startswith("benchmarks/"):
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        script = ROOT / arguments[0]
        subprocess.run([sys.executable, script, "--help"], check=True, capture_output=True, env=env)
    else:
        raise ValueError(f"the tests do not know how to run {program!r}; mark the block as not run.")


def adapted(arguments: list[str]) -> list[str]:
    """Arguments of a `dovetail` command, for a machine without a GPU and without memory for billions of parameters."""
    if "--synthetic-acceptance" in arguments:
        arguments = ["my-target/config.json" if word.endswith("-shape") else word for word in arguments]
    if "--vram" in arguments and arguments[0] != "plan" and not torch.cuda.is_available():
        size = arguments.index("--vram") + 1
        arguments = [*arguments[:size], "0", *arguments[size + 1 :]]
    return arguments
