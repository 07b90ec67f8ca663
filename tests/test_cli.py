"""The `dovetail` command as users run it: as a process, with a tiny pair on disk."""

import json
import sys

import pytest
from helpers import run_python, save_pair, write_jsonl

from dovetail_plugin import DovetailDraft
from dovetail_plugin.bench.compare import timed_generate
from dovetail_plugin.cli import main
from dovetail_plugin.planning.known_shapes import SHAPES, shape_config

SHORT = ("--max-new-tokens", "12", "--draft-device", "cpu")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A directory with `target` and `draft` in it."""
    directory = tmp_path_factory.mktemp("pair")
    save_pair(directory)
    return directory


@pytest.fixture
def here(pair, tmp_path, monkeypatch):
    """Run inside an empty directory with the pair linked into it; for commands run in this process."""
    for name in ("target", "draft"):
        (tmp_path / name).symlink_to(pair / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def dovetail(*arguments, cwd):
    return run_python("-m", "dovetail_plugin", *arguments, cwd=cwd)


PAIR = ("--target", "target", "--draft", "draft")


def test_command_help(tmp_path):
    done = dovetail("--help", cwd=tmp_path)
    assert done.returncode == 0
    for taught in ("examples:", "dovetail train --target", "dovetail generate --target", "dovetail bench --target"):
        assert taught in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("command", "taught"),
    [
        ("generate", ["--compare", "--prompt", "--nodes", "--temperature", "streaming"]),
        (
            "bench",
            ["--out results.jsonl", "one right after the other", "GSM8K", "--threads", "--plot", "llama-2-7b-shape"],
        ),
        ("train", ["--resume", '{"messages": [...]}', "accelerate launch", "--cache-features", "(default: 1024)"]),
    ],
)
def test_subcommand_help(command, taught, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for text in ("examples:", f"dovetail {command} --target DIR", *taught):
        assert text in said
    assert "default: None" not in said


def test_no_command(capsys):
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert "{generate,bench,plan,train,convert,export}" in capsys.readouterr().err


def test_generate(pair):
    done = dovetail("generate", *PAIR, *SHORT, "--prompt", "count 3", cwd=pair)
    assert done.returncode == 0, done.stderr
    assert "12 tokens in" in done.stdout
    assert "acceptance length" in done.stdout
    assert "plain" not in done.stdout


def test_generate_compare(pair):
    done = dovetail("generate", *PAIR, *SHORT, "--prompt", "count 3", "--compare", cwd=pair)
    assert done.returncode == 0, done.stderr
    assert "identical text: yes" in done.stdout
    plain, drafted = done.stdout.split("--- with the draft ---")
    plain = plain.split("--- plain generate ---")[1].strip()
    assert plain
    assert drafted.strip().startswith(plain)
    assert "ratio" in done.stdout


def test_sampling_compares_equal_too(here, capsys):
    options = ["--do-sample", "--temperature", "0.8", "--top-p", "0.9", "--seed", "5"]
    assert main(["generate", *PAIR, *SHORT, "--prompt", "count 3", "--compare", *options]) == 0
    assert "identical text: yes" in capsys.readouterr().out


def test_bench(pair, tmp_path):
    out = tmp_path / "results.jsonl"
    out.write_text('{"earlier": 1}\n')
    done = dovetail("bench", *PAIR, *SHORT, "--count", "2", "--nodes", "9", "--depth", "3", "--out", out, cwd=pair)
    assert done.returncode == 0, done.stderr
    *table, line = done.stdout.strip().splitlines()
    assert any("tokens/s" in row for row in table)
    assert any("2 of 2 identical" in row for row in table)
    result = json.loads(line)
    assert out.read_text().splitlines() == ['{"earlier": 1}', line]
    assert result["versions"].keys() >= {"python", "torch", "transformers", "accelerate", "safetensors"}
    assert result["machine"].keys() >= {"cpu", "cores", "threads", "gpu"}
    assert result["command"].startswith("python -m dovetail_plugin bench --target target")
    assert (result["prompts"], result["identical"], result["new_tokens"]) == (2, 2, 24)
    assert result["settings"]["budget"] == "9/3/8"
    assert result["settings"]["target"] == "target"
    assert result["settings"]["max_new_tokens"] == 12


def test_bench_own_prompts(here, capsys):
    rows = [{"turns": ["one", "two"]}, {"prompt": "three"}, {"question": "four"}]
    write_jsonl(here / "mine.jsonl", rows)
    assert main(["bench", *PAIR, *SHORT, "--prompts", "mine.jsonl", "--threads", "1"]) == 0
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["prompts"] == 3


SYNTHETIC = ("--synthetic-acceptance", "0.7", "--count", "2", "--nodes", "9", "--depth", "3")


def test_bench_before_training(here, capsys):
    """A target of the user's own, no draft: the figures are marked wherever they appear."""
    assert main(["bench", "--target", "target", *SHORT, *SYNTHETIC, "--blocks", "2", "--out", "out.jsonl"]) == 0
    *table, line = capsys.readouterr().out.strip().splitlines()
    assert table[-1] == "SYNTHETIC: acceptance simulated at 0.70"
    assert not any("identical" in row for row in table)
    result = json.loads(line)
    assert (here / "out.jsonl").read_text() == line + "\n"
    assert result["settings"]["acceptance"] == "SYNTHETIC, simulated at 0.70"
    assert (result["prompts"], result["new_tokens"]) == (2, 24)
    assert "weights" not in result["settings"]
    one = DovetailDraft.from_pretrained("draft").num_parameters()
    assert result["settings"]["draft_parameters"] > 1.3 * one  # two blocks


def test_bench_of_a_shape(here, capsys, monkeypatch):
    """Nothing but sizes: random weights, prompts without a tokenizer. By a shape's name, a file, a directory."""
    fields = dict(model_type="qwen2", vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    monkeypatch.setitem(SHAPES, "tiny-shape", fields | dict(num_attention_heads=4, num_key_value_heads=2))
    (here / "bare").mkdir()
    shape_config("tiny-shape").save_pretrained(here / "bare")
    for target, name in (("tiny-shape", "tiny-shape"), ("bare/config.json", "bare"), ("bare", "bare")):
        assert main(["bench", "--target", target, *SHORT, *SYNTHETIC]) == 0
        said = capsys.readouterr().out
        settings = json.loads(said.strip().splitlines()[-1])["settings"]
        assert (settings["target"], settings["weights"], settings["dtype"]) == (name, "random weights", "bfloat16")
        assert "SYNTHETIC" in said
    assert main(["bench", "--target", "tiny-shape", *SHORT, *SYNTHETIC, "--prompts", "mine.jsonl"]) == 2
    assert "tiny-shape has no tokenizer" in capsys.readouterr().err
    assert main(["bench", "--target", "tiny-shape", "--draft", "draft", *SHORT, *SYNTHETIC]) == 2
    assert "the draft's vocabulary is 260, the target's is 99" in capsys.readouterr().err


@pytest.mark.parametrize("what", [("--draft", "draft"), SYNTHETIC], ids=["real", "synthetic"])
def test_bench_plot(here, what, capsys):
    """The picture is written, and the sweep behind it is kept with the figures."""
    budget = ("--nodes", "5", "--depth", "2", "--top-k", "3", "--count", "1")
    assert main(["bench", "--target", "target", *SHORT, *what, *budget, "--plot", "bench.png"]) == 0
    *_, line, written = capsys.readouterr().out.strip().splitlines()
    assert written == "plot: bench.png"
    assert (here / "bench.png").read_bytes().startswith(b"\x89PNG")
    tried = json.loads(line)["settings"]["sweep_tokens_per_s"]
    assert tried.keys() > {"plain", "5/2/3", "2/1/1", "16/6/8"}
    assert all(speed > 0 for speed in tried.values())


def test_bench_plot_needs_matplotlib(here, monkeypatch, capsys):
    """Said at once, not after the measurements."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "--target", "no/such", "--draft", "none", "--plot", "bench.png"]) == 2
    assert "pip install 'dovetail-plugin[plot]'" in capsys.readouterr().err


def test_unknown_directory(tmp_path):
    """One line on stderr that names the option and the directory, status 2, no traceback."""
    done = dovetail("generate", "--target", "no/where", "--draft", "none", "--prompt", "x", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("dovetail generate: --target no/where: no such directory")


MISTAKES = {
    "--draft not/to/be/found: no such directory": ["bench", "--target", "target", "--draft", "not/to/be/found"],
    "--target not/to/be/found: no such": [
        "train",
        "--target",
        "not/to/be/found",
        "--data",
        "chats.jsonl",
        "--out",
        "new",
    ],
    "chats.jsonl": ["train", "--target", "target", "--data", "chats.jsonl", "--out", "new"],
    "steps must be at least 1": ["train", "--target", "target", "--data", "x", "--out", "new", "--steps", "0"],
    "--draft-device cuda:99": ["bench", *PAIR, "--draft-device", "cuda:99"],
    "nodes must be at least 1, got 0": ["bench", *PAIR, *SHORT, "--nodes", "0"],
    "threads must be at least 1, got 0": ["bench", *PAIR, *SHORT, "--threads", "0"],
    "--count must be at least 1, got 0": ["bench", *PAIR, *SHORT, "--count", "0"],
    "--draft is missing; give one": ["bench", "--target", "target"],
    "between 0 and 1, got 1.5": ["bench", "--target", "target", "--synthetic-acceptance", "1.5"],
    "between 0 and 1, got nan": ["bench", "--target", "target", "--synthetic-acceptance", "nan"],
    "--do-sample does not go with --synthetic-acceptance": ["bench", *PAIR, *SYNTHETIC, "--do-sample"],
    "--max-new-tokens must be at least 1, got 0": ["bench", *PAIR, *SYNTHETIC, "--max-new-tokens", "0"],
    "--blocks is of the untrained draft": ["bench", *PAIR, *SYNTHETIC, "--blocks", "2"],
    "--blocks must be at least 1, got 0": ["bench", "--target", "target", *SYNTHETIC, "--blocks", "0"],
    "llama-2-7b-shape is a shape without weights": ["bench", "--target", "llama-2-7b-shape", "--draft", "draft"],
    "--target no/such/thing: no such file or directory": ["bench", "--target", "no/such/thing", *SYNTHETIC],
    "torch finds no CUDA device": ["bench", "--target", "target", *SYNTHETIC, "--draft-device", "cuda:99"],
    "is not a valid plot file. Use a name that ends in .png": ["bench", *PAIR, "--plot", "bench.bmp"],
    "'nowhere' is not a directory. Create it": ["bench", *PAIR, "--plot", "nowhere/bench.png"],
    "mine.jsonl": ["bench", *PAIR, *SHORT, "--prompts", "mine.jsonl"],
    "max_new_tokens": ["generate", *PAIR, "--draft-device", "cpu", "--max-new-tokens", "0", "--prompt", "x"],
}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes(message, capsys):
    """Each ends with status 2 and a last line that says what to change."""
    assert main(MISTAKES[message]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"dovetail {MISTAKES[message][0]}: ")
    assert message in line


def test_text_that_differs_fails_the_bench(here, monkeypatch, capsys):
    """A benchmark of a draft that changes greedy text must not look like a success."""

    def last_token_wrong(target, input_ids, **options):
        run = timed_generate(target, input_ids, **options)
        if "assistant_model" in options:
            run.ids[0, -1] = 7
        return run

    monkeypatch.setattr("dovetail_plugin.bench.compare.timed_generate", last_token_wrong)
    write_jsonl(here / "mine.jsonl", [{"prompt": "one"}])
    assert main(["bench", *PAIR, *SHORT, "--prompts", "mine.jsonl"]) == 1
    assert "1 DIFFER" in capsys.readouterr().out
