"""The CPU kernels against slow references, on every set of instructions that this CPU has, and a layer made of them."""

import copy
import io
import pickle
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gguf_files import random_blocks

from dovetail_plugin.errors import InputError
from dovetail_plugin.kernels import FORMATS, KINDS
from dovetail_plugin.kernels import library as module
from dovetail_plugin.kernels.gguf_blocks import repack
from dovetail_plugin.kernels.library import BLOCK, GROUP, SCALES_OF_BLOCKS, WIDE, KernelError, Library, library
from dovetail_plugin.kernels.linear import PackedLinear
from dovetail_plugin.kernels.packing import HUGE_PAGE, pack, packed_bytes, unpack

pytestmark = pytest.mark.one_environment("depends on neither transformers nor an engine")

SOURCES = Path(module.__file__).parent / "c-src"


def packed_at_random(outputs: int, inputs: int, kind: str) -> torch.Tensor:
    """Return packed weights of any format; the seed is torch's."""
    if kind in KINDS:
        return pack(torch.randn(outputs, inputs), kind)
    return repack(random_blocks(kind.upper(), outputs, inputs), kind.upper())


def quantized(x: torch.Tensor, kind: str) -> torch.Tensor:
    """Return what the kernels make of activations (N, K), as float64."""
    inputs = x.shape[1]
    groups = F.pad(x.double(), (0, -inputs % GROUP)).unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True) / (32767 if kind in WIDE else 127)
    numbers = torch.where(scale > 0, groups / scale.clamp_min(1e-300), 0).round()
    return (numbers * scale).flatten(1)[:, :inputs]


@settings(max_examples=60, deadline=None)
@given(
    outputs=st.integers(1, 70),
    inputs=st.integers(1, 200),
    rows=st.integers(1, 64),
    kind=st.sampled_from(FORMATS),
    seed=st.integers(0, 1000),
    with_bias=st.booleans(),
)
def test_every_kernel_gives_the_product_and_the_same_bits(outputs, inputs, rows, kind, seed, with_bias):
    found = library()
    if found is None:
        pytest.skip("this CPU has no AVX2, or there is no compiler")
    torch.manual_seed(seed)
    inputs = (inputs + 66) // 67 * BLOCK if kind in SCALES_OF_BLOCKS else inputs
    x, bias = torch.randn(rows, inputs) * torch.logspace(-3, 3, rows)[:, None], torch.randn(outputs)
    bias = bias if with_bias else None
    packed = packed_at_random(outputs, inputs, kind)
    weight = unpack(packed, outputs, inputs, kind)
    exact = quantized(x, kind) @ weight.double().T + (0 if bias is None else bias)
    first, before = None, found.instructions
    try:
        for instructions in found.available:
            found.instructions = instructions
            out = found.linear(x, packed, outputs, kind, bias)
            size = (x.abs() @ weight.abs().T).double() + (1e-30 if bias is None else bias.abs())
            # Numbers on the edge between two may be rounded to either in float32.
            assert ((out - exact).abs() / size).max() < (1e-4 if kind in WIDE else 5e-3)
            first = out if first is None else first
            assert torch.equal(out, first), instructions
            alone = torch.cat([found.linear(row[None], packed, outputs, kind, bias) for row in x])
            assert torch.equal(out, alone), "a row depends on other rows"
    finally:
        found.instructions = before


@pytest.mark.parametrize("kind", FORMATS)
def test_threads_do_not_change_a_bit(kernels, kind):
    torch.manual_seed(0)
    packed, x = packed_at_random(1000, 512, kind), torch.randn(5, 512)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(kernels.linear(x, packed, 1000, kind))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found)
    with ThreadPoolExecutor(4) as pool:
        several = list(pool.map(lambda _: kernels.linear(x, packed, 1000, kind), range(40)))
    assert all(torch.equal(one, found[0]) for one in several)


def test_work_is_done_in_the_threads_of_torch(kernels):
    assert kernels.threaded
    threads = lambda: len(list(Path("/proc/self/task").iterdir()))  # noqa: E731
    torch.randn(512, 512) @ torch.randn(512, 512)
    packed, x = pack(torch.randn(2000, 512), "int8"), torch.randn(8, 512)
    torch.randn(1 << 20).exp()  # torch's threads exist
    before = threads()
    kernels.linear(x, packed, 2000, "int8")
    assert threads() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", FORMATS)
def test_half_precision_is_rounded_once(kernels, kind, dtype):
    torch.manual_seed(0)
    packed, x, bias = packed_at_random(50, 256, kind), torch.randn(3, 256).to(dtype), torch.randn(50).to(dtype)
    wide = kernels.linear(x.float(), packed, 50, kind, bias.float())
    assert torch.equal(kernels.linear(x, packed, 50, kind, bias), wide.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FORMATS)
def test_numbers_that_are_not_finite_stay_in_their_row(kernels, kind, dtype):
    torch.manual_seed(0)
    inputs = 256 if kind in SCALES_OF_BLOCKS else 70
    packed, x = packed_at_random(20, inputs, kind), torch.randn(4, inputs).to(dtype)
    right = kernels.linear(x, packed, 20, kind)
    x[1, 3], x[2, 65] = torch.nan, torch.inf
    out = kernels.linear(x, packed, 20, kind)
    assert torch.equal(out[[0, 3]], right[[0, 3]])
    assert not out[[1, 2]].isfinite().any()


def test_zeros_and_tiny_numbers_give_zeros(kernels):
    for kind in FORMATS:
        x = torch.zeros(3, 256)
        x[1], x[2] = 1e-42, 1e-31
        assert torch.equal(kernels.linear(x, packed_at_random(20, 256, kind), 20, kind), torch.zeros(3, 20))
    packed = pack(torch.randn(20, 64), "int8")
    assert torch.equal(
        kernels.linear(torch.ones(1, 64), pack(torch.zeros(20, 64), "int4"), 20, "int4")[0], torch.zeros(20)
    )
    assert kernels.linear(torch.ones(0, 64), packed, 20, "int8").shape == (0, 20)


def test_the_library_refuses_what_does_not_fit(kernels):
    packed = pack(torch.randn(16, 32), "int4")
    for wrong in (packed[:-1], pack(torch.randn(16, 64), "int4"), pack(torch.randn(16, 32), "int8")):
        with pytest.raises(ValueError, match="16 x 32"):
            kernels.linear(torch.randn(1, 32), wrong, 16, "int4")
    with pytest.raises(ValueError, match="16 x 32"):
        kernels.linear(torch.randn(1, 32), packed, 16, "int4", torch.randn(8))
    with pytest.raises(ValueError, match="multiple of 256 inputs, got 128"):
        kernels.linear(torch.randn(1, 128), packed_at_random(16, 256, "q4_k"), 16, "q4_k")
    with pytest.raises(KernelError, match="int4"):
        kernels.linear(torch.randn(1, 0), packed[:0], 16, "int4")


@pytest.mark.parametrize("kind", ["q4_k", "q6_k"])
def test_no_weights_are_quantized_to_the_formats_of_files(kind):
    with pytest.raises(InputError, match="int8, int4"):
        pack(torch.randn(16, 256), kind)


@pytest.mark.parametrize(("kind", "largest"), [("int8", 0.5 / 127), ("int4", 0.2)])
def test_packed_weights_are_near_the_weights(kind, largest):
    torch.manual_seed(0)
    weight = torch.randn(4100, 77)  # more than is packed at a time
    packed = pack(weight, kind)
    assert packed.dtype == torch.uint8 and packed.shape == (packed_bytes(4100, 77, kind),)
    error = F.pad((unpack(packed, 4100, 77, kind) - weight).abs(), (0, -77 % GROUP)).unflatten(1, (-1, GROUP))
    scale = F.pad(weight.abs(), (0, -77 % GROUP)).unflatten(1, (-1, GROUP)).amax(-1)
    assert (error.amax(-1) / scale).max() < 1.01 * largest


@pytest.mark.parametrize("kind", KINDS)
def test_packing_again_changes_nothing(kind):
    weight = unpack(pack(torch.randn(33, 65), kind), 33, 65, kind)
    assert torch.allclose(unpack(pack(weight, kind), 33, 65, kind), weight, rtol=2e-3 if kind == "int8" else 0.2)


def test_int4_tries_scales(monkeypatch):
    torch.manual_seed(0)
    weight = torch.randn(64, 256)
    error = lambda: (unpack(pack(weight, "int4"), 64, 256, "int4") - weight).square().mean()  # noqa: E731
    with_candidates = error()
    monkeypatch.setattr("dovetail_plugin.kernels.packing.CANDIDATES", ())
    assert with_candidates < 0.95 * error()


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 1e30])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_have_no_scale_are_refused(kind, value):
    weight = torch.randn(20, 40)
    weight[3, 4] = value
    with pytest.raises(InputError, match="infinite"):
        pack(weight, kind)


# --- the layer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_the_linear_layer_with_its_unpacked_weights(kernels, kind, bias):
    torch.manual_seed(0)
    linear = torch.nn.Linear(100, 37, bias=bias).requires_grad_(False)
    packed = PackedLinear.of(linear, kind)
    x = torch.randn(2, 3, 100)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        out = packed(x.to(dtype))
        assert out.dtype == dtype and out.shape == (2, 3, 37)
        assert (out.float() - F.linear(x, packed.unpacked(), linear.bias)).abs().max() < 0.05
    assert torch.equal(packed(x.transpose(0, 1)), packed(x).transpose(0, 1))
    assert kind in repr(packed) and packed.is_packed
    for copied in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(copied(x), packed(x))


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_library_torch_multiplies(kernels, kind, monkeypatch):
    packed = PackedLinear.of(torch.nn.Linear(100, 37).requires_grad_(False), kind)
    x = torch.randn(4, 100)
    right = packed(x)
    monkeypatch.setattr("dovetail_plugin.kernels.linear.library", lambda: None)
    assert (packed(x) - right).abs().max() < 0.05


def test_gradients_go_through(kernels):
    packed = PackedLinear.of(torch.nn.Linear(32, 8).requires_grad_(False), "int8")
    x = torch.randn(2, 32, requires_grad=True)
    packed(x).sum().backward()
    assert torch.allclose(x.grad, packed.unpacked().sum(0).expand(2, -1))


def test_a_layer_says_what_is_wrong():
    with pytest.raises(InputError, match="int8, int4"):
        PackedLinear(4, 4, bias=False, kind="int5")
    with pytest.raises(InputError, match=r"are 2368 bytes, got \(2367,\)"):
        PackedLinear(256, 9, bias=False, kind="q4_k").take_(torch.zeros(2367, dtype=torch.uint8), torch.float32)
    packed = PackedLinear.of(torch.nn.Linear(32, 8).requires_grad_(False), "int8")
    with pytest.raises(InputError, match="32"):
        packed(torch.randn(2, 64))
    with pytest.raises(TypeError, match="uint8"):
        packed(torch.ones(2, 32, dtype=torch.uint8))
    with pytest.raises(InputError, match=r"are \(8, 31\), and the config says \(8, 32\)"):
        packed.pack_(torch.randn(8, 31))


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_keeps_dtype_and_shape_of_its_weights_without_memory(kind):
    packed = PackedLinear.of(torch.nn.Linear(100, 37).requires_grad_(False), kind)
    x = torch.randn(2, 100)
    right = packed(x)
    for same in (packed, copy.deepcopy(packed), packed.to(torch.float32), packed.to("cpu"), packed.eval()):
        assert same.weight.shape == (37, 100) and same.weight.untyped_storage().nbytes() == 4
        assert torch.equal(same(x), right)
    assert packed.packed_weight.dtype == torch.uint8
    assert sum(parameter.numel() for parameter in packed.parameters()) == 37 * 100 + 37
    packed.to(torch.bfloat16)
    assert packed.weight.dtype == packed.bias.dtype == torch.bfloat16 and packed.weight.untyped_storage().nbytes() == 2
    assert (packed(x) - right).abs().max() < 0.05
    meta = copy.deepcopy(packed).to("meta")
    assert meta.packed_weight.is_meta


@pytest.mark.parametrize("asked", ["torch.compiler.is_compiling", "torch.jit.is_tracing"])
def test_traces_and_compiled_graphs_multiply_in_torch(kernels, monkeypatch, asked):
    """There the result of a call to the library would be a constant."""
    packed = PackedLinear.of(torch.nn.Linear(100, 37).requires_grad_(False), "int8")
    x = torch.randn(2, 100)
    monkeypatch.setattr(asked, lambda: True)
    assert torch.equal(packed(x), F.linear(x, packed.unpacked(), packed.bias))


# --- the library -----------------------------------------------------------------------------------


def test_a_missing_or_broken_library_is_said_once(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(module, "__file__", str(tmp_path / "library.py"))
    assert library.__wrapped__() is None
    assert "install GCC 11" in caplog.text
    (tmp_path / "_library.so").write_bytes(b"no library")
    caplog.clear()
    assert library.__wrapped__() is None
    assert "slower" in caplog.text
    assert library() is library(), "the answer is kept"


def test_weights_in_huge_pages_are_tensors_like_others():
    weight = torch.randn(1040, 2112)
    packed = pack(weight, "int8")
    assert packed.nbytes > HUGE_PAGE
    with io.BytesIO() as file:
        torch.save(packed, file)
        file.seek(0)
        loaded = torch.load(file)
    numbers = unpack(packed, 1040, 2112, "int8")
    for copied in (loaded, packed.clone(), copy.deepcopy(packed)):
        assert torch.equal(unpack(copied, 1040, 2112, "int8"), numbers)
    view, first = packed[:64], packed[:64].tolist()
    del packed, copied
    assert view.tolist() == first, "a view keeps the memory"


def test_a_cpu_without_avx2_is_refused(kernels, monkeypatch):
    class Old:
        def dovetail_interface(self):
            return 1

        def dovetail_instructions(self):
            return 0

    monkeypatch.setattr(module.ctypes, "CDLL", lambda *_: Old())
    monkeypatch.setattr(module, "INTERFACE", 1)
    with pytest.raises(KernelError, match="AVX2"):
        Library(Path("any"))
    monkeypatch.setattr(module, "INTERFACE", 2)
    with pytest.raises(KernelError, match="other sources"):
        Library(Path("any"))


def test_the_kernels_pass_the_sanitizers(kernels, tmp_path):
    program = tmp_path / "sanitized"
    driver = Path(__file__).parent / "support" / "kernels_sanitized.c"
    flags = ["-O1", "-g", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined"]
    command = [
        "gcc",
        *flags,
        "-fno-sanitize-recover=all",
        str(driver),
        *map(str, SOURCES.glob("*.c")),
        "-o",
        str(program),
    ]
    subprocess.run(command, check=True)
    ran = subprocess.run([program], check=True, capture_output=True, text=True)
    assert int(ran.stdout) >= (7 * 2 + 2) * 3 * len(kernels.available)
