"""The `dovetail` command as a new user meets it: help, `generate`, and mistakes in any option."""

import io
import shutil
import subprocess
import sys

import pytest
from helpers import PAIR, SHORT, command_environment, refusal, run_python, save_pair
from transformers import GenerationConfig

from dovetail_plugin import TreeBudget
from dovetail_plugin.bench.compare import Run
from dovetail_plugin.cli import COMMANDS, main
from dovetail_plugin.cli.convert import FORMATS
from dovetail_plugin.drafts import convert

GENERATE = ("generate", *PAIR, *SHORT)


def dovetail(*arguments, cwd, **options):
    return run_python("-m", "dovetail_plugin", *arguments, cwd=cwd, **options)


# --- help --------------------------------------------------------------------------------------------


def test_help_and_version_load_no_torch(tmp_path):
    code = (
        "import os, sys, sysconfig; sys.argv = [os.path.join(sysconfig.get_path('scripts'), 'dovetail')]\n"
        "from dovetail_plugin.cli import main\n"
        "try: main({!r})\nfinally: assert 'torch' not in sys.modules"
    )
    for arguments in (["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)):
        done = run_python("-c", code.format(arguments), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout and done.stderr == ""


def test_command_help(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for text in ("examples:", "dovetail train --target", "dovetail generate --target", *COMMANDS):
        assert text in printed


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("dovetail 0.") and "torch 2" in printed and "transformers 5" in printed


@pytest.mark.parametrize(
    ("command", "texts"),
    [
        (
            "generate",
            ["--compare", "--prompt", "--tree-nodes, --nodes N", "--temperature", "--target, --model, -m DIR"],
        ),
        ("bench", ["--out results.jsonl", "one right after the other", "GSM8K", "--threads", "--plot", "--json"]),
        ("train", ["--resume", '{"messages": [...]}', "accelerate launch", "--cache-features DIR", "(default: 1024)"]),
        ("convert", ["--to {dovetail,eagle3,speculators,vllm}"]),
        ("export", ["--to {onnx,openvino}", "-- --group-size 64"]),
    ],
)
@pytest.mark.parametrize("columns", ["80", "120"])
def test_subcommand_help(command, texts, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for text in ("examples:", f"dovetail {command} ", *texts):
        assert " ".join(text.split()) in " ".join(printed.split())
    assert "default: None" not in printed
    prose = printed.partition("examples:")[0].splitlines()[1:]
    assert max(map(len, prose)) <= int(columns)


def test_help_names_the_defaults_of_the_package(capsys):
    """These are written out in the command line, which loads no torch to show help."""
    assert FORMATS == convert.FORMATS
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    budget = TreeBudget()
    assert f"default: {budget.nodes}, or what fits the others" in printed
    assert f"default: what fits the others, {budget.depth} for {budget.nodes} nodes" in printed
    assert f"default: half of the nodes, at most {budget.top_k}" in printed


def test_no_command(capsys):
    assert "required: COMMAND" in refusal(capsys)
    assert "generate" in refusal(capsys, "produce")


# --- generate ----------------------------------------------------------------------------------------


def test_answer_alone_goes_to_standard_output(pair):
    """The prompt may come from an option, a file or standard input."""
    done = dovetail(*GENERATE, "--prompt", "count 3", "--compare", cwd=pair)
    assert done.returncode == 0, done.stderr
    assert "identical text: yes" in done.stderr
    assert "ratio" in done.stderr and "acceptance length" in done.stderr and "12 tokens in" in done.stderr
    plain = done.stderr.partition("--- without the draft ---\n")[2].partition("\n--- with the draft ---")[0]
    assert plain.strip() and plain == done.stdout
    piped = dovetail(*GENERATE, cwd=pair, input="count 3\n")
    assert piped.returncode == 0, piped.stderr
    assert piped.stdout == done.stdout
    assert "without the draft" not in piped.stderr


def test_prompt_sources(here, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("zähl 3\n".encode())))
    (here / "prompt.txt").write_bytes(b"\xef\xbb\xbf" + "zähl 3\n".encode())
    answers = set()
    for source in (("-p", "zähl 3"), ("--prompt-file", "prompt.txt"), ("--prompt", "-")):
        assert main([*GENERATE, *source]) == 0
        answers.add(capsys.readouterr().out)
    assert len(answers) == 1


def test_a_prompt_is_asked_for_at_a_terminal(here, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert "there is no prompt; give --prompt TEXT" in refusal(capsys, *GENERATE)


def test_closed_pipe_ends_quietly(pair):
    process = subprocess.Popen(
        [sys.executable, "-m", "dovetail_plugin", *GENERATE, "--prompt", "count 3"],
        cwd=pair,
        env=command_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    printed = process.stderr.read().decode()
    assert process.wait() == 141
    assert "Traceback" not in printed and "Broken pipe" not in printed


def test_sampling_compares_equal_too(here, capsys):
    options = ["--do-sample", "--temperature", "0.8", "--top-p", "0.9", "--top-k", "40", "--min-p", "0.01"]
    assert main([*GENERATE, "--prompt", "count 3", "--compare", *options, "--seed", "5"]) == 0
    assert "identical text: yes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), {"do_sample": False}),
        (("--repetition-penalty", "1.3"), {"do_sample": False, "repetition_penalty": 1.3}),
        (("--do-sample",), {"do_sample": True}),
        (("--do-sample", "--top-k", "5", "--temp", "0.5"), {"do_sample": True, "top_k": 5, "temperature": 0.5}),
    ],
)
def test_only_given_options_reach_generate(here, monkeypatch, options, expected):
    """So the temperature, top_k and top_p that are saved with the model keep their effect."""
    seen = []

    def record(target, input_ids, streamer, assistant_model, **options):
        seen.append(options)
        return Run(0, 1.0, input_ids)

    monkeypatch.setattr("dovetail_plugin.bench.compare.timed_generate", record)
    assert main([*GENERATE, "--prompt", "count 3", *options]) == 0
    assert seen == [{"max_new_tokens": 12} | expected]


def test_saved_sampling_settings_act(tmp_path, monkeypatch, capsys):
    """With a saved temperature near 0, sampling gives the greedy text."""
    save_pair(tmp_path)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main([*GENERATE, "--prompt", "count 3"]) == 0
    greedy = capsys.readouterr().out
    GenerationConfig(do_sample=True, temperature=1e-4).save_pretrained(tmp_path / "target")
    assert main([*GENERATE, "--prompt", "count 3", "--do-sample"]) == 0
    assert capsys.readouterr().out == greedy


# --- mistakes ----------------------------------------------------------------------------------------

PROMPT = (*GENERATE, "--prompt", "x")
BIG = str(10**30)
MISTAKES = {
    "--target not/to/be/found: no such directory": ["generate", "--target", "not/to/be/found", "--prompt", "x"],
    "--target target/config.json is a file": ["generate", "--target", "target/config.json", "--prompt", "x"],
    "-m: is empty; give a directory": ["generate", "--target", "", "--prompt", "x"],
    "--target draft is a draft": ["generate", "--target", "draft", "--draft", "target", "--prompt", "x"],
    "--draft draft/config.json is a file": ["generate", "-m", "target", "-md", "draft/config.json", "-p", "x"],
    "--prompt is empty": [*GENERATE, "--prompt", ""],
    "at byte 3). Save it as UTF-8": [*GENERATE, "--prompt", "caf\udce9"],
    "--prompt-file target is a directory; name a file": [*GENERATE, "--prompt-file", "target"],
    "target/model.safetensors is not valid UTF-8 (invalid start byte at byte": [
        *GENERATE,
        "--prompt-file",
        "target/model.safetensors",
    ],
    "No such file or directory: 'no.txt'": [*GENERATE, "--prompt-file", "no.txt"],
    "must be at most 1024, got 1000000": [*PROMPT, "--threads", "1000000"],
    "--tree-top-k: must be at most 128, got 1000000": [*PROMPT, "--tree-top-k", "1000000"],
    "must be at most 10000000, got 1000000000000": [*PROMPT, "--max-new-tokens", "1000000000000"],
    "--n-predict/-n: must be at least 1, got 0": [*PROMPT, "-n", "0"],
    "--seed: must be at least 0, got -1": [*PROMPT, "--seed", "-1"],
    "--top-p: must be between 0 and 1, got 2": [*PROMPT, "--do-sample", "--top-p", "2"],
    "--top-p: must be between 0 and 1, got nan": [*PROMPT, "--do-sample", "--top-p", "nan"],
    "--temp: must be between 1e-05 and 100000, got inf": [*PROMPT, "--do-sample", "--temperature", "inf"],
    "--min-p: 'low' is not a number": [*PROMPT, "--do-sample", "--min-p", "low"],
    "--repetition-penalty: must be above 0, got 0": [*PROMPT, "--repetition-penalty", "0"],
    "--temperature has an effect on sampling only; add --do-sample": [*PROMPT, "--temperature", "0.5"],
    "The width of the draft tree is --tree-top-k": [*PROMPT, "--top-k", "4"],
    "there is no option --temprature; did you mean --temperature?": [*PROMPT, "--temprature", "1"],
    "there is no use for the argument 'you'": [*GENERATE, "--prompt", "hello", "you"],
    "--vram plans where the draft goes": [*PROMPT, "--vram", "0"],
    "--temp: must be between 1e-05 and 100000, got 1e-320": [*PROMPT, "--do-sample", "--temperature", "1e-320"],
    "--revision: is empty; leave the option out": [*PROMPT, "--revision", ""],
    "--token: is empty; leave the option out": [*PROMPT, "--token", " "],
    "--draft-device 'meta' is not a device here": ["generate", *PAIR, "-p", "x", "--draft-device", "meta"],
    "--draft-device 'mps' is not a device here": ["generate", *PAIR, "-p", "x", "--draft-device", "mps"],
    "--count: must be at most 100000": ["bench", *PAIR, "--count", "1000000000000"],
    "--blocks: must be at most 6": ["bench", "-m", "target", "--synthetic-acceptance", "0.5", "--blocks", "10000"],
    "--context: must be at most 1073741824": ["plan", "-m", "target", "--context", "1000000000000"],
    "is not a valid size": ["plan", "-m", "target", "--vram", "9" * 5000 + "GiB"],
    "--target caf\\udce9: no such directory": ["generate", "-m", "caf\udce9", "-p", "x"],
    "chats.jsonl": ["train", "--target", "target", "--data", "chats.jsonl", "--out", "new"],
    "--target no/such: no such directory": ["train", "--target", "no/such", "--data", "chats.jsonl", "--out", "new"],
    "steps must be at least 1": ["train", "--target", "target", "--data", "x", "--out", "new", "--steps", "0"],
    "--seed: must be at most 9223372036854775807, got 1": ["train", "-m", "t", "--data", "x", "-o", "o", "--seed", BIG],
    "--blocks: must be at most 6, got 7": ["train", "-m", "target", "--data", "x", "-o", "new", "--blocks", "7"],
    "--lr: must be at least 0, got nan": ["train", "--target", "target", "--data", "x", "--out", "new", "--lr", "nan"],
}


def broken(directory, file, content):
    """A copy of the target with other content in one of its files; None deletes it."""
    shutil.copytree("target", directory)
    (directory / file).unlink(missing_ok=True)
    if content is not None:
        (directory / file).write_bytes(content)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", b"\xff\xfe", "the config is not JSON"),
        ("config.json", b'{"model_type": "t5"}', "is a t5 model, and targets are decoder-only models"),
        ("config.json", b'{"model_type": "llama", "hidden_size": "x"}', "config.json cannot be used"),
        ("model.safetensors", b"\x10" * 500, "model.safetensors is truncated or not safetensors"),
        ("tokenizer.json", b"{", "its tokenizer cannot be read"),
        ("tokenizer.json", None, "its tokenizer cannot be read"),
        ("generation_config.json", b"[1]", "one of its files cannot be used"),
        ("chat_template.jinja", b"{% for %}", "the tokenizer cannot encode the chat (TemplateSyntaxError"),
    ],
)
def test_broken_targets(file, content, message, here, capsys):
    broken(here / "copy", file, content)
    assert message in refusal(capsys, "generate", "-m", "copy", "-md", "draft", "-p", "x", "--draft-device", "cpu")


PROMPTS = {
    "line 1: the file is UTF-16. Save it as UTF-8": '{"prompt": "x"}'.encode("utf-16"),
    "line 1: there are zero bytes, as in UTF-16. Save the file as UTF-8": '{"prompt": "x"}'.encode("utf-16-le"),
    "line 2: byte 16 (0xe9) is not UTF-8. Save the file as UTF-8": '{"prompt": "x"}\n{"prompt": "caf\u00e9'.encode(
        "latin-1"
    ),
    "line 2: its JSON is nested too deeply": b'{"prompt": "x"}\n' + b"[" * 100_000,
    "line 1: not valid JSON": b"{",
    "line 1: '\\ud83d' is half of a character": b'{"prompt": "\\ud83d"}',
    'line 1: "messages" must be a list of objects': b'{"messages": "x"}',
    'line 2: "messages" must be a list of objects': b'\n{"messages": ["x"]}',
    'line 3: "messages" must be a list of objects': b'\n\n{"messages": {"role": "user"}}',
    'line 1: expected text under "prompt"': b'{"turns": 3}',
    ": there is no such file": None,
    "no prompts in": b"",
}


@pytest.mark.parametrize("message", PROMPTS)
def test_prompts_that_cannot_be_read(message, here, capsys, monkeypatch):
    """They are read before the models."""
    if PROMPTS[message] is not None:
        (here / "prompts.jsonl").write_bytes(PROMPTS[message])
    monkeypatch.setattr("dovetail_plugin.cli.comparison.load_pair", lambda args: pytest.fail("models were loaded"))
    line = refusal(capsys, "bench", *PAIR, "--prompts", "prompts.jsonl")
    assert message in line and "prompts.jsonl" in line


def test_prompts_that_the_template_refuses(here, capsys):
    broken(here / "copy", "chat_template.jinja", b"{{ raise_exception('no tools') if messages[0].role == 'tool' }}x")
    (here / "prompts.jsonl").write_bytes(b'{"prompt": "x"}\n{"messages": [{"role": "tool", "content": "3"}]}')
    pair = ("-m", "copy", "-md", "draft", "--draft-device", "cpu")
    line = refusal(capsys, "bench", *pair, "--prompts", "prompts.jsonl")
    assert "prompts.jsonl, line 2: the tokenizer cannot encode the chat" in line


@pytest.mark.usefixtures("here", "offline_hub")
@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes(message, capsys):
    """Each ends with status 2 and one line that says what to change."""
    line = refusal(capsys, *MISTAKES[message])
    assert line.startswith(f"dovetail {MISTAKES[message][0]}: ")
    assert message in line
