"""Products with packed weights on a CPU: the C library, packing, and the linear layers made of both."""

KINDS = ("int8", "int4")
"""Kinds of packed weights that any weights can be quantized to. This file loads no torch, for the command line."""

FORMATS = (*KINDS, "q4_k", "q6_k")
"""All kinds of quantized weights, by their number in the library. The last two come from GGUF files only."""

FLOAT = "float"
"""Kind of weights that oneDNN has packed, with the numbers they have."""

WEIGHTS = (*KINDS, FLOAT)
"""All kinds of packed weights that can be asked for."""
