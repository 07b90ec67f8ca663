"""`dovetail export` and `--target-ir`: bad input, and, with optimum-intel, from a checkpoint to text."""

import importlib.util

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
    monkeypatch.setattr(export, "_is_there", lambda module: False)
    said = refusal(capsys, "export", "--target", target, "--to", "openvino", "--out", tmp_path / "out")
    assert "optimum-intel" in said
    assert "docs/adapters.md" in said


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
        assert "identical" in said.stdout
    table = run_python("-m", "dovetail_plugin", "bench", *common, "--count", "2", cwd=tmp_path)
    assert table.returncode == 0, table.stdout + table.stderr
    assert "ratio" in table.stdout
