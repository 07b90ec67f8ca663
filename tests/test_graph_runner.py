"""Static shapes give what the draft's own modules give; on a GPU, graphs are captured and replayed without a wait.

Without a GPU the static pass runs eagerly, which tests everything but capture and replay.
"""

import copy
import gc
import logging

import pytest
import torch
from families import prompt, tiny_target
from hypothesis import given, settings
from hypothesis import strategies as st
from support.devices import FakeCuda, move
from support.drafts import make_draft, text_and_features
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dovetail_plugin import DovetailConfig, DovetailDraft, TreeBudget
from dovetail_plugin.drafts import cuda_graphs as graph_runner
from dovetail_plugin.drafts.cuda_graph_rows import MAX_STATIC_ROWS
from dovetail_plugin.drafts.cuda_graphs import GraphRunner
from dovetail_plugin.drafts.feature_drafter import FeatureDrafter
from dovetail_plugin.drafts.runners import graph_runner_for
from dovetail_plugin.drafts.torch_runner import TorchRunner
from dovetail_plugin.report import PhaseClock
from dovetail_plugin.runner import Pass

DRAFTS = [("dgf", 1), ("dgf", 3), ("concat", 1), ("concat", 2)]
BUDGETS = [TreeBudget(16, 5, 6), TreeBudget(6, 5, 1), TreeBudget(9, 3, 3), TreeBudget(40, 3, 20), TreeBudget(2, 1, 1)]


def drafters(draft, capacity=64, runner=None):
    """The default one and one over static shapes."""
    runner = runner or GraphRunner(draft)
    plain, static = (
        FeatureDrafter(draft, each, capacity=capacity, clock=PhaseClock()) for each in (TorchRunner(draft), runner)
    )
    return plain, static


def tensors_of(predicted):
    return predicted.features, predicted.logits


def assert_same_trees(one, other, tolerance=1e-5):
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.parents, other.parents)
    torch.testing.assert_close(one.scores, other.scores, atol=tolerance, rtol=tolerance)


@pytest.fixture(params=[256, 16], ids=["wide", "narrow"])
def min_columns(request, monkeypatch):
    """With 16 columns at least, short texts go through several column counts, and outgrow their storage."""
    monkeypatch.setattr(graph_runner, "MIN_COLUMNS", request.param)
    return request.param


class Recording(TorchDispatchMode):
    """A CUDA graph in slow motion: the operations of a pass, to be run again over the very same memory.

    Host numbers of the recorded pass stay as they are, so a pass that depends on one goes wrong here as there.
    """

    def __init__(self, runner, store, rows, columns):
        super().__init__()
        self.calls, self.replays = [], 0
        with self:
            runner._static_pass(store, rows, columns)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.inference_mode()
    def replay(self):
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():  # no view, nor in place
                    old.copy_(new)


def record(patch):
    """Makes runners on the CPU record and replay; the list of recordings to come."""
    made, original = [], GraphRunner.__init__

    def capture(self, store, rows, columns):
        made.append(Recording(self, store, rows, columns))
        return made[-1]

    def init(self, draft):
        original(self, draft)
        self.enable_graphs = True

    patch.setattr(GraphRunner, "__init__", init)
    patch.setattr(GraphRunner, "_capture", capture)
    return made


@pytest.fixture
def recordings(monkeypatch):
    return record(monkeypatch)


def test_replays_follow_their_inputs(recordings, min_columns):
    """As the test below, over recordings: each is replayed with lengths, widths and texts other than the first."""
    for _ in range(2):
        test_trees_are_the_default_runners("dgf", 2, min_columns)
    assert sum(recording.replays for recording in recordings) > 4 * len(recordings)


@pytest.mark.parametrize(("fusion", "blocks"), DRAFTS)
def test_trees_are_the_default_runners(fusion, blocks, min_columns):
    """Rounds of catching up and growing, from 1 to 20 rows a pass, chains too, through 32 rows of storage to 128."""
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


def test_a_head_for_each_key_and_a_head_that_bends_logits():
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
    """`grow_chain` writes to storage that inference mode made, and grows it."""
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


# --- rows ----------------------------------------------------------------------------------------

STEPS = st.lists(st.tuples(st.integers(1, MAX_STATIC_ROWS + 3), st.integers(0, 30)), min_size=1, max_size=8)


@given(prompt_rows=st.integers(1, 20), steps=STEPS, seed=st.integers(0, 9), replayed=st.booleans())
@settings(max_examples=40, deadline=None)
def test_any_appending_and_setting_back_is_as_with_kv_rows(prompt_rows, steps, seed, replayed):
    """Steps: (rows appended, rows set back before that). Masks are random, but rows see themselves."""
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
def test_results_outlive_later_passes_and_dropped_rows_leave_no_trace():
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


def test_storage_goes_to_the_next_text_and_only_one_is_kept():
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
    first.rows.store.kv.fill_(float("nan"))  # of a draft that failed
    _, second = drafters(draft, runner=runner)  # while the first text goes on
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


def copied_of(what, draft=None):
    """A deep copy; policies are the machine's and stay shared."""
    policy = (draft or what).policy
    return copy.deepcopy(what, {id(policy): policy})


def test_draft_with_a_runner_can_be_copied():
    draft = make_draft()
    ids, features = text_and_features(6)
    drafter = FeatureDrafter(draft, graph_runner_for(draft), capacity=64, clock=PhaseClock())
    drafter.begin(features, ids)
    wanted = drafter.grow(BUDGETS[0])
    copied = copied_of(draft)
    runner = graph_runner_for(copied)
    assert runner is not graph_runner_for(draft) and runner._draft is copied
    other = FeatureDrafter(copied, runner, capacity=64, clock=PhaseClock())
    other.begin(features, ids)
    assert_same_trees(wanted, other.grow(BUDGETS[0]))
    assert_same_trees(wanted, copied_of(drafter, draft).grow(BUDGETS[0]))


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


def test_unattached_draft_says_so():
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


def test_failed_capture_means_no_graphs_for_good(monkeypatch, caplog):
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


# --- devices and waiting -------------------------------------------------------------------------


class FakeCopies(FakeCuda):
    """Copies straight to the dispatcher too: their autograd kernel wants a CUDA build."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.Tensor.copy_:
            return super().__torch_function__(func, types, args, kwargs)
        target, source = args
        assert target.device == source.device
        return torch.ops.aten.copy_(target, source)


class Touched(TorchDispatchMode):
    """Notes the operations and the devices of all tensors that they read. FakeTensorMode refuses to read numbers."""

    def __init__(self):
        super().__init__()
        self.devices, self.operations = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations.add(func.overloadpacket.__name__)
        self.devices |= {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fusion", ["dgf", "concat"])
def test_levels_stay_on_the_device_and_read_no_numbers(fusion, monkeypatch):
    """On fake "cuda" tensors mixing devices raises and so does `.item()`; even copies from the CPU are none."""
    monkeypatch.setattr(graph_runner, "MIN_COLUMNS", 16)
    with FakeTensorMode(allow_non_fake_inputs=True), FakeCopies(), torch.inference_mode():
        config = DovetailConfig(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
            num_hidden_layers=2, fusion=fusion,
        )  # fmt: skip
        draft = move(DovetailDraft(config), "cuda")
        draft.embed_weight = draft.head_weight = torch.empty(97, 32, device="cuda")
        runner = GraphRunner(draft)
        assert runner.enable_graphs and runner.device.type == "cuda"
        runner.enable_graphs = False  # tensors without memory can be in no graph
        rows = runner.new_rows(16)
        features, tokens = torch.empty(6, 32, device="cuda"), torch.empty(6, dtype=torch.int64, device="cuda")
        runner.run(Pass(features, tokens, 0, logits_from=5), rows)
        touched = Touched()
        for step in range(6):  # 24 rows: past the first storage
            mask = torch.empty(3, rows.length + 3, device="cuda")
            level = Pass(features[:3], tokens[:3], rows.length, is_level=True, mask=mask, logits_from=step % 2)
            draft.rope_for(level, torch.float32)  # the table over the next positions is made now and then only
            with touched:
                predicted, logits = tensors_of(runner.run(level, rows))
            assert predicted.device.type == logits.device.type == "cuda"
            assert predicted.shape == (3, 32) and logits.shape == (3 - step % 2, 97)
        assert touched.devices <= {"cuda", "meta"}  # shapes alone, for attention and slices: see FakeCuda
        waiting = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "unique", "lift_fresh"}
        assert "index_copy_" in touched.operations and not touched.operations & waiting


def test_reading_a_number_in_a_level_would_be_noticed(monkeypatch):
    """The check above works."""
    original = GraphRunner._static_pass

    def waits(self, store, rows, columns):
        store.count.item()
        original(self, store, rows, columns)

    monkeypatch.setattr(GraphRunner, "_static_pass", waits)
    with pytest.raises(Exception, match=r"item|scalar"):
        test_levels_stay_on_the_device_and_read_no_numbers("dgf", monkeypatch)


# --- on a GPU ------------------------------------------------------------------------------------

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]


def gpu(test):
    for mark in on_gpu:
        test = mark(test)
    return test


def cuda_draft(fusion="dgf", blocks=2, dtype=torch.float32):
    draft = make_draft(fusion, blocks).to("cuda", dtype)
    draft.attach(tiny_target("llama"))
    return draft


def start(drafter, rows=6):
    ids, features = text_and_features(rows)
    drafter.begin(features, ids)
    drafter.catch_up()
    return drafter


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("fusion", "blocks"), [("dgf", 1), ("concat", 3)])
def test_replays_are_the_static_pass(fusion, blocks, dtype, min_columns):
    """Captured or not, the same kernels run; nothing waits for the device once the graphs are there."""
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


@gpu
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


@gpu
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
    copied = copied_of(draft)
    other = start(FeatureDrafter(copied, graph_runner_for(copied), capacity=64, clock=PhaseClock()))
    assert_same_trees(wanted, other.grow(BUDGETS[0]), 1e-4)


@gpu
def test_generation_over_graphs(llama):
    """The whole loop, from a draft that is kept with its runner."""
    draft = DovetailDraft.for_target(llama, blocks=2).to("cuda", torch.bfloat16)
    plain = llama.generate(prompt(), max_new_tokens=60, do_sample=False)
    for _ in range(2):
        text = llama.generate(prompt(), max_new_tokens=60, do_sample=False, assistant_model=draft)
        assert torch.equal(plain, text) and not draft.report.warnings


@gpu
@pytest.mark.parametrize("error", ["python", "cuda"])
def test_failing_captures_leave_everything_in_order(error, monkeypatch, caplog):
    """Whether our code raises or CUDA invalidates the capture: same trees, same stream, memory can be freed."""
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
    runner = GraphRunner(draft)  # others may still capture
    again = start(FeatureDrafter(draft, runner, capacity=64, clock=PhaseClock()))
    assert_same_trees(wanted, again.grow(BUDGETS[0]), 1e-4)
    assert again.runner.enable_graphs and again.rows.store.graphs
