"""Plans on the command line: sizes as text, the table, JSON, `dovetail plan`."""

import json

import pytest
import torch
from helpers import refusal, run_python, save_pair
from transformers import AutoConfig

from dovetail_plugin import machine
from dovetail_plugin.cli import main
from dovetail_plugin.planning.device_plan import format_bytes, parse_bytes
from dovetail_plugin.planning.known_shapes import load_config, shape_config
from dovetail_plugin.planning.make_plan import make_plan
from dovetail_plugin.planning.storage import EXPORTED, FLOAT_DTYPES
from dovetail_plugin.policy.device_split import DeviceSplitPolicy

pytestmark = pytest.mark.torch_only("plans for targets in torch")

MIB, GIB = 2**20, 2**30


def plan_for(shape, vram_bytes, **options):
    return make_plan(shape_config(shape), None, vram_bytes=vram_bytes, **options)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 * GIB),
        ("4g", 4 * GIB),
        ("4 GB", 4 * 10**9),
        ("512MiB", 512 * MIB),
        ("512m", 512 * MIB),
        ("1.5GiB", 3 * GIB // 2),
        ("64k", 65536),
        ("2TB", 2 * 10**12),
        (" 100 b ", 100),
        ("0", 0),
        ("0GiB", 0),
        (123, 123),
        (0, 0),
    ],
)
def test_parse_bytes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "value", [-1, "-4GiB", "4x", "GiB", "", "four", "1e9", "4GiB4", True, None, "6", "6.5", "4294967296"]
)
def test_parse_bytes_refuses(value):
    with pytest.raises(ValueError, match="GiB") as refused:
        parse_bytes(value)
    assert repr(value) in str(refused.value)


@pytest.mark.parametrize("size", ["6", "6.5"])
def test_sizes_without_a_unit_are_refused_with_a_suggestion(size):
    with pytest.raises(ValueError, match=rf"'{size}' has no unit\. Write {size}GiB"):
        parse_bytes(size)
    with pytest.raises(ValueError, match="has no unit"):
        DeviceSplitPolicy(vram_budget=size)
    with pytest.raises(ValueError, match="has no unit"):
        DeviceSplitPolicy(ram_budget=size)
    assert DeviceSplitPolicy(vram_budget=6).vram_budget_bytes == 6


def test_format_bytes():
    assert [format_bytes(n) for n in (512, 3 * MIB // 2, 5 * GIB)] == ["0.5 KiB", "1.5 MiB", "5.00 GiB"]
    assert format_bytes(-2 * GIB) == "-2.00 GiB"


# --- what is printed ---------------------------------------------------------------------------


def test_table_and_json():
    plan = plan_for("llama-3.1-8b-shape", 4 * GIB, ram_bytes=32 * GIB)
    table = plan.table()
    for part in plan.parts:
        assert part.name in table and format_bytes(part.bytes) in table
    for device, budget in (("gpu", "4.00 GiB"), ("cpu", "32.00 GiB")):
        assert f"of {budget}, {format_bytes(plan.left_bytes(device))} left" in table
    assert all(f"- {note}" in table for note in plan.notes)
    assert "no limit given" in plan_for("llama-3.1-8b-shape", 0).table()
    stored = json.loads(json.dumps(plan.as_dict()))
    assert stored["vram_needed_bytes"] == sum(p["bytes"] for p in stored["parts"] if p["device"] == "gpu")
    assert stored["ram_left_bytes"] == plan.left_bytes("cpu")
    assert stored["device_map"] == plan.device_map


SIZES = ("--vram", "4GiB", "--ram", "32GiB")


def test_command(tmp_path, capsys):
    target, draft = save_pair(tmp_path)
    assert main(["plan", "--target", str(target), "--draft", str(draft), *SIZES]) == 0
    said = capsys.readouterr().out
    assert (
        "draft: blocks" in said and "of 4.00 GiB" in said and "of 32.00 GiB" in said and "--vram not given" not in said
    )
    assert main(["plan", "--target", str(target / "config.json"), *SIZES, "--json", "--blocks", "2"]) == 0
    two = json.loads(capsys.readouterr().out)
    one = make_plan(load_config(target), None, vram_bytes=4 * GIB).as_dict()
    blocks = [next(p["bytes"] for p in plan["parts"] if p["name"] == "draft: blocks") for plan in (one, two)]
    assert blocks[0] < blocks[1]


def test_command_as_a_process(tmp_path):
    done = run_python("-m", "dovetail_plugin", "plan", "--target", "llama-3.1-8b-shape", *SIZES, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    policy = DeviceSplitPolicy(vram_budget="4GiB", ram_budget="32GiB")
    assert done.stdout.strip() == policy.plan("llama-3.1-8b-shape", gpu_supports_bf16=True).table()
    refused = run_python(
        "-m", "dovetail_plugin", "plan", "--target", "llama-2-13b-shape", "--vram", "0", "--ram", "8GiB", cwd=tmp_path
    )
    assert refused.returncode == 2 and refused.stdout == ""
    assert refused.stderr.startswith("dovetail plan: the target does not fit")


def test_command_looks_at_this_machine(monkeypatch, capsys):
    monkeypatch.setattr(machine, "memory_bytes", lambda: 24 * GIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["plan", "--target", "llama-3.1-8b-shape"]) == 0
    said = capsys.readouterr().out
    assert "--vram not given: torch finds no GPU" in said and "--ram not given: this machine has 24.00 GiB" in said
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GIB, 4 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX 2050")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert main(["plan", "--target", "llama-3.1-8b-shape"]) == 0
    said = capsys.readouterr().out
    assert "--vram not given: RTX 2050 has 3.00 GiB free" in said and "float16" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vram", "4x"], "'4x' is not a valid size"),
        (["--ram", "lots"], "'lots' is not a valid size"),
        (["--vram", "6"], "'6' has no unit. Write 6GiB"),
        (["--ram", "6.5"], "'6.5' has no unit. Write 6.5GiB"),
        (["--draft", "llama-2-7b-shape"], "the config of a llama model, not of a draft"),
        (["--draft", "draft", "--blocks", "2"], "--blocks describes the untrained draft"),
        (["--target", "not/to/be/found"], "not/to/be/found: no such file or directory"),
    ],
)
def test_mistakes(arguments, message, capsys):
    target = [] if "--target" in arguments else ["--target", "llama-2-7b-shape"]
    assert main(["plan", *target, *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--blocks", "0"], "must be at least 1, got 0"),
        (["--blocks", "7"], "must be at most 6, got 7"),
        (["--context", "0"], "must be at least 1, got 0"),
        (["--prefill-rows", "many"], "'many' is not a whole number"),
        (["--vram", ""], "is empty; give a size"),
        (["--target", ""], "is empty; give a directory or a hub id"),
        (["--draft", " "], "is empty; give a directory or a hub id"),
    ],
)
def test_mistakes_in_one_option(arguments, message, capsys):
    assert f"{arguments[0]}" in (said := refusal(capsys, "plan", "--target", "llama-2-7b-shape", *arguments))
    assert message in said


@pytest.fixture
def no_hub(monkeypatch):
    """Fails when a name is looked up."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"the hub was asked for {args}")

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    monkeypatch.setattr("dovetail_plugin.planning.draft_config.read_config", refuse)


def test_lookup_is_planned_without_the_hub(no_hub, capsys):
    assert main(["plan", "--target", "llama-2-7b-shape", "--draft", "lookup", *SIZES]) == 0
    said = capsys.readouterr().out
    assert "prompt lookup has no weights: the draft takes no VRAM" in said and "draft: blocks" not in said
    policy = DeviceSplitPolicy(vram_budget="4GiB", ram_budget="32GiB")
    assert policy.plan("llama-2-7b-shape", "lookup").draft_dtype is None


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("llama-2-7b-shpe", "llama-2-7b-shape"),
        ("qwen3-8b", "qwen3-8b-shape"),
        ("Gemma-3-27B-shape", "gemma-3-27b-shape"),
        ("gpt-oss-20b", "gpt-oss-20b-shape"),
    ],
)
def test_near_misses_of_a_shape_are_named_without_the_hub(no_hub, name, close, capsys):
    assert main(["plan", "--target", name, *SIZES]) == 2
    said = capsys.readouterr().err
    assert f"there is no shape '{name}'. Did you mean {close}" in said


@pytest.mark.parametrize(("model_type", "message"), [("t5", "encoder-decoders"), ("qwen2_vl", "cannot load")])
def test_models_that_cannot_be_planned_for_are_refused_in_one_line(model_type, message, tmp_path, capsys):
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    assert main(["plan", "--target", str(tmp_path), *SIZES]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said) < 400


def test_help(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    said = capsys.readouterr().out
    for text in ("examples:", "dovetail plan --target DIR", "--vram SIZE", "llama-3.1-8b-shape", "(default: 4096)"):
        assert " ".join(text.split()) in " ".join(said.split())
    assert "default: None" not in said
    assert "{auto,float32,bfloat16,float16,int8,int4}" in said
    assert (*FLOAT_DTYPES, *EXPORTED) == ("float32", "bfloat16", "float16", "int8", "int4")
