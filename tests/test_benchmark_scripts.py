"""Every script in benchmarks/ runs at its smallest size, prints a table and stores one JSON line with provenance.

The command line of `inflate.py`, which measures nothing, is tested in test_inflate.py.
"""

import argparse
import json
import sys

import pytest
from helpers import ROOT, run_python

from dovetail_plugin.cli.common import parse_engine
from dovetail_plugin.kernels import KINDS

BENCHMARKS = ROOT / "benchmarks"
PAIR = ROOT / "examples" / "tiny_pair"
TARGET, DRAFT = PAIR / "dovetail-tiny-target", PAIR / "dovetail-tiny-draft"
SMALLEST_SHAPE = "256,640,16"  # the shape of the bundled pair itself
ONE_SHORT_TEXT = ["--count", "1", "--new-tokens", "4"]

sys.path.insert(0, str(BENCHMARKS))
import common  # noqa: E402


def contents(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def run_script(name, *arguments, directory):
    """Run a script; returns [what it printed, each result that it stored]."""
    kept, out = contents(BENCHMARKS / "results"), directory / "out.jsonl"
    done = run_python(BENCHMARKS / name, *arguments, "--out", out, cwd=directory)
    assert done.returncode == 0, done.stderr
    assert contents(BENCHMARKS / "results") == kept
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    results = [json.loads(line) for line in lines]
    for result in results:
        assert result["command"].startswith(f"{name} ")
        assert result.keys() >= {"git", "versions", "machine"}
        assert json.dumps(result) in done.stdout
    return [done.stdout, *results]


def torch_only(function):
    return pytest.mark.torch_only("the script runs targets in torch")(function)


@torch_only
def test_run(tmp_path):
    printed, bundled, inflated = run_script(
        "run.py", "--dtype", "float32", "--shape", SMALLEST_SHAPE, *ONE_SHORT_TEXT, directory=tmp_path
    )
    assert "bundled pair, float32, budget policy" in printed and "tokens/s (median)" in printed
    assert f"inflated pair, {SMALLEST_SHAPE}, bfloat16, budget policy" in printed
    assert (bundled["prompts"], bundled["new_tokens"], bundled["identical"]) == (1, 4, 1)
    assert (inflated["prompts"], inflated["new_tokens"], inflated["differences"]) == (1, 4, 0)


@torch_only
def test_quality(tmp_path):
    """Of the same function, the planted outliers only make quantized weights worse."""
    printed, bundled, outliers = run_script("quality.py", "--count", "2", "--tokens", "24", directory=tmp_path)
    assert "| bundled target " in printed and "| outliers target " in printed
    for result in (bundled, outliers):
        figures = result["quality"]
        assert figures.keys() >= {"fp32", *(f"packed {kind}" for kind in KINDS)}
        assert figures["fp32"]["kl"] == 0 and figures["fp32"]["agreement"] == 1
        assert all(row["tokens"] == 46 and row["perplexity"] > 1 for row in figures.values())
        assert 0 < figures["packed int8"]["kl"] < figures["packed int4"]["kl"] < 1
    ours, planted = bundled["quality"], outliers["quality"]
    assert planted["fp32"]["perplexity"] == pytest.approx(ours["fp32"]["perplexity"], rel=1e-4)
    assert planted["packed int8"]["kl"] > 3 * ours["packed int8"]["kl"]


@torch_only
def test_heterogeneous(tmp_path):
    options = ["--shape", SMALLEST_SHAPE, "--dtype", "float32", "--prompts", "1", "--new-tokens", "4"]
    printed, result = run_script("heterogeneous.py", *options, directory=tmp_path)
    assert "verify N nodes, ms: 1: " in printed and "4 of 16 target layers moved" in printed
    sides = [result["sides"][name] for name in ("policy", "7/4/10", "16/7/10", "60/7/10")]
    assert all(side["identical"] == 1 for side in (*sides, result["offload"]["policy"]))
    assert result["left_out"] == []


@torch_only
def test_memory(tmp_path):
    options = ["--prompt-tokens", "8", "--new-tokens", "4", "--repeats", "1"]
    printed, result = run_script("memory.py", *options, directory=tmp_path)
    assert "peak, with the draft" in printed
    assert result["peaks_mib"].keys() == {"plain", "draft"}
    assert result["target_cache_mib"] == 2 * 4 * 12 * 16 * 2 * 64 / 2**20


@torch_only
def test_policy(tmp_path):
    options = ["--grid-prompts", "1", "--prompts", "1", "--finalists", "1", "--useless-prompts", "1"]
    printed, result = run_script("policy.py", *options, "--new-tokens", "4", directory=tmp_path)
    assert "policy to the best static budget" in printed
    assert result["free"]["tokens_per_s"].keys() == {"policy", result["free"]["best"]}
    assert result["useless"]["ratio"] > 0


@torch_only
def test_plan_accuracy(tmp_path):
    (tmp_path / "pair").mkdir()
    for name, stored in (("target", TARGET), ("draft", DRAFT)):
        (tmp_path / "pair" / name).symlink_to(stored)
    options = ["--pair", tmp_path / "pair", "--dtype", "float32", "--vram", "0"]
    options += ["--prompt-tokens", "8", "--new-tokens", "4"]
    printed, result = run_script("plan_accuracy.py", *options, directory=tmp_path)
    assert "planned" in printed and "tensors: target weights" in printed
    errors = {row["what"]: row["error"] for row in result["plan_accuracy"][0]["rows"]}
    assert errors["tensors: target weights"] == 0.0
    assert errors["tensors: target KV cache"] == 0.0


@torch_only
def test_policy_simulation(tmp_path):
    options = ["--texts", "1", "--scenario", "a useless draft"]
    printed, result = run_script("policy_simulation.py", *options, directory=tmp_path)
    assert "| a useless draft |" in printed
    assert all(0.9 < share < 1.1 for shares in result["shares"]["a useless draft"].values() for share in shares)


@torch_only
def test_identity(tmp_path):
    printed, result = run_script(
        "identity.py", "--count", "4", "--new-tokens", "4", "--threads", "2", directory=tmp_path
    )
    assert "4 prompts: " in printed
    assert sum(result["verdicts"].values()) == 4 and "different" not in result["verdicts"]
    factors = result["seconds_to_lone_seconds"]
    assert factors.keys() == {"draft", "plain"} and all(factor > 0 for factor in factors.values())


@torch_only
def test_identity_with_packed_weights(tmp_path):
    options = ["--count", "2", "--new-tokens", "8", "--weights", "int4"]
    _, result = run_script("identity.py", *options, directory=tmp_path)
    assert result["verdicts"] == {"equal (generate)": 2} and result["weights"] == "int4"


@torch_only
def test_identity_in_parts(tmp_path):
    options = ["--count", "3", "--new-tokens", "4", "--progress", str(tmp_path / "progress.jsonl")]
    (printed,) = run_script("identity.py", *options, "--part", "2/2", directory=tmp_path)
    assert "1 of 3 prompts: " in printed
    printed, result = run_script("identity.py", *options, directory=tmp_path)
    assert "3 of 3 prompts: " in printed
    assert sum(result["prompts_of_revision"].values()) == 3


def test_every_script_is_tested():
    scripts = {file.stem for file in BENCHMARKS.glob("*.py")} - {"common"}
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert scripts <= tested | {"inflate"}


# --- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (common.positive, "0", "'0' is not a valid count. Use an integer of at least 1"),
        (common.positive, "few", "'few' is not a valid count"),
        (common.parse_shape, "3b", "'3b' is not a valid shape. Use 500m, 1b"),
        (common.parse_budget, "8/4", "8/4"),
        (common.output_file, "nowhere/out.jsonl", "'nowhere' is not a directory. Create it first"),
    ],
)
def test_bad_arguments_are_refused(read, text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        read(text)


def test_good_arguments():
    assert common.positive("3") == 3
    assert common.parse_shape("1024,2816,24") == "1024,2816,24"
    assert common.parse_budget("policy") is None
    assert str(common.parse_budget("8/4/3")) == "8/4/3"
    assert common.output_file("out.jsonl").name == "out.jsonl"


def test_engine_settings():
    name, settings = parse_engine("openvino int8=some/dir,budget=8/4/3,group=32")
    assert (name, settings) == ("openvino int8", {"dir": "some/dir", "budget": "8/4/3", "group": "32"})


@pytest.mark.parametrize("text", ["openvino", "openvino=", "openvino=dir,group", "openvino=dir,budget=8/4"])
def test_bad_engines_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError):
        parse_engine(text)
