"""A byte-level tokenizer, chats, saved pairs and subprocesses for tests of data, training and commands."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import engines
import torch
from families import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dovetail_plugin import DovetailDraft
from dovetail_plugin.cli import main
from dovetail_plugin.cli.common import Parser

PAIR = ("--target", "target", "--draft", "draft")
SHORT = ("--max-new-tokens", "12", "--draft-device", "cpu")
"""Options of `dovetail` for the pair that the fixture `pair` has written, and for a short text on the CPU."""

ROOT = Path(__file__).resolve().parent.parent
SPECIAL_TOKENS = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
MARKED_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}<|assistant|>{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"
    "{% else %}<|user|>{{ m['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PLAIN_TEMPLATE = MARKED_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
BYTE_VOCAB = len(SPECIAL_TOKENS) + 256


def byte_tokenizer(chat_template: str | None = MARKED_TEMPLATE) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each byte, so that any text can be encoded; 260 tokens with the special ones."""
    letters = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|end|>", chat_template=chat_template
    )


def byte_target(**overrides: Any) -> Any:
    """The model of `byte_model` as a target of the engine under test."""
    return engines.current().target(byte_model(**overrides))


def byte_model(**overrides: Any) -> PreTrainedModel:
    """A tiny Llama for `byte_tokenizer`. It has no EOS token, so texts have their full length."""
    fields = dict(vocab_size=BYTE_VOCAB, num_hidden_layers=2, eos_token_id=None, bos_token_id=None)
    return tiny_model("llama", **(fields | {"max_position_embeddings": 1024} | overrides))


def save_pair(directory: Path) -> tuple[Path, Path]:
    """A byte-level target and an untrained draft as checkpoints: (target directory, draft directory)."""
    target = byte_model()
    target.save_pretrained(directory / "target")
    byte_tokenizer().save_pretrained(directory / "target")
    torch.manual_seed(7)
    DovetailDraft.for_target(target).save_pretrained(directory / "draft")
    return directory / "target", directory / "draft"


def chat(number: int) -> list[dict[str, str]]:
    """A chat of two turns whose length depends on the number."""
    return [
        {"role": "user", "content": f"count {number}"},
        {"role": "assistant", "content": " ".join(str(n) for n in range(number % 7 + 3))},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "no " * (number % 3 + 1)},
    ]


def write_jsonl(file: Path, rows: list) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def refusal(capsys, *arguments: object) -> str:
    """Run `dovetail` in this process; assert that it refuses with status 2, and return the one line that it prints."""
    try:
        status = main([*map(str, arguments)])
    except SystemExit as ended:
        status = ended.code
    printed = capsys.readouterr()
    assert status == 2
    assert printed.out == ""
    return printed.err.strip().splitlines()[-1]


def parse_command(module: Any, *arguments: str) -> argparse.Namespace:
    """The options of one subcommand, whose module is given."""
    parser = Parser(prog="dovetail")
    module.add_parser(parser.add_subparsers(dest="command"))
    return parser.parse_args([module.__name__.rpartition(".")[2], *arguments])


def run_python(*arguments: object, cwd: Path, input: str = "") -> subprocess.CompletedProcess:
    """Run `python ARGUMENTS` on one thread, offline, with this checkout importable and `input` as standard input."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=command_environment(), input=input, capture_output=True, text=True, timeout=300
    )


def command_environment() -> dict[str, str]:
    """The environment of this process, on one thread, offline, with this checkout importable."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "120",
    }
