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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import checkpoints
from support.faults import Said, at_most, changed_configs, damage

from dovetail_plugin import DovetailConfig, DovetailDraft, DovetailError, TreeBudget
from dovetail_plugin.drafts.checkpoints.load import TOKEN_ORDER

pytestmark = pytest.mark.torch_only("about loading, which is the same for every engine")

FORMATS = ("dovetail", "dovetail eagle3", "dovetail bin", "paper", "eagle", "eagle3", "speculators")
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
        DovetailDraft.from_pretrained(checkpoints.eagle3().write(directory)).save_pretrained(directory)
        return
    draft = DovetailDraft.for_target(target, blocks=2)
    draft.config.calibration = {"greedy": [0.5] * 18}
    draft.save_pretrained(directory)
    np.save(directory / TOKEN_ORDER, np.random.default_rng(0).permutation(VOCAB).astype(np.int32))
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


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_file(name, valid, target, plain):
    @settings(max_examples=15, **EXAMPLES)
    @given(st.integers(0, 2**32))
    def check(seed):
        rng = random.Random(seed)
        with tempfile.TemporaryDirectory() as directory:
            copied = Path(shutil.copytree(valid[name], directory, dirs_exist_ok=True))
            file = rng.choice(sorted(copied.iterdir()))
            if rng.random() < 0.1:
                file.unlink()
            else:
                damage(file, rng)
            try_to_draft(copied, target, plain)

    check()
