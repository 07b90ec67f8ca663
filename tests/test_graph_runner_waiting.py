"""Levels of static shapes stay on the device and never wait for it, tested with fake CUDA tensors."""

import pytest
import torch
from support.devices import FakeCuda, move
from support.graphs import tensors_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dovetail_plugin import DovetailConfig, DovetailDraft
from dovetail_plugin.drafts import cuda_graphs as graph_runner
from dovetail_plugin.drafts.cuda_graphs import GraphRunner
from dovetail_plugin.runner import Pass


class FakeCopies(FakeCuda):
    """Calls `copy_` without autograd, whose kernel requires a CUDA build of torch."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.Tensor.copy_:
            return super().__torch_function__(func, types, args, kwargs)
        target, source = args
        assert target.device == source.device
        return torch.ops.aten.copy_(target, source)


class Touched(TorchDispatchMode):
    """Collects the operations and the devices of all tensors that they read."""

    def __init__(self):
        super().__init__()
        self.devices, self.operations = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations.add(func.overloadpacket.__name__)
        self.devices |= {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fusion", ["dgf", "concat"])
def test_levels_stay_on_the_device_and_read_no_numbers(fusion, monkeypatch):
    """With fake "cuda" tensors, mixing devices and `.item()` raise errors; copies from the CPU are looked for."""
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
    """The previous test fails for a pass that reads a number."""
    original = GraphRunner._static_pass

    def waits(self, store, rows, columns):
        store.count.item()
        original(self, store, rows, columns)

    monkeypatch.setattr(GraphRunner, "_static_pass", waits)
    with pytest.raises(Exception, match=r"item|scalar"):
        test_levels_stay_on_the_device_and_read_no_numbers("dgf", monkeypatch)
