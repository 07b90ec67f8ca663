"""Random changes of the files of a draft: it drafts the plain text, or a `DovetailError` says what is wrong."""

import json
import random
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from families import VOCAB, prompt, tiny_target
from helpers import byte_model, byte_tokenizer
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file, save_file
from support import checkpoints
from support.faults import Said, at_most, changed_configs, damage
from transformers import AutoModelForCausalLM

from dovetail_plugin import AutoDraft, DovetailConfig, DovetailDraft, DovetailError, TreeBudget
from dovetail_plugin.drafts.checkpoints.load import TOKEN_ORDER

pytestmark = pytest.mark.torch_only("about loading, which is the same for every engine")

FORMATS = ("dovetail", "dovetail eagle3", "dovetail bin", "dovetail shards", "paper", "eagle", "eagle3", "speculators")
OTHERS = [
    *("to_dict", "from_dict", "attribute_map", "feature_size", "per_layer_config", "layer_types", "text_config"),
    *("quantization_config", "transformers_weights", "num_labels", "id2label", "dtype", "torch_dtype", "rope_theta"),
    *("rope_scaling", "partial_rotary_factor", "eagle_config", "norm_output", "target_hidden_size", "model_type", "_x"),
    *("draft_vocab_size", "is_encoder_decoder", "output_attentions", "attn_implementation", "name_or_path", "bias"),
]
EXAMPLES = dict(deadline=None, suppress_health_check=list(HealthCheck), database=None)


@pytest.fixture(scope="module")
def target():
    return tiny_target("llama", num_hidden_layers=checkpoints.TARGET_LAYERS)


@pytest.fixture(scope="module")
def plain(target):
    return target.generate(prompt(), max_new_tokens=6, do_sample=False)


def make(name: str, directory: Path, target) -> None:
    """Write a valid draft."""
    torch.manual_seed(3)
    if name in checkpoints.FORMATS:
        checkpoints.FORMATS[name]().write(directory)
        return
    if name == "dovetail eagle3":
        with tempfile.TemporaryDirectory() as source:
            DovetailDraft.from_pretrained(checkpoints.eagle3().write(Path(source))).save_pretrained(directory)
        return
    draft = DovetailDraft.for_target(target, blocks=2)
    draft.config.calibration = {"greedy": [0.5] * 18}
    draft.save_pretrained(directory)
    np.save(directory / TOKEN_ORDER, np.random.default_rng(0).permutation(VOCAB).astype(np.int32))
    if name == "dovetail shards":
        tensors = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        shards = {"one.safetensors": sorted(tensors)[::2], "two.safetensors": sorted(tensors)[1::2]}
        for file, names in shards.items():
            save_file({key: tensors[key] for key in names}, directory / file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {key: file for file, names in shards.items() for key in names}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    if name == "dovetail bin":
        torch.save(draft.state_dict(), directory / "pytorch_model.bin")
        (directory / "model.safetensors").unlink()


@pytest.fixture(scope="module")
def valid(tmp_path_factory, target):
    """Name of a format -> directory with a valid draft."""
    made = {}
    for name in FORMATS:
        made[name] = tmp_path_factory.mktemp("valid")
        make(name, made[name], target)
    return made


def try_to_draft(directory: Path, target, plain) -> bool:
    """Whether the draft loads and drafts. Any error other than a `DovetailError`, much memory or many lines fail."""
    held = sum(file.stat().st_size for file in directory.iterdir())
    with Said() as said:
        try:
            with at_most(tensor_bytes=held + 2**20, python_bytes=2 * held + 2**24):
                draft = DovetailDraft.from_pretrained(directory)
                draft.budget = TreeBudget(6, 2, 3)
                if draft.config.fusion != "eagle3":
                    draft.draft_vocab_size = min(40, draft.config.vocab_size)
            text = target.generate(prompt(), max_new_tokens=6, do_sample=False, assistant_model=draft)
        except DovetailError as error:
            text, message = None, str(error)
    assert len(said.lines) <= 3, said.lines
    if text is None:
        assert any(words in message for words in (str(directory), "this draft was trained for", "the draft reads"))
        assert len(message) < 8000
        return False
    assert torch.equal(text, plain)
    return True


@pytest.mark.parametrize("name", FORMATS)
def test_unchanged(name, valid, target, plain):
    assert try_to_draft(valid[name], target, plain)


@pytest.mark.parametrize("name", FORMATS)
def test_changed_config(name, valid, target, plain):
    stored = json.loads((valid[name] / "config.json").read_text())
    if name.startswith("dovetail"):
        assert stored["model_type"] == DovetailConfig.model_type

    @settings(max_examples=15, **EXAMPLES)
    @given(changed_configs(stored, OTHERS))
    def check(config):
        with tempfile.TemporaryDirectory() as directory:
            copied = Path(shutil.copytree(valid[name], directory, dirs_exist_ok=True))
            (copied / "config.json").write_text(json.dumps(config))
            try_to_draft(copied, target, plain)

    check()


FILES = [
    *(("dovetail", file) for file in ("config.json", "model.safetensors", TOKEN_ORDER)),
    *(("dovetail shards", file) for file in ("model.safetensors.index.json", "one.safetensors", "two.safetensors")),
    *((name, "config.json") for name in FORMATS[1:]),
    *((name, "pytorch_model.bin") for name in ("dovetail bin", "paper")),
    *((name, "model.safetensors") for name in ("dovetail eagle3", "eagle", "eagle3", "speculators")),
]
SMALL_MODEL = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def damaged(directory: Path, file: str, seed: int):
    """A copy of a directory with one of its files damaged, or missing."""
    rng = random.Random(f"{directory.name[:5]} {file} {seed}")
    copied = tempfile.TemporaryDirectory()
    shutil.copytree(directory, copied.name, dirs_exist_ok=True)
    if seed % 50 == 49:
        (Path(copied.name) / file).unlink()
    else:
        damage(Path(copied.name) / file, rng)
    return copied


@pytest.mark.parametrize(("name", "file"), FILES)
def test_damaged_file(name, file, valid, target, plain):
    for seed in range(5):
        with damaged(valid[name], file, seed) as directory:
            try_to_draft(Path(directory), target, plain)


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "file"), FILES)
def test_file_damaged_in_200_ways(name, file, valid, target, plain):
    outcomes = set()
    for seed in range(200):
        with damaged(valid[name], file, seed) as directory:
            outcomes.add(try_to_draft(Path(directory), target, plain))
    assert False in outcomes


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """A directory with a small model, and a target with its tokenizer."""
    directory = tmp_path_factory.mktemp("small")
    byte_model().save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    target = AutoModelForCausalLM.from_pretrained(shutil.copytree(directory, directory.parent / "byte-target"))
    return directory, target


def try_small_model(directory: Path, target) -> bool:
    """Whether the small model loads and drafts the plain text. Any error that is not the caller's mistake fails."""
    held = sum(file.stat().st_size for file in directory.iterdir())
    ids = prompt()
    with Said():
        try:
            with at_most(tensor_bytes=20 * held + 2**24, python_bytes=8 * held + 2**26):
                draft = AutoDraft.from_pretrained(str(directory))
            draft.budget = TreeBudget(6, 2, 3)
            text = target.generate(ids, max_new_tokens=4, do_sample=False, assistant_model=draft)
        except (ValueError, OSError):
            return False
    assert torch.equal(text, target.generate(ids, max_new_tokens=4, do_sample=False))
    return True


def test_small_model_unchanged(small_model):
    assert try_small_model(*small_model)


@pytest.mark.parametrize("file", SMALL_MODEL)
def test_damaged_small_model(file, small_model):
    for seed in range(5):
        with damaged(small_model[0], file, seed) as directory:
            try_small_model(Path(directory), small_model[1])


@pytest.mark.nightly
@pytest.mark.parametrize("file", SMALL_MODEL)
def test_small_model_damaged_in_200_ways(file, small_model):
    for seed in range(200):
        with damaged(small_model[0], file, seed) as directory:
            try_small_model(Path(directory), small_model[1])
