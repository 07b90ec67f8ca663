"""OpenVINO targets: their graphs, their state and the files they come from. Runs with `--engine openvino`.

That texts are right is tested by the files that run over every engine.
"""

import hashlib
import itertools
import random
import shutil

import engines
import numpy as np
import pytest
import torch
from conftest import random_tree
from families import SLIDING, VOCAB, prompt, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from test_families import CASES, IDS

if not engines.is_current("openvino"):
    pytest.skip("runs with --engine openvino", allow_module_level=True)

import openvino as ov
from openvino import opset13 as ops
from transformers import AutoTokenizer

from dovetail_plugin import DovetailDraft, TreeBudget, machine
from dovetail_plugin.adapters import openvino as adapter
from dovetail_plugin.adapters.openvino import OpenVINOTarget, graph
from dovetail_plugin.adapters.openvino import session as openvino_session
from dovetail_plugin.bench.compare import Comparison
from dovetail_plugin.bench.prompts import load_prompts
from dovetail_plugin.targets.engine import engine_of

GREEDY = dict(max_new_tokens=40, do_sample=False, eos_token_id=None)


def export(model_type="llama", kind="f32", **fields):
    """(the torch model, the directory of its export)."""
    model = tiny_model(model_type, **fields)
    return model, engines.current().exporter.path(model, kind)


def open_session(target, cache=None, max_nodes=30):
    engine = engine_of(target)
    return engine.session(
        cache or engine.cache(None), max_length=500, max_nodes=max_nodes, prefill_chunk=None, model_kwargs={}
    )


@torch.no_grad()
def torch_rows(model, ids):
    """(logits, features) of all rows of a text, by torch."""
    hidden = model.base_model(input_ids=ids).last_hidden_state
    return model(input_ids=ids).logits[0], hidden[0]


def close(got, wanted):
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


# --- the graph -------------------------------------------------------------------------------------


def read(directory):
    return ov.Core().read_model(directory / "openvino_model.xml")


def names(ports):
    return {name for port in ports for name in port.get_names()}


def test_edits():
    model = read(export()[1])
    inputs, outputs = names(model.inputs), names(model.outputs)
    assert not graph.is_prepared(model)
    graph.prepare(model)
    assert graph.is_prepared(model)
    assert names(model.inputs) - inputs == {"tree_bias", "first_logit_row"}
    assert names(model.outputs) - outputs == {"features"}


@pytest.mark.parametrize("kind", ["f32", "int8", "int4"])
def test_neutral_inputs_leave_the_function_as_it_was(kind):
    """The edited graph against the stored one, over two passes: the same logits."""
    directory, logits = export(kind=kind)[1], []
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


@pytest.mark.parametrize(("model_type", "fields"), CASES, ids=IDS)
def test_logits_and_features_are_torchs(model_type, fields):
    """Of a prompt longer than the window: features of every row, logits of the last, and all of a plain pass."""
    model = tiny_model(model_type, **fields)
    target = engines.current().target(model)
    ids = prompt(60)
    logits, features = torch_rows(model, ids)
    with open_session(target) as session:
        output = session.prefill(ids, None)
    assert output.logits.shape == (1, VOCAB)
    close(output.logits[0], logits[-1])
    close(output.features, features)
    close(target(ids).logits[0], logits)


def test_features_are_those_behind_the_final_norm():
    """The features times the head are the logits, with a head that scales and caps them too."""
    model = tiny_model("gemma2", **SLIDING["gemma2"])
    model.model.norm.weight.data.normal_()  # else the state before the norm might pass
    target = engines.current().target(model)
    with open_session(target) as session:
        output = session.prefill(prompt(), None)
    cap = model.config.final_logit_softcapping
    wanted = cap * torch.tanh(output.features[-1:] @ engine_of(target).tables().head.T / cap)
    close(output.logits, wanted)


def test_left_padding_in_a_plain_pass():
    model = tiny_model("llama")
    ids = torch.cat([torch.zeros(1, 5, dtype=torch.long), prompt()], dim=1)
    mask = (torch.arange(22) >= 5).long()[None]
    logits = engines.current().target(model)(ids, attention_mask=mask).logits[0, 5:]
    close(logits, torch_rows(model, prompt())[0])


# --- trees -----------------------------------------------------------------------------------------

TREES = [(name, fields) for name, fields in CASES if "sliding_window" not in fields or not fields["sliding_window"]]


@pytest.mark.parametrize(("model_type", "fields"), [*TREES, ("mistral", {"sliding_window": 200})], ids=str)
def test_tree_scores_are_those_of_its_paths(model_type, fields):
    """Three trees with paths kept in between, holes and all: each node against torch's run over its own path."""
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
                close(output.logits[node], logits[-1])
                close(output.features[node], features[-1])
            longest = max(paths, key=len)
            session.keep(longest)
            text = torch.cat([text[:, :-1], tree.tokens[longest][None], prompt(1)], dim=1)


def test_chains_once_the_window_is_near():
    """The graph counts a window's rows: holes and branches would push out what is still visible."""
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


# --- the state -------------------------------------------------------------------------------------


@pytest.fixture
def rows(monkeypatch):
    """After every round: (tokens, rows of the state as the engine has it, rows as the cache counts them)."""
    seen, keep = [], openvino_session.OpenVINOSession.keep

    def spy(session, path):
        keep(session, path)
        owned = session._state
        held = [state.state.shape[owned.row_axis] for state in owned.request.query_state()]
        assert len(set(held)) == 1
        seen.append((session._cache.length, held[0], session._cache.slots))

    monkeypatch.setattr(openvino_session.OpenVINOSession, "keep", spy)
    return seen


@pytest.mark.parametrize("free", [0, 8, 128])
def test_holes_are_bounded_and_taken_out(llama, draft, oracle, rows, monkeypatch, free):
    options = GREEDY | {"max_new_tokens": 200}
    plain = llama.generate(prompt(), **options)
    oracle(plain, 17)
    monkeypatch.setattr(openvino_session, "FREE_HOLES", free)
    rows.clear()
    assert torch.equal(plain, llama.generate(prompt(), **options, assistant_model=draft))
    holes = [held - tokens for tokens, held, _ in rows]
    assert all(held == counted for _, held, counted in rows)
    assert all(count <= free + tokens // 2 for count, (tokens, _, _) in zip(holes, rows, strict=True))
    compactions = [after for before, after in itertools.pairwise(holes) if after < before]
    assert compactions, "no compaction happened, so nothing was tested"
    assert set(compactions) == {0}


def test_exact_targets_keep_no_holes(oracle, rows):
    """Chains, and a state that is row for row what plain generation makes of it: the same bits.

    That a row's product does not depend on how many rows there are is a property of the CPU plugin's int8 kernels for
    VNNI; elsewhere it computes one row by another kernel, and what is left is a rounding of float32.
    """
    target = engines.current().target(tiny_model("llama"), kind="int8", exact=True)
    draft = DovetailDraft.for_target(target)
    options = GREEDY | {"max_new_tokens": 60, "output_logits": True, "return_dict_in_generate": True}
    plain = target.generate(prompt(), **options)
    oracle(plain.sequences, 17)
    rows.clear()
    drafted = target.generate(prompt(), **options, assistant_model=draft)
    assert all(tokens == held for tokens, held, _ in rows)
    assert draft.report.acceptance_length > 1
    assert torch.equal(plain.sequences, drafted.sequences)
    one, other = torch.cat(plain.logits), torch.cat(drafted.logits)
    if "vnni" in machine.cpu_name():
        assert torch.equal(one, other)
    torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("free", [-1000, 1000])
def test_turns_with_holes_and_without(llama, draft, oracle, monkeypatch, free):
    monkeypatch.setattr(openvino_session, "FREE_HOLES", free)
    options = GREEDY | {"return_dict_in_generate": True}
    first = llama.generate(prompt(), **GREEDY)
    text = torch.cat([first, prompt(6)], dim=1)
    second = llama.generate(text, **GREEDY)
    oracle(second, 17)
    out = llama.generate(prompt(), **options, assistant_model=draft)
    assert (out.past_key_values.holes == 0) == (free < 0)
    oracle(second, text.shape[1])
    other = DovetailDraft.for_target(llama)  # one that was not there in the first turn
    out = llama.generate(text, **options, past_key_values=out.past_key_values, assistant_model=other)
    assert torch.equal(out.sequences, second)


def test_stale_cache(llama, draft):
    """The state holds one text: a cache from before another one is refused, and a later text is right."""
    first = llama.generate(prompt(), **GREEDY, return_dict_in_generate=True, assistant_model=draft)
    other = llama.generate(prompt(9), **GREEDY)
    more = torch.cat([first.sequences, prompt(3)], dim=1)
    with pytest.raises(ValueError, match=r"earlier generation.*whole text without past_key_values"):
        llama.generate(more, **GREEDY, past_key_values=first.past_key_values, assistant_model=draft)
    assert torch.equal(other, llama.generate(prompt(9), **GREEDY))


def test_an_interrupted_round_leaves_a_valid_cache(llama):
    """Rows that were scored and neither kept nor rejected stay hidden when the text goes on."""
    text, cache = prompt(), engine_of(llama).cache(None)
    with open_session(llama) as session:
        wanted = session.prefill(text, None)
    with open_session(llama, cache) as session:
        session.prefill(text[:, :-1], None)
        session.score(random_tree(5, [], TreeBudget(14, 5, 4), random.Random(4), VOCAB))
    assert cache.get_seq_length() == text.shape[1] - 1
    with open_session(llama, cache) as session:
        output = session.prefill(text[:, -1:], None)
    close(output.logits, wanted.logits)
    close(output.features, wanted.features[-1:])


def test_prompt_in_chunks(llama, draft, monkeypatch):
    plain = llama.generate(prompt(50), **GREEDY)
    monkeypatch.setattr(openvino_session, "PREFILL_ROWS", 7)
    passes, infer = [], openvino_session.OpenVINOSession._infer

    def spy(session, ids, *args, **kwargs):
        passes.append(len(ids))
        return infer(session, ids, *args, **kwargs)

    monkeypatch.setattr(openvino_session.OpenVINOSession, "_infer", spy)
    assert torch.equal(plain, llama.generate(prompt(50), **GREEDY, assistant_model=draft))
    assert passes[:8] == [7] * 7 + [1]


@given(st.integers(0, 2000), st.integers(1, 600))
def test_passes_over_a_prompt_are_whole_blocks_and_a_short_rest(rows, most):
    passes = openvino_session.prompt_passes(rows, most)
    assert sum(passes) == rows and all(0 < count <= most for count in passes)
    assert len(passes) <= -(-rows // most) + 1
    assert all(count == most for count in passes[:-2])


@pytest.mark.parametrize(
    ("rows", "passes"),
    [(40, [40]), (64, [64]), (65, [64, 1]), (112, [64, 48]), (113, [113]), (131, [128, 3]), (600, [512, 64, 24])],
)
def test_a_short_rest_is_run_by_itself(rows, passes):
    assert openvino_session.prompt_passes(rows, 512) == passes


def test_interrupted_generation_leaves_a_usable_target(llama, draft, monkeypatch):
    plain = llama.generate(prompt(), **GREEDY)

    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(draft, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llama.generate(prompt(), **GREEDY, assistant_model=draft)
    assert torch.equal(plain, llama.generate(prompt(), **GREEDY, assistant_model=draft))


# --- fewer bits ------------------------------------------------------------------------------------

STEPS = {"int8": 255, "int4": 15}


@pytest.mark.parametrize("kind", STEPS)
def test_tables_of_compressed_exports(kind):
    """Embedding and head come out decompressed: within one step of the weights, and what the graph computes with."""
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
    close(output.logits, output.features[-1:] @ tables.head.T)


def test_tied_tables_stay_tied():
    tables = engine_of(engines.current().target(tiny_model("llama", tie_word_embeddings=True))).tables()
    assert tables.head is tables.embedding
    assert tables.bias is None


def test_half_precision_files(tmp_path):
    """IRs whose weights are stored in float16, as many on the hub are."""
    model, directory = export()
    shutil.copytree(directory, tmp_path / "half", ignore=shutil.ignore_patterns("openvino_model.*"))
    ov.save_model(read(directory), tmp_path / "half" / "openvino_model.xml", compress_to_fp16=True)
    target = OpenVINOTarget.from_pretrained(tmp_path / "half", threads=1)
    weight = model.lm_head.weight.detach()
    assert torch.equal(engine_of(target).tables().head, weight.half().float())
    plain = target.generate(prompt(), **GREEDY)
    draft = DovetailDraft.for_target(target)
    assert torch.equal(plain, target.generate(prompt(), **GREEDY, assistant_model=draft))


@pytest.mark.parametrize("kind", STEPS)
def test_compressed_bundled_target_parts_only_at_ties(kind):
    from test_bundled import DRAFT, TARGET, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32)
    target = engines.current().target(model, own_runner=True, kind=kind)
    comparison = Comparison(target, DovetailDraft.from_pretrained(DRAFT), {"max_new_tokens": 64, "do_sample": False})
    for input_ids in load_prompts(None, AutoTokenizer.from_pretrained(TARGET), 8):
        comparison.add(input_ids)
    result = comparison.result()
    assert result.differences == 0
    assert result.identical + result.ties == 8
    assert result.acceptance_length > 2.5


# --- the user's files, and optimum's models --------------------------------------------------------


def digests(directory):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()}


@pytest.mark.parametrize("kind", ["f32", "int8"])
def test_files_are_not_changed(tmp_path, kind):
    shutil.copytree(export(kind=kind)[1], tmp_path / "ir")
    before = digests(tmp_path / "ir")
    target = OpenVINOTarget.from_pretrained(tmp_path / "ir", threads=1)
    target.generate(prompt(), **GREEDY, assistant_model=DovetailDraft.for_target(target))
    assert digests(tmp_path / "ir") == before


def optimum_model(directory, **options):
    optimum = pytest.importorskip("optimum.intel")
    return optimum.OVModelForCausalLM.from_pretrained(directory, **options)


def test_optimum_model(tmp_path, oracle):
    """Drafted, plain by optimum's own loop, and both again: one text, one request, files as they were."""
    shutil.copytree(export()[1], tmp_path / "ir")
    before = digests(tmp_path / "ir")
    model = optimum_model(tmp_path / "ir")
    draft = DovetailDraft.for_target(model)
    options = dict(attention_mask=torch.ones_like(prompt()), **GREEDY)
    drafted = model.generate(prompt(), **options, assistant_model=draft)
    request = model.request
    assert engine_of(model).request is request
    plain = model.generate(prompt(), **options)
    assert torch.equal(plain, drafted)
    oracle(plain, 17)
    assert torch.equal(plain, model.generate(prompt(), **options, assistant_model=draft))
    assert draft.report.acceptance_length > 1.2
    assert torch.equal(plain, model.generate(prompt(), **options))
    assert model.request is request, "compiled a second time"
    assert torch.equal(plain, tiny_model("llama").generate(prompt(), **options))
    assert digests(tmp_path / "ir") == before


def test_optimum_model_is_compiled_once_for_drafting(monkeypatch):
    """The copy that was compiled without the edits is let go, and no other is made afterwards."""
    model = optimum_model(export()[1])
    compiled = []
    compile_model = ov.Core.compile_model

    def spy(core, graph_or_file, *args, **kwargs):
        compiled.append(graph_or_file)
        return compile_model(core, graph_or_file, *args, **kwargs)

    monkeypatch.setattr(ov.Core, "compile_model", spy)
    engine_of(model)
    assert [c is model.model for c in compiled] == [True]
    del compiled[:]
    for _ in range(2):
        model.generate(prompt(), **GREEDY)
        engine_of(model).cache(None)
    assert compiled == []


def test_optimum_turns():
    """A cache goes on to the next drafted turn, but not past a text that optimum's own loop wrote in between."""
    model = optimum_model(export()[1])
    draft = DovetailDraft.for_target(model)
    options = GREEDY | {"return_dict_in_generate": True, "assistant_model": draft}
    whole = model.generate(torch.cat([model.generate(prompt(), **GREEDY), prompt(5)], dim=1), **GREEDY)
    first = model.generate(prompt(), **options)
    more = torch.cat([first.sequences, prompt(5)], dim=1)
    second = model.generate(more, past_key_values=first.past_key_values, **options)
    assert torch.equal(second.sequences, whole)
    model.generate(prompt(9), **GREEDY)
    with pytest.raises(ValueError, match="earlier generation"):
        model.generate(torch.cat([whole, prompt(5)], dim=1), past_key_values=second.past_key_values, **options)


def test_optimum_models_that_cannot_be_edited():
    draft = DovetailDraft.for_target(tiny_model("llama"))
    model = optimum_model(export()[1], compile_only=True)
    with pytest.raises(ValueError, match="compile_only=True"):
        model.generate(prompt(), **GREEDY, assistant_model=draft)
    model = optimum_model(export(kind="stateless")[1])
    with pytest.raises(ValueError, match="stateless export"):
        model.generate(prompt(), **GREEDY, assistant_model=draft)


# --- a draft beside the engine ---------------------------------------------------------------------


def test_preparing_a_draft_takes_no_random_numbers():
    """The first drafted text is sampled with the numbers that a plain one would be sampled with."""
    pytest.importorskip("nncf")
    target = engines.current().target(tiny_model("llama"), own_runner=True)
    draft = DovetailDraft.for_target(target)
    options = GREEDY | {"do_sample": True}
    torch.manual_seed(3)
    plain = target.generate(prompt(), **options)
    torch.manual_seed(3)
    assert torch.equal(plain, target.generate(prompt(), **options, assistant_model=draft))


def test_name_of_the_directory_is_no_reason_to_warn(llama, draft, recwarn):
    draft.config.target_name_or_path = "org/the-model-that-was-exported"
    llama.generate(prompt(), **GREEDY, assistant_model=DovetailDraft(draft.config))
    assert not [w for w in recwarn if "was trained for" in str(w.message)]


# --- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["config.json", "openvino_model.xml", "openvino_model.bin"])
def test_incomplete_directory(tmp_path, missing):
    shutil.copytree(export()[1], tmp_path / "ir", ignore=shutil.ignore_patterns(missing))
    with pytest.raises((OSError, ValueError), match=missing.replace(".", r"\.")):
        OpenVINOTarget.from_pretrained(tmp_path / "ir")


def test_encoder():
    from transformers import BertConfig, BertModel

    sizes = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    directory = engines.current().exporter.path(BertModel(BertConfig(**sizes)).eval(), "encoder")
    with pytest.raises(ValueError, match=r"no output `logits`.*last_hidden_state.*an encoder has none") as error:
        OpenVINOTarget.from_pretrained(directory)
    assert directory.name in str(error.value)


def test_stateless_export():
    with pytest.raises(ValueError, match=r"no key/value state.*export it again") as error:
        OpenVINOTarget.from_pretrained(export(kind="stateless")[1])
    assert "--disable-stateful" in str(error.value)


def test_graph_without_the_attention_that_is_looked_for(monkeypatch):
    model = read(export()[1])
    monkeypatch.setattr(graph, "ATTENTION", "FlashAttention")
    with pytest.raises(graph.GraphError, match="looked for FlashAttention nodes and found none"):
        graph.prepare(model)


def test_graph_with_an_unknown_head():
    model = read(export()[1])
    result = next(port.get_node() for port in model.outputs if "logits" in port.get_names())
    node = ops.relu(result.input_value(0))
    node.set_friendly_name("a_strange_end")
    result.input(0).replace_source_output(node.output(0))
    with pytest.raises(graph.GraphError, match=r"looked for the head's MatMul.*Relu 'a_strange_end'"):
        graph.prepare(model)


def test_small_key_value_cache_warns():
    directory = export()[1]
    with pytest.warns(UserWarning, match='cache holds u8.*KV_CACHE_PRECISION "f32"'):
        OpenVINOTarget.from_pretrained(directory, kv_cache_precision="u8")


def test_default_precisions_do_not_warn(recwarn):
    compiled = engine_of(OpenVINOTarget.from_pretrained(export()[1])).request.get_compiled_model()
    assert not [w for w in recwarn if "cache holds" in str(w.message)]
    for name in ("KV_CACHE_PRECISION", "INFERENCE_PRECISION_HINT"):
        assert compiled.get_property(name) == ov.Type.f32


def test_small_key_value_cache_of_optimum_warns():
    """Only where the user asked for it: the default of optimum and the plugin is replaced."""
    model = optimum_model(export()[1], ov_config={"KV_CACHE_PRECISION": "u8"})
    with pytest.warns(UserWarning, match="cache holds u8"):
        engine_of(model)
    request = engine_of(optimum_model(export()[1])).request
    assert request.get_compiled_model().get_property("KV_CACHE_PRECISION") == ov.Type.f32


def test_plain_generation_takes_one_sequence(llama):
    with pytest.raises(ValueError, match="batch of 2"):
        llama.generate(prompt().repeat(2, 1), **GREEDY)


def test_plain_generation_refuses_what_it_does_not_have(llama):
    with pytest.raises(ValueError, match="num_beams=2"):
        llama.generate(prompt(), **(GREEDY | {"num_beams": 2}))


def test_unknown_arguments(llama, draft):
    with pytest.raises(ValueError, match="no_such_argument"):
        llama.generate(prompt(), **GREEDY, assistant_model=draft, no_such_argument=1)
    with pytest.raises(ValueError, match="no input for token_type_ids"):
        engine_of(llama).session(
            None, max_length=9, max_nodes=1, prefill_chunk=None, model_kwargs={"token_type_ids": torch.zeros(1, 17)}
        )
