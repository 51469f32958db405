"""Triton kernels, imported where `moe_lm.ops.backend` says that they run."""
