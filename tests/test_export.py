"""`dovetail export` and `--target-ir`: bad input, and, with optimum-intel, from a checkpoint to text."""

import importlib.util
import json
import os

import engines
import pytest
from helpers import run_python, save_pair

from dovetail_plugin.cli import export, main


def refusal(capsys, *arguments) -> str:
    assert main([*map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_no_such_target(tmp_path, capsys):
    missing = tmp_path / "missing"
    said = refusal(capsys, "export", "--target", missing, "--to", "openvino", "--out", tmp_path / "out")
    assert f"--target {missing}: no such directory" in said


def test_weights_that_the_format_does_not_store(tmp_path, capsys):
    said = refusal(capsys, "export", "--target", tmp_path, "--to", "onnx", "--weights", "int8", "--out", tmp_path)
    assert "--weights int8 does not go with --to onnx; use fp32" in said


def test_missing_exporter(tmp_path, capsys, monkeypatch):
    target, _ = save_pair(tmp_path)
    monkeypatch.setattr(export, "is_installed", lambda module: False)
    said = refusal(capsys, "export", "--target", target, "--to", "openvino", "--out", tmp_path / "out")
    assert "optimum-intel" in said
    assert "docs/adapters.md of a checkout" in said


OPTIMUM = """
import os, sys
out = sys.argv[-1]
print("arguments", sys.argv[1:])
os.makedirs(out, exist_ok=True)
open(os.path.join(out, "config.json"), "w").write("{}")
open(os.path.join(out, "openvino_model.xml"), "w").write("graph")
sys.exit(int(os.environ.get("FAILS", "0")))
"""
"""Stands for the exporter: it writes two files."""


@pytest.fixture
def installed(tmp_path):
    """A folder on the path with a stand-in for optimum, and a current directory with a target in it."""
    commands = tmp_path / "site" / "optimum" / "commands"
    for folder in (commands, tmp_path / "site" / "optimum" / "intel"):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
    (commands / "optimum_cli.py").write_text(OPTIMUM)
    (tmp_path / "here").mkdir()
    save_pair(tmp_path / "here")
    return tmp_path


def run_export(installed, *more, **environment):
    command = ["-m", "dovetail_plugin", "export", "--target", "target", "--to", "openvino", "--out", "ir", *more]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(installed / "site"))
        for name, value in environment.items():
            patch.setenv(name, value)
        return run_python(*command, cwd=installed / "here")


HOSTILE = "open('ran', 'w')\nraise SystemExit('hostile code was run')"


@pytest.mark.parametrize("path", ["absolute", "relative"])
def test_a_file_of_the_current_directory_is_not_run_as_the_exporter(installed, path):
    """The directory may be a downloaded repository; an empty entry of PYTHONPATH is the current directory, too."""
    here = installed / "here"
    for file in ("optimum.py", "runpy.py", "optimum/__init__.py", "optimum/commands/optimum_cli.py"):
        (here / file).parent.mkdir(parents=True, exist_ok=True)
        (here / file).write_text(HOSTILE)
    more = {"PYTHONPATH": f"{installed / 'site'}{os.pathsep}"} if path == "relative" else {}
    done = run_export(installed, **more)
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in (here / "ir").iterdir()) == ["config.json", "openvino_model.xml"]
    assert not (here / "ran").exists() and "arguments ['export', 'openvino', '--model', 'target'" in done.stdout


def test_an_exporter_in_the_current_directory_alone_is_not_found(installed):
    (installed / "site" / "optimum").rename(installed / "here" / "optimum")
    for file in (installed / "here" / "optimum").rglob("__init__.py"):
        file.write_text(HOSTILE)
    done = run_export(installed)
    assert not (installed / "here" / "ran").exists()
    if importlib.util.find_spec("optimum") is None:
        assert done.returncode == 2 and "needs optimum-intel, which is not installed" in done.stderr


@pytest.mark.parametrize("exists", [False, True])
def test_a_failed_export_leaves_nothing_behind(installed, exists):
    here = installed / "here"
    if exists:
        (here / "ir").mkdir()
    before = sorted(here.rglob("*"))
    assert run_export(installed, FAILS="3").returncode == 3
    assert sorted(here.rglob("*")) == before
    assert run_export(installed).returncode == 0
    assert (here / "ir" / "openvino_model.xml").read_text() == "graph"


def test_a_used_directory_is_not_exported_to(installed):
    (installed / "here" / "ir").mkdir()
    (installed / "here" / "ir" / "thesis.txt").write_text("mine")
    done = run_export(installed)
    assert done.returncode == 2 and "ir is not empty (thesis.txt)" in done.stderr
    assert [file.name for file in (installed / "here" / "ir").iterdir()] == ["thesis.txt"]


def test_directory_without_a_graph(tmp_path, capsys):
    target, draft = save_pair(tmp_path)
    said = refusal(capsys, "generate", "--target-ir", target, "--draft", draft, "--prompt", "x")
    assert "openvino_model.xml" in said
    assert "dovetail export" in said


def test_one_target_only(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--target", "a", "--target-ir", "b", "--draft", "c", "--prompt", "x"])
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.skipif(
    not (engines.is_current("openvino") and importlib.util.find_spec("optimum")),
    reason="runs with --engine openvino where optimum-intel is installed",
)
@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_from_checkpoint_to_text(tmp_path, weights):
    """Export a pair, then generate and benchmark with the exported target and the default policy."""
    target, draft = save_pair(tmp_path)
    command = ["-m", "dovetail_plugin", "export", "--target", target, "--to", "openvino", "--weights", weights]
    exported = run_python(*command, "--out", tmp_path / "ir", cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    common = ["--target-ir", tmp_path / "ir", "--draft", draft, "--max-new-tokens", "12"]
    said = run_python("-m", "dovetail_plugin", "generate", *common, "--prompt", "count", "--compare", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert len(list((tmp_path / "records").iterdir())) == 1, "the default policy did not measure the exported target"
    if weights == "fp32":
        assert "identical" in said.stderr
    table = run_python("-m", "dovetail_plugin", "bench", *common, "--count", "2", cwd=tmp_path)
    assert table.returncode == 0, table.stdout + table.stderr
    assert "ratio" in table.stdout
    if weights == "int8":
        options = ["--target", target, "--draft", draft, "--max-new-tokens", "4", "--count", "1", "--repeats", "1"]
        engine = [
            "--engines",
            "int8",
            "--engine",
            f"exported={tmp_path / 'ir'},budget=4/3/1",
            "--context",
            "8",
            "--json",
        ]
        line = run_python("-m", "dovetail_plugin", "bench", *options, *engine, cwd=tmp_path)
        assert line.returncode == 0, line.stderr
        assert json.loads(line.stdout)["texts"].keys() == {"torch, dovetail", "packed int8", "exported"}
