"""Import, calls, overlapping calls and `unregister` leave the process as it was."""

from helpers import run_python

PROCESS = """
import logging, os, signal, sys, threading, warnings
import torch, transformers
import transformers.pipelines.base
from transformers import GenerationMixin, LlamaConfig, LlamaForCausalLM

if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, os.sched_getaffinity(0))
torch.set_num_threads(2)
signal.signal(signal.SIGTERM, lambda *_: None)
warnings.filterwarnings("error", message="a filter of the user's own")
logging.getLogger("transformers").setLevel(logging.ERROR)
transformers.logging.set_verbosity_error()
hook = sys.excepthook


def born():
    found = []
    thread = threading.Thread(target=lambda: found.append((torch.get_num_threads(), affinity(0))))
    thread.start()
    thread.join()
    return found[0]


def affinity(thread):
    return sorted(os.sched_getaffinity(thread)) if hasattr(os, "sched_getaffinity") else None


def loggers():
    names = ["", "transformers", "torch", "py.warnings"]
    return [(n, logging.getLogger(n).level, tuple(logging.getLogger(n).handlers)) for n in names]


def state():
    return {
        "threads": torch.get_num_threads(),
        "born": born(),
        "affinity": affinity(0),
        "signals": [signal.getsignal(s) for s in sorted(signal.valid_signals())],
        "filters": list(warnings.filters),
        "loggers": loggers(),
        "verbosity": transformers.logging.get_verbosity(),
        "excepthook": sys.excepthook is hook and threading.excepthook.__module__,
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "determinism": (torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype()),
        "random": torch.get_rng_state().sum().item(),
        "alive": sorted(t.name for t in threading.enumerate() if type(t).__name__ != "TMonitor"),  # that of bars
    }


def functions():
    names = ("_validate_generation_mode", "_assisted_decoding", "_sample", "_get_candidate_generator", "generate_batch")
    held = transformers.pipelines.base.load_assistant_model
    return [held, *(getattr(GenerationMixin, name) for name in names)]


def unchanged(what):
    now = state()
    changed = {name: (before[name], now[name]) for name in before if now[name] != before[name]}
    assert not changed, (what, changed)


before, stock = state(), functions()
import dovetail_plugin as d

unchanged("import")
d.unregister()
assert functions() == stock
d.register()
unchanged("register")
config = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
target = LlamaForCausalLM(LlamaConfig(**config, bos_token_id=None, eos_token_id=None)).eval()
ids = torch.tensor([[1, 2, 1, 2, 1]])


def call(draft=None, **options):
    options = dict(max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids)) | options
    target.generate(ids, **options, **({} if draft is None else {"assistant_model": draft}))


torch.manual_seed(0)
before["random"] = torch.get_rng_state().sum().item()
own = d.DovetailDraft.for_target(target)
lookup = d.PromptLookupDraft(shortest=1)
torch.manual_seed(0)
for draft in (lookup, own):
    call(draft)
    unchanged(draft)
d.attach_draft(target, lookup)
call()
call(num_beams=2)
unchanged("attached")
d.detach_draft(target)


class Endless(transformers.StoppingCriteria):
    def __init__(self):
        self.begun, self.may_end = threading.Event(), threading.Event()

    def __call__(self, input_ids, scores, **_):
        self.begun.set()
        return torch.full((1,), self.may_end.wait(60))


first, second = Endless(), Endless()
calls = []
for criterion in (first, second):  # the first begins first and ends first
    calls.append(threading.Thread(target=call, args=(lookup,), kwargs=dict(stopping_criteria=[criterion])))
    calls[-1].start()
    assert criterion.begun.wait(60)
assert born() == before["born"]
for thread, criterion in zip(calls, (first, second)):
    criterion.may_end.set()
    thread.join()
    assert born() == before["born"]
unchanged("overlapping calls")
try:
    call(own, logits_processor=[lambda *_: 1 / 0])
except ZeroDivisionError:
    pass
unchanged("a call that failed")
d.unregister()
assert functions() == stock
unchanged("unregister")
"""


def test_the_process_is_as_before(tmp_path):
    done = run_python("-c", PROCESS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
