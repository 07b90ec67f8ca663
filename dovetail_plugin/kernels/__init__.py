"""Products with packed weights on a CPU: the C library, packing, and the linear layer made of both."""

KINDS = ("int8", "int4")
"""Kinds of packed weights, by their number in the library. This file loads no torch, for the command line."""
