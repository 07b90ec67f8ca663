"""Storage of static shapes: rows that are appended and set back, and storage that passes from text to text."""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.drafts import make_draft, text_and_features
from support.graphs import BUDGETS, assert_same_trees, drafters, record, tensors_of

from dovetail_plugin.drafts import cuda_graphs as graph_runner
from dovetail_plugin.drafts.cuda_graph_rows import MAX_STATIC_ROWS
from dovetail_plugin.drafts.cuda_graphs import GraphRunner
from dovetail_plugin.drafts.runners import graph_runner_for
from dovetail_plugin.drafts.torch_runner import TorchRunner
from dovetail_plugin.runner import Pass

STEPS = st.lists(st.tuples(st.integers(1, MAX_STATIC_ROWS + 3), st.integers(0, 30)), min_size=1, max_size=8)


@given(prompt_rows=st.integers(1, 20), steps=STEPS, seed=st.integers(0, 9), replayed=st.booleans())
@settings(max_examples=40, deadline=None)
def test_appending_and_dropping_rows_equals_kv_rows(prompt_rows, steps, seed, replayed):
    """Each step is (rows to append, rows to drop before that). Masks are random, but every row sees itself."""
    draft = make_draft("dgf", 2, seed)
    generator = torch.Generator().manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(graph_runner, "MIN_COLUMNS", 8)
        if replayed:
            record(patch)
        runners = [TorchRunner(draft), GraphRunner(draft)]
        all_rows = [runner.new_rows(8) for runner in runners]
        length = 0
        for count, back in [(prompt_rows, 0), *steps]:
            start = max(length - back, 1) if length else 0
            length = start + count
            mask = torch.zeros(count, length).masked_fill(
                torch.rand(count, length, generator=generator) < 0.4, float("-inf")
            )
            mask[:, start:].fill_diagonal_(0)
            features = torch.randn(count, 32, generator=generator)
            tokens = torch.randint(97, (count,), generator=generator)
            step = Pass(features, tokens, start, mask=mask if start else None, logits_from=count - 1)
            results = []
            for runner, rows in zip(runners, all_rows, strict=True):
                rows.length = start
                results.append(tensors_of(runner.run(step, rows)))
                assert rows.length == length
            for one, other in zip(*results, strict=True):
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
            for block, own in enumerate(all_rows[0].layers):
                keys, values = all_rows[1].store.kv[block][..., :length, :]
                torch.testing.assert_close(own.keys, keys, atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(own.values, values, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_results_and_rows_are_independent_of_other_passes():
    draft = make_draft("dgf", 2)
    runner = GraphRunner(draft)
    rows, features, tokens = runner.new_rows(64), torch.randn(3, 32), torch.arange(3)
    runner.run(Pass(features, tokens, 0), rows)
    behind = Pass(features, tokens, 0, mask=torch.zeros(3, 6))
    first = tensors_of(runner.run(behind, rows))
    before = [tensor.clone() for tensor in first]
    rows.length = 3
    runner.run(Pass(torch.full((9, 32), float("nan")), torch.arange(9), 0, mask=torch.zeros(9, 12)), rows)
    assert all(torch.equal(one, other) for one, other in zip(before, first, strict=True))
    rows.length = 3
    again = tensors_of(runner.run(behind, rows))
    assert all(torch.equal(one, other) for one, other in zip(before, again, strict=True))


def test_next_text_takes_over_the_storage():
    draft = make_draft()
    ids, features = text_and_features(6)
    runner = graph_runner_for(draft)
    assert graph_runner_for(draft) is runner

    def tree(drafter):
        drafter.begin(features, ids)
        return drafter.grow(BUDGETS[0])

    plain, first = drafters(draft, runner=runner)
    wanted = tree(plain)
    assert first.rows.store is None  # nothing is allocated before the draft is needed
    assert_same_trees(wanted, tree(first))
    first.rows.store.kv.fill_(float("nan"))  # as after a draft that failed
    _, second = drafters(draft, runner=runner)  # while the first text is still generated
    assert_same_trees(wanted, tree(second))
    left = first.rows.store
    assert second.rows.store is not left
    del first
    _, third = drafters(draft, runner=runner)
    assert_same_trees(wanted, tree(third))
    assert third.rows.store is left and not runner._idle
    del second, third
    gc.collect()
    assert len(runner._idle) == 2
    _, long = drafters(draft, capacity=1000, runner=runner)
    assert_same_trees(wanted, tree(long))
    assert long.rows.store.capacity == 1024 and not runner._idle

    draft.to(torch.bfloat16)
    assert graph_runner_for(draft) is not runner
