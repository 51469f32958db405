"""Triton kernels, imported where the operations that they are registered for run them."""
