"""The library of CPU kernels: finding it, what it runs on, and its two functions for tensors.

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

INTERFACE = 3
"""Number of the functions' signatures, as in c-src/kernels.h."""


def packed_bytes(outputs: int, inputs: int, kind: str) -> int:
    """Return the size of packed weights (outputs, inputs), in bytes.

    Raises:
        ValueError: `inputs` is not a multiple of 256, and the kind has blocks of 256.
    """
    panels, groups = -(-outputs // PANEL), -(-inputs // GROUP)
    group_bytes = PANEL * (2 + (GROUP if kind in WIDE else GROUP // 2))
    if kind not in SCALES_OF_BLOCKS:
        return panels * groups * group_bytes
    if inputs % BLOCK:
        raise ValueError(f"weights in {kind} have a multiple of {BLOCK} inputs, got {inputs}.")
    return panels * groups * group_bytes + panels * (inputs // BLOCK) * PANEL * 2 * SCALES_OF_BLOCKS[kind]


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
