"""OpenVINO targets: the files they are loaded from, and input that is refused. Runs with `--engine openvino`."""

import shutil

import engines
import pytest
import torch
from families import VOCAB, prompt
from support.files import digests
from support.sessions import exported
from transformers import BertConfig, BertModel

if not engines.is_current("openvino"):
    pytest.skip("runs with --engine openvino", allow_module_level=True)

import openvino as ov
from openvino import opset13 as ops

from dovetail_plugin import DovetailDraft
from dovetail_plugin.adapters.openvino import OpenVINOTarget, graph
from dovetail_plugin.targets.engine import engine_of

pytestmark = pytest.mark.usefixtures("fixed_budget")

GREEDY = dict(max_new_tokens=40, do_sample=False, eos_token_id=None)


@pytest.mark.parametrize("kind", ["f32", "int8"])
def test_files_are_not_changed(tmp_path, kind):
    shutil.copytree(exported(kind=kind)[1], tmp_path / "ir")
    before = digests(tmp_path / "ir")
    target = OpenVINOTarget.from_pretrained(tmp_path / "ir", threads=1)
    target.generate(prompt(), **GREEDY, assistant_model=DovetailDraft.for_target(target))
    assert digests(tmp_path / "ir") == before


# --- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["config.json", "openvino_model.xml", "openvino_model.bin"])
def test_incomplete_directory(tmp_path, missing):
    shutil.copytree(exported()[1], tmp_path / "ir", ignore=shutil.ignore_patterns(missing))
    with pytest.raises((OSError, ValueError), match=missing.replace(".", r"\.")):
        OpenVINOTarget.from_pretrained(tmp_path / "ir")


def test_encoder():
    sizes = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    directory = engines.current().exporter.path(BertModel(BertConfig(**sizes)).eval(), "encoder")
    with pytest.raises(ValueError, match=r"no output `logits`.*last_hidden_state.*an encoder has none") as error:
        OpenVINOTarget.from_pretrained(directory)
    assert directory.name in str(error.value)


def test_stateless_export():
    with pytest.raises(ValueError, match=r"no key/value state.*export it again") as error:
        OpenVINOTarget.from_pretrained(exported(kind="stateless")[1])
    assert "--disable-stateful" in str(error.value)


def test_graph_without_the_attention_that_is_looked_for(monkeypatch):
    model = ov.Core().read_model(exported()[1] / "openvino_model.xml")
    monkeypatch.setattr(graph, "ATTENTION", "FlashAttention")
    with pytest.raises(graph.GraphError, match="looked for FlashAttention nodes and found none"):
        graph.prepare(model)


def test_graph_with_an_unknown_head():
    model = ov.Core().read_model(exported()[1] / "openvino_model.xml")
    result = next(port.get_node() for port in model.outputs if "logits" in port.get_names())
    node = ops.relu(result.input_value(0))
    node.set_friendly_name("a_strange_end")
    result.input(0).replace_source_output(node.output(0))
    with pytest.raises(graph.GraphError, match=r"looked for the head's MatMul.*Relu 'a_strange_end'"):
        graph.prepare(model)


def test_small_key_value_cache_warns():
    directory = exported()[1]
    with pytest.warns(UserWarning, match='cache holds u8.*KV_CACHE_PRECISION "f32"'):
        OpenVINOTarget.from_pretrained(directory, kv_cache_precision="u8")


def test_default_precisions_do_not_warn(recwarn):
    compiled = engine_of(OpenVINOTarget.from_pretrained(exported()[1])).compiled
    assert not [w for w in recwarn if "cache holds" in str(w.message)]
    for name in ("KV_CACHE_PRECISION", "INFERENCE_PRECISION_HINT"):
        assert compiled.get_property(name) == ov.Type.f32


def test_plain_generation_of_a_batch(llama):
    alone = llama.generate(prompt(), **GREEDY)
    assert torch.equal(llama.generate(prompt().repeat(2, 1), **GREEDY), alone.repeat(2, 1))


def test_plain_generation_refuses_what_it_does_not_have(llama):
    with pytest.raises(ValueError, match="num_beams=2"):
        llama.generate(prompt(), **(GREEDY | {"num_beams": 2}))


def test_unknown_arguments(llama, draft):
    with pytest.raises(ValueError, match="no_such_argument"):
        llama.generate(prompt(), **GREEDY, assistant_model=draft, no_such_argument=1)
    with pytest.raises(ValueError, match="no input for token_type_ids"):
        engine_of(llama).session(
            None, max_nodes=1, prefill_chunk=None, model_kwargs={"token_type_ids": torch.zeros(1, 17)}
        )
