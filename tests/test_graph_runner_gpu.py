"""CUDA graphs of draft passes on a real GPU: capture, replay, and captures that fail."""

import copy
import gc
import logging

import pytest
import torch
from families import prompt, tiny_target
from support.drafts import make_draft, text_and_features
from support.graphs import BUDGETS, assert_same_trees, drafters

from dovetail_plugin import DovetailDraft, TreeBudget
from dovetail_plugin.drafts import cuda_graphs as graph_runner
from dovetail_plugin.drafts.cuda_graphs import GraphRunner
from dovetail_plugin.drafts.feature_drafter import FeatureDrafter
from dovetail_plugin.drafts.runners import graph_runner_for
from dovetail_plugin.report import PhaseClock

pytestmark = [
    pytest.mark.usefixtures("fixed_budget"),
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]


def cuda_draft(fusion="dgf", blocks=2, dtype=torch.float32):
    draft = make_draft(fusion, blocks).to("cuda", dtype)
    draft.attach(tiny_target("llama"))
    return draft


def start(drafter, rows=6):
    ids, features = text_and_features(rows)
    drafter.begin(features, ids)
    drafter.catch_up()
    return drafter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("fusion", "blocks"), [("dgf", 1), ("concat", 3)])
def test_replays_equal_the_static_pass(fusion, blocks, dtype, min_columns):
    """The same kernels run with and without capture; with graphs, nothing waits for the device."""
    draft = cuda_draft(fusion, blocks, dtype)
    eager, graphs = GraphRunner(draft), GraphRunner(draft)
    eager.enable_graphs = False
    one, other = (start(FeatureDrafter(draft, r, capacity=64, clock=PhaseClock())) for r in (eager, graphs))
    ids, features = text_and_features(40)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for end in (8, 11, 15, 30, 38):
        for budget in BUDGETS:
            wanted, tree = one.grow(budget), other.grow(budget)
            if dtype == torch.float32:
                assert_same_trees(wanted, tree, 1e-4)
            torch.testing.assert_close(wanted.scores, tree.scores, atol=tolerance, rtol=tolerance)
        for drafter in (one, other):
            drafter.advance(features[drafter.committed : end], ids[drafter.committed + 1 : end + 1])
            drafter.catch_up()
    for budget in BUDGETS:
        other.grow(budget)
    store = other.rows.store
    assert graphs.enable_graphs and not one.rows.store.graphs
    assert {rows for rows, _ in store.graphs} <= {1, 2, 4, 8, 16}
    captured = dict(store.graphs)
    assert captured
    torch.cuda.set_sync_debug_mode("error")
    try:
        for budget in BUDGETS:
            other.grow_on_device(budget)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert store.graphs == captured


def test_replays_agree_with_the_drafts_own_modules():
    draft = cuda_draft("dgf", 3)
    plain, static = (start(drafter) for drafter in drafters(draft))
    for budget in BUDGETS * 2:
        wanted, tree = plain.grow(budget), static.grow(budget)
        torch.testing.assert_close(wanted.scores, tree.scores, atol=1e-3, rtol=1e-3)
    with torch.no_grad():  # graphs captured in inference mode are replayed outside of it, and the other way round
        chains = [d.grow_chain(4, lambda logits, _: (logits.argmax(-1), logits)) for d in (plain, static)]
    torch.testing.assert_close(*(scores for _, scores in chains), atol=1e-3, rtol=1e-3)
    static.grow(TreeBudget(6, 5, 1))
    assert static.runner.enable_graphs and {(1, 256), (4, 256), (8, 256)} <= set(static.rows.store.graphs)


def test_later_texts_replay_and_moved_weights_are_captured_anew():
    draft = cuda_draft()
    runner = graph_runner_for(draft)
    wanted = start(FeatureDrafter(draft, runner, capacity=64, clock=PhaseClock())).grow(BUDGETS[0])
    gc.collect()
    (store,) = runner._idle
    graph = store.graphs[8, 256]
    drafter = start(FeatureDrafter(draft, runner, capacity=64, clock=PhaseClock()))
    assert_same_trees(wanted, drafter.grow(BUDGETS[0]), 1e-4)
    assert drafter.rows.store is store and store.graphs[8, 256] is graph
    olds = [parameter.data for parameter in draft.parameters()] + [draft.head_weight]  # keeps their addresses taken
    draft.to("cpu").to("cuda")
    draft.attach(tiny_target("llama"))
    for old in olds:
        old.fill_(float("nan"))
    assert_same_trees(wanted, drafter.grow(BUDGETS[0]), 1e-4)
    assert store.graphs[8, 256] is not graph
    copied = copy.deepcopy(draft)
    copied.attach(tiny_target("llama"))
    other = start(FeatureDrafter(copied, graph_runner_for(copied), capacity=64, clock=PhaseClock()))
    assert_same_trees(wanted, other.grow(BUDGETS[0]), 1e-4)


def test_generation_over_graphs(llama):
    """The whole loop, twice, with the runner that the draft keeps."""
    draft = DovetailDraft.for_target(llama, blocks=2).to("cuda", torch.bfloat16)
    plain = llama.generate(prompt(), max_new_tokens=60, do_sample=False)
    for _ in range(2):
        text = llama.generate(prompt(), max_new_tokens=60, do_sample=False, assistant_model=draft)
        assert torch.equal(plain, text) and not draft.report.warnings


@pytest.mark.parametrize("error", ["python", "cuda"])
def test_failed_captures_leave_the_device_usable(error, monkeypatch, caplog):
    """Our code raises, or CUDA invalidates the capture: the same trees, the same stream, and memory can be freed."""
    draft = cuda_draft()
    original = draft.head

    def head(features):
        if torch.cuda.is_current_stream_capturing():
            if error == "python":
                raise RuntimeError("no such thing")
            torch.cuda.synchronize()
        return original(features)

    plain, static = (start(drafter) for drafter in drafters(draft))
    wanted, stream = plain.grow(BUDGETS[0]), torch.cuda.current_stream()
    monkeypatch.setattr(draft, "head", head)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert_same_trees(wanted, static.grow(BUDGETS[0]), 1e-4)
    assert not static.runner.enable_graphs
    assert len([record for record in caplog.records if record.name == graph_runner.__name__]) == 1
    assert torch.cuda.current_stream() == stream
    torch.cuda.empty_cache()
    torch.rand(1, device="cuda")
    monkeypatch.undo()
    again = start(
        FeatureDrafter(draft, GraphRunner(draft), capacity=64, clock=PhaseClock())
    )  # others may still capture
    assert_same_trees(wanted, again.grow(BUDGETS[0]), 1e-4)
    assert again.runner.enable_graphs and again.rows.store.graphs
