"""OpenVINO targets: their graphs, trees and compressed weights. Runs with `--engine openvino`.

Files that run over every engine test the generated text.
"""

import random
import shutil

import engines
import numpy as np
import pytest
import torch
from families import CASE_IDS, CASES, SLIDING, VOCAB, prompt, tiny_model
from support.bundled import DRAFT, TARGET
from support.sessions import assert_close, exported, open_session, torch_rows
from support.trees import random_tree
from transformers import AutoModelForCausalLM, AutoTokenizer

if not engines.is_current("openvino"):
    pytest.skip("runs with --engine openvino", allow_module_level=True)

import openvino as ov

from dovetail_plugin import DovetailDraft, TreeBudget
from dovetail_plugin.adapters import openvino as adapter
from dovetail_plugin.adapters.openvino import OpenVINOTarget, graph
from dovetail_plugin.bench.compare import Comparison
from dovetail_plugin.bench.prompts import load_prompts
from dovetail_plugin.targets.engine import engine_of

pytestmark = pytest.mark.usefixtures("fixed_budget")

GREEDY = dict(max_new_tokens=40, do_sample=False, eos_token_id=None)


def read(directory):
    return ov.Core().read_model(directory / "openvino_model.xml")


def names(ports):
    return {name for port in ports for name in port.get_names()}


def test_edits_add_the_inputs_and_outputs_of_trees():
    model = read(exported()[1])
    inputs, outputs = names(model.inputs), names(model.outputs)
    assert not graph.is_prepared(model)
    graph.prepare(model)
    assert graph.is_prepared(model)
    assert names(model.inputs) - inputs == {"tree_bias", "first_logit_row"}
    assert names(model.outputs) - outputs == {"features"}


@pytest.mark.parametrize("kind", ["f32", "int8", "int4"])
def test_neutral_inputs_leave_the_function_as_it_was(kind):
    """With neutral values of the new inputs, the edited graph gives the logits of the stored one in two passes."""
    directory, logits = exported(kind=kind)[1], []
    for edited in (False, True):
        model = read(directory)
        if edited:
            graph.prepare(model)
        compiled = ov.Core().compile_model(model, "CPU", adapter.precision_properties())
        request = compiled.create_infer_request()
        for start, end in ((0, 17), (17, 23)):
            inputs = {
                "input_ids": prompt(23)[:, start:end].numpy(),
                "attention_mask": np.ones((1, end), dtype=np.int64),
                "position_ids": np.arange(start, end)[None],
                "beam_idx": np.zeros(1, dtype=np.int32),
            }
            if edited:
                inputs |= {"tree_bias": np.zeros((1, 1, 1, 1), np.float32), "first_logit_row": np.zeros(1, np.int64)}
            request.infer(inputs)
            logits.append(request.get_tensor("logits").data.copy())
    np.testing.assert_allclose(logits[2], logits[0], atol=1e-5)
    np.testing.assert_allclose(logits[3], logits[1], atol=1e-5)


@pytest.mark.parametrize(("model_type", "fields"), CASES, ids=CASE_IDS)
def test_logits_and_features_equal_torchs(model_type, fields):
    """A prompt longer than the window: features of all rows, logits of the last row, and all logits of a plain pass."""
    model = tiny_model(model_type, **fields)
    target = engines.current().target(model)
    ids = prompt(60)
    logits, features = torch_rows(model, ids)
    with open_session(target) as session:
        output = session.prefill(ids, None)
    assert output.logits.shape == (1, VOCAB)
    assert_close(output.logits[0], logits[-1])
    assert_close(output.features, features)
    assert_close(target(ids).logits[0], logits)


def test_features_are_those_behind_the_final_norm():
    """Features times the head give the logits, also for a head that scales and caps them."""
    model = tiny_model("gemma2", **SLIDING["gemma2"])
    model.model.norm.weight.data.normal_()  # otherwise the state before the norm could pass too
    target = engines.current().target(model)
    with open_session(target) as session:
        output = session.prefill(prompt(), None)
    cap = model.config.final_logit_softcapping
    wanted = cap * torch.tanh(output.features[-1:] @ engine_of(target).tables().head.T / cap)
    assert_close(output.logits, wanted)


def test_left_padding_in_a_plain_pass():
    model = tiny_model("llama")
    ids = torch.cat([torch.zeros(1, 5, dtype=torch.long), prompt()], dim=1)
    mask = (torch.arange(22) >= 5).long()[None]
    logits = engines.current().target(model)(ids, attention_mask=mask).logits[0, 5:]
    assert_close(logits, torch_rows(model, prompt())[0])


# --- trees -----------------------------------------------------------------------------------------

TREES = [(name, fields) for name, fields in CASES if "sliding_window" not in fields or not fields["sliding_window"]]


@pytest.mark.parametrize(("model_type", "fields"), [*TREES, ("mistral", {"sliding_window": 200})], ids=str)
def test_logits_of_tree_nodes_equal_those_of_their_paths(model_type, fields):
    """Three trees, with a path kept after each: every node against a pass of torch over the node's path."""
    model = tiny_model(model_type, **fields)
    text = prompt()
    rng = random.Random(4)
    with open_session(engines.current().target(model)) as session:
        session.prefill(text[:, :-1], None)
        assert session.supports_tree
        for _ in range(3):
            tree = random_tree(int(text[0, -1]), [], TreeBudget(14, 5, 4), rng, VOCAB)
            output = session.score(tree)
            paths = []
            for node, parent in enumerate(tree.parents.tolist()):
                paths.append([*(paths[parent] if node else []), node])
                ids = torch.cat([text[:, :-1], tree.tokens[paths[node]][None]], dim=1)
                logits, features = torch_rows(model, ids)
                assert_close(output.logits[node], logits[-1])
                assert_close(output.features[node], features[-1])
            longest = max(paths, key=len)
            session.keep(longest)
            text = torch.cat([text[:, :-1], tree.tokens[longest][None], prompt(1)], dim=1)


def test_chains_once_the_window_is_near():
    """The graph counts the rows of a window, so holes and branches would push visible rows out of it."""
    target = engines.current().target(tiny_model("mistral", sliding_window=100))
    draft = DovetailDraft.for_target(target)
    draft.budget = TreeBudget(12, 4, 4)
    with open_session(target, max_nodes=12) as session:
        session.prefill(prompt(60), None)
        assert session.supports_tree
        session.prefill(prompt(30), None)
        assert not session.supports_tree
    target.generate(prompt(60), **GREEDY, assistant_model=draft)
    rounds = draft.report.rounds
    assert rounds[0].nodes == 12
    assert rounds[-1].nodes <= 5


# --- compressed weights ----------------------------------------------------------------------------

STEPS = {"int8": 255, "int4": 15}


@pytest.mark.parametrize("kind", STEPS)
def test_tables_of_compressed_exports(kind):
    """The tables are decompressed: within one quantization step of the weights, and equal to the graph's own."""
    model = tiny_model("llama")
    target = engines.current().target(model, kind=kind, ov_config={"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"})
    tables = engine_of(target).tables()
    for table, weight in ((tables.embedding, model.model.embed_tokens.weight), (tables.head, model.lm_head.weight)):
        step = (weight.max(1).values - weight.min(1).values)[:, None] / 255  # embedding and head keep 8 bits
        error = (table - weight.detach()).abs()
        assert bool((error <= step).all())
        assert float(error.max()) > 0
    with open_session(target) as session:
        output = session.prefill(prompt(), None)
    assert_close(output.logits, output.features[-1:] @ tables.head.T)


def test_tied_tables_stay_tied():
    tables = engine_of(engines.current().target(tiny_model("llama", tie_word_embeddings=True))).tables()
    assert tables.head is tables.embedding
    assert tables.bias is None


def test_half_precision_files(tmp_path):
    """An IR whose weights are stored in float16, as many on the hub are."""
    model, directory = exported()
    shutil.copytree(directory, tmp_path / "half", ignore=shutil.ignore_patterns("openvino_model.*"))
    ov.save_model(read(directory), tmp_path / "half" / "openvino_model.xml", compress_to_fp16=True)
    target = OpenVINOTarget.from_pretrained(tmp_path / "half", threads=1)
    weight = model.lm_head.weight.detach()
    assert torch.equal(engine_of(target).tables().head, weight.half().float())
    plain = target.generate(prompt(), **GREEDY)
    draft = DovetailDraft.for_target(target)
    assert torch.equal(plain, target.generate(prompt(), **GREEDY, assistant_model=draft))


@pytest.mark.parametrize("kind", STEPS)
def test_compressed_bundled_target_differs_only_at_ties(kind):
    model = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32)
    target = engines.current().target(model, own_runner=True, kind=kind)
    comparison = Comparison(target, DovetailDraft.from_pretrained(DRAFT), {"max_new_tokens": 64, "do_sample": False})
    for input_ids in load_prompts(None, AutoTokenizer.from_pretrained(TARGET), 8):
        comparison.add(input_ids)
    result = comparison.result()
    assert result.differences == 0
    assert result.identical + result.ties == 8
    assert result.acceptance_length > 2.5
