"""The CUDA backend: loops over chunks as grid-stride kernels, and the simulator that stands for a device."""
