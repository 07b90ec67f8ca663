"""`dovetail bench --engines`: the command, its refusals, and targets that are exported for the comparison."""

import argparse
import functools
import json

import pytest
from helpers import PAIR, SHORT, refusal
from transformers import AutoModelForCausalLM

from dovetail_plugin import CpuWeights, machine, save_packed
from dovetail_plugin.bench.engines import (
    compare_engines,
)
from dovetail_plugin.bench.roofline import Roofline
from dovetail_plugin.cli import engines as loading
from dovetail_plugin.cli import export, main
from dovetail_plugin.cli.common import ALL_ENGINES, engine_names
from dovetail_plugin.kernels import KINDS, WEIGHTS

LIMITS = Roofline(20e9, {"avx2": {"int8": 100e9, "int4": 200e9, "float": 50e9}}, "avx2", 1 << 20)
QUICK = (*PAIR, *SHORT, "--count", "1", "--repeats", "1", "--context", "8")


@pytest.fixture
def quick_limits(monkeypatch):
    """The command takes given limits, because measuring takes seconds."""
    given = functools.partial(compare_engines, measure_limits=lambda _: LIMITS)
    monkeypatch.setattr(loading, "compare_engines", given)


@pytest.mark.usefixtures("kernels", "quick_limits")
def test_command(here, capsys):
    options = ("--engines", "int8", "--plot", "e.png", "--out", "e.jsonl")
    assert main(["bench", *QUICK, *options]) == 0
    printed = capsys.readouterr()
    assert "| packed int8" in printed.out and "| torch, dovetail" in printed.out and "| packed int4" not in printed.out
    assert printed.err.strip().splitlines()[-1] == "plot: e.png"
    assert (here / "e.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((here / "e.jsonl").read_text())
    assert result["context"] == 8
    assert list(result["passes"]["pass_ms"]["torch"]) == ["1", "2", "4", "8", "16", "32"]
    assert result["settings"]["target"] == "target" and result["settings"]["left_out"] == {}


@pytest.mark.usefixtures("kernels", "quick_limits")
def test_all_engines_are_those_that_are_installed(here, capsys, monkeypatch):
    monkeypatch.setattr(export, "is_installed", lambda name: False)
    assert main(["bench", *QUICK, "--engines", "--json"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert list(result["texts"]) == ["torch, dovetail", *(f"packed {kind}" for kind in WEIGHTS)]
    assert result["settings"]["left_out"] == {"openvino": "openvino is not installed"}
    assert "left out: openvino (openvino is not installed)" in printed.err


MISTAKES = {
    "--context is for the comparison of engines; add --engines": ["--context", "8"],
    "--engine is for the comparison of engines; add --engines": ["--engine", "a=b"],
    "--weights does not go with --engines": ["--engines", "--weights", "int8"],
    "--synthetic-acceptance does not go with --engines": ["--engines", "--synthetic-acceptance", "0.5"],
    "there is no engine 'int5'; give int8": ["--engines", "int8,int5"],
    "'a' is not a valid engine; give NAME=DIR": ["--engines", "--engine", "a"],
    "'torch' is another engine's name": ["--engines", "--engine", "torch=target"],
    "exact is true or false, got 'yes'": ["--engines", "--engine", "a=target,exact=yes"],
    "'=target' is not a valid engine": ["--engines", "--engine", "=target"],
    "two engines have the same name": ["--engines", "--engine", "a=target", "--engine", "a=draft"],
}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes(message, capsys):
    assert message in refusal(capsys, "bench", *PAIR, *MISTAKES[message])


@pytest.mark.usefixtures("here")
def test_targets_without_float_weights_are_refused(capsys):
    save_packed(AutoModelForCausalLM.from_pretrained("target", quantization_config=CpuWeights("int8")), "packed")
    for target, message in (("packed", "quantized already"), ("a.gguf", "--engine NAME=FILE.gguf")):
        assert message in refusal(capsys, "bench", "--target", target, "--draft", "draft", "--engines")


@pytest.mark.usefixtures("here")
def test_engines_that_were_named_must_be_there(capsys, monkeypatch):
    monkeypatch.setattr(loading, "library", lambda: None)
    line = refusal(capsys, "bench", *QUICK, "--engines", "int8")
    assert "--engines int8: the CPU kernels were not built." in line


@pytest.mark.usefixtures("here", "kernels")
def test_too_little_memory_is_refused_before_models_are_loaded(capsys, monkeypatch):
    monkeypatch.setattr(machine, "available_bytes", lambda: 4096)
    monkeypatch.setattr(loading, "load_language_model", None)
    line = refusal(capsys, "bench", *QUICK, "--engines", "int8")
    assert "and 4096 bytes of memory are free" in line and "int8 " in line


def test_names_of_engines():
    assert engine_names("int8, openvino") == ["int8", "openvino"]
    assert engine_names("int8,all") == "all"
    assert set(KINDS) < set(ALL_ENGINES)
    with pytest.raises(argparse.ArgumentTypeError):
        engine_names("")


# --- the export for a comparison ---------------------------------------------------------------------


def request(**changes):
    return argparse.Namespace(
        **{"target": ".", "engines": ["openvino"], "engine": [], "trust_remote_code": False} | changes
    )


def test_openvino_is_exported_where_optimum_is_installed(monkeypatch, tmp_path):
    installed = {"openvino", "optimum.intel"}
    monkeypatch.setattr(export, "is_installed", lambda name: name in installed)
    assert loading.choose(request()).export
    with pytest.raises(ValueError, match="only a target in a directory"):
        loading.choose(request(target="no/such"))
    installed.remove("optimum.intel")
    assert "optimum-intel" in loading.choose(request(engines="all")).left_out["openvino"]
    (tmp_path / "openvino_model.xml").touch()
    named = request(engines="all", engine=[("mine", {"dir": str(tmp_path)})])
    chosen = loading.choose(named)
    assert chosen.exported == {"mine": {"dir": str(tmp_path)}} and not chosen.export


def test_the_export_is_removed_after_the_comparison(monkeypatch, capsys):
    def exported(args, weights, out, output):
        assert (args.to, weights) == ("openvino", "int8") and args.passed_on == ["--trust-remote-code"]
        out.mkdir()
        return status

    monkeypatch.setattr(export, "run_optimum", exported)
    status, chosen = 0, loading.Chosen(export=True)
    with loading._exported(request(trust_remote_code=True), chosen) as found:
        place = loading.Path(found["openvino"]["dir"])
        assert place.is_dir()
    assert not place.exists() and chosen.exported == {}
    status = 1
    with (
        pytest.raises(ValueError, match="cannot be exported to OpenVINO"),
        loading._exported(request(trust_remote_code=True), chosen),
    ):
        pass
    assert "exporting . to OpenVINO" in capsys.readouterr().err
