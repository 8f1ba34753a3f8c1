"""Compile the Triton kernels for GPUs without having them, and inspect the machine code."""
