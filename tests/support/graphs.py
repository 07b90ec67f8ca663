"""Drafters over static shapes, and a stand-in for CUDA graphs that records a pass on the CPU and replays it."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dovetail_plugin import TreeBudget
from dovetail_plugin.drafts.cuda_graphs import GraphRunner
from dovetail_plugin.drafts.feature_drafter import FeatureDrafter
from dovetail_plugin.drafts.torch_runner import TorchRunner
from dovetail_plugin.report import PhaseClock

BUDGETS = [TreeBudget(16, 5, 6), TreeBudget(6, 5, 1), TreeBudget(9, 3, 3), TreeBudget(40, 3, 20), TreeBudget(2, 1, 1)]


def drafters(draft, capacity=64, runner=None):
    """A drafter with the default runner, and one with a runner over static shapes."""
    runner = runner or GraphRunner(draft)
    return FeatureDrafter(draft, TorchRunner(draft), capacity=capacity, clock=PhaseClock()), FeatureDrafter(
        draft, runner, capacity=capacity, clock=PhaseClock()
    )


def tensors_of(predicted):
    """Features and logits of a pass."""
    return predicted.features, predicted.logits


def assert_same_trees(one, other, tolerance=1e-5):
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.parents, other.parents)
    torch.testing.assert_close(one.scores, other.scores, atol=tolerance, rtol=tolerance)


class Recording(TorchDispatchMode):
    """A stand-in for a CUDA graph: records the operations of a pass and runs them again on the same memory.

    Numbers that the recorded pass read on the host stay the same in a replay. A pass that depends on such a number
    gives wrong results here, as it does in a CUDA graph.
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
    """Make runners on the CPU record and replay their passes. Returns the list that recordings are added to."""
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
