"""Draft passes over static shapes give the trees of the draft's own modules.

On a GPU these passes are captured as CUDA graphs; test_graph_runner_gpu.py tests capture and replay. Here the static
pass runs eagerly, or is recorded and replayed on the CPU.
"""

import copy
import logging

import pytest
import torch
from families import tiny_target
from support.drafts import make_draft, text_and_features
from support.graphs import BUDGETS, assert_same_trees, drafters, record

from dovetail_plugin import DovetailConfig, DovetailDraft
from dovetail_plugin.drafts import cuda_graphs as graph_runner
from dovetail_plugin.drafts.cuda_graphs import GraphRunner
from dovetail_plugin.drafts.feature_drafter import FeatureDrafter
from dovetail_plugin.drafts.runners import graph_runner_for
from dovetail_plugin.report import PhaseClock

DRAFTS = [("dgf", 1), ("dgf", 3), ("concat", 1), ("concat", 2)]


@pytest.fixture
def recordings(monkeypatch):
    return record(monkeypatch)


def test_replays_follow_their_inputs(recordings, min_columns):
    """The next test with recorded passes: each is replayed with other lengths, widths and texts."""
    for _ in range(2):
        test_trees_equal_those_of_the_default_runner("dgf", 2, min_columns)
    assert sum(recording.replays for recording in recordings) > 4 * len(recordings)


@pytest.mark.parametrize(("fusion", "blocks"), DRAFTS)
def test_trees_equal_those_of_the_default_runner(fusion, blocks, min_columns):
    """Rounds with passes of 1 to 20 rows, with trees and chains, while the storage grows from 32 rows to 128."""
    draft = make_draft(fusion, blocks)
    ids, features = text_and_features(80)
    plain, static = drafters(draft, capacity=24)
    ends = [5, 6, 8, 12, 20, 37, 54, 55, 71, 80]
    for drafter in (plain, static):
        drafter.begin(features[:3], ids[:4])
    for start, end in zip([3, *ends[:-1]], ends, strict=True):
        for budget in BUDGETS[start % 2 :: 2]:
            assert_same_trees(plain.grow(budget), static.grow(budget))
        for drafter in (plain, static):
            drafter.advance(features[start:end], ids[start + 1 : end + 1])
    assert_same_trees(plain.grow(BUDGETS[0]), static.grow(BUDGETS[0]))
    assert static.rows.store.capacity == max(128, min_columns)
    assert bool(static.rows.store.graphs) == static.runner.enable_graphs


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_other_dtypes(dtype):
    draft = make_draft("dgf", 2).to(dtype)
    draft.attach(tiny_target("llama"))
    ids, features = text_and_features(20)
    plain, static = drafters(draft)
    for drafter in (plain, static):
        drafter.begin(features[:17], ids[:18])
        drafter.advance(features[17:], ids[18:])
        drafter.catch_up()
    assert static._root.logits.dtype == dtype
    tolerance = {torch.float64: 1e-9, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    torch.testing.assert_close(plain._root.logits, static._root.logits, atol=tolerance, rtol=tolerance)
    assert static.grow(BUDGETS[0]).scores.isfinite().all()


def test_as_many_key_heads_as_heads_and_capped_logits():
    config = DovetailConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=4,
        head_dim=16, num_hidden_layers=2, logit_softcap=5.0, logit_scale=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    draft = DovetailDraft(config)
    draft.embed_weight, draft.head_weight, draft.head_bias = torch.randn(97, 32), torch.randn(97, 32), torch.randn(97)
    ids, features = text_and_features(9)
    plain, static = drafters(draft)
    for drafter in (plain, static):
        drafter.begin(features[:6], ids[:7])
        drafter.advance(features[6:], ids[7:])
    assert_same_trees(plain.grow(BUDGETS[0]), static.grow(BUDGETS[0]))


@torch.no_grad()
def test_chains_outside_of_inference_mode(monkeypatch):
    """`grow_chain` writes to storage that was made in inference mode, and enlarges it."""
    monkeypatch.setattr(graph_runner, "MIN_COLUMNS", 8)
    draft = make_draft("dgf", 2)
    ids, features = text_and_features(7)
    chains = []
    for drafter in drafters(draft, capacity=8):
        drafter.begin(features, ids)
        drafter.grow(BUDGETS[0])
        chains.append(drafter.grow_chain(12, lambda logits, _: (logits.argmax(-1), logits)))
    (tokens, scores), (static_tokens, static_scores) = chains
    assert torch.equal(tokens, static_tokens)
    torch.testing.assert_close(scores, static_scores, atol=1e-5, rtol=1e-5)


def test_draft_with_a_runner_can_be_copied():
    draft = make_draft()
    ids, features = text_and_features(6)
    drafter = FeatureDrafter(draft, graph_runner_for(draft), capacity=64, clock=PhaseClock())
    drafter.begin(features, ids)
    wanted = drafter.grow(BUDGETS[0])
    copied = copy.deepcopy(draft)
    copied.attach(tiny_target("llama"))
    runner = graph_runner_for(copied)
    assert runner is not graph_runner_for(draft) and runner._draft is copied
    other = FeatureDrafter(copied, runner, capacity=64, clock=PhaseClock())
    other.begin(features, ids)
    assert_same_trees(wanted, other.grow(BUDGETS[0]))


def test_another_target_with_other_tables():
    draft = make_draft()
    ids, features = text_and_features(6)
    runner = GraphRunner(draft)
    plain, static = drafters(draft, runner=runner)
    for drafter in (plain, static):
        drafter.begin(features, ids)
        drafter.grow(BUDGETS[0])
    draft.head_weight = torch.randn(101, 32)  # some tables are padded
    assert_same_trees(plain.grow(BUDGETS[0]), static.grow(BUDGETS[0]))


def test_unattached_draft_is_refused():
    config = DovetailConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_attention_heads=4)
    drafter = FeatureDrafter(draft := DovetailDraft(config), GraphRunner(draft), capacity=64, clock=PhaseClock())
    drafter.begin(torch.randn(3, 32), torch.arange(4))
    with pytest.raises(ValueError, match="no embedding table"):
        drafter.catch_up()


def test_autocast_changes_nothing():
    draft = make_draft("dgf", 2)
    ids, features = text_and_features(6)
    plain, static = drafters(draft)
    for drafter in (plain, static):
        drafter.begin(features, ids)
    wanted = plain.grow(BUDGETS[0])
    with torch.autocast("cpu", torch.bfloat16):
        static.catch_up()
        tree = static.grow(BUDGETS[0])
    assert_same_trees(wanted, tree)


def test_no_graphs_after_a_failed_capture(monkeypatch, caplog):
    draft = make_draft("dgf", 2)
    ids, features = text_and_features(6)
    runner, attempts = GraphRunner(draft), []

    def capture(*_):
        attempts.append(1)
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(runner, "_capture", capture)
    runner.enable_graphs = True
    plain, static = drafters(draft, runner=runner)
    with caplog.at_level(logging.WARNING):
        for drafter in (plain, static):
            drafter.begin(features, ids)
        for budget in BUDGETS:
            assert_same_trees(plain.grow(budget), static.grow(budget))
    assert len(attempts) == 1 and not runner.enable_graphs
    messages = [record.message for record in caplog.records if record.name == graph_runner.__name__]
    assert messages == ["the draft goes on without CUDA graphs: OutOfMemoryError: no room"]


def test_graphs_of_other_weights_are_not_replayed(recordings):
    draft = make_draft("dgf", 2)
    ids, features = text_and_features(6)
    plain, static = drafters(draft)
    for drafter in (plain, static):
        drafter.begin(features, ids)
    for _ in range(3):
        assert_same_trees(plain.grow(BUDGETS[0]), static.grow(BUDGETS[0]))
    assert len(recordings) == 1 and recordings[0].replays == 12
    draft.head_weight = draft.head_weight.clone().mul_(2)
    assert_same_trees(plain.grow(BUDGETS[0]), static.grow(BUDGETS[0]))
    draft.layers[1].mlp.up_proj.weight.data = draft.layers[1].mlp.up_proj.weight.data * 2
    assert_same_trees(plain.grow(BUDGETS[0]), static.grow(BUDGETS[0]))
    assert len(recordings) == 3 and list(static.rows.store.graphs) == [(8, 256)]
    static.runner.enable_graphs = False
    assert_same_trees(plain.grow(BUDGETS[0]), static.grow(BUDGETS[0]))
    assert not static.rows.store.graphs
