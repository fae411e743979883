"""The CPU backend: loops over chunks, and the kernels that are made of them."""
