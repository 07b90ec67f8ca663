"""`dovetail bench`: the table, the line of JSON, simulated acceptance, the picture, and what is refused."""

import json
import sys

import pytest
from helpers import PAIR, SHORT, refusal, run_python, write_jsonl

from dovetail_plugin import DovetailDraft
from dovetail_plugin.bench.compare import timed_generate
from dovetail_plugin.bench.provenance import provenance
from dovetail_plugin.cli import main
from dovetail_plugin.planning.known_shapes import SHAPES, shape_config

TREE = ("--tree-nodes", "9", "--tree-depth", "3")


def result_of(capsys) -> dict:
    """The result that `--json` prints, which is all that goes to standard output."""
    (line,) = capsys.readouterr().out.strip().splitlines()
    return json.loads(line)


def test_bench(pair, tmp_path):
    out = tmp_path / "results.jsonl"
    out.write_text('{"earlier": 1}\n')
    options = ("--count", "2", *TREE, "--out", out, "--token", "hf_secret")
    done = run_python("-m", "dovetail_plugin", "bench", *PAIR, *SHORT, *options, cwd=pair)
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stdout and "2 of 2 identical" in done.stdout
    assert "{" not in done.stdout
    earlier, line = out.read_text().splitlines()
    assert earlier == '{"earlier": 1}'
    assert "hf_secret" not in line
    result = json.loads(line)
    assert result["versions"].keys() >= {"python", "torch", "transformers", "accelerate", "safetensors"}
    assert result["machine"].keys() >= {"cpu", "cores", "threads", "gpu"}
    assert result["command"].startswith("python -m dovetail_plugin bench --target target")
    assert (result["prompts"], result["identical"], result["new_tokens"]) == (2, 2, 24)
    assert result["settings"]["budget"] == "9/3/4"
    assert result["settings"]["target"] == "target"
    assert result["settings"]["max_new_tokens"] == 12


def test_bench_own_prompts(here, capsys):
    rows = [{"turns": ["one", "two"]}, {"prompt": "three"}, {"question": "four"}]
    write_jsonl(here / "mine.jsonl", rows)
    assert main(["bench", *PAIR, *SHORT, "--prompts", "mine.jsonl", "--threads", "1", "--json"]) == 0
    assert result_of(capsys)["prompts"] == 3


def test_bench_without_a_draft_takes_the_known_one_or_lookup(here, capsys):
    assert main(["bench", "-m", "target", "-n", "12", "--count", "1", *TREE, "--json"]) == 0
    printed = capsys.readouterr()
    assert "--draft not given: taking lookup" in printed.err
    assert json.loads(printed.out)["settings"]["draft_parameters"] == 0


def test_sampling_options_are_kept_with_the_result(here, capsys):
    """Only those that were given: the others are the model's own."""
    assert main(["bench", *PAIR, *SHORT, "--count", "1", *TREE, "--do-sample", "--top-k", "5", "--json"]) == 0
    settings = result_of(capsys)["settings"]
    assert (settings["do_sample"], settings["top_k"], settings["budget"]) == (True, 5, "9/3/4")
    assert "temperature" not in settings and "top_p" not in settings


def test_no_token_in_results(monkeypatch):
    for written in (["--token", "hf_secret"], ["--token=hf_secret"]):
        monkeypatch.setattr("sys.argv", ["dovetail", "bench", *written, "--count", "3"])
        assert "hf_secret" not in provenance()["command"]
        assert provenance()["command"].endswith("--count 3")


SYNTHETIC = ("--synthetic-acceptance", "0.7", "--count", "2", *TREE)


def test_bench_before_training(here, capsys):
    """A target with weights, but no draft: the figures are marked wherever they appear."""
    assert main(["bench", "--target", "target", *SHORT, *SYNTHETIC, "--blocks", "2", "--out", "out.jsonl"]) == 0
    table = capsys.readouterr().out.strip().splitlines()
    assert table[-1] == "SYNTHETIC: acceptance simulated at 0.70"
    assert not any("identical" in row for row in table)
    result = json.loads((here / "out.jsonl").read_text())
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
        assert main(["bench", "--target", target, *SHORT, *SYNTHETIC, "--json"]) == 0
        settings = result_of(capsys)["settings"]
        assert (settings["target"], settings["weights"], settings["dtype"]) == (name, "random weights", "bfloat16")
        assert "SYNTHETIC" in settings["acceptance"]
    shape = ("bench", "--target", "tiny-shape", *SHORT, *SYNTHETIC)
    assert "tiny-shape has no tokenizer" in refusal(capsys, *shape, "--prompts", "mine.jsonl")
    assert "the draft's vocabulary is 260, the target's is 99" in refusal(capsys, *shape, "--draft", "draft")


@pytest.mark.parametrize("what", [("--draft", "draft"), SYNTHETIC], ids=["real", "synthetic"])
def test_bench_plot(here, what, capsys):
    """The picture is written, and the sweep behind it is kept with the figures."""
    budget = ("--nodes", "5", "--depth", "2", "--tree-top-k", "3", "--count", "1")
    assert main(["bench", "--target", "target", *SHORT, *what, *budget, "--plot", "bench.png", "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err.strip().splitlines()[-1] == "plot: bench.png"
    assert (here / "bench.png").read_bytes().startswith(b"\x89PNG")
    tried = json.loads(printed.out)["settings"]["sweep_tokens_per_s"]
    assert tried.keys() > {"plain", "5/2/3", "2/1/1", "16/6/8"}
    assert all(speed > 0 for speed in tried.values())


def test_bench_plot_needs_matplotlib(here, monkeypatch, capsys):
    """It is refused before anything is measured."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = refusal(capsys, "bench", "--target", "no/such", "--draft", "none", "--plot", "bench.png")
    assert "pip install '.[plot]'" in line


MISTAKES = {
    "--draft not/to/be/found: no such directory": ["--target", "target", "--draft", "not/to/be/found"],
    "--draft-device cuda:99": [*PAIR, "--draft-device", "cuda:99"],
    "--draft-device 'gpu' is not a device": [*PAIR, "--draft-device", "gpu"],
    "--nodes: must be at least 1, got 0": [*PAIR, *SHORT, "--nodes", "0"],
    "--threads/-t: must be at least 1, got 0": [*PAIR, *SHORT, "--threads", "0"],
    "--count: must be at least 1, got 0": [*PAIR, *SHORT, "--count", "0"],
    "must be between 0 and 1, got 1.5": ["--target", "target", "--synthetic-acceptance", "1.5"],
    "must be between 0 and 1, got nan": ["--target", "target", "--synthetic-acceptance", "nan"],
    "--do-sample does not go with --synthetic-acceptance": [*PAIR, *SYNTHETIC, "--do-sample"],
    "-n: must be at least 1, got 0": [*PAIR, *SYNTHETIC, "--max-new-tokens", "0"],
    "--blocks needs --synthetic-acceptance without --draft": [*PAIR, *SYNTHETIC, "--blocks", "2"],
    "--blocks: must be at least 1, got 0": ["--target", "target", *SYNTHETIC, "--blocks", "0"],
    "llama-2-7b-shape is a shape without weights": ["--target", "llama-2-7b-shape", "--draft", "draft"],
    "A shape can be named, too: llama-2-7b-shape": ["--target", "no/such/thing", *SYNTHETIC],
    "torch finds no CUDA device": ["--target", "target", *SYNTHETIC, "--draft-device", "cuda:99"],
    "is not a valid plot file. Use a name that ends in .png": [*PAIR, "--plot", "bench.bmp"],
    "'nowhere' is not a directory. Create it before plotting": [*PAIR, "--plot", "nowhere/bench.png"],
    "--out nowhere/out.jsonl: there is no directory 'nowhere'": [*PAIR, "--out", "nowhere/out.jsonl"],
    "--out target is a directory": [*PAIR, "--out", "target"],
    "mine.jsonl": [*PAIR, *SHORT, "--prompts", "mine.jsonl"],
    "are for `dovetail export`": [*PAIR, "--", "--sym"],
}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes(message, capsys):
    line = refusal(capsys, "bench", *MISTAKES[message])
    assert line.startswith("dovetail bench: ")
    assert message in line


def test_a_result_without_permission_is_refused_before_models_are_loaded(here, capsys, monkeypatch):
    monkeypatch.setattr("os.access", lambda place, mode: False)
    line = refusal(capsys, "bench", "-m", "no/such", "--out", "out.jsonl")
    assert "--out out.jsonl: there is no permission to write it; name another file" in line


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
