"""What the command line loads: by which revision, with whose permission, and where `--vram` puts it."""

import dataclasses
import functools

import pytest
import torch
from helpers import PAIR, chat, parse_command, refusal, write_jsonl
from transformers import AutoTokenizer

from dovetail_plugin.bench.prompts import load_prompts
from dovetail_plugin.cli import bench, export, generate, loading, main, train
from dovetail_plugin.training.config import TrainingConfig

HUB = ("--revision", "r1", "--draft-revision", "r2", "--token", "secret", "--cache-dir", "cache", "--local-files-only")


# --- options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "written",
    [
        ["--model", "t", "--draft-model", "d", "--n-predict", "7", "--threads", "2", "--nodes", "9", "--depth", "3"],
        ["-m", "t", "-md", "d", "-n", "7", "-t", "2", "--tree-nodes", "9", "--tree-depth", "3"],
        ["--target", "t", "--assistant-model", "d", "--max-new-tokens", "7", "-t", "2", "--nodes=9", "--depth=3"],
    ],
)
def test_aliases(written):
    args = parse_command(bench, *written)
    assert (args.target, args.draft, args.max_new_tokens, args.threads) == ("t", "d", 7, 2)
    assert (args.tree_nodes, args.tree_depth, args.tree_top_k, args.top_k) == (9, 3, None, None)


def test_training_options_are_the_fields_of_the_config():
    args = parse_command(train, "--target", "t", "--data", "a.jsonl", "b.jsonl", "--out", "o")
    hub = ("revision", "draft_revision", "token", "cache_dir", "local_files_only", "trust_remote_code")
    data, others = tuple(args.data), ("command", "run", "resume", "overwrite_output_dir", *hub)
    values = {name: value for name, value in vars(args).items() if name not in others}
    assert TrainingConfig(**(values | {"data": data})) == TrainingConfig("t", data, args.out)
    assert all(field.metadata["help"] for field in dataclasses.fields(TrainingConfig))


# --- where models come from --------------------------------------------------------------------------


def record(calls, kind, name, **options):
    calls.append((kind, name, options))
    return kind


def test_hub_options_reach_model_tokenizer_and_draft(monkeypatch):
    calls = []
    monkeypatch.setattr(loading, "load_language_model", functools.partial(record, calls, "target"))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", functools.partial(record, calls, "tokenizer"))
    monkeypatch.setattr(loading.AutoDraft, "from_pretrained", functools.partial(record, calls, "draft"))
    monkeypatch.setattr(loading, "read_config", functools.partial(record, calls, "draft config"))
    args = parse_command(generate, "--target", "t", "--draft", "d", *HUB, "--trust-remote-code")
    loading.load_target(args)
    loading.load_target_tokenizer(args)
    loading.load_draft(args, None)
    source = {"token": "secret", "cache_dir": "cache", "local_files_only": True}
    trusted = source | {"trust_remote_code": True}
    assert calls == [
        ("target", "t", trusted | {"revision": "r1", "dtype": "auto"}),
        ("tokenizer", "t", trusted | {"revision": "r1"}),
        ("draft config", "d", source | {"revision": "r2"}),
        ("draft", "d", trusted | {"revision": "r2", "dtype": "auto", "device_map": "auto"}),
    ]


def test_local_pair_loads_with_hub_options(here, capsys):
    """Every loader accepts them, the draft's included."""
    options = ("--cache-dir", "cache", "--trust-remote-code", "--token", "secret")
    assert main(["generate", *PAIR, "--draft-device", "cpu", "-n", "4", "-p", "x", *options]) == 0
    assert capsys.readouterr().out.strip()


def test_code_of_a_model_is_not_run_unasked(here, capsys):
    """And nobody is asked on standard input, where a script would wait for an answer."""
    (here / "custom").mkdir()
    (here / "custom" / "config.json").write_text(
        '{"model_type": "custom", "auto_map": {"AutoConfig": "configuration_custom.CustomConfig"}}'
    )
    (here / "custom" / "configuration_custom.py").write_text("raise SystemExit('was run')")
    line = refusal(capsys, "generate", "--target", "custom", "--draft", "draft", "-p", "x")
    assert "--target custom comes with Python code, which runs only with --trust-remote-code" in line
    for command in (["plan"], ["bench", "--draft", "draft"], ["train", "--data", "x", "--out", "new"]):
        line = refusal(capsys, *command, "--target", "custom")
        assert "comes with Python code" in line and "was run" not in line


def test_export_passes_options_on(here, capsys, monkeypatch):
    started = []

    class Done:
        returncode = 0

    monkeypatch.setattr(export, "is_installed", lambda module: True)
    monkeypatch.setattr(export.subprocess, "run", lambda command, **_: started.append(command) or Done())
    command = ["export", "-m", "target", "--to", "openvino", "-o", "ir", "--", "--group-size", "64", "--sym"]
    assert main(command) == 0
    (started,) = started
    assert started[-4:-1] == ["--group-size", "64", "--sym"]
    assert started[started.index("--weight-format") + 1] == "int8"


def test_prompts_do_not_hold_the_answer(here):
    """Rows of training data are cut before the assistant's first turn; a chat that waits for an answer is whole."""
    tokenizer = AutoTokenizer.from_pretrained("target")
    waiting = [*chat(3), {"role": "user", "content": "and now"}]
    rows = [{"messages": chat(3)}, {"prompt": "ask", "completion": "gold"}, {"messages": waiting}]
    texts = [tokenizer.decode(ids[0]) for ids in load_prompts(write_jsonl(here / "rows.jsonl", rows), tokenizer, 3)]
    assert texts[:2] == ["<|user|>count 3<|assistant|>", "<|user|>ask<|assistant|>"]
    assert texts[2].endswith("<|user|>and now<|assistant|>") and "again" in texts[2]
    file = write_jsonl(here / "answers.jsonl", [{"messages": [{"role": "assistant", "content": "gold"}]}])
    with pytest.raises(ValueError, match=r"answers\.jsonl, line 1: the chat starts with the assistant's turn"):
        load_prompts(file, tokenizer, 1)


# --- --vram ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["generate", "bench", "bench before training"])
def test_vram_of_zero_plans_without_a_gpu(here, capsys, command):
    name, *extra = {
        "generate": ["generate", "-p", "count 3"],
        "bench": ["bench", "--count", "1"],
        "bench before training": ["bench", "--count", "1", "--synthetic-acceptance", "0.7"],
    }[command]
    options = ("-n", "6", "--tree-nodes", "5", "--vram", "0")
    assert main([name, *PAIR, *options, *extra]) == 0
    assert "draft: blocks" in capsys.readouterr().err


def test_vram_places_target_and_draft_by_the_plan(here, capsys, monkeypatch):
    """With a GPU that is played by the CPU: the plan gives it the draft and layers of the target."""
    applied = []

    def apply(plan, target, draft):
        applied.append(plan)
        apply_plan(plan, target, draft, gpu="cpu")

    apply_plan = loading.apply_plan
    monkeypatch.setattr(loading, "apply_plan", apply)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    args = parse_command(generate, *PAIR, "--vram", "4GiB")
    target = loading.load_target(args)
    draft = loading.AutoDraft.from_pretrained("draft", device_map="cpu")
    loading.place_by_plan(args, target, draft)
    (plan,) = applied
    assert plan.draft_device == "gpu" and plan.gpu_layers
    assert draft.policy.vram_budget_bytes == 4 * 2**30
    assert "of 4.00 GiB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--draft", "draft", "--vram", "4GiB"], "torch finds no CUDA device; give 0"),
        (["--draft", "draft", "--vram", "four"], "'four'"),
        (["--draft", "lookup", "--vram", "0"], "not for a PromptLookupDraft"),
        (["--draft", "draft", "--vram", "0", "--draft-device", "cpu"], "leave out --draft-device"),
        (["--draft", "draft", "--vram", ""], "give a size such as 4GiB"),
    ],
)
def test_vram_refuses(here, capsys, monkeypatch, options, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert message in refusal(capsys, "generate", "--target", "target", "-p", "x", *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "draft", "--out", "new"], "--target draft is a draft"),
        (["--target", "target", "--out", "target"], "target contains a checkpoint that is not a Dovetail draft"),
        (["--target", "target", "--out", "taken"], "--out taken is a file. Name a directory"),
    ],
)
def test_train_refuses_before_it_trains(here, capsys, options, message):
    (here / "taken").write_text("mine")
    data = write_jsonl(here / "chats.jsonl", [{"messages": chat(3)}])
    assert message in refusal(capsys, "train", *options, "--data", str(data))
    assert (here / "taken").read_text() == "mine"


def test_vram_is_refused_before_models_are_loaded(here, capsys, monkeypatch):
    monkeypatch.setattr(loading, "load_target", lambda args: pytest.fail("the target was loaded"))
    monkeypatch.setattr(loading, "load_draft", lambda *_: pytest.fail("the draft was loaded"))
    assert "--vram: '4' has no unit" in refusal(capsys, "generate", *PAIR, "-p", "x", "--vram", "4")
