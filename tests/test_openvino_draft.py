"""Drafts that run as an OpenVINO graph: the same trees as in torch, holes in the rows, and drafting without nncf."""

import logging
import sys
import threading
import warnings

import pytest
import torch
from families import prompt, tiny_target
from support.workers import workers

from dovetail_plugin import DovetailDraft, TreeBudget
from dovetail_plugin.drafts.feature_drafter import FeatureDrafter
from dovetail_plugin.drafts.runners import runner_for
from dovetail_plugin.drafts.torch_runner import TorchRunner
from dovetail_plugin.report import PhaseClock

pytest.importorskip("openvino")
pytest.importorskip("nncf")
openvino_draft = pytest.importorskip("dovetail_plugin.adapters.openvino.draft")
OpenVINORunner = openvino_draft.OpenVINORunner

BUDGET = TreeBudget(nodes=10, depth=4, top_k=3)


@pytest.fixture(scope="module", params=[("dgf", 1), ("dgf", 3), ("concat", 2)], ids=["dgf1", "dgf3", "concat2"])
def pair(request):
    fusion, blocks = request.param
    torch.manual_seed(3)
    draft = DovetailDraft.for_target(tiny_target("llama"), blocks=blocks, fusion=fusion)
    return draft, OpenVINORunner(draft, weights="f32")


def rounds(draft, runner, count=6):
    """Trees of several rounds in which different numbers of tokens were accepted."""
    generator = torch.Generator().manual_seed(1)
    drafter = FeatureDrafter(draft, runner, capacity=8, clock=PhaseClock())
    drafter.begin(torch.randn(11, draft.config.hidden_size, generator=generator), prompt(12)[0])
    for number in range(count):
        yield drafter.grow(BUDGET)
        accepted = number % 4 + 1
        tokens = torch.randint(3, 97, (accepted,), generator=generator)
        drafter.advance(torch.randn(accepted, draft.config.hidden_size, generator=generator), tokens)


def assert_same_trees(one, other):
    for wanted, got in zip(one, other, strict=True):
        assert torch.equal(got.tokens, wanted.tokens)
        assert torch.equal(got.parents, wanted.parents)
        torch.testing.assert_close(got.scores, wanted.scores, atol=1e-4, rtol=1e-4)


def test_the_same_trees_as_in_torch(pair):
    draft, runner = pair
    assert_same_trees(list(rounds(draft, TorchRunner(draft))), list(rounds(draft, runner)))


def test_the_same_trees_when_holes_are_taken_out(pair, monkeypatch):
    draft, runner = pair
    monkeypatch.setattr(openvino_draft, "SPARE_HOLES", 0)
    taken_out = []
    compact = openvino_draft.StateRows._compact

    def counted(rows):
        taken_out.append(rows.slots - rows.length)
        compact(rows)
        assert rows.slots == rows.length == rows.request.query_state()[0].state.shape[2]

    monkeypatch.setattr(openvino_draft.StateRows, "_compact", counted)
    assert_same_trees(list(rounds(draft, TorchRunner(draft))), list(rounds(draft, runner)))
    assert sum(taken_out) > 0


def test_holes_are_bounded(pair, monkeypatch):
    draft, runner = pair
    monkeypatch.setattr(openvino_draft, "SPARE_HOLES", 20)
    drafter = FeatureDrafter(draft, runner, capacity=8, clock=PhaseClock())
    drafter.begin(torch.randn(11, 32), prompt(12)[0])
    for _ in range(30):
        drafter.grow(BUDGET)
        drafter.advance(torch.randn(1, 32), torch.tensor([5]))
        own = drafter.rows
        assert own.slots <= 2 * own.length + 20 + BUDGET.top_k


def test_two_texts_at_a_time_do_not_mix(pair):
    draft, runner = pair
    alone = list(rounds(draft, runner))
    first, second = rounds(draft, runner), rounds(draft, runner)
    mixed = [(one, other) for one, other in zip(first, second, strict=True)]
    assert_same_trees(alone, [one for one, _ in mixed])
    assert_same_trees(alone, [other for _, other in mixed])


def test_whole_texts_of_another_thread_in_the_middle_of_a_pass(pair, monkeypatch):
    """Both threads use one runner. Between the inputs of a pass and its run, the other one grows all its trees."""
    draft, runner = pair
    alone, others, run = list(rounds(draft, runner)), [], OpenVINORunner.run
    mine = threading.get_ident()

    def between(runner, step, rows):
        if threading.get_ident() == mine and len(others) < 4:
            others.append(other(lambda: list(rounds(draft, runner))))
        return run(runner, step, rows)

    monkeypatch.setattr(OpenVINORunner, "run", between)
    with workers(1) as (other,):
        assert_same_trees(alone, list(rounds(draft, runner)))
    assert len(others) == 4
    for trees in others:
        assert_same_trees(alone, trees)


def test_a_graph_is_made_while_others_print_and_sample(monkeypatch, capsys, recwarn):
    """Their output appears, their random numbers are used up, and no other graph is made meanwhile."""
    compress, console = openvino_draft.nncf.compress_weights, openvino_draft.rich.get_console()
    draft, filters = DovetailDraft.for_target(tiny_target("llama")), list(warnings.filters)
    drawn = []

    def meanwhile():
        print("a token of another text")
        drawn.append(torch.rand(3))
        return openvino_draft._one_graph.acquire(blocking=False)

    def between(*args, **kwargs):
        assert not other(meanwhile)
        return compress(*args, **kwargs)

    monkeypatch.setattr(openvino_draft.nncf, "compress_weights", between)
    torch.manual_seed(11)
    with workers(1) as (other,):
        openvino_draft.draft_graph(draft, "int8")
        after = torch.rand(3)
        assert other(openvino_draft._one_graph.acquire, False)
        other(openvino_draft._one_graph.release)
    torch.manual_seed(11)
    assert torch.equal(torch.stack([drawn[0], after]), torch.rand(6).view(2, 3))
    assert capsys.readouterr().out == "a token of another text\n"
    assert warnings.filters == filters and not console.quiet


def bits(graph):
    """Element types of the graph's compressed matrices."""
    constants = (node for node in graph.get_ops() if node.get_type_name() == "Constant")
    return {node.get_element_type().to_string() for node in constants} & {"u8", "i8", "i4"}


@pytest.mark.parametrize(("weights", "compressed"), [("int4", {"i4", "u8"}), ("int8", {"u8"})])
def test_compressed_weights_give_similar_trees(weights, compressed):
    """Compression only lowers acceptance; scores stay within the error of so few bits on random weights."""
    torch.manual_seed(3)
    draft = DovetailDraft.for_target(tiny_target("llama", hidden_size=128, intermediate_size=256))
    assert bits(openvino_draft.draft_graph(draft, weights)) == compressed  # with int4, the head stays int8
    runner = OpenVINORunner(draft, weights)
    exact, rough = next(rounds(draft, TorchRunner(draft))), next(rounds(draft, runner))
    assert abs(exact.scores[1] - rough.scores[1]) < 0.5
    assert not torch.equal(exact.scores, rough.scores)


def test_compression_leaves_logging_as_it_was():
    """Handlers that an application put on nncf's logger keep their level."""
    logger, handler = logging.getLogger("nncf"), logging.NullHandler()
    level = logger.level
    logger.addHandler(handler)
    try:
        openvino_draft.draft_graph(DovetailDraft.for_target(tiny_target("llama")), "int8")
        assert (logger.level, handler.level) == (level, logging.NOTSET)
    finally:
        logger.removeHandler(handler)


def test_matrices_too_small_for_groups_stay_int8():
    draft = DovetailDraft.for_target(tiny_target("llama", hidden_size=24, num_attention_heads=4, intermediate_size=40))
    assert bits(openvino_draft.draft_graph(draft, "int4")) == {"u8"}


@pytest.mark.parametrize(
    ("extensions", "weights"),
    [({"avx512_vnni", "avx2"}, "int4"), ({"amx_int8"}, "int4"), ({"avx2"}, "int8"), (set(), "int8")],
)
def test_four_bits_where_the_cpu_has_arithmetic_for_them(monkeypatch, extensions, weights):
    monkeypatch.setattr(openvino_draft.machine, "vector_extensions", lambda: extensions)
    assert openvino_draft.default_weights() == weights


def test_without_nncf_the_draft_runs_in_torch(monkeypatch):
    from dovetail_plugin.adapters import openvino

    draft = DovetailDraft.for_target(tiny_target("llama"))
    monkeypatch.setitem(sys.modules, "nncf", None)
    monkeypatch.delitem(sys.modules, "dovetail_plugin.adapters.openvino.draft")
    said = []
    monkeypatch.setattr(openvino.logger, "warning", said.append)
    engine = openvino.OpenVINOEngine.__new__(openvino.OpenVINOEngine)
    engine._draft_properties, engine.draft_weights = {}, None
    for _ in range(2):
        assert isinstance(runner_for(draft, engine), TorchRunner)
    assert len(said) == 1
    assert ".[openvino]" in said[0]
