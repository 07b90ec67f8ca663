"""Attention and activations of the CPU kernels: right, and a row has the same bits whatever is computed beside it."""

import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail_plugin.kernels import library as module
from dovetail_plugin.kernels.library import ACTIVATIONS, KernelError, library

pytestmark = pytest.mark.one_environment("depends on neither transformers nor an engine")

SOURCES = Path(module.__file__).parent / "c-src"


def attention_ref(q, k, v, mask, scale, softcap=0.0, sinks=None):
    """(N, H, E) float64. `mask` is (N, L), bool or additive."""
    group = q.shape[0] // k.shape[0]
    q, k, v = q.double(), k.double().repeat_interleave(group, 0), v.double().repeat_interleave(group, 0)
    scores = q @ k.transpose(1, 2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, q.shape[1], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : k.shape[1]].nan_to_num(0)  # rows that see nothing
    return (weights @ v).transpose(0, 1)


def random_mask(kind: str, rows: int, cached: int) -> torch.Tensor:
    """(rows, cached) bool. The last `rows` keys are those of the rows themselves, which each row sees its own of."""
    own = torch.arange(cached - rows, cached)
    mask = torch.ones(rows, cached, dtype=torch.bool).tril(cached - rows)
    if kind == "tree":
        parents = [-1] + [int(torch.randint(0, node, ())) for node in range(1, rows)]
        mask[:, cached - rows :] = False
        for node, parent in enumerate(parents):
            if parent >= 0:
                mask[node, cached - rows :] = mask[parent, cached - rows :]
            mask[node, cached - rows + node] = True
    elif kind == "window":
        mask = mask.triu(cached - rows - int(torch.randint(1, cached + 1, ())))
    elif kind == "holes":
        mask &= torch.rand(cached) < 0.7
    elif kind == "random":
        mask = torch.rand(rows, cached) < torch.rand(())
    mask[torch.arange(rows), own] = True
    return mask


def assert_rows_stand_alone(kernels, out, q, k, v, mask, **options):
    """A row gives the same bits alone, over a cache that holds the keys that it sees and no others."""
    for row in {0, len(out) // 2, len(out) - 1}:
        seen = mask[row].nonzero()[:, 0]
        alone = kernels.attention(q[:, row : row + 1], k[:, seen], v[:, seen], **options)
        assert torch.equal(alone[0], out[row]), row


@settings(max_examples=120, deadline=None)
@given(
    rows=st.integers(1, 70),
    before=st.integers(0, 700),
    key_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 4, 7, 8]),
    size=st.sampled_from([1, 5, 8, 32, 64, 72, 128]),
    value_size=st.sampled_from([3, 16, 64, 80]),
    kind=st.sampled_from(["chain", "tree", "window", "holes", "random"]),
    seed=st.integers(0, 1000),
)
def test_attention_is_right_and_exact(rows, before, key_heads, group, size, value_size, kind, seed):
    found = library()
    if found is None:
        pytest.skip("this CPU has no AVX2, or there is no compiler")
    torch.manual_seed(seed)
    cached, options = before + rows, {"scale": size**-0.5}
    q = torch.randn(key_heads * group, rows, size)
    k, v = torch.randn(key_heads, cached, size), torch.randn(key_heads, cached, value_size)
    mask = random_mask(kind, rows, cached)
    instructions, threads, outs = found.instructions, torch.get_num_threads(), []
    try:
        for number, one in enumerate((*found.available, found.available[0])):
            found.instructions = one
            torch.set_num_threads(1 + number)
            outs.append(found.attention(q, k, v, mask, **options))
    finally:
        found.instructions = instructions
        torch.set_num_threads(threads)
    assert (outs[0] - attention_ref(q, k, v, mask, **options)).abs().max() < 1e-5
    assert all(torch.equal(out, outs[0]) for out in outs), "instructions or threads change a bit"
    assert_rows_stand_alone(found, outs[0], q, k, v, mask, **options)
    places = torch.randperm(2 * cached)[:cached].sort().values  # among slots that nobody sees
    far_k, far_v = (torch.full((key_heads, 2 * cached, x.shape[2]), torch.nan).index_copy(1, places, x) for x in (k, v))
    far_mask = torch.zeros(rows, 2 * cached, dtype=torch.bool).index_copy(1, places, mask)
    assert torch.equal(found.attention(q, far_k, far_v, far_mask, **options), outs[0]), "the slot of a key matters"


@pytest.mark.parametrize("size", [256, 512])
def test_large_heads_and_more_keys_than_rows_have_room_for(kernels, size):
    """The rows are computed in parts, because the sums of all of them would take too much memory."""
    torch.manual_seed(0)
    rows, cached = 40, 3000
    q, k, v = torch.randn(64, rows, size), torch.randn(1, cached, size), torch.randn(1, cached, size)
    mask = random_mask("random", rows, cached)
    mask[:, :300] = True
    out = kernels.attention(q, k, v, mask, scale=0.05)
    assert (out - attention_ref(q, k, v, mask, 0.05)).abs().max() < 1e-5
    assert_rows_stand_alone(kernels, out, q, k, v, mask, scale=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [64, 20])
def test_half_precision_is_rounded_once(kernels, dtype, size):
    torch.manual_seed(0)
    q, k, v = (torch.randn(heads, rows, size).to(dtype) for heads, rows in ((6, 9), (2, 400), (2, 400)))
    mask = random_mask("tree", 9, 400)
    wide = kernels.attention(q.float(), k.float(), v.float(), mask, scale=0.2)
    assert torch.equal(kernels.attention(q, k, v, mask, scale=0.2), wide.to(dtype))


@pytest.mark.parametrize("kind", ["chain", "tree", "window"])
def test_rows_of_a_cache_with_reserved_rows(kernels, kind):
    """Queries, keys and values are views, as models and caches make them."""
    torch.manual_seed(0)
    rows, cached = 12, 290
    q, buffer = torch.randn(rows, 8, 32).transpose(0, 1), torch.full((2, 2, 600, 32), torch.nan)
    buffer[:, :, 7 : 7 + cached] = torch.randn(2, 2, cached, 32)
    k, v = buffer[:, :, 7 : 7 + cached]
    mask = torch.zeros(rows, 400, dtype=torch.bool)[:, 50 : 50 + cached].copy_(random_mask(kind, rows, cached))
    out = kernels.attention(q, k, v, mask, scale=0.2)
    assert (out - attention_ref(q, k, v, mask, 0.2)).abs().max() < 1e-5
    assert torch.equal(out, kernels.attention(*(x.contiguous() for x in (q, k, v, mask)), scale=0.2))


def test_without_a_mask(kernels):
    torch.manual_seed(0)
    q, k, v = torch.randn(4, 9, 16), torch.randn(2, 300, 16), torch.randn(2, 300, 16)
    for causal in (False, True):
        mask = torch.ones(9, 300, dtype=torch.bool).tril(291 if causal else 300)
        out = kernels.attention(q, k, v, scale=0.25, causal=causal)
        assert torch.equal(out, kernels.attention(q, k, v, mask, scale=0.25))
    short = torch.ones(9, 4, dtype=torch.bool).tril(-5)
    assert torch.equal(
        kernels.attention(q, k[:, :4], v[:, :4], scale=0.25, causal=True),
        kernels.attention(q, k[:, :4], v[:, :4], short, scale=0.25),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masks_of_numbers(kernels, dtype):
    torch.manual_seed(0)
    rows, cached = 11, 333
    q, k, v = torch.randn(4, rows, 16), torch.randn(2, cached, 16), torch.randn(2, cached, 16)
    seen = random_mask("tree", rows, cached)
    hidden = torch.zeros(rows, cached, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    assert torch.equal(kernels.attention(q, k, v, hidden, scale=0.25), kernels.attention(q, k, v, seen, scale=0.25))
    added = torch.randn(rows, cached).to(dtype).masked_fill(~seen, -torch.inf)
    out = kernels.attention(q, k, v, added, scale=0.25)
    assert (out - attention_ref(q, k, v, added, 0.25)).abs().max() < 1e-5
    for row in (0, 10):
        keys = seen[row].nonzero()[:, 0]
        alone = kernels.attention(q[:, row : row + 1], k[:, keys], v[:, keys], added[row : row + 1, keys], scale=0.25)
        assert torch.equal(alone[0], out[row])


def test_softcap_and_sinks(kernels):
    torch.manual_seed(0)
    q, k, v = 9 * torch.randn(6, 10, 16), torch.randn(2, 300, 16), torch.randn(2, 300, 16)
    mask, sinks = random_mask("tree", 10, 300), 30 + 5 * torch.randn(6)
    for options in ({"softcap": 2.0}, {"sinks": sinks}, {"softcap": 50.0, "sinks": sinks}):
        out = kernels.attention(q, k, v, mask, scale=0.3, **options)
        assert (out - attention_ref(q, k, v, mask, 0.3, **options)).abs().max() < 2e-5
        assert (out - kernels.attention(q, k, v, mask, scale=0.3)).abs().max() > 1e-3
        assert_rows_stand_alone(kernels, out, q, k, v, mask, scale=0.3, **options)


def test_numbers_that_are_not_finite_stay_in_the_rows_that_see_them(kernels):
    torch.manual_seed(0)
    q, k, v = torch.randn(4, 6, 16), torch.randn(2, 280, 16), torch.randn(2, 280, 16)
    mask = random_mask("tree", 6, 280)
    mask[:, 100:103], mask[0, 100], mask[1, 101], mask[2, 102] = False, True, True, True
    right = kernels.attention(q, k, v, mask, scale=0.25)
    k[:, 100], v[:, 101], k[:, 102] = torch.nan, torch.nan, torch.inf
    out = kernels.attention(q, k, v, mask, scale=0.25)
    assert torch.equal(out[3:], right[3:])
    assert not out[0].isfinite().any() and not out[1].isfinite().any()


def test_rows_that_see_nothing_are_zeros(kernels):
    q, k, v = torch.randn(2, 3, 16), torch.randn(2, 20, 16), torch.randn(2, 20, 16)
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[1] = False
    out = kernels.attention(q, k, v, mask, scale=0.25)
    assert not out[1].any() and out[[0, 2]].all()
    assert not kernels.attention(q, k, v, torch.zeros_like(mask), scale=0.25).any()
    assert kernels.attention(q[:, :0], k, v, scale=0.25).shape == (0, 2, 16)


def test_large_scores(kernels):
    q, k, v = torch.full((1, 1, 4), 1e4), torch.eye(4)[None] * 1e4, torch.eye(4)[None]
    assert torch.allclose(kernels.attention(q, k, v, scale=1.0), torch.full((1, 1, 4), 0.25))
    k[0, 2] *= 2
    assert torch.equal(kernels.attention(q, k, v, scale=1.0), v[None, None, 0, 2])


def test_what_the_library_refuses(kernels):
    q, k, v = torch.randn(2, 3, 16), torch.randn(2, 20, 16), torch.randn(2, 20, 16)
    for wrong in ((q[:1], k, v), (torch.randn(2, 3, 513), torch.randn(2, 20, 513), v), (q, k[:, :0], v[:, :0])):
        with pytest.raises(KernelError, match="3 rows over"):
            kernels.attention(*wrong, scale=1.0)


# --- activations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(kernels, activation, dtype):
    torch.manual_seed(0)
    x = torch.cat([torch.linspace(-60, 60, 5001), torch.randn(2000), torch.tensor([0.0, torch.inf])]).to(dtype)
    exact = F.silu(x.double()) if activation == "silu" else F.gelu(x.double(), approximate="tanh")
    out = kernels.activate(x, activation)
    error = (out.double() - exact).abs()[:-1]
    assert (error <= exact.abs()[:-1] * torch.finfo(dtype).eps + 3e-7).all() and out[-1] == torch.inf
    assert kernels.activate(torch.tensor([torch.nan], dtype=dtype), activation).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_place_of_a_number_does_not_change_its_activation(kernels, activation, dtype):
    torch.manual_seed(0)
    x = torch.randn(13, 4099).to(dtype)
    alone = torch.stack([kernels.activate(row, activation) for row in x])
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        assert torch.equal(kernels.activate(x, activation), alone)
    assert torch.equal(torch.stack([kernels.activate(one[None], activation) for one in x[0, :50]])[:, 0], alone[0, :50])


# --- the sources -----------------------------------------------------------------------------------


def test_attention_and_activations_pass_the_sanitizers(kernels, tmp_path):
    program = tmp_path / "sanitized"
    driver = Path(__file__).parent / "support" / "attention_sanitized.c"
    flags = ["-O1", "-g", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined"]
    sources = [*SOURCES.glob("attention*.c"), SOURCES / "activations.c", SOURCES / "quantize.c"]
    command = ["gcc", *flags, "-fno-sanitize-recover=all", str(driver), *map(str, sources), "-o", str(program)]
    subprocess.run(command, check=True)
    ran = subprocess.run([program], check=True, capture_output=True, text=True)
    assert int(ran.stdout) >= 6 * 3 * 6 + 3 * 29
