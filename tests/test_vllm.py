"""Drafts of this project in vLLM's CPU build: texts, counts against our own chain drafting, sampling, refusals.

Runs in the environment of `make test-vllm`. vLLM's counts of drafted and accepted tokens are compared with those of
our own loop on the same prompts: equal ones mean that features, positions, masks and caches are the same.
"""

import gc
import json
import logging
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("vllm")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

from vllm import LLM, ModelRegistry, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from dovetail_plugin import DovetailConfig, DovetailDraft, TreeBudget
from dovetail_plugin.adapters import vllm as plugin
from dovetail_plugin.benchmark import load_prompts

PAIR = Path(__file__).parent.parent / "examples" / "tiny_pair"
TARGET, DRAFT = PAIR / "dovetail-tiny-target", PAIR / "dovetail-tiny-draft"
NEW_TOKENS = 48


@pytest.fixture(scope="module")
def prompts() -> "list[list[int]]":
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    return [ids[0].tolist() for ids in load_prompts(None, tokenizer, 6)]


@pytest.fixture(scope="module")
def drafts(tmp_path_factory) -> "dict[int, Path]":
    """Directories by number of blocks: the bundled draft, and one with two further blocks that change little."""
    torch.manual_seed(5)
    small = DovetailDraft.from_pretrained(DRAFT, dtype=torch.float32)
    config = DovetailConfig.from_pretrained(DRAFT, num_hidden_layers=3)
    large = DovetailDraft(config)
    large.load_state_dict(small.state_dict(), strict=False)
    for layer in large.layers[1:]:
        for matrix in (layer.self_attn.o_proj, layer.mlp.down_proj):
            matrix.weight.data *= 0.3
    directory = tmp_path_factory.mktemp("drafts") / "three"
    large.save_pretrained(directory)
    return {1: DRAFT, 3: directory}


@contextmanager
def engine(draft: "Path | None", tokens: int = 3, dtype: str = "float32", **options):
    """An LLM with the bundled target, and a draft if there is one."""
    if draft is not None:
        options["speculative_config"] = {"method": "eagle", "model": str(draft), "num_speculative_tokens": tokens}
    llm = LLM(
        str(TARGET),
        dtype=dtype,
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=8,
        disable_log_stats=False,
        **options,
    )
    try:
        yield llm
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def greedy(llm, prompts) -> "list[list[int]]":
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def counts_of(llm, tokens: int) -> "dict[str, object]":
    found = {metric.name.removeprefix("vllm:spec_decode_num_"): metric for metric in llm.get_metrics()}
    return {
        "rounds": found["drafts"].value,
        "drafted": found["draft_tokens"].value,
        "accepted": found["accepted_tokens"].value,
        "by position": list(found["accepted_tokens_per_pos"].values)[:tokens],
    }


def our_counts(draft_dir: Path, prompts, tokens: int, dtype: torch.dtype) -> "dict[str, object]":
    """Of our chains, over as many rounds as the text of NEW_TOKENS takes; vLLM drafts at its end as everywhere."""
    target = AutoModelForCausalLM.from_pretrained(TARGET, dtype=dtype)
    draft = DovetailDraft.from_pretrained(draft_dir, dtype=dtype)
    draft.budget = TreeBudget(tokens + 1, tokens, 1)
    accepted = []
    for ids in prompts:
        target.generate(
            torch.tensor([ids]),
            assistant_model=draft,
            max_new_tokens=NEW_TOKENS + 4 * tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        length = 1  # the prompt's pass gives one
        for one in draft.report.rounds:
            if length >= NEW_TOKENS:
                break
            assert one.nodes == tokens + 1
            accepted.append(one.emitted - 1)
            length += one.emitted
    return {
        "rounds": len(accepted),
        "drafted": tokens * len(accepted),
        "accepted": sum(accepted),
        "by position": [sum(count > position for count in accepted) for position in range(tokens)],
    }


@pytest.fixture(scope="module")
def plain(prompts) -> "dict[str, list[list[int]]]":
    """Texts of vLLM without speculation, by type."""
    texts = {}
    for dtype in ("float32", "bfloat16"):
        with engine(None, dtype=dtype) as llm:
            texts[dtype] = greedy(llm, prompts)
    return texts


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("tokens", [1, 3, 5])
def test_texts_and_counts(blocks, tokens, prompts, plain, drafts):
    with engine(drafts[blocks], tokens) as llm:
        assert greedy(llm, prompts) == plain["float32"]
        counts = counts_of(llm, tokens)
    assert counts == our_counts(drafts[blocks], prompts, tokens, torch.float32)
    assert counts["accepted"] > 0.3 * counts["rounds"]


@pytest.mark.parametrize("blocks", [1, 3])
def test_texts_and_counts_with_chunked_prefill(blocks, prompts, plain, drafts):
    assert min(map(len, prompts)) > 32
    with engine(drafts[blocks], 3, enable_chunked_prefill=True, max_num_batched_tokens=32) as llm:
        assert greedy(llm, prompts) == plain["float32"]
        counts = counts_of(llm, 3)
    assert counts == our_counts(drafts[blocks], prompts, 3, torch.float32)


@pytest.mark.parametrize("blocks", [1, 3])
def test_bf16(blocks, prompts, plain, drafts):
    with engine(drafts[blocks], 3, dtype="bfloat16") as llm:
        assert greedy(llm, prompts) == plain["bfloat16"]
        counts = counts_of(llm, 3)
    assert counts == our_counts(drafts[blocks], prompts, 3, torch.bfloat16)


# --- registration -----------------------------------------------------------------------------------


def test_register_may_run_again():
    """vLLM calls it in every process, and in some more than once."""
    for _ in range(3):
        plugin.register()
    assert set(plugin.ARCHITECTURES) <= set(ModelRegistry.get_supported_archs())


def test_processes_of_the_engine_know_drafts(prompts, plain):
    """As users run it: the engine in a process of its own, which finds the plugin by its entry point."""
    script = (
        "import json, sys\n"
        "from vllm import LLM, SamplingParams\n"
        "if __name__ == '__main__':\n"
        "    target, draft, prompts = json.loads(sys.stdin.read())\n"
        "    llm = LLM(target, dtype='float32', enforce_eager=True, max_model_len=512, max_num_seqs=8,\n"
        "        speculative_config={'method': 'eagle', 'model': draft, 'num_speculative_tokens': 3})\n"
        f"    sampling = SamplingParams(temperature=0.0, max_tokens={NEW_TOKENS}, ignore_eos=True)\n"
        "    outputs = llm.generate([{'prompt_token_ids': ids} for ids in prompts], sampling, use_tqdm=False)\n"
        "    print(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps([str(TARGET), str(DRAFT), prompts]),
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.strip().splitlines()[-1]) == plain["float32"]


def test_serve(prompts, plain, tmp_path):
    """The command of docs/vllm.md, asked over HTTP."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    speculation = json.dumps({"method": "eagle", "model": str(DRAFT), "num_speculative_tokens": 3})
    command = [str(Path(sys.executable).parent / "vllm"), "serve", str(TARGET), "--speculative-config", speculation]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--port", str(port)]
    with open(tmp_path / "log", "w", encoding="utf-8") as log:
        server = subprocess.Popen([*command, "--host", "127.0.0.1"], stdout=log, stderr=subprocess.STDOUT)
    try:
        body = {"model": str(TARGET), "prompt": prompts[0], "max_tokens": NEW_TOKENS, "temperature": 0.0}
        answer = ask(port, body | {"ignore_eos": True, "return_token_ids": True}, server, tmp_path / "log")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
            metrics = page.read().decode()
    finally:
        server.terminate()
        server.wait(timeout=60)
    assert answer["choices"][0]["token_ids"] == plain["float32"][0]
    accepted = [line for line in metrics.splitlines() if line.startswith("vllm:spec_decode_num_accepted_tokens_total")]
    assert float(accepted[0].split()[-1]) > 0


def ask(port: int, body: "dict[str, object]", server, log: Path) -> "dict":
    """The server's answer, as soon as it gives one."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    for _ in range(240):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except ConnectionError:
            pass
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionError):
                raise
        time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])


# --- sampling ---------------------------------------------------------------------------------------


def exact_probabilities(ids: "list[int]", temperature: float, top_k: int) -> "dict[tuple[int, ...], float]":
    """Of every continuation of three tokens, by plain passes of the target."""
    target = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32)
    continuations: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer = {}
        for tokens, so_far in continuations.items():
            with torch.no_grad():
                logits = target(torch.tensor([ids + list(tokens)])).logits[0, -1] / temperature
            kept = logits.topk(top_k)
            for token, share in zip(kept.indices.tolist(), kept.values.softmax(-1).tolist(), strict=True):
                longer[(*tokens, token)] = so_far * share
        continuations = longer
    return continuations


def test_sampling_is_found_wrong_and_repaired(prompts, monkeypatch, caplog):
    """The build's fault is seen; with the repair, text is distributed as the target says (seeded, so not by chance)."""
    monkeypatch.delenv(plugin.FIX_SAMPLING, raising=False)
    with caplog.at_level(logging.WARNING, logger=plugin.__name__), engine(DRAFT, 3):
        assert not plugin.sampling_is_right()
        assert plugin.FIX_SAMPLING in caplog.text and "temperature" in caplog.text
    monkeypatch.setenv(plugin.FIX_SAMPLING, "1")
    temperature, top_k, count = 1.5, 3, 1500
    with engine(DRAFT, 3) as llm:
        assert plugin.sampling_is_right()
        sampling = [
            SamplingParams(temperature=temperature, top_k=top_k, max_tokens=6, seed=seed, ignore_eos=True)
            for seed in range(count)
        ]
        outputs = llm.generate([{"prompt_token_ids": prompts[0]}] * count, sampling, use_tqdm=False)
        accepted = counts_of(llm, 3)["accepted"]
    assert accepted > count / 4
    seen = Counter(tuple(output.outputs[0].token_ids[:3]) for output in outputs)
    expected = exact_probabilities(prompts[0], temperature, top_k)
    assert set(seen) <= set(expected)
    usual = [tokens for tokens, share in expected.items() if share * count >= 5]
    observed = [seen[tokens] for tokens in usual]
    shares = [expected[tokens] for tokens in usual]
    observed.append(count - sum(observed))
    shares.append(1.0 - sum(shares))
    assert len(usual) >= 8
    assert chisquare(observed, [share * count for share in shares]).pvalue > 1e-3


def test_repaired_kernel_is_repeat_interleave():
    values = torch.tensor([0.5, 0.0, 2.0, 3.0])
    ends = torch.tensor([2, 2, 5, 6], dtype=torch.int32)
    output = torch.full((6,), -1.0)
    plugin._expand(output, values, ends, 0, 1, 8)
    counts = [b - a for a, b in pairwise([0, *ends.tolist()])]
    assert output.tolist() == torch.tensor([0.5, 1.0, 2.0, 3.0]).repeat_interleave(torch.tensor(counts)).tolist()


# --- refusals ---------------------------------------------------------------------------------------


def refusal(draft: Path) -> str:
    """What a user reads who gives this draft to vLLM."""
    try:
        with engine(draft):
            pass
    except ValueError as error:
        return str(error)
    finally:
        cleanup_dist_env_and_memory()
    raise AssertionError("vLLM took this draft")


def test_incomplete_checkpoints_are_refused_with_all_names(tmp_path):
    tensors = load_file(DRAFT / "model.safetensors")
    del tensors["fusion.W_z"]
    tensors["layers.0.mlp.up_proj.weight"] = tensors["layers.0.mlp.up_proj.weight"][:-2].clone()
    tensors["layers.1.mlp.up_proj.weight"] = torch.zeros(2, 2)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((DRAFT / "config.json").read_text())
    message = refusal(tmp_path)
    for part in ("missing: fusion.W_z", "unexpected: layers.1.mlp.up_proj.weight", "(638, 256), expected (640, 256)"):
        assert part in message


@pytest.mark.parametrize(("field", "size"), [("vocab_size", 3000), ("hidden_size", 128)])
def test_drafts_of_other_targets_are_refused(field, size, tmp_path):
    config = DovetailConfig.from_pretrained(DRAFT, **{field: size}, target_name_or_path="somewhere/else")
    DovetailDraft(config).save_pretrained(tmp_path)
    message = refusal(tmp_path)
    assert str(size) in message and "somewhere/else" in message


def test_eagle3_drafts_are_sent_to_vllms_own_method(tmp_path):
    config = DovetailConfig.from_pretrained(DRAFT, fusion="eagle3", feature_layers=[1, 3, 5])
    DovetailDraft(config).save_pretrained(tmp_path)
    assert "dovetail convert" in refusal(tmp_path)
