"""Products with packed weights on a CPU: the C library, packing, and the linear layer made of both."""
