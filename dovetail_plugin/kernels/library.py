"""The library of CPU kernels: finding it, what it runs on, and its functions for tensors.

The library is plain C (see c-src/) and knows neither Python nor torch, so one file serves every version of both. It
runs in the threads of torch's own OpenMP library. Threads of a second one would wait for those of torch at each step.
"""

import ctypes
import functools
import logging
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from ..errors import DovetailError
from . import FORMATS

logger = logging.getLogger(__name__)

NUMBER_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Dtype of activations and results -> its number in the library."""

INSTRUCTIONS = ("avx2", "avx_vnni", "avx512_vnni")
"""Sets of instructions by their number in the library, from slow to fast."""

MIXES = ("int8", "int4", "float")
"""Mixes of instructions by their number in the library; those of the kinds of weights, and fused multiply-adds."""

NO_MASK, CAUSAL, BOOL_MASK = -3, -2, -1
"""Masks of attention by their number in the library; others have the number of their dtype."""

ACTIVATIONS = ("silu", "gelu_tanh")
"""Activation functions by their number in the library."""

GROUP = 32
"""Inputs that share a scale."""

BLOCK = 256
"""Inputs of a block of "q4_k" and "q6_k", whose groups share scales of their scales."""

PANEL = 16
"""Outputs that are packed together."""

WIDE = ("int8", "q6_k")
"""Kinds with a byte for each weight, whose activations have 16 bits. The others have half a byte and 8 bits."""

SCALES_OF_BLOCKS = {"q4_k": 2, "q6_k": 1}
"""Kind with blocks -> half-precision numbers of each block and output."""

INTERFACE = 6
"""Number of the functions' signatures, as in c-src/kernels.h."""


def packed_bytes(outputs: int, inputs: int, kind: str) -> int:
    """Return the size of packed weights (outputs, inputs), in bytes.

    Raises:
        ValueError: `inputs` is not a multiple of 256, and the kind has blocks of 256; or it is none of `FORMATS`.
    """
    if kind not in FORMATS:
        raise ValueError(f"packed weights are {', '.join(FORMATS)}, not {kind!r}.")
    panels, groups = -(-outputs // PANEL), -(-inputs // GROUP)
    group_bytes = PANEL * (2 + (GROUP if kind in WIDE else GROUP // 2))
    if kind not in SCALES_OF_BLOCKS:
        return panels * groups * group_bytes
    if inputs % BLOCK:
        raise ValueError(f"weights in {kind} have a multiple of {BLOCK} inputs, got {inputs}.")
    return panels * groups * group_bytes + panels * (inputs // BLOCK) * PANEL * 2 * SCALES_OF_BLOCKS[kind]


def bytes_per_weight(kind: str) -> float:
    """Return the bytes of a packed weight, its share of the scales included."""
    return packed_bytes(PANEL, GROUP, kind) / (PANEL * GROUP)


class KernelError(DovetailError, RuntimeError):
    """The library of kernels refused a call."""


class Library:
    """The loaded library.

    Args:
        file: the shared object.

    Raises:
        OSError: the file cannot be loaded.
        KernelError: the file was built from other sources, or has no kernels for this CPU.

    Attributes:
        instructions: set that the kernels use, one of `available`. May be set.
        available: the sets that this CPU has, from slow to fast.
        threaded: whether it runs in torch's threads; else in the calling one.
    """

    products = ("_linear",)
    """Attributes with the functions that multiply and do not quantize. Benchmarks replace them to time them."""

    def __init__(self, file: Path) -> None:
        self._library = ctypes.CDLL(str(file))
        if self._library.dovetail_interface() != INTERFACE:
            raise KernelError("the CPU kernels were built from other sources. Install dovetail_plugin again.")
        found = self._library.dovetail_instructions()
        if not found:
            raise KernelError(
                "the CPU kernels need an x86-64 CPU with AVX2, FMA and F16C, and a build by GCC 11 or later."
            )
        self.available = tuple(name for number, name in enumerate(INSTRUCTIONS) if found >> number & 1)
        self.instructions = self.available[-1]
        pointer, size, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self._quantize = self._library.dovetail_quantize
        self._quantize.argtypes = [pointer, integer, size, size, integer, pointer, pointer, pointer, integer]
        self._linear = self._library.dovetail_linear
        self._linear.argtypes = [
            *(pointer, size, size, integer, pointer, pointer, pointer, size, pointer, pointer),
            *(integer, integer, integer),
        ]
        self._multiply, self._read = self._library.dovetail_multiply, self._library.dovetail_read
        self._multiply.argtypes, self._multiply.restype = [integer, integer, size, integer], size
        self._read.argtypes = [pointer, size, integer]
        self._attention = self._library.dovetail_attention
        self._attention.argtypes = [ctypes.POINTER(_Attention)]
        self._activate = self._library.dovetail_activate
        self._activate.argtypes = [pointer, pointer, integer, size, integer, integer]
        self._library.dovetail_use_threads.argtypes = [pointer]
        parallel = _torch_parallel_regions()
        self.threaded = parallel is not None
        self._library.dovetail_use_threads(parallel)

    def linear(self, x: Tensor, packed: Tensor, outputs: int, kind: str, bias: Tensor | None = None) -> Tensor:
        """Multiply rows with packed weights. The result of a row does not depend on other rows, to the bit.

        Args:
            x: (N, K) float32, bfloat16 or float16 on the CPU, contiguous.
            packed: what `packing.pack` made of weights (M, K).
            outputs: M.
            kind: one of `FORMATS`, the format of `packed`.
            bias: (M,) in the dtype of x, contiguous, or None.

        Returns:
            (N, M) in the dtype of x.

        Raises:
            ValueError: a tensor has another size than the others say.
            KernelError: the library refuses the call.
        """
        rows, inputs = x.shape
        if packed.numel() != packed_bytes(outputs, inputs, kind) or (bias is not None and bias.numel() != outputs):
            raise ValueError(f"packed weights or bias are not those of {outputs} x {inputs} weights in {kind}.")
        groups = -(-inputs // GROUP)
        out = torch.empty(rows, outputs, dtype=x.dtype, device="cpu")
        if not rows:
            return out
        count = groups * rows
        bytes_of_numbers = count * GROUP * (2 if kind in WIDE else 1)
        buffer = torch.empty(bytes_of_numbers + 8 * count, dtype=torch.uint8, device="cpu")
        numbers = buffer.data_ptr()
        scales, offsets = numbers + bytes_of_numbers, numbers + bytes_of_numbers + 4 * count
        type_, format_, threads = NUMBER_TYPES[x.dtype], FORMATS.index(kind), torch.get_num_threads()
        failed = self._quantize(x.data_ptr(), type_, rows, inputs, format_, numbers, scales, offsets, threads)
        failed = failed or self._linear(
            packed.data_ptr(),
            outputs,
            groups,
            format_,
            numbers,
            scales,
            offsets,
            rows,
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            type_,
            INSTRUCTIONS.index(self.instructions),
            threads,
        )
        if failed:
            raise KernelError(f"the CPU kernels refused weights in {kind} and activations in {x.dtype}.")
        return out

    def multiply(self, mix: str, instructions: str, tasks: int) -> int:
        """Multiply as fast as this CPU can, for benchmarks.

        Args:
            mix: one of `MIXES`: the instructions that a kernel needs for each number.
            instructions: one of `available`.
            tasks: 1 or more; one takes a thread some microseconds.

        Returns:
            The number of products that were added to sums.

        Raises:
            KernelError: this CPU does not have the instructions, or there are no tasks.
        """
        if instructions not in self.available:
            raise KernelError(f"this CPU has {', '.join(self.available)}, and not {instructions}.")
        numbers = MIXES.index(mix), INSTRUCTIONS.index(instructions)
        done = self._multiply(*numbers, tasks, torch.get_num_threads())
        if done < 0:
            raise KernelError(f"the number of tasks must be at least 1, got {tasks}.")
        return done

    def read(self, buffer: Tensor) -> None:
        """Read a contiguous tensor on the CPU once, in torch's threads, for benchmarks.

        Raises:
            KernelError: it is empty.
        """
        if self._read(buffer.data_ptr(), buffer.nbytes, torch.get_num_threads()):
            raise KernelError("there is nothing to read in an empty tensor.")

    def attention(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None = None,
        *,
        scale: float,
        causal: bool = False,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Compute attention of rows over cached keys. The result of a row depends on the keys that it sees, to the bit.

        Neither other rows nor masked keys, and not the places of keys in the cache, change a bit. Consecutive query
        heads share a key head.

        Args:
            queries: (H, N, D) float32, bfloat16 or float16 on the CPU, D at most 512. The numbers of a head lie
                together, here and in `keys` and `values`.
            keys: (K, L, D) in the same dtype, where K divides H.
            values: (K, L, E) in the same dtype, E at most 512.
            mask: (N, L) bool, or of a float dtype that is added to scores and whose lowest number hides a key; the
                numbers of a row lie together. Or None: each row sees all keys.
            scale: factor of the scores.
            causal: without a mask, the last row sees all keys and each row before it one less.
            softcap: the scores are c tanh(score / c); 0 for none.
            sinks: (H,) scores without a value, or None.

        Returns:
            (N, H, E) in the dtype of the queries; zeros for rows that see no key.

        Raises:
            ValueError: a tensor has another size than the others say.
            KernelError: the library refuses the call, or there is no memory.
        """
        (heads, rows, size), (key_heads, cached, value_size) = queries.shape, values.shape
        fits = keys.shape == (key_heads, cached, size) and (mask is None or mask.shape == (rows, cached))
        if not fits or (sinks is not None and sinks.numel() != heads):
            raise ValueError("keys, values, mask or sinks are not those of the same attention.")
        out = torch.empty(rows, heads, value_size, dtype=queries.dtype, device="cpu")
        if not rows:
            return out
        sinks = None if sinks is None else sinks.detach().float().contiguous()
        kind = CAUSAL if causal else NO_MASK
        if mask is not None:
            kind = BOOL_MASK if mask.dtype == torch.bool else NUMBER_TYPES[mask.dtype]
        call = _Attention(
            *(None if tensor is None else tensor.data_ptr() for tensor in (queries, keys, values, mask, sinks, out)),
            *(rows, cached, heads, key_heads, size, value_size),
            *(*queries.stride()[:2], *keys.stride()[:2], *values.stride()[:2], 0 if mask is None else mask.stride(0)),
            *(scale, softcap, NUMBER_TYPES[queries.dtype], kind),
            *(INSTRUCTIONS.index(self.instructions), torch.get_num_threads()),
        )
        failed = self._attention(ctypes.byref(call))
        if failed:
            reason = "found no memory" if failed == -2 else "refused its arguments"
            raise KernelError(f"attention of {rows} rows over {cached} keys {reason}.")
        return out

    def activate(self, x: Tensor, activation: str) -> Tensor:
        """Apply an activation function. The result of a number does not depend on where it stands, to the bit.

        Args:
            x: any shape, float32, bfloat16 or float16 on the CPU, contiguous.
            activation: one of `ACTIVATIONS`.
        """
        out = torch.empty_like(x)
        number, threads = ACTIVATIONS.index(activation), torch.get_num_threads()
        if self._activate(x.data_ptr(), out.data_ptr(), NUMBER_TYPES[x.dtype], x.numel(), number, threads):
            raise KernelError(f"the CPU kernels refused {activation} of {x.dtype}.")
        return out


class _Attention(ctypes.Structure):
    """`struct attention` in c-src/attention.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("queries", "keys", "values", "mask", "sinks", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "cached", "heads", "key_heads", "size", "value_size")),
        *((name, ctypes.c_int64) for name in ("query_head", "query_row", "key_head", "key_row")),
        *((name, ctypes.c_int64) for name in ("value_head", "value_row", "mask_row")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        *((name, ctypes.c_int32) for name in ("type", "mask_type", "instructions", "threads")),
    )


@functools.cache
def library() -> Library | None:
    """Return the library, or None if it was not built or does not run here; says so in the log, once."""
    files = sorted(Path(__file__).parent.glob("_library*.so"))
    if not files:
        logger.warning(
            "the CPU kernels of dovetail_plugin were not built, so packed weights run in torch, which is slower. They "
            "are for Linux on x86-64: install GCC 11 or later, and dovetail_plugin again."
        )
        return None
    try:
        return Library(files[0])
    except (OSError, AttributeError, KernelError) as error:
        logger.warning("packed weights run in torch, which is slower: %s", error)
        return None


def _torch_parallel_regions() -> int | None:
    """Return the address of `GOMP_parallel` in the OpenMP library that torch has loaded, or None.

    GNU's and LLVM's libraries have a function of this name with the same arguments.
    """
    if sys.platform == "win32":
        return None
    directory = Path(torch.__file__).parent / "lib"
    names = [str(file) for pattern in ("libgomp*", "libiomp5*", "libomp*") for file in directory.glob(pattern)]
    names += ["libgomp.so.1", "libiomp5.so", "libomp.so"]  # of the system, or of conda
    for name in names:
        try:  # only what is loaded already
            loaded = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
            return ctypes.cast(loaded.GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None
