"""The training loop learns, and resuming, accumulation and several processes do not change the result."""

import dataclasses
import json

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import ROOT, run_python
from support.training import SIZES, assert_same, config_for, history, interrupted_after, weights, write_files
from transformers import AutoModelForCausalLM, AutoTokenizer

from dovetail_plugin import DovetailDraft
from dovetail_plugin.training import TrainingConfig, train
from dovetail_plugin.training import loop as loop_module

pytestmark = pytest.mark.usefixtures("fixed_budget")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A directory with a target and its tokenizer, and 16 chats."""
    return write_files(tmp_path_factory.mktemp("training"))


@pytest.fixture
def config(files, tmp_path):
    """A function that builds a config with changed fields; its output goes to the directory of the test."""
    return lambda out="draft", **changes: config_for(files, tmp_path / out, **changes)


@pytest.fixture(scope="module")
def reference(files, tmp_path_factory):
    """Weights and history of an uninterrupted run of 6 steps in one process."""
    out = tmp_path_factory.mktemp("reference")
    train(config_for(files, out))
    return weights(out), history(out)


def test_output_loads_and_records_its_settings(config, files):
    """The output loads, generates, and records the settings of the run."""
    config = config(steps=2, save_dtype="bfloat16", blocks=2, fusion="concat")
    train(config)
    names = {file.name for file in config.out.iterdir()}
    assert names >= {"model.safetensors", "config.json", "training.json", "loss.png", "tokenizer.json"}
    assert (config.out / "loss.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((config.out / "training.json").read_text())
    assert record["config"]["steps"] == 2
    assert record["config"]["target"] == "target"
    assert record["history"]["steps"] == [1, 2]
    assert len(record["history"]["losses"]) == 2
    assert str(files) not in json.dumps(record)  # no paths of this machine
    draft = DovetailDraft.from_pretrained(config.out)
    assert (draft.dtype, draft.config.fusion, len(draft.layers)) == (torch.bfloat16, "concat", 2)
    assert draft.config.target_name_or_path == "target"
    target = AutoModelForCausalLM.from_pretrained(files / "target")
    ids = AutoTokenizer.from_pretrained(config.out)("count 3", return_tensors="pt")["input_ids"]
    plain = target.generate(ids, max_new_tokens=10, do_sample=False)
    assert torch.equal(plain, target.generate(ids, max_new_tokens=10, do_sample=False, assistant_model=draft))


@pytest.fixture
def fresh_accelerate():
    """Reset accelerate, which keeps one precision per process, before and after a test that uses another one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_loss_goes_down(config, precision):
    config = config(steps=40, lr=5e-3, mixed_precision=precision, eval_every=40, save_every=99)
    train(config)
    losses = history(config.out)["losses"]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert 1.0 <= history(config.out)["acceptance"][-1] <= 1.0 + config.rollout


def test_seed_decides_the_weights(config, reference):
    for out, seed in (("same", 0), ("other", 1)):
        train(config(out, seed=seed))
    assert_same(weights(config("same").out), reference[0], atol=0, rtol=0)
    assert history(config("same").out) == reference[1]
    assert not torch.equal(weights(config("other").out)["fusion.W_1"], reference[0]["fusion.W_1"])


@pytest.mark.parametrize("done", [3, 5])
def test_resume(config, reference, done):
    """A run that is interrupted after 3 or 5 steps resumes from step 2 or 4 and ends with the same weights."""
    with interrupted_after(done) as first:
        train(config())
    assert first.steps == [*range(done)]
    with interrupted_after(None) as rest:
        train(config(), resume=True)
    assert rest.steps == [*range(done - 1, 6)]
    assert_same(weights(config().out), reference[0], atol=1e-6, rtol=1e-6)
    assert history(config().out)["steps"] == [1, 2, 3, 4, 5, 6]
    assert history(config().out)["losses"] == pytest.approx(reference[1]["losses"], abs=1e-5)
    assert history(config().out)["acceptance"] == pytest.approx(reference[1]["acceptance"], abs=1e-5)


def test_resume_without_a_state_starts_anew(config, reference):
    train(config(), resume=True)
    assert_same(weights(config().out), reference[0], atol=0, rtol=0)


@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"accumulate": 4}], ids=str)
def test_accumulation_does_not_change_the_result(config, reference, changes):
    """The parts differ in length and number of rows, and the step is the same."""
    train(config(**changes))
    assert history(config().out)["losses"] == pytest.approx(reference[1]["losses"], abs=1e-5)
    assert_same(weights(config().out), reference[0], atol=1e-4, rtol=1e-4)


def test_cached_features_give_the_same_weights(config, reference, tmp_path, monkeypatch):
    train(config("first", cache_features=tmp_path / "cache"))
    assert_same(weights(config("first").out), reference[0], atol=1e-4, rtol=1e-4)

    def never(*_args):
        raise AssertionError("the target ran although its features were stored")

    monkeypatch.setattr(loop_module, "target_features", never)
    monkeypatch.setattr("dovetail_plugin.training.features.target_features", never)
    train(config("second", cache_features=tmp_path / "cache"))
    assert_same(weights(config("second").out), weights(config("first").out), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"accumulate": 3}, r"batch_size \(4\) must be a multiple of accumulate \(3\)"),
        ({"max_length": 4}, r"max_length \(4\) is too short for 2 rollout passes. Use at least 5"),
        ({"blocks": 7}, "blocks must be at most 6, got 7"),
        ({"seed": 2**63}, "seed must be at most 9223372036854775807, got 9223372036854775808"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"lr": 0.0}, "lr must be above 0, got 0.0"),
        ({"clip": float("nan")}, "clip must be above 0, got nan"),
        ({"feature_noise": -0.1}, "feature_noise must be at least 0"),
        ({"fusion": "sum"}, "fusion must be one of dgf, concat, got 'sum'"),
        ({"save_dtype": "bf16"}, "save_dtype must be one of .*bfloat16.*got 'bf16'"),
        ({"dtype": "int8"}, "dtype must be one of auto"),
        ({"mixed_precision": "fp8"}, "mixed_precision"),
    ],
)
def test_bad_settings_are_refused(config, changes, match):
    with pytest.raises(ValueError, match=match):
        config(**changes)


@pytest.mark.parametrize(("length", "count"), [(16, 3), (7, 7), (5, 1), (1000, 32)])
def test_held_out_sequences_are_of_all_parts_of_the_data(length, count):
    """Not only of the last file, which may be of another kind; each is used once, and the others keep their order."""
    ordered = loop_module.held_out_last(list(range(length)), count)
    others, held_out = ordered[:-count], ordered[-count:]
    assert sorted(ordered) == list(range(length)) and others == sorted(others)
    gaps = [b - a for a, b in zip([-held_out[0], *held_out], [*held_out, 2 * length - held_out[-1]], strict=True)]
    assert max(gaps) <= length // count + 2


def test_too_little_data_is_refused(config):
    with pytest.raises(ValueError, match="16 usable sequences are too few for 14 held-out sequences"):
        train(config(held_out=14))


def test_missing_data_is_refused(config):
    with pytest.raises(ValueError, match=r"at least one \.jsonl"):
        dataclasses.replace(config(), data=())


def test_every_setting_has_a_description():
    """The command line and the documentation read it."""
    for setting in dataclasses.fields(TrainingConfig):
        text = setting.metadata["help"]
        assert text and "\n" not in text
        assert setting.default in setting.metadata.get("choices", (setting.default,))


def test_reading_the_settings_needs_no_torch():
    """`dovetail train --help` lists the settings without loading what trains."""
    code = (
        "import sys; sys.path.insert(0, 'dovetail_plugin'); import training.config, training;"
        "assert not {'torch', 'accelerate', 'numpy', 'transformers'} & set(sys.modules)"
    )
    done = run_python("-c", code, cwd=ROOT)
    assert done.returncode == 0, done.stderr


LAUNCHERS = {
    "accelerate, one process": ["accelerate.commands.launch", "--cpu", "--num_processes", "1"],
    "two processes": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_give_the_same_weights(launcher, files, reference, tmp_path):
    """The command runs under a launcher. Two processes share each step and end with the weights of one process."""
    options = {f"--{name.replace('_', '-')}": value for name, value in SIZES.items()}
    train_command = ["train", "--target", files / "target", "--data", files / "chats.jsonl", "--out", "draft"]
    arguments = [*train_command, "--save-dtype", "float32", *(part for pair in options.items() for part in pair)]
    done = run_python("-m", *LAUNCHERS[launcher], "-m", "dovetail_plugin", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "draft saved to draft" in done.stdout
    assert_same(weights(tmp_path / "draft"), reference[0], atol=1e-4, rtol=1e-4)
    assert history(tmp_path / "draft")["losses"] == pytest.approx(reference[1]["losses"], abs=1e-5)
