"""Triton kernels, one file an operator."""
