"""Target on the CPU and draft on a real GPU, and the reverse. Skipped without a GPU."""

import pytest
import torch
from families import prompt, tiny_target
from support.bundled import TARGET, load_pair
from transformers import AutoTokenizer

from dovetail_plugin import DovetailDraft, TreeBudget
from dovetail_plugin.bench.compare import Comparison
from dovetail_plugin.bench.prompts import load_prompts
from dovetail_plugin.drafts.feature_drafter import FeatureDrafter
from dovetail_plugin.drafts.torch_runner import TorchRunner
from dovetail_plugin.report import PhaseClock

pytestmark = [
    pytest.mark.usefixtures("fixed_budget"),
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_draft_on_cuda_target_on_cpu(llama, oracle, dtype):
    """Whatever the dtype of the draft is, the text is the one of the fp32 target."""
    draft = DovetailDraft.for_target(llama, blocks=2).to("cuda", dtype)
    plain = llama.generate(prompt(), max_new_tokens=60, do_sample=False)
    assert torch.equal(plain, llama.generate(prompt(), max_new_tokens=60, do_sample=False, assistant_model=draft))
    oracle(plain, 17)
    assert torch.equal(plain, llama.generate(prompt(), max_new_tokens=60, do_sample=False, assistant_model=draft))
    assert draft.embed_weight.device.type == draft.head_weight.device.type == "cuda"


def test_target_on_cuda_draft_on_cpu(oracle):
    target = tiny_target("llama").to("cuda")
    draft = DovetailDraft.for_target(target).to("cpu")
    ids = prompt().to("cuda")
    plain = target.generate(ids, max_new_tokens=60, do_sample=False)
    oracle(plain, 17)
    assert torch.equal(plain, target.generate(ids, max_new_tokens=60, do_sample=False, assistant_model=draft))


def test_bundled_pair():
    target, draft = load_pair(torch.float32)
    draft.to("cuda", torch.bfloat16)
    comparison = Comparison(target, draft, {"max_new_tokens": 96, "do_sample": False})
    for input_ids in load_prompts(None, AutoTokenizer.from_pretrained(TARGET), 8):
        comparison.add(input_ids)
    assert comparison.result().identical == 8
    assert comparison.result().acceptance_length >= 3.5


def test_growing_a_tree_never_waits_for_the_device():
    """`grow_on_device` does not synchronize with the device; CUDA raises an error if it does."""
    llama = tiny_target("llama")
    draft = DovetailDraft.for_target(llama, blocks=2).to("cuda")
    drafter = FeatureDrafter(draft, TorchRunner(draft), capacity=64, clock=PhaseClock())
    with torch.no_grad():
        drafter.begin(torch.randn(6, 32), prompt(7)[0])
        torch.cuda.set_sync_debug_mode("error")
        try:
            drafter.catch_up()
            drafter.grow_on_device(TreeBudget(16, 5, 6))
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_out_of_memory_on_the_gpu_keeps_the_text(llama, monkeypatch):
    draft = DovetailDraft.for_target(llama).to("cuda")
    draft.runner = "torch"  # which calls `step`
    original, calls = draft.step, []

    def step(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            torch.empty(1 << 50, device="cuda")
        return original(*args, **kwargs)

    monkeypatch.setattr(draft, "step", step)
    plain = llama.generate(prompt(), max_new_tokens=40, do_sample=False)
    assert torch.equal(plain, llama.generate(prompt(), max_new_tokens=40, do_sample=False, assistant_model=draft))
    assert len(draft.report.warnings) == 1
