"""The training loop: it learns, resumes, accumulates and shares work without changing what it learns."""

import dataclasses
import json

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers import byte_target, byte_tokenizer, chat, run_python, write_jsonl
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dovetail_plugin import DovetailDraft
from dovetail_plugin.training import TrainingConfig, train
from dovetail_plugin.training import loop as loop_module

pytestmark = pytest.mark.usefixtures("fixed_budget")

SIZES = dict(steps=6, batch_size=4, max_length=48, warmup_steps=2, rollout=2, held_out=3, eval_every=3, save_every=2)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A directory with a target and its tokenizer, and 16 chats."""
    directory = tmp_path_factory.mktemp("training")
    byte_target().save_pretrained(directory / "target")
    byte_tokenizer().save_pretrained(directory / "target")
    write_jsonl(directory / "chats.jsonl", [{"messages": chat(n)} for n in range(16)])
    return directory


@pytest.fixture
def config(files, tmp_path):
    """A function from changed fields to a config that trains into this test's directory."""

    def build(out="draft", **changes):
        sizes = SIZES | {"save_dtype": "float32"} | changes
        return TrainingConfig(str(files / "target"), (files / "chats.jsonl",), tmp_path / out, **sizes)

    return build


@pytest.fixture(scope="module")
def reference(files, tmp_path_factory):
    """Weights and history of a run of 6 steps without anything special."""
    out = tmp_path_factory.mktemp("reference")
    train(TrainingConfig(str(files / "target"), (files / "chats.jsonl",), out, **SIZES, save_dtype="float32"))
    return weights(out), history(out)


def weights(directory):
    return load_file(directory / "model.safetensors")


def history(directory):
    return json.loads((directory / "training.json").read_text())["history"]


def assert_same(got, wanted, **tolerance):
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}")


def test_output_directory(config, files):
    """What is left behind loads, generates and says how it was made."""
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
    assert str(files) not in json.dumps(record)  # where things lay is nobody's business
    draft = DovetailDraft.from_pretrained(config.out)
    assert (draft.dtype, draft.config.fusion, len(draft.layers)) == (torch.bfloat16, "concat", 2)
    assert draft.config.target_name_or_path == "target"
    target = AutoModelForCausalLM.from_pretrained(files / "target")
    ids = AutoTokenizer.from_pretrained(config.out)("count 3", return_tensors="pt")["input_ids"]
    plain = target.generate(ids, max_new_tokens=10, do_sample=False)
    assert torch.equal(plain, target.generate(ids, max_new_tokens=10, do_sample=False, assistant_model=draft))


@pytest.fixture
def fresh_accelerate():
    """accelerate keeps one precision for each process; forget it before and after a test with another."""
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


def test_same_seed_same_weights(config, reference):
    for out, seed in (("same", 0), ("other", 1)):
        train(config(out, seed=seed))
    assert_same(weights(config("same").out), reference[0], atol=0, rtol=0)
    assert history(config("same").out) == reference[1]
    assert not torch.equal(weights(config("other").out)["fusion.W_1"], reference[0]["fusion.W_1"])


@pytest.mark.parametrize("done", [3, 5])
def test_resume(config, reference, monkeypatch, done):
    """Interrupted after 3 or 5 steps (the last state is of step 2 or 4) and resumed: as if nothing had happened."""
    steps, step = [], loop_module._Run._step

    def interrupted(run, number):
        if len(steps) == done:
            raise KeyboardInterrupt
        steps.append(number)
        return step(run, number)

    with monkeypatch.context() as patch:
        patch.setattr(loop_module._Run, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config())
    monkeypatch.setattr(loop_module._Run, "_step", lambda run, number: steps.append(number) or step(run, number))
    train(config(), resume=True)
    assert steps == [*range(done), *range(done - 1, 6)]
    assert_same(weights(config().out), reference[0], atol=1e-6, rtol=1e-6)
    assert history(config().out)["steps"] == [1, 2, 3, 4, 5, 6]
    assert history(config().out)["losses"] == pytest.approx(reference[1]["losses"], abs=1e-5)
    assert history(config().out)["acceptance"] == pytest.approx(reference[1]["acceptance"], abs=1e-5)


def test_resume_with_nothing_to_resume_from(config, reference):
    train(config(), resume=True)
    assert_same(weights(config().out), reference[0], atol=0, rtol=0)


def test_interrupted_save_leaves_the_last_state(config, reference, monkeypatch):
    """Killed while the second state is written: the first one is still whole."""
    saves, save = [], Accelerator.save_state

    def killed(self, directory):
        save(self, directory)
        saves.append(directory)
        if len(saves) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "save_state", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config())
    train(config(), resume=True)
    assert_same(weights(config().out), reference[0], atol=1e-6, rtol=1e-6)
    assert history(config().out)["steps"] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("field", "value"), [("lr", 5e-4), ("blocks", 2), ("steps", 8), ("held_out", 4)])
def test_resume_with_other_numbers(config, field, value):
    train(config())
    with pytest.raises(ValueError, match=f"cannot resume.*{field} was .* and is {value}"):
        train(config(**{field: value}), resume=True)


@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"accumulate": 4}], ids=str)
def test_gradient_accumulation(config, reference, changes):
    """The parts have different lengths and counts of rows; the step is the same."""
    train(config(**changes))
    assert history(config().out)["losses"] == pytest.approx(reference[1]["losses"], abs=1e-5)
    assert_same(weights(config().out), reference[0], atol=1e-4, rtol=1e-4)


def test_cached_features(config, reference, tmp_path, monkeypatch):
    train(config("first", cache_features=tmp_path / "cache"))
    assert_same(weights(config("first").out), reference[0], atol=1e-4, rtol=1e-4)

    def never(*_args):
        raise AssertionError("the target ran although its features were there")

    monkeypatch.setattr(loop_module, "target_features", never)
    monkeypatch.setattr("dovetail_plugin.training.features.target_features", never)
    train(config("second", cache_features=tmp_path / "cache"))
    assert_same(weights(config("second").out), weights(config("first").out), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"accumulate": 3}, r"batch_size \(4\) must be a multiple of accumulate \(3\)"),
        ({"max_length": 4}, r"max_length \(4\)"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"feature_noise": -0.1}, "feature_noise must be at least 0"),
        ({"fusion": "sum"}, "fusion must be one of dgf, concat, got 'sum'"),
        ({"save_dtype": "bf16"}, "save_dtype must be one of .*bfloat16.*got 'bf16'"),
        ({"dtype": "int8"}, "dtype must be one of auto"),
        ({"mixed_precision": "fp8"}, "mixed_precision"),
    ],
)
def test_bad_numbers(config, changes, match):
    with pytest.raises(ValueError, match=match):
        config(**changes)


def test_too_little_data(config):
    with pytest.raises(ValueError, match="16 usable sequences are too few for 14 held-out"):
        train(config(held_out=14))


def test_no_data(config):
    with pytest.raises(ValueError, match=r"at least one \.jsonl"):
        dataclasses.replace(config(), data=())


LAUNCHERS = {
    "accelerate, one process": ["accelerate.commands.launch", "--cpu", "--num_processes", "1"],
    "two processes": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launched(launcher, files, reference, tmp_path):
    """The command under a launcher; two processes share the steps and end with the weights of one."""
    options = {f"--{name.replace('_', '-')}": value for name, value in SIZES.items()}
    train_command = ["train", "--target", files / "target", "--data", files / "chats.jsonl", "--out", "draft"]
    arguments = [*train_command, "--save-dtype", "float32", *(part for pair in options.items() for part in pair)]
    done = run_python("-m", *LAUNCHERS[launcher], "-m", "dovetail_plugin", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "draft saved to draft" in done.stdout
    assert_same(weights(tmp_path / "draft"), reference[0], atol=1e-4, rtol=1e-4)
    assert history(tmp_path / "draft")["losses"] == pytest.approx(reference[1]["losses"], abs=1e-5)
