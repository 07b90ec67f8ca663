"""`dovetail bench --engines`: limits of the machine, the kernels' own time, floors, tables, memory."""

import contextlib
import copy
import importlib.machinery
import json
import sys
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import pytest
import torch
from families import prompt, tiny_model
from transformers import AutoModelForCausalLM

from dovetail_plugin import CpuWeights, DovetailDraft, machine
from dovetail_plugin.bench import engines_plot, roofline
from dovetail_plugin.bench.engines import ROWS, Contender, compare_engines, linear_bytes, linear_numbers
from dovetail_plugin.bench.engines_memory import engines_bytes, exported_bytes, refuse_without_memory
from dovetail_plugin.bench.engines_result import Floors, aligned
from dovetail_plugin.bench.llamacpp import LlamaCpp
from dovetail_plugin.bench.roofline import MIX_OF, Roofline, kernel_time, measure
from dovetail_plugin.cli import engines as loading
from dovetail_plugin.errors import InputError
from dovetail_plugin.kernels import FLOAT, FORMATS, WEIGHTS
from dovetail_plugin.kernels.library import MIXES, KernelError, bytes_per_weight, library
from dovetail_plugin.kernels.linear import PackedLinear

PEAKS = {"avx2": {"int8": 100e9, "int4": 200e9, "float": 50e9}}
LIMITS = Roofline(20e9, PEAKS, "avx2", 1 << 20)
GREEDY = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)


# --- limits of the machine ---------------------------------------------------------------------------


def test_limits_are_measured_for_all_instructions(kernels):
    found = measure(kernels, seconds=0.002, size=1 << 20)
    assert found.multiply_adds_per_s.keys() == set(kernels.available)
    assert all(speeds.keys() == set(MIXES) for speeds in found.multiply_adds_per_s.values())
    assert all(speed > 1e8 for speeds in found.multiply_adds_per_s.values() for speed in speeds.values())
    assert found.read_bytes_per_s > 1e8 and found.buffer_bytes == 1 << 20
    assert found.instructions == kernels.instructions


def test_every_step_is_counted(kernels):
    """256 rounds of 16 steps: the wider the registers, and the narrower the numbers, the more products in a step."""
    products = {(name, mix): kernels.multiply(mix, name, 3) for name in kernels.available for mix in MIXES}
    for (name, mix), done in products.items():
        registers, bits = (16, 512) if name == "avx512_vnni" else (12, 256)
        assert done == 3 * 256 * 16 * registers * bits // {"int8": 16, "int4": 8, "float": 32}[mix]


def test_the_library_refuses_measurements_that_cannot_be(kernels):
    with pytest.raises(KernelError, match="and not neon"):
        kernels.multiply("int8", "neon", 1)
    with pytest.raises(KernelError, match="at least 1, got 0"):
        kernels.multiply("int8", kernels.available[0], 0)
    with pytest.raises(KernelError, match="empty"):
        kernels.read(torch.empty(0))


def test_a_buffer_that_does_not_fit_is_refused(kernels, monkeypatch):
    monkeypatch.setattr(machine, "available_bytes", lambda: 1000)
    with pytest.raises(InputError, match="4096 bytes, and 1000 bytes of memory are free"):
        measure(kernels, size=4096)


def test_the_buffer_is_larger_than_the_last_cache(monkeypatch, tmp_path):
    for name, size in (("index0", "48K"), ("index3", "480M"), ("index9", "odd")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "size").write_text(f"{size}\n")
    assert machine.last_cache_bytes(tmp_path) == 480 << 20
    assert machine.last_cache_bytes(tmp_path / "index0") == 0
    monkeypatch.setattr(machine, "last_cache_bytes", lambda: 480 << 20)
    assert roofline.buffer_bytes() == 960 << 20
    monkeypatch.setattr(machine, "last_cache_bytes", lambda: 0)
    assert roofline.buffer_bytes() == roofline.LEAST_BUFFER


def test_floors_of_given_limits():
    assert LIMITS.memory_ms(10**9) == 50.0
    assert LIMITS.arithmetic_ms(8 * 10**9, "int8") == 80.0
    assert LIMITS.arithmetic_ms(8 * 10**9, "int4") == 40.0
    assert LIMITS.arithmetic_ms(8 * 10**9, None) is None
    assert set(MIX_OF) == {*FORMATS, FLOAT}
    slow = Roofline(10e9, {"avx2": {"int8": 300e9, "int4": 1e9, "float": 1e9}}, "avx2", 1 << 20)
    best = LIMITS.best_of(slow)
    assert best.read_bytes_per_s == 20e9
    assert best.multiply_adds_per_s == {"avx2": {"int8": 300e9, "int4": 200e9, "float": 50e9}}
    assert LIMITS.lines().splitlines() == [
        "read bandwidth: 20.0 GB/s",
        "billions of multiply-adds/s, avx2 (in use): int8 100, int4 200, float 50",
    ]


def test_the_higher_floor_counts():
    floors = Floors(10.0, {1: 2.0, 8: 16.0})
    assert [(floors.ms(n), floors.limit(n)) for n in (1, 8)] == [(10.0, "memory"), (16.0, "arithmetic")]
    assert (Floors(10.0, None).ms(8), Floors(10.0, None).limit(8)) == (10.0, "memory")


# --- the kernels' own time ---------------------------------------------------------------------------


class Clock:
    """Kernels and a clock that only moves while they work."""

    products = ("_linear",)

    def __init__(self):
        self.now = 0.0

    def _linear(self, seconds):
        self.now += seconds
        return -1


def test_only_products_in_the_block_are_measured(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(roofline.time, "perf_counter", lambda: clock.now)
    own = clock._linear
    clock._linear(5.0)
    with contextlib.suppress(KeyError), kernel_time(clock) as measured:
        assert clock._linear(2.0) == -1
        clock.now += 10.0
        clock._linear(0.5)
        raise KeyError
    clock._linear(7.0)
    assert measured.seconds == 2.5
    assert clock._linear == own
    with kernel_time(None) as nothing:
        assert nothing.seconds == 0.0


def test_layers_are_measured(kernels):
    layer, x = PackedLinear.of(torch.nn.Linear(64, 64).requires_grad_(False), "int8"), torch.randn(2, 64)
    right = layer(x)
    with kernel_time(kernels) as measured:
        assert torch.equal(layer(x), right)
    inside = measured.seconds
    layer(x)
    assert measured.seconds == inside > 0


# --- the comparison ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The result for a tiny Llama in torch and with packed weights."""
    directory = tmp_path_factory.mktemp("target")
    stock = tiny_model("llama", eos_token_id=None)
    stock.save_pretrained(directory)
    packed = AutoModelForCausalLM.from_pretrained(directory, quantization_config=CpuWeights("int8"))
    torch.manual_seed(7)
    draft = DovetailDraft.for_target(stock)
    contenders = [
        Contender("torch, dovetail", stock, copy.deepcopy(draft), None, linear_bytes(stock), "float"),
        Contender("packed int8", packed, copy.deepcopy(draft), None, linear_bytes(packed), "int8"),
        Contender("unknown", stock, copy.deepcopy(draft), None, None, None),
    ]
    calls = []

    def limits(found):
        calls.append(found)
        return LIMITS

    options = dict(context=5, repeats=2, row_counts=(1, 3), measure_limits=limits)
    result = compare_engines(contenders, stock, [prompt(9)], GREEDY, kernels=library() or Clock(), **options)
    assert len(calls) == 2, "the machine is measured before the passes and after them"
    return result


def test_every_engine_has_its_passes_and_texts(compared):
    names = ["torch, dovetail", "packed int8", "unknown"]
    assert list(compared.passes.pass_ms) == ["torch", *names]
    assert all(list(ms) == [1, 3] and min(ms.values()) > 0 for ms in compared.passes.pass_ms.values())
    assert list(compared.texts) == names and compared.differences == 0
    assert all(text.new_tokens == 6 for text in compared.texts.values())
    assert list(compared.floors) == names[:2]


@pytest.mark.usefixtures("kernels")
def test_the_rest_of_a_pass_is_what_the_kernels_leave(compared):
    passes = compared.passes
    assert list(passes.kernels_ms) == list(passes.other_ms) == ["packed int8"]
    for rows, whole in passes.pass_ms["packed int8"].items():  # medians of two passes are means
        assert passes.kernels_ms["packed int8"][rows] + passes.other_ms["packed int8"][rows] == pytest.approx(whole)


def test_floors_come_from_the_weights(compared):
    llama = tiny_model("llama", eos_token_id=None)
    numbers = sum(p.numel() for name, p in llama.named_parameters() if name.endswith(("proj.weight", "head.weight")))
    assert compared.multiply_adds == linear_numbers(llama) == numbers
    assert linear_bytes(llama) == 4 * numbers
    assert compared.floors["torch, dovetail"].memory_ms == pytest.approx(1e3 * 4 * numbers / 20e9)
    assert compared.floors["packed int8"].arithmetic_ms[3] == pytest.approx(1e3 * 3 * numbers / 100e9)


def test_tables(compared):
    text = compared.table()
    lines = text.splitlines()
    assert lines[0] == "read bandwidth: 20.0 GB/s"
    titles = [line.split("|")[1].strip() for before, line in pairwise(lines) if not before]
    assert titles[0] == "ms per pass, 5 tokens of context"
    assert titles[1] == "times the floor (m: memory, a: arithmetic)"
    assert titles[-1] == "engine"
    assert "V(3)/V(1)" in text and "1 of 1 identical" in text
    for table in text.split("\n\n")[1:]:
        assert len({len(line) for line in table.splitlines()}) == 1
    assert aligned([["a", "bcd"], ["ef", "g"]]).splitlines() == ["| a  | bcd |", "|----|-----|", "| ef | g   |"]


def test_the_line_of_json(compared):
    line = json.loads(compared.json_line())
    assert line["passes"]["pass_ms"]["packed int8"].keys() == {"1", "3"}
    assert line["roofline"]["read_bytes_per_s"] == 20e9
    assert line["floors"]["packed int8"].keys() == {"memory_ms", "arithmetic_ms"}
    assert line["texts"]["unknown"]["prompts"] == 1
    assert line.keys() >= {"command", "git", "versions", "machine", "context", "multiply_adds"}


def test_the_picture(compared, tmp_path):
    passes, speeds = engines_plot.picture(compared).axes
    labels = [text.get_text() for text in passes.get_legend().get_texts()]
    assert labels == list(compared.passes.pass_ms)
    assert len(passes.lines) == len(labels) + len(compared.floors)
    assert list(passes.lines[0].get_ydata()) == list(compared.passes.pass_ms["torch"].values())
    widths = [bar.get_width() for bar in speeds.patches]
    texts = compared.texts.values()
    assert widths == [t.plain_tokens_per_s for t in texts] + [t.draft_tokens_per_s for t in texts]
    engines_plot.draw(tmp_path / "e.svg", compared)
    assert (tmp_path / "e.svg").stat().st_size > 1000


# --- llama.cpp ---------------------------------------------------------------------------------------


class Server:
    """Answers requests as llama.cpp does: only the tokens behind the common beginning with the last request are run."""

    def __init__(self, settings):
        assert settings.model.path.endswith("target.gguf") and settings.n_ctx >= 20 + max(ROWS)
        self.held = []

    def handle_completions(self, request):
        tokens, held = request["prompt"], self.held if request["cache_prompt"] else []
        if len(tokens) > 100:
            return {"error": "too long"}
        common = 0
        while common < min(len(tokens), len(held)) and tokens[common] == held[common]:
            common += 1
        self.held, run = tokens, len(tokens) - common
        times = {"prompt_n": run, "prompt_ms": 2.0 * run, "predicted_n": request["n_predict"], "predicted_ms": 500.0}
        return {"timings": times}


@pytest.fixture
def llamacpp(monkeypatch, tmp_path):
    """llama.cpp with a stand-in for its library."""
    part = SimpleNamespace
    library = ModuleType("xllamacpp")
    library.CommonParams = lambda: part(model=part(), cpuparams=part(), cpuparams_batch=part())
    library.Server, library.__spec__ = Server, importlib.machinery.ModuleSpec("xllamacpp", None)
    monkeypatch.setitem(sys.modules, "xllamacpp", library)
    (tmp_path / "target.gguf").write_bytes(bytes(1000))
    return lambda: LlamaCpp("llama.cpp", tmp_path / "target.gguf", tiny_model("llama").config, most_tokens=20)


def test_llamacpp_runs_every_row_of_a_pass(llamacpp):
    timed = llamacpp().pass_behind(torch.arange(5, 13)[None])
    assert [timed(rows) for rows in (1, 4, 1, 8, 32)] == [0.002, 0.008, 0.002, 0.016, 0.064]


def test_llamacpp_generates_without_what_it_holds(llamacpp):
    engine = llamacpp()
    for _ in range(2):
        run = engine.generate(prompt(10), 6)
        assert (run.tokens, run.seconds) == (6, 0.52)
    with pytest.raises(InputError, match="refuses a request of 101 tokens"):
        engine.generate(prompt(101), 6)


def test_llamacpp_takes_part_without_a_draft(llamacpp):
    stock = tiny_model("llama", eos_token_id=None)
    contender = Contender("torch, dovetail", stock, DovetailDraft.for_target(stock), None, None, None)
    options = dict(context=5, repeats=1, row_counts=(1, 3), measure_limits=lambda _: LIMITS, others=[llamacpp()])
    result = compare_engines([contender], stock, [prompt(10)], GREEDY, kernels=Clock(), **options)
    assert result.passes.pass_ms["llama.cpp"] == {1: 2.0, 3: 6.0}
    assert result.plain_tokens_per_s == {"llama.cpp": pytest.approx(6 / 0.52)}
    assert result.floors["llama.cpp"].memory_ms == pytest.approx(1e3 * 1000 / 20e9)
    (row,) = [line for line in result.table().splitlines() if line.startswith("| llama.cpp") and "| - " in line]
    assert [cell.strip() for cell in row.split("|")[2:5]] == ["-", "11.5", "-"]


def test_llamacpp_says_what_is_missing(llamacpp, monkeypatch, tmp_path):
    (tmp_path / "target.gguf").unlink()
    with pytest.raises(InputError, match="there is no such file"):
        llamacpp()
    with pytest.raises(ValueError, match="leave out budget"):
        loading.llamacpp_engine("a", {"dir": "a.gguf", "budget": "4/3/1"}, None, 8)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install xllamacpp"):
        llamacpp()


def test_experts_are_in_no_floor(tmp_path):
    """A pass reads the experts that its rows choose. In torch they are parameters, packed they are layers."""
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=CpuWeights("int8"))
    assert linear_numbers(packed) == linear_numbers(model)
    assert linear_bytes(packed) < linear_bytes(model)


# --- memory ------------------------------------------------------------------------------------------


def _bytes(tensor):
    return tensor.nbytes if tensor.layout != torch.strided else tensor.untyped_storage().nbytes()


def test_bytes_of_packed_weights_are_those_of_a_loaded_model(tmp_path):
    for tied in (False, True):
        model = tiny_model("llama", eos_token_id=None, tie_word_embeddings=tied)
        model.save_pretrained(tmp_path)
        parts = engines_bytes(model.config, dtype="auto", kinds=["int4"], exported={}, draft_bytes=50, context=10)
        for kind in WEIGHTS:
            of_kind = engines_bytes(model.config, dtype="auto", kinds=[kind], exported={}, draft_bytes=50, context=10)
            packed = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=CpuWeights(kind))
            held = sum(_bytes(tensor) for tensor in (*packed.parameters(), *packed.buffers()))
            assert of_kind[kind] == pytest.approx(held, rel=0.1)
        assert parts["torch"] >= sum(p.nbytes for p in model.parameters())
        packed = int(50 / 4 * (bytes_per_weight("int8") + bytes_per_weight("int4")))
        assert parts["drafts"] == 2 * 50 + packed + model.lm_head.weight.nbytes


def test_what_does_not_fit_is_refused_with_its_bytes(monkeypatch):
    monkeypatch.setattr(machine, "available_bytes", lambda: 3000)
    refuse_without_memory({"torch": 2000, "int8": 1000})
    with pytest.raises(InputError, match=r"takes 3001 bytes \(torch 2.0 KiB, int8 1.0 KiB\), and 3000 bytes"):
        refuse_without_memory({"torch": 2000, "int8": 1001})


def test_bytes_of_exported_weights(tmp_path):
    for name, size in (("openvino_model.bin", 7), ("openvino_model.xml", 100), ("model.onnx", 20)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert exported_bytes(tmp_path) == 27
