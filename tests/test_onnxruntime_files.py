"""ONNX Runtime targets: directories they are loaded from, and bad input. Runs with `--engine onnxruntime`."""

import shutil
import sys
from pathlib import Path

import engines
import pytest
import torch
from families import prompt, tiny_model
from support.files import digests
from support.sessions import exported

if not engines.is_current("onnxruntime"):
    pytest.skip("runs with --engine onnxruntime", allow_module_level=True)

import onnx
from onnx import TensorProto, helper

from dovetail_plugin import DovetailDraft
from dovetail_plugin.adapters.onnxruntime import OnnxRuntimeTarget, engine_for, weights
from dovetail_plugin.targets.engine import engine_of

pytestmark = pytest.mark.usefixtures("fixed_budget")

GREEDY = dict(max_new_tokens=40, do_sample=False, eos_token_id=None)


def copied(directory: Path, to: Path) -> Path:
    return Path(shutil.copytree(directory, to / directory.name))


@pytest.mark.parametrize("kind", ["f32", "int4"])
def test_files_are_not_changed(tmp_path, kind):
    directory = copied(exported(kind=kind)[1], tmp_path)
    before = digests(directory)
    target = OnnxRuntimeTarget.from_pretrained(directory, threads=1)
    draft = DovetailDraft.for_target(target)
    target.generate(prompt(), **GREEDY, assistant_model=draft)
    assert digests(directory) == before


def _with_external_data(tmp_path) -> Path:
    directory = copied(exported()[1], tmp_path)
    model = onnx.load(directory / "model.onnx")
    (directory / "model.onnx").unlink()
    onnx.save(
        model, directory / "model.onnx", save_as_external_data=True, location="model.onnx_data", size_threshold=64
    )
    assert (directory / "model.onnx_data").exists()
    return directory


def _linked(tmp_path) -> Path:
    """A directory like a snapshot of the hub: links to files with other names in another directory."""
    directory, blobs, snapshot = _with_external_data(tmp_path), tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    for number, file in enumerate(sorted(directory.iterdir())):
        file.rename(blobs / f"blob{number}")
        (snapshot / file.name).symlink_to(Path("..") / "blobs" / f"blob{number}")
    return snapshot


@pytest.mark.parametrize("arrange", [_with_external_data, _linked])
def test_external_data(tmp_path, arrange):
    target, plain = OnnxRuntimeTarget.from_pretrained(arrange(tmp_path), threads=1), prompt()
    inside = OnnxRuntimeTarget.from_pretrained(exported()[1], threads=1)
    assert torch.equal(target(plain).logits, inside(plain).logits)
    one, other = engine_of(target).tables(), engine_of(inside).tables()
    assert torch.equal(one.embedding, other.embedding) and torch.equal(one.head, other.head)


def test_weights_stay_in_their_files():
    """The graph that the session is made from does not contain large weights."""
    directory = exported(hidden_size=128, intermediate_size=256)[1]
    file = directory / "model.onnx"
    model = weights.point_to_files(onnx.load(file, load_external_data=False), file).model
    assert max(len(tensor.raw_data) for tensor in model.graph.initializer) < weights.SMALL
    assert model.ByteSize() < file.stat().st_size / 2


def test_parameters_are_counted():
    model = tiny_model("llama")
    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    wanted = model.num_parameters() - norms
    for kind in ("f32", "int8"):
        assert OnnxRuntimeTarget.from_pretrained(exported(kind=kind)[1], threads=1).num_parameters() == wanted


# --- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["config.json", "model.onnx"])
def test_incomplete_directory(tmp_path, missing):
    directory = copied(exported()[1], tmp_path)
    (directory / missing).unlink()
    with pytest.raises(OSError, match=missing):
        OnnxRuntimeTarget.from_pretrained(directory)


def test_missing_external_data(tmp_path):
    directory = _with_external_data(tmp_path)
    (directory / "model.onnx_data").unlink()
    with pytest.raises(OSError, match=r"model\.onnx_data"):
        OnnxRuntimeTarget.from_pretrained(directory)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("encoder", "no output `logits`.*last_hidden_state.*an encoder"),
        ("without_cache", r"no inputs `past_key_values\.\*`.*text-generation-with-past"),
        ("dynamic", "DynamicQuantizeLinear .*Quantize weights only"),
    ],
)
def test_exports_that_cannot_be_targets(kind, match):
    with pytest.raises(ValueError, match=match):
        OnnxRuntimeTarget.from_pretrained(exported(kind=kind)[1])


def _edited(tmp_path, edit) -> Path:
    directory = copied(exported()[1], tmp_path)
    model = onnx.load(directory / "model.onnx")
    edit(model.graph)
    onnx.save(model, directory / "model.onnx")
    return directory


def _without_softmax(nodes):
    for node in nodes.node:
        if node.op_type == "Softmax":
            node.op_type = "LogSoftmax"


def _with_fused_attention(nodes):
    for node in nodes.node:
        if node.op_type == "Concat" and "past_key_values" in node.input[0]:
            node.op_type = "GroupQueryAttention"


def _with_another_head(nodes):
    next(node for node in nodes.node if "logits" in node.output).op_type = "Conv"


def _with_a_merged_cache(nodes):
    nodes.input.append(helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1]))


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (_without_softmax, "looked for Softmax nodes behind an Add.*each of 3 layers, and found 0"),
        (_with_fused_attention, r"looked for one Concat.*past_key_values\.0\.key.*GroupQueryAttention"),
        (_with_another_head, "looked for the head's MatMul or MatMulNBits.*found Conv '/lm_head/MatMul'"),
        (_with_a_merged_cache, "inputs that cannot be filled: use_cache_branch"),
    ],
)
def test_graphs_that_cannot_be_edited(tmp_path, edit, match):
    with pytest.raises(ValueError, match=match):
        OnnxRuntimeTarget.from_pretrained(_edited(tmp_path, edit))


def test_optimum_objects_are_refused():
    class ORTModelForCausalLM:
        pass

    for call in (engine_for, OnnxRuntimeTarget.from_pretrained):
        with pytest.raises(ValueError, match=r"ORTModelForCausalLM.*Pass the directory"):
            call(ORTModelForCausalLM())


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_missing_package_names_the_extra(monkeypatch, missing):
    for name in [name for name in sys.modules if name.startswith("dovetail_plugin.adapters.onnxruntime")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"pip install '\.\[onnxruntime\]'"):
        __import__("dovetail_plugin.adapters.onnxruntime")


def test_unknown_arguments():
    engine = engine_of(engines.current().target(tiny_model("llama")))
    extra = {"token_type_ids": torch.zeros(1, 17)}
    with pytest.raises(ValueError, match="the graph has no input for token_type_ids"):
        engine.session(engine.cache(None), max_nodes=1, prefill_chunk=None, model_kwargs=extra)
