"""Drafts of this project in vLLM's CPU build: texts, acceptance counts, sampling, and bad input.

Runs in the environment of `make test-vllm`. vLLM's counts of drafted and accepted tokens are compared with those of
our own loop on the same prompts. Equal counts mean that features, positions, masks and caches are the same.
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
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import chisquare
from support.bundled import DRAFT, TARGET
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

pytest.importorskip("vllm")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

from vllm import LLM, ModelRegistry, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from dovetail_plugin import DovetailConfig, DovetailDraft, TreeBudget
from dovetail_plugin.adapters import vllm as plugin
from dovetail_plugin.bench.prompts import load_prompts
from dovetail_plugin.drafts.feature_drafter import FeatureDrafter

NEW_TOKENS = 48
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def prompts() -> "list[list[int]]":
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    return [ids[0].tolist() for ids in load_prompts(None, tokenizer, 8)]


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


Draft = tuple[Path, int]
"""Directory of a draft, and number of tokens that it drafts in a round."""


def run(draft: "Draft | None", action, dtype: str = "float32", **options):
    """Return `action(llm)` for a new engine with the bundled target, and end the engine."""
    if draft is not None:
        options["speculative_config"] = {"method": "eagle", "model": str(draft[0]), "num_speculative_tokens": draft[1]}
    usual = dict(enforce_eager=True, max_model_len=512, max_num_seqs=8, disable_log_stats=False)
    try:
        return action(LLM(str(TARGET), dtype=dtype, **(usual | options)))
    finally:
        gc.collect()
        cleanup_dist_env_and_memory()


def greedy(draft: "Draft | None", prompts, **options):
    """(texts, counts) of all prompts at once; counts are None without a draft."""

    def action(llm):
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], GREEDY, use_tqdm=False)
        texts = [list(output.outputs[0].token_ids) for output in outputs]
        return texts, None if draft is None else counts_of(llm, draft[1])

    return run(draft, action, **options)


def counts_of(llm, tokens: int) -> "dict[str, object]":
    found = {metric.name.removeprefix("vllm:spec_decode_num_"): metric for metric in llm.get_metrics()}
    return {
        "rounds": found["drafts"].value,
        "drafted": found["draft_tokens"].value,
        "accepted": found["accepted_tokens"].value,
        "by position": list(found["accepted_tokens_per_pos"].values)[:tokens],
    }


def our_counts(draft_dir: Path, prompts, tokens: int, dtype: torch.dtype, gaps=None) -> "dict[str, object]":
    """Counts of our own chains for a text of NEW_TOKENS; near its end they are as long as before, like vLLM's.

    Args:
        gaps: a list that receives, for every step of the draft, the relative difference of its two best logits.
    """
    target = AutoModelForCausalLM.from_pretrained(TARGET, dtype=dtype)
    draft = DovetailDraft.from_pretrained(draft_dir, dtype=dtype)
    draft.budget = TreeBudget(tokens + 1, tokens, 1)
    head = draft.head

    def head_with_gaps(features):
        logits = head(features)
        if gaps is not None:
            best = logits.float().topk(2).values
            gaps.extend(((best[..., 0] - best[..., 1]) / best[..., 0].abs()).flatten().tolist())
        return logits

    draft.head = head_with_gaps
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
    return {dtype: greedy(None, prompts, dtype=dtype)[0] for dtype in ("float32", "bfloat16")}


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("tokens", [1, 3, 5])
def test_texts_and_counts(blocks, tokens, prompts, plain, drafts):
    texts, counts = greedy((drafts[blocks], tokens), prompts)
    assert texts == plain["float32"]
    assert counts == our_counts(drafts[blocks], prompts, tokens, torch.float32)
    assert counts["accepted"] > 0.3 * counts["rounds"]


@pytest.mark.parametrize("blocks", [1, 3])
def test_chunked_prefill(blocks, prompts, plain, drafts, monkeypatch):
    """vLLM 0.32 pairs the last feature of a chunk with the prompt's last token, not with the next one.

    (`prepare_next_token_ids_padded` takes the last token that is known.) This lowers acceptance and does not change
    the text. The counts are compared with those of a drafter that makes the same mistake.
    """
    rows = 32
    assert min(map(len, prompts)) > rows
    chunks = dict(enable_chunked_prefill=True, max_num_batched_tokens=rows, max_num_seqs=1)
    texts, counts = greedy((drafts[blocks], 3), prompts, **chunks)
    assert texts == plain["float32"]
    begin = FeatureDrafter.begin

    def begin_in_chunks(self, features, input_ids):
        ends = torch.arange(rows, len(input_ids) - 1, rows)
        begin(self, features, input_ids.index_put((ends,), input_ids[-2]))

    monkeypatch.setattr(FeatureDrafter, "begin", begin_in_chunks)
    assert counts == our_counts(drafts[blocks], prompts, 3, torch.float32)


@pytest.mark.parametrize("blocks", [1, 3])
def test_bf16(blocks, prompts, plain, drafts):
    """vLLM and torch round differently in bf16: where their texts agree, the counts do too, except at ties.

    A tie is a step of our draft whose two best logits are equal up to rounding.
    """
    draft = (drafts[blocks], 3)
    assert greedy(draft, prompts, dtype="bfloat16")[0] == plain["bfloat16"]

    def one_by_one(llm):
        counts = [counts_of(llm, 3)]
        for ids in prompts:
            llm.generate([{"prompt_token_ids": ids}], GREEDY, use_tqdm=False)
            counts.append(counts_of(llm, 3))
        return [np.subtract(after["by position"], before["by position"]).tolist() for before, after in pairwise(counts)]

    theirs = run(draft, one_by_one, dtype="bfloat16")
    target = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.bfloat16)
    options = dict(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    agreeing = [
        number
        for number, ids in enumerate(prompts)
        if target.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() == plain["bfloat16"][number]
    ]
    gaps: list[list[float]] = [[] for _ in prompts]
    ours = [our_counts(draft[0], [ids], 3, torch.bfloat16, gaps[i])["by position"] for i, ids in enumerate(prompts)]
    parted = [number for number in agreeing if ours[number] != theirs[number]]
    # How many plain texts of the two libraries agree is a matter of the CPU: most with AVX-512, half with AMX, where
    # they multiply with different instructions. Four texts are what the comparison needs.
    assert len(agreeing) >= 4 and len(parted) <= 0.25 * len(agreeing)
    assert all(min(gaps[number]) <= 2**-7 for number in parted)


# --- registration -----------------------------------------------------------------------------------


def test_register_may_run_again():
    """vLLM calls it in every process, in some of them more than once."""
    for _ in range(3):
        plugin.register()
    assert set(plugin.ARCHITECTURES) <= set(ModelRegistry.get_supported_archs())


def test_draft_in_the_engines_own_process(prompts, plain, tmp_path):
    """The engine runs in a separate process, as by default, and finds the plugin by its entry point."""
    script = (
        "import json, sys\n"
        "from vllm import LLM, SamplingParams\n"
        "if __name__ == '__main__':\n"
        "    target, draft, prompts = json.loads(sys.stdin.read())\n"
        "    llm = LLM(target, dtype='float32', enforce_eager=True, max_model_len=512, max_num_seqs=8,\n"
        "        speculative_config={'method': 'eagle', 'model': draft, 'num_speculative_tokens': 3})\n"
        f"    sampling = SamplingParams(temperature=0.0, max_tokens={NEW_TOKENS}, ignore_eos=True)\n"
        "    outputs = llm.generate([{'prompt_token_ids': ids} for ids in prompts], sampling, use_tqdm=False)\n"
        "    with open(sys.argv[1], 'w') as file:\n"  # lines of other processes go to the same standard output
        "        json.dump([list(output.outputs[0].token_ids) for output in outputs], file)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "texts.json")],
        input=json.dumps([str(TARGET), str(DRAFT), prompts]),
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "texts.json").read_text()) == plain["float32"]


def test_serve(prompts, plain, tmp_path):
    """The server that `vllm serve` starts, over HTTP. (The command itself requires a package named vllm.)"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    speculation = json.dumps({"method": "eagle", "model": str(DRAFT), "num_speculative_tokens": 3})
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(TARGET)]
    command += ["--speculative-config", speculation, "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "512", "--port", str(port)]
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
    """Wait for the server and return its answer."""
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


def exact_probabilities(ids: "list[int]", temperature: float, top_p: float) -> "dict[tuple[int, ...], float]":
    """Probability of every continuation of three tokens, from plain passes and the warpers of transformers."""
    target = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32)
    warp = LogitsProcessorList([TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)])
    continuations: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        texts = torch.tensor([ids + list(tokens) for tokens in continuations])
        with torch.no_grad():
            shares = warp(texts, target(texts).logits[:, -1]).softmax(-1)
        continuations = {
            (*tokens, token): so_far * shares[row, token].item()
            for row, (tokens, so_far) in enumerate(continuations.items())
            for token in shares[row].nonzero()[:, 0].tolist()
        }
    return continuations


def test_faulty_sampling_is_found_and_repaired(prompts, monkeypatch, caplog):
    """The fault of this build is detected; with the repair, sampled text has the target's distribution."""
    monkeypatch.delenv(plugin.FIX_SAMPLING, raising=False)
    with caplog.at_level(logging.WARNING, logger=plugin.__name__):
        assert not run((DRAFT, 3), lambda _: plugin.sampling_is_right())
    assert plugin.FIX_SAMPLING in caplog.text and "temperature" in caplog.text
    monkeypatch.setenv(plugin.FIX_SAMPLING, "1")
    temperature, top_p, count = 1.0, 0.8, 1000

    def sample(llm):
        assert plugin.sampling_is_right()
        sampling = SamplingParams(temperature=temperature, top_p=top_p, max_tokens=6, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": prompts[0]}] * count, sampling, use_tqdm=False)
        return [tuple(output.outputs[0].token_ids[:3]) for output in outputs], counts_of(llm, 3)["accepted"]

    texts, accepted = run((DRAFT, 3), sample, max_num_seqs=100)
    assert accepted > count / 4
    seen = Counter(texts)
    expected = exact_probabilities(prompts[0], temperature, top_p)
    assert set(seen) <= set(expected)
    usual = [tokens for tokens, share in expected.items() if share * count >= 5]
    observed = [seen[tokens] for tokens in usual]
    shares = [expected[tokens] for tokens in usual]
    observed.append(count - sum(observed))
    shares.append(1.0 - sum(shares))
    assert len(usual) >= 8
    assert chisquare(observed, [share * count for share in shares]).pvalue > 1e-3


def test_repaired_kernel_equals_repeat_interleave():
    values = torch.tensor([0.5, 0.0, 2.0, 3.0])
    ends = torch.tensor([2, 2, 5, 6], dtype=torch.int32)
    output = torch.full((6,), -1.0)
    plugin._expand(output, values, ends, 0, 1, 8)
    counts = [b - a for a, b in pairwise([0, *ends.tolist()])]
    assert output.tolist() == torch.tensor([0.5, 1.0, 2.0, 3.0]).repeat_interleave(torch.tensor(counts)).tolist()


# --- refusals ---------------------------------------------------------------------------------------


def refusal(draft: Path) -> str:
    """Give this draft to vLLM and return the error message."""
    try:
        run((draft, 3), lambda _: None)
    except ValueError as error:
        return str(error)
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
